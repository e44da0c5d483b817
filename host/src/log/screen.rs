//! The thread that writes to stderr, so that whoever reads it cannot stop the program.
//!
//! A full pipe that nobody empties, or a terminal halted with Ctrl-S, blocks whoever writes. Here that is a thread with
//! a bounded queue. Who has something to say waits for the thread only while it gets on; while it is stuck, progress is
//! dropped first and messages last, and the number of what was dropped is said when it gets on again.
//!
//! Below the last line there may be bars, which are drawn anew with each change and over the width that there is then.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a message waits for its turn before the reader is taken for one that has stopped.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long the end of the program waits for such a reader.
const LAST_PATIENCE: Duration = Duration::from_secs(5);
/// Lines that wait for a reader.
const MAX_LINES: usize = 1000;
/// As long as so many lines wait, lines of progress are dropped.
const MAX_PROGRESS: usize = 20;
/// Between two drawings of changed bars.
const BAR_PERIOD: Duration = Duration::from_millis(100);
/// Where no terminal says how wide it is.
const DEFAULT_WIDTH: usize = 80;
/// Characters of a bar itself.
const BAR_LENGTH: usize = 10;

/// What may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The next one says more.
    Progress,
    /// Should be read.
    Message,
}

/// A line that is drawn over and over: `label [#####-----] text`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Bar {
    pub(super) label: String,
    /// How much is done, 0 to 1, if somebody knows.
    pub(super) fraction: Option<f64>,
    pub(super) text: String,
}

impl Bar {
    /// At most `width` characters.
    fn render(&self, width: usize) -> String {
        let bar = self.fraction.map(|fraction| {
            let n_full = (fraction.clamp(0.0, 1.0) * BAR_LENGTH as f64).floor();
            let n_full = (1..=BAR_LENGTH).filter(|&n| n as f64 <= n_full).count();
            format!(
                "[{}{}]",
                "#".repeat(n_full),
                "-".repeat(BAR_LENGTH - n_full)
            )
        });
        let parts = [
            self.label.clone(),
            bar.unwrap_or_default(),
            self.text.clone(),
        ];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join(" ").chars().take(width).collect()
    }
}

/// The writing thread, from the side of those who have something to say.
pub(super) struct Screen {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write.
    asked: Condvar,
    /// Something was written.
    wrote: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<String>,
    /// By the order in which they are drawn.
    bars: BTreeMap<String, Bar>,
    /// Lines and changes of bars: ever asked for, in the writer's hands, and written.
    n_asked: u64,
    n_taken: u64,
    n_written: u64,
    n_dropped: u64,
    /// The reader has kept somebody waiting, and has taken nothing since.
    is_stuck: bool,
    /// It has kept somebody waiting at the end.
    is_given_up: bool,
    is_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Screen {
    /// A thread that writes to stderr.
    pub(super) fn on_stderr() -> Self {
        // Not through `std::io::stderr`, whose lock a stuck write would hold: a panic elsewhere wants it.
        let stderr = std::io::stderr().as_fd().try_clone_to_owned();
        match stderr {
            Ok(stderr) => Self::new(File::from(stderr), width_of_stderr),
            Err(_) => Self::new(std::io::sink(), width_of_stderr), // A closed stderr.
        }
    }

    /// A thread that writes to `out`, whose width `width` tells each time.
    pub(super) fn new(
        out: impl Write + Send + 'static,
        width: impl Fn() -> usize + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = Writer {
            shared: Arc::clone(&shared),
            out,
            width,
            drawn: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("terminal".to_owned());
        if thread.spawn(move || writer.run()).is_err() {
            // Nobody will ever write.
            let mut state = shared.lock();
            (state.is_stuck, state.is_given_up) = (true, true);
        }
        Self { shared }
    }

    /// Writes a line, or several, above the bars. Returns when it is written, or the reader is found to have stopped.
    pub(super) fn line(&self, text: String, kind: Kind) {
        let mut state = self.shared.lock();
        let limit = match kind {
            Kind::Progress => MAX_PROGRESS,
            Kind::Message => MAX_LINES,
        };
        if state.lines.len() >= limit {
            state.n_dropped += 1;
            return;
        }
        state.lines.push_back(text);
        state.n_asked += 1;
        self.shared.asked.notify_one();
        if !state.is_stuck && !self.wait(state, PATIENCE) {
            self.shared.lock().is_stuck = true;
        }
    }

    /// Shows a bar, or takes it away. Bars are drawn in the order of their keys.
    pub(super) fn bar(&self, key: &str, bar: Option<Bar>) {
        let mut state = self.shared.lock();
        let before = match bar {
            Some(bar) => state.bars.insert(key.to_owned(), bar),
            None => state.bars.remove(key),
        };
        if before.as_ref() != state.bars.get(key) {
            state.n_asked += 1;
            self.shared.asked.notify_one();
        }
    }

    /// Waits until all is written, but not for ever, and not for a second time.
    pub(super) fn flush(&self) {
        let state = self.shared.lock();
        if !state.is_given_up && !self.wait(state, LAST_PATIENCE) {
            self.shared.lock().is_given_up = true;
        }
    }

    /// Whether everything that is in the queue now was written within `patience`.
    fn wait(&self, state: MutexGuard<'_, State>, patience: Duration) -> bool {
        let end = state.n_asked;
        let is_due = |state: &mut State| state.n_written < end;
        let waited = self
            .shared
            .wrote
            .wait_timeout_while(state, patience, is_due);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.n_written >= end
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.asked.notify_one();
    }
}

/// The thread's own side.
struct Writer<W, F> {
    shared: Arc<Shared>,
    out: W,
    width: F,
    /// Lengths of the bars that are on the screen, the cursor behind the last one.
    drawn: Vec<usize>,
}

impl<W: Write, F: Fn() -> usize> Writer<W, F> {
    fn run(mut self) {
        let mut last_drawn: Option<Instant> = None;
        loop {
            let state = self.shared.lock();
            let is_idle = |state: &mut State| state.n_taken == state.n_asked && !state.is_over;
            let asked = self.shared.asked.wait_while(state, is_idle);
            let mut state = asked.unwrap_or_else(PoisonError::into_inner);
            // Bars that change all the time are drawn now and then; a line, or the end of all bars, does not wait.
            if let Some(rest) = last_drawn.and_then(|last| BAR_PERIOD.checked_sub(last.elapsed())) {
                let can_wait = |state: &mut State| {
                    state.lines.is_empty() && !state.bars.is_empty() && !state.is_over
                };
                let waited = self.shared.asked.wait_timeout_while(state, rest, can_wait);
                (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            }
            let lines = std::mem::take(&mut state.lines);
            let n_dropped = std::mem::take(&mut state.n_dropped);
            let bars: Vec<Bar> = state.bars.values().cloned().collect();
            state.n_taken = state.n_asked;
            let (n_taken, is_over) = (state.n_taken, state.is_over);
            drop(state);

            let mut frame = self.erased();
            for line in &lines {
                frame.push_str(line);
                frame.push('\n');
            }
            if n_dropped > 0 {
                let _ = writeln!(
                    frame,
                    "warning: nobody read this for a while: {n_dropped} lines were left out"
                );
            }
            frame.push_str(&self.drawing(&bars));
            self.write(&frame);
            last_drawn = Some(Instant::now());

            let mut state = self.shared.lock();
            state.n_written = n_taken;
            (state.is_stuck, state.is_given_up) = (false, false);
            self.shared.wrote.notify_all();
            if is_over && state.n_taken == state.n_asked {
                return;
            }
        }
    }

    /// Takes the bars off the screen. A terminal that has become narrower has broken them into several rows.
    fn erased(&mut self) -> String {
        let width = (self.width)().max(1);
        let n_rows: usize = self
            .drawn
            .drain(..)
            .map(|length| length.div_ceil(width).max(1))
            .sum();
        match n_rows {
            0 => String::new(),
            1 => "\r\u{1b}[J".to_owned(),
            n => format!("\r\u{1b}[{}A\u{1b}[J", n - 1),
        }
    }

    fn drawing(&mut self, bars: &[Bar]) -> String {
        // A row that is full to its last column would make some terminals begin another.
        let width = (self.width)().saturating_sub(1);
        let rows: Vec<String> = bars.iter().map(|bar| bar.render(width)).collect();
        self.drawn = rows.iter().map(|row| row.chars().count()).collect();
        rows.join("\n")
    }

    /// A closed stderr is no reason to stop training; what it does not take is lost.
    fn write(&mut self, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match self.out.write(rest) {
                Ok(0) => return,
                Ok(n) => rest = &rest[n..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another program has made the terminal non-blocking.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(_) => return,
            }
        }
        let _ = self.out.flush();
    }
}

fn width_of_stderr() -> usize {
    match rustix::termios::tcgetwinsize(std::io::stderr()) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => DEFAULT_WIDTH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::testing::Captured;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, channel};

    /// Takes nothing until it is let.
    struct Gate(Receiver<()>, Captured);

    impl Write for Gate {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(data)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stopped_costs_one_wait_and_hears_what_was_left_out() {
        let captured = Captured::default();
        let (open, gate) = channel();
        let screen = Screen::new(Gate(gate, captured.clone()), || 80);
        let start = Instant::now();
        for n in 0..1500 {
            screen.line(format!("message {n}"), Kind::Message);
            screen.line(format!("progress {n}"), Kind::Progress);
        }
        assert!(start.elapsed() < 10 * PATIENCE, "{:?}", start.elapsed());
        drop(open);
        screen.flush();
        screen.line("alive".to_owned(), Kind::Message);
        let text = captured.text();
        let count = |beginning: &str| {
            text.lines()
                .filter(|line| line.starts_with(beginning))
                .count()
        };
        let (n_messages, n_progress) = (count("message"), count("progress"));
        assert!(n_messages > 900 && n_messages < 1100, "{n_messages}");
        assert!(n_progress <= 2 * MAX_PROGRESS, "{n_progress}");
        let n_dropped = 3000 - n_messages - n_progress;
        let said = format!("nobody read this for a while: {n_dropped} lines were left out");
        assert!(
            text.contains(&said) && text.ends_with("alive\n"),
            "{said}\n{text}"
        );
    }

    #[test]
    fn a_closed_reader_is_no_trouble() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let screen = Screen::new(Closed, || 80);
        for n in 0..10 {
            screen.line(n.to_string(), Kind::Message);
        }
        screen.flush();
        assert_eq!(screen.shared.lock().n_written, 10);
    }

    #[test]
    fn bars_stay_below_lines_and_fit_the_width() {
        let captured = Captured::default();
        let width = Arc::new(AtomicUsize::new(20));
        let reads = Arc::clone(&width);
        let screen = Screen::new(captured.clone(), move || reads.load(Ordering::SeqCst));
        let bar = Bar {
            label: "x".to_owned(),
            fraction: Some(0.35),
            text: "a long text".to_owned(),
        };
        screen.bar("b", Some(bar.clone()));
        screen.bar(
            "a",
            Some(Bar {
                label: "first".to_owned(),
                ..Bar::default()
            }),
        );
        screen.line("line".to_owned(), Kind::Message);
        // Whatever was drawn before, the line is followed by both bars, cut before the last column.
        let text = captured.text();
        assert!(
            text.ends_with("line\nfirst\nx [###-------] a lo"),
            "{text:?}"
        );

        // Now 19 characters are on two rows, and the bar above them on one.
        width.store(10, Ordering::SeqCst);
        screen.bar("a", None);
        screen.bar("b", None);
        screen.line("end".to_owned(), Kind::Message);
        let text = captured.text();
        assert!(text.contains("a lo\r\u{1b}[2A\u{1b}[J"), "{text:?}");
        assert!(text.ends_with("end\n"), "{text:?}");
    }
}
