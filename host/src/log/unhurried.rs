//! Output for whoever must not wait for its reader: a terminal that is stopped, or a pipe that nobody empties.
//!
//! A thread writes. As long as somebody reads, a flush returns when everything is written, so that the order of what comes
//! from here and from elsewhere is kept. A reader that stops costs one flush a moment, and later ones nothing; what it does
//! not read piles up to a bound, beyond which it is left out.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What waits for a reader.
const MAX_BYTES: usize = 1 << 20;

/// How long a flush waits for a reader that it does not know to be stuck.
const PATIENCE: Duration = Duration::from_millis(500);

/// A writer whose calls return soon.
#[derive(Debug)]
pub(super) struct Unhurried {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread is writing what it took.
    is_writing: bool,
    /// A flush has waited in vain since the last write that ended.
    is_stuck: bool,
    n_left_out: usize,
    is_closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until nobody writes here any more.
    fn feed(&self, out: &mut dyn Write) {
        let mut state = self.lock();
        loop {
            while state.waiting.is_empty() {
                if state.is_closed {
                    return;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let mut taken = std::mem::take(&mut state.waiting);
            let n_left_out = std::mem::take(&mut state.n_left_out);
            if n_left_out > 0 {
                let note = format!(
                    "warning: {n_left_out} bytes of output were left out here: nobody read\n"
                );
                taken.extend_from_slice(note.as_bytes());
            }
            state.is_writing = true;
            drop(state);
            // A closed stderr is no reason to stop training.
            let _ = out.write_all(&taken).and_then(|()| out.flush());
            state = self.lock();
            state.is_writing = false;
            state.is_stuck = false;
            self.changed.notify_all();
        }
    }
}

impl Unhurried {
    /// Writes to `out`.
    pub(super) fn new(mut out: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name("output".to_owned());
        let fed = Arc::clone(&shared);
        if thread.spawn(move || fed.feed(&mut out)).is_err() {
            // Without a thread nothing would ever be written; there is nobody to tell it to.
            shared.lock().is_stuck = true;
        }
        Self { shared }
    }
}

impl Write for Unhurried {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let mut state = self.shared.lock();
        if state.waiting.len() + data.len() > MAX_BYTES {
            state.n_left_out += data.len();
        } else {
            state.waiting.extend_from_slice(data);
        }
        self.shared.changed.notify_all();
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let state = self.shared.lock();
        let is_busy =
            |state: &mut State| !state.is_stuck && (state.is_writing || !state.waiting.is_empty());
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, PATIENCE, is_busy);
        let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_stuck |= waited.timed_out();
        Ok(())
    }
}

impl Drop for Unhurried {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, pipe};

    /// More than any pipe holds.
    static LINE: [u8; 200_000] = [b'x'; 200_000];

    #[test]
    fn a_flush_returns_when_everything_is_written() {
        let (mut reader, writer) = pipe().unwrap();
        let mut out = Unhurried::new(writer);
        for text in ["first\n", "second\n"] {
            writeln!(out, "{text}").unwrap();
            out.flush().unwrap();
            assert!(!out.shared.lock().is_stuck);
        }
        drop(out);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first\n\nsecond\n\n");
    }

    #[test]
    fn a_reader_that_stops_keeps_nobody_waiting_and_learns_what_it_missed() {
        let (reader, writer) = pipe().unwrap();
        let mut out = Unhurried::new(writer);
        out.write_all(&LINE).unwrap();
        out.flush().unwrap();
        assert!(
            out.shared.lock().is_stuck,
            "it would still wait if it waited for ever"
        );
        for _ in 0..10 {
            out.write_all(&LINE).unwrap();
        }
        out.write_all(b"\n").unwrap();
        // 200,000 bytes are with the pipe, five times as many wait, and the rest is too much.
        assert_eq!(out.shared.lock().n_left_out, 5 * LINE.len());
        drop(out);
        let mut lines = BufReader::new(reader).split(b'\n');
        assert_eq!(lines.next().unwrap().unwrap().len(), 6 * LINE.len());
        let note = String::from_utf8(lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(
            note,
            "warning: 1000000 bytes of output were left out here: nobody read"
        );
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut out = Unhurried::new(writer);
        for _ in 0..3 {
            out.write_all(b"text").unwrap();
            out.flush().unwrap();
        }
        assert!(!out.shared.lock().is_stuck);
    }
}
