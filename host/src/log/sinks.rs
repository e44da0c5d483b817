//! The thread between the train loop and the sinks.
//!
//! Scalars are never dropped by the queue: when it is full the caller waits. Texts and charts are, because a slow
//! dashboard must not slow down training for their sake. A sink that fails keeps its records for the next attempts.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::{Record, Sink, SinkError, normalize_name};

/// The reference's queue length.
const QUEUE_LENGTH: usize = 1000;
/// Records that a failing sink may be behind before it is given up.
const MAX_BACKLOG: usize = 1000;

/// All sinks of a run. Usable from several threads.
#[derive(Debug)]
pub struct Sinks {
    queue: Option<SyncSender<Record>>,
    thread: Option<JoinHandle<()>>,
    warnings: Arc<Mutex<Vec<String>>>,
    n_dropped: AtomicU64,
}

impl Sinks {
    /// Starts the thread that feeds `sinks`.
    pub fn start(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self::with_queue_length(sinks, QUEUE_LENGTH)
    }

    fn with_queue_length(sinks: Vec<Box<dyn Sink>>, length: usize) -> Self {
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let mut started = Self {
            queue: None,
            thread: None,
            warnings: Arc::clone(&warnings),
            n_dropped: AtomicU64::new(0),
        };
        if sinks.is_empty() {
            return started;
        }
        let (queue, records) = sync_channel(length);
        let thread = std::thread::Builder::new().name("log".to_owned());
        match thread.spawn(move || feed(sinks, &records, &warnings)) {
            Ok(handle) => {
                started.queue = Some(queue);
                started.thread = Some(handle);
            }
            Err(error) => warn(
                &started.warnings,
                format!("nothing is logged: cannot start a thread: {error}"),
            ),
        }
        started
    }

    /// Hands over a record. Waits only if the sinks are a whole queue behind; the record's texts and charts are dropped then.
    pub fn record(&self, record: Record) {
        let Some(queue) = &self.queue else {
            return;
        };
        if let Err(TrySendError::Full(mut record)) = queue.try_send(record) {
            let n_dropped = record.texts.drain(..).count() + record.plots.drain(..).count();
            self.n_dropped
                .fetch_add(n_dropped as u64, Ordering::Relaxed);
            if !record.scalars.is_empty() {
                // An error means that the thread is gone, which `feed` has warned about.
                let _ = queue.send(record);
            }
        }
    }

    /// The warnings since the last call.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until every record is written, and returns the warnings that were not taken yet.
    pub fn finish(mut self) -> Vec<String> {
        self.close();
        let mut warnings = self.take_warnings();
        let n_dropped = self.n_dropped.load(Ordering::Relaxed);
        if n_dropped > 0 {
            warnings.push(format!(
                "{n_dropped} texts and charts were not logged, because the sinks were too slow"
            ));
        }
        warnings
    }

    fn close(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn(&self.warnings, "the log thread stopped early".to_owned());
        }
    }
}

impl Drop for Sinks {
    /// A run that ends with an error still gets its last records written.
    fn drop(&mut self) {
        self.close();
    }
}

fn warn(warnings: &Mutex<Vec<String>>, text: String) {
    warnings
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(text);
}

fn feed(sinks: Vec<Box<dyn Sink>>, records: &Receiver<Record>, warnings: &Mutex<Vec<String>>) {
    let mut feeds: Vec<Feed> = sinks.into_iter().map(Feed::new).collect();
    for mut record in records {
        for (name, _) in &mut record.scalars {
            *name = normalize_name(name);
        }
        for (name, _) in &mut record.texts {
            *name = normalize_name(name);
        }
        for (name, _) in &mut record.plots {
            *name = normalize_name(name);
        }
        let record = Arc::new(record);
        for feed in &mut feeds {
            feed.offer(&record, warnings);
        }
    }
    for feed in &mut feeds {
        feed.finish(warnings);
    }
}

/// One sink and what it has yet to take.
struct Feed {
    sink: Box<dyn Sink>,
    backlog: VecDeque<Arc<Record>>,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Working,
    /// The warning was given; the next record is the next attempt.
    Failing,
    Disabled,
}

impl Feed {
    fn new(sink: Box<dyn Sink>) -> Self {
        Self {
            sink,
            backlog: VecDeque::new(),
            state: State::Working,
        }
    }

    fn offer(&mut self, record: &Arc<Record>, warnings: &Mutex<Vec<String>>) {
        if self.state == State::Disabled {
            return;
        }
        self.backlog.push_back(Arc::clone(record));
        self.drain(warnings);
        if self.backlog.len() > MAX_BACKLOG {
            let why = format!("it refused {MAX_BACKLOG} records");
            self.disable(&why, warnings);
        }
    }

    fn drain(&mut self, warnings: &Mutex<Vec<String>>) {
        while let Some(record) = self.backlog.front() {
            match catch_unwind(AssertUnwindSafe(|| self.sink.write(record))) {
                Ok(Ok(())) => {
                    self.backlog.pop_front();
                    self.state = State::Working;
                }
                Ok(Err(error)) => {
                    if self.state == State::Working {
                        self.state = State::Failing;
                        warn(warnings, failure(self.sink.name(), &error));
                    }
                    return;
                }
                Err(_) => return self.disable("it panicked", warnings),
            }
        }
    }

    fn finish(&mut self, warnings: &Mutex<Vec<String>>) {
        if self.state == State::Disabled {
            return;
        }
        self.drain(warnings);
        if !self.backlog.is_empty() {
            let n_lost = self.backlog.len();
            warn(
                warnings,
                format!("log `{}` lost its last {n_lost} records", self.sink.name()),
            );
        }
        match catch_unwind(AssertUnwindSafe(|| self.sink.flush())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn(warnings, failure(self.sink.name(), &error)),
            Err(_) => self.disable("it panicked", warnings),
        }
    }

    fn disable(&mut self, why: &str, warnings: &Mutex<Vec<String>>) {
        self.state = State::Disabled;
        self.backlog = VecDeque::new();
        warn(
            warnings,
            format!(
                "log `{}` is switched off for this run: {why}",
                self.sink.name()
            ),
        );
    }
}

fn failure(name: &str, error: &SinkError) -> String {
    format!(
        "log `{name}` failed, the next record tries again: {error}; {}",
        error.help()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Passes records to the test; refuses the attempts numbered in `refused`.
    struct Probe {
        seen: Sender<Record>,
        n_attempts: usize,
        refused: std::ops::Range<usize>,
        gate: Option<Receiver<()>>,
    }

    impl Probe {
        fn new(refused: std::ops::Range<usize>) -> (Self, Receiver<Record>) {
            let (seen, records) = channel();
            let probe = Self {
                seen,
                n_attempts: 0,
                refused,
                gate: None,
            };
            (probe, records)
        }
    }

    impl Sink for Probe {
        #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
        fn name(&self) -> &str {
            "probe"
        }

        fn write(&mut self, record: &Record) -> Result<(), SinkError> {
            if let Some(gate) = &self.gate {
                let _ = gate.recv();
            }
            self.n_attempts += 1;
            if self.refused.contains(&(self.n_attempts - 1)) {
                return Err(SinkError::Other {
                    why: "no".to_owned(),
                });
            }
            self.seen.send(record.clone()).unwrap();
            Ok(())
        }

        fn flush(&mut self) -> Result<(), SinkError> {
            Ok(())
        }
    }

    fn record(step: u64) -> Record {
        Record {
            step,
            scalars: vec![("/train//loss".to_owned(), 1.0)],
            texts: vec![("sample/".to_owned(), "text".to_owned())],
            ..Record::default()
        }
    }

    #[test]
    fn every_sink_gets_every_record_in_order_with_clean_names() {
        let (first, first_seen) = Probe::new(0..0);
        let (second, second_seen) = Probe::new(0..0);
        let sinks = Sinks::start(vec![Box::new(first), Box::new(second)]);
        for step in 0..100 {
            sinks.record(record(step));
        }
        assert!(sinks.finish().is_empty());
        for seen in [first_seen, second_seen] {
            let seen: Vec<Record> = seen.iter().collect();
            assert!(seen.iter().map(|record| record.step).eq(0..100));
            assert_eq!(seen[0].scalars[0].0, "train/loss");
            assert_eq!(seen[0].texts[0].0, "sample");
        }
    }

    #[test]
    fn a_failing_sink_warns_once_and_catches_up() {
        let (probe, seen) = Probe::new(1..4);
        let sinks = Sinks::start(vec![Box::new(probe)]);
        for step in 0..10 {
            sinks.record(record(step));
        }
        let warnings = sinks.finish();
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with("log `probe` failed, the next record tries again: no; "));
        assert!(seen.iter().map(|record| record.step).eq(0..10));
    }

    #[test]
    fn a_sink_that_fails_for_ever_is_switched_off_and_the_others_go_on() {
        let (bad, _) = Probe::new(0..usize::MAX);
        let (good, seen) = Probe::new(0..0);
        let sinks = Sinks::with_queue_length(vec![Box::new(bad), Box::new(good)], 2 * MAX_BACKLOG);
        let n_records = MAX_BACKLOG as u64 + 5;
        for step in 0..n_records {
            sinks.record(record(step));
        }
        let warnings = sinks.finish();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[1].contains("switched off"));
        assert_eq!(seen.iter().count() as u64, n_records);
    }

    #[test]
    fn a_full_queue_drops_texts_and_never_scalars() {
        let (mut probe, seen) = Probe::new(0..0);
        let (open, gate) = channel();
        probe.gate = Some(gate);
        let sinks = Sinks::with_queue_length(vec![Box::new(probe)], 2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for step in 0..20 {
                    sinks.record(record(step));
                }
                for step in 20..40 {
                    let mut text_only = record(step);
                    text_only.scalars.clear();
                    sinks.record(text_only);
                }
            });
            for _ in 0..40 {
                open.send(()).unwrap();
            }
            drop(open);
        });
        let _ = sinks.finish();
        let seen: Vec<Record> = seen.iter().collect();
        let with_scalars = seen.iter().filter(|record| !record.scalars.is_empty());
        assert!(with_scalars.map(|record| record.step).eq(0..20));
    }

    #[test]
    fn dropped_texts_are_counted() {
        let (mut probe, seen) = Probe::new(0..0);
        let (open, gate) = channel();
        probe.gate = Some(gate);
        let sinks = Sinks::with_queue_length(vec![Box::new(probe)], 1);
        let text_only = |step| Record {
            scalars: Vec::new(),
            ..record(step)
        };
        // The gate is shut: at most one record is with the sink and one in the queue.
        for step in 0..5 {
            sinks.record(text_only(step));
        }
        drop(open);
        let warnings = sinks.finish();
        let n_seen = seen.iter().count();
        assert!(n_seen <= 2);
        let expected = format!("{} texts and charts were not logged", 5 - n_seen);
        assert!(warnings[0].starts_with(&expected), "{warnings:?}");
    }

    #[test]
    fn no_sinks_is_no_work() {
        let sinks = Sinks::start(Vec::new());
        sinks.record(record(1));
        assert!(sinks.finish().is_empty());
    }
}
