//! The threads between the train loop and the sinks.
//!
//! Each sink has a queue and a thread of its own, so that one that is slow, stuck or gone delays neither the train loop
//! nor the others. [`Sinks::record`] never waits. What a slow sink has yet to take piles up in memory:
//!
//! ```text
//! texts and charts   are left out while the queue is long, and counted
//! scalars            are never left out; past a bound in bytes the sink is given up, with a warning
//! ```
//! A sink that fails keeps its records, and tries again with the next one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use moeut_plot::{Matrix, Plot, Series};

use super::{End, Level, Notice, Record, Sink, SinkError, normalize_name};

/// What may wait for one sink.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Records beyond which texts and charts are left out: the reference's queue length.
    records: usize,
    /// Bytes beyond which texts and charts are left out.
    bytes: usize,
    /// Bytes of scalars beyond which the sink is given up: some days of training.
    bytes_of_scalars: usize,
}

const BOUNDS: Bounds = Bounds {
    records: 1000,
    bytes: 64 << 20,
    bytes_of_scalars: 256 << 20,
};

/// All sinks of a run. Usable from several threads.
#[derive(Debug)]
pub struct Sinks {
    feeds: Vec<Feed>,
    notices: Arc<Notices>,
}

/// A sink's queue, which a thread empties. Nobody joins that thread: it may be stuck.
#[derive(Debug)]
struct Feed {
    name: String,
    queue: Arc<Queue>,
}

impl Sinks {
    /// Starts the threads that feed `sinks`.
    pub fn start(sinks: Vec<Box<dyn Sink>>) -> Self {
        Self::with_bounds(sinks, BOUNDS)
    }

    fn with_bounds(sinks: Vec<Box<dyn Sink>>, bounds: Bounds) -> Self {
        let notices = Arc::new(Notices::default());
        let feeds = sinks.into_iter().filter_map(|sink| {
            let name = sink.name().to_owned();
            let queue = Arc::new(Queue::new(bounds));
            let thread = std::thread::Builder::new().name(format!("log {name}"));
            let started = {
                let (queue, notices) = (Arc::clone(&queue), Arc::clone(&notices));
                thread.spawn(move || feed(sink, &queue, &notices))
            };
            match started {
                Ok(_) => Some(Feed { name, queue }),
                Err(error) => {
                    notices.warn(switched_off(
                        &name,
                        &format!("cannot start a thread: {error}"),
                    ));
                    None
                }
            }
        });
        Self {
            feeds: feeds.collect(),
            notices,
        }
    }

    /// Hands over a record; returns at once.
    pub fn record(&self, mut record: Record) {
        if self.feeds.is_empty() {
            return;
        }
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
        for feed in &self.feeds {
            if let Err(why) = feed.queue.push(&record) {
                self.notices.warn(switched_off(&feed.name, &why));
            }
        }
    }

    /// What the user should know, since the last call.
    pub fn take_notices(&self) -> Vec<Notice> {
        self.notices.take()
    }

    /// Tells every sink how the run ended, waits until all are done, though not for ever, and returns the notices that were
    /// not taken yet.
    pub fn finish(mut self, end: End) -> Vec<Notice> {
        self.close(end);
        self.take_notices()
    }

    fn close(&mut self, end: End) {
        for feed in &self.feeds {
            feed.queue.close(end);
        }
        let deadline = Instant::now() + end.patience();
        for feed in self.feeds.drain(..) {
            let (is_over, n_left, n_dropped) = feed.queue.wait_until_over(deadline);
            if !is_over {
                let seconds = end.patience().as_secs();
                self.notices.warn(format!(
                    "log `{}` does not answer: given up after {seconds} s with {n_left} records left",
                    feed.name
                ));
            }
            if n_dropped > 0 {
                self.notices.warn(format!(
                    "log `{}` was too slow: {n_dropped} texts and charts were left out",
                    feed.name
                ));
            }
        }
    }
}

impl Drop for Sinks {
    /// A run that ends with an error still gets its last records written.
    fn drop(&mut self) {
        self.close(End::Failed);
    }
}

/// What sinks have to say.
#[derive(Debug, Default)]
struct Notices(Mutex<Vec<Notice>>);

impl Notices {
    fn add(&self, notices: Vec<Notice>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.extend(notices);
    }

    fn warn(&self, text: String) {
        self.add(vec![(Level::Warning, text)]);
    }

    fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What one sink has yet to take.
#[derive(Debug)]
struct Queue {
    bounds: Bounds,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Arc<Record>>,
    n_bytes: usize,
    /// Pushes and the closing: a sink that failed tries again when it has changed.
    n_events: u64,
    /// No more records will come.
    end: Option<End>,
    /// The sink takes no more records.
    is_over: bool,
    /// Texts and charts that were left out.
    n_dropped: usize,
}

/// What a sink's thread does next.
enum Turn {
    Write(Arc<Record>, u64),
    End(End, usize),
    Over,
}

impl Queue {
    fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a record, or says why the sink is given up.
    fn push(&self, record: &Arc<Record>) -> Result<(), String> {
        let mut state = self.lock();
        if state.is_over {
            return Ok(());
        }
        let n_bytes = size(record);
        let n_extra = record.texts.len() + record.plots.len();
        let is_long = state.records.len() >= self.bounds.records
            || state.n_bytes + n_bytes > self.bounds.bytes;
        let record = if is_long && n_extra > 0 {
            state.n_dropped += n_extra;
            let scalars = record.scalars.clone();
            let step = record.step;
            Arc::new(Record {
                step,
                scalars,
                ..Record::default()
            })
        } else {
            Arc::clone(record)
        };
        if record.scalars.is_empty() && record.texts.is_empty() && record.plots.is_empty() {
            return Ok(());
        }
        if state.n_bytes > self.bounds.bytes_of_scalars {
            let n_records = state.records.len();
            state.give_up();
            self.changed.notify_all();
            return Err(format!("{n_records} records wait for it"));
        }
        state.n_bytes += size(&record);
        state.records.push_back(record);
        state.n_events += 1;
        self.changed.notify_all();
        Ok(())
    }

    fn close(&self, end: End) {
        let mut state = self.lock();
        state.end = Some(end);
        state.n_events += 1;
        self.changed.notify_all();
    }

    /// Waits for something to do. An attempt that failed at event number `failed_at` is not repeated before the next event.
    fn next(&self, failed_at: Option<u64>) -> Turn {
        let mut state = self.lock();
        loop {
            if state.is_over {
                return Turn::Over;
            }
            if let Some(record) = state.records.front()
                && failed_at != Some(state.n_events)
            {
                return Turn::Write(Arc::clone(record), state.n_events);
            }
            if let Some(end) = state.end {
                return Turn::End(end, state.records.len());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pop(&self) {
        let mut state = self.lock();
        if let Some(record) = state.records.pop_front() {
            state.n_bytes -= size(&record);
        }
    }

    fn give_up(&self) {
        self.lock().give_up();
        self.changed.notify_all();
    }

    /// Whether the sink is done, how many records it has not taken, and how many texts and charts were left out.
    fn wait_until_over(&self, deadline: Instant) -> (bool, usize, usize) {
        let left = deadline.saturating_duration_since(Instant::now());
        let is_busy = |state: &mut State| !state.is_over;
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), left, is_busy)
            .unwrap_or_else(PoisonError::into_inner);
        let state = waited.0;
        (state.is_over, state.records.len(), state.n_dropped)
    }
}

impl State {
    fn give_up(&mut self) {
        self.is_over = true;
        self.records = VecDeque::new();
        self.n_bytes = 0;
    }
}

/// Takes records out of `queue` until the run ends.
fn feed(mut sink: Box<dyn Sink>, queue: &Queue, notices: &Notices) {
    let mut failed_at = None;
    let mut is_over = false;
    while !is_over {
        let outcome = match queue.next(failed_at) {
            Turn::Over => return,
            Turn::Write(record, event) => {
                let outcome = catch_unwind(AssertUnwindSafe(|| sink.write(&record)));
                let was_failing = failed_at.take().is_some();
                match &outcome {
                    Ok(Ok(())) => queue.pop(),
                    Ok(Err(_)) => failed_at = Some(event),
                    Err(_) => is_over = true,
                }
                outcome.map(|written| written.map_err(|error| (error, was_failing)))
            }
            Turn::End(end, n_lost) => {
                is_over = true;
                if n_lost > 0 {
                    let name = sink.name();
                    notices.warn(format!("log `{name}` lost its last {n_lost} records"));
                }
                let outcome = catch_unwind(AssertUnwindSafe(|| sink.finish(end)));
                outcome.map(|ended| ended.map_err(|error| (error, false)))
            }
        };
        match outcome {
            Ok(Ok(()) | Err((_, true))) => {}
            Ok(Err((error, false))) => notices.warn(failure(sink.name(), &error)),
            Err(_) => notices.warn(switched_off(sink.name(), "it panicked")),
        }
        notices.add(sink.take_notices());
    }
    queue.give_up();
}

fn switched_off(name: &str, why: &str) -> String {
    let rest = match name {
        "jsonl" => "",
        _ => "; `metrics.jsonl` has the numbers",
    };
    format!("log `{name}` is switched off for this run: {why}{rest}")
}

fn failure(name: &str, error: &SinkError) -> String {
    format!(
        "log `{name}` failed, the next record tries again: {error}; {}",
        error.help()
    )
}

/// About how many bytes a record takes.
fn size(record: &Record) -> usize {
    const ENTRY: usize = 64; // a name's and a vector's own fields, and what the allocator adds
    let scalars = record.scalars.iter().map(|(name, _)| name.len());
    let texts = record
        .texts
        .iter()
        .map(|(name, text)| name.len() + text.len());
    let plots = record
        .plots
        .iter()
        .map(|(name, plot)| name.len() + plot_size(plot));
    scalars
        .chain(texts)
        .chain(plots)
        .map(|n_bytes| n_bytes + ENTRY)
        .sum()
}

fn plot_size(plot: &Plot) -> usize {
    let matrix = |matrix: &Matrix| 4 * matrix.values.len();
    let series = |all: &[Series]| -> usize {
        all.iter()
            .map(|one| 8 * (one.x.len() + one.y.len() + 2 * one.error.len()))
            .sum()
    };
    match plot {
        Plot::Table(table) => table.rows.iter().flatten().map(String::len).sum(),
        Plot::Histogram(histogram) => 16 * histogram.counts.len(),
        Plot::Images(images) => images.iter().map(|image| image.rgb.len()).sum(),
        Plot::Bars(bars) => series(&bars.series),
        Plot::Xy(chart) => series(&chart.series),
        Plot::Heatmap(heatmap) => matrix(&heatmap.matrix),
        Plot::Confusion(confusion) => matrix(&confusion.counts),
        Plot::Clustermap(map) => matrix(&map.matrix),
        Plot::Frames(frames) => frames.frames.iter().map(|(_, one)| matrix(one)).sum(),
    }
}

impl End {
    /// How long the end of a run waits for its logs. Whoever sent a signal may kill the process soon: `wandb agent` after
    /// 30 s, SLURM by default, too.
    pub(super) fn patience(self) -> Duration {
        match self {
            Self::Finished | Self::Failed => Duration::from_mins(1),
            Self::Stopped(_) => Duration::from_secs(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Passes records to the test; refuses the attempts numbered in `refused`.
    struct Probe {
        seen: Sender<Record>,
        n_attempts: usize,
        refused: std::ops::Range<usize>,
        /// Every attempt waits for the test to send something, or to let go.
        gate: Option<Receiver<()>>,
        end: Sender<End>,
    }

    struct Seen {
        records: Receiver<Record>,
        end: Receiver<End>,
    }

    impl Probe {
        fn new(refused: std::ops::Range<usize>) -> (Self, Seen) {
            let (seen, records) = channel();
            let (ended, end) = channel();
            let probe = Self {
                seen,
                n_attempts: 0,
                refused,
                gate: None,
                end: ended,
            };
            (probe, Seen { records, end })
        }

        fn gated() -> (Self, Seen, Sender<()>) {
            let (mut probe, seen) = Self::new(0..0);
            let (open, gate) = channel();
            probe.gate = Some(gate);
            (probe, seen, open)
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

        fn finish(&mut self, end: End) -> Result<(), SinkError> {
            self.end.send(end).unwrap();
            Ok(())
        }

        fn take_notices(&mut self) -> Vec<Notice> {
            if self.n_attempts == 3 {
                return vec![(Level::Info, "three".to_owned())];
            }
            Vec::new()
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

    fn texts(notices: &[Notice]) -> Vec<&str> {
        notices.iter().map(|(_, text)| text.as_str()).collect()
    }

    #[test]
    fn every_sink_gets_every_record_in_order_with_clean_names_and_the_end() {
        let (first, first_seen) = Probe::new(0..0);
        let (second, second_seen) = Probe::new(0..0);
        let sinks = Sinks::start(vec![Box::new(first), Box::new(second)]);
        for step in 0..100 {
            sinks.record(record(step));
        }
        let notices = sinks.finish(End::Finished);
        assert_eq!(texts(&notices), ["three", "three"]);
        for seen in [first_seen, second_seen] {
            let records: Vec<Record> = seen.records.iter().collect();
            assert!(records.iter().map(|record| record.step).eq(0..100));
            assert_eq!(records[0].scalars[0].0, "train/loss");
            assert_eq!(records[0].texts[0].0, "sample");
            assert_eq!(seen.end.recv(), Ok(End::Finished));
        }
    }

    #[test]
    fn a_failing_sink_warns_once_and_catches_up() {
        let (probe, seen) = Probe::new(1..2);
        let sinks = Sinks::start(vec![Box::new(probe)]);
        let mut notices = Vec::new();
        for step in 0..3 {
            sinks.record(record(step));
        }
        while notices.is_empty() {
            std::thread::yield_now();
            notices = sinks.take_notices();
        }
        for step in 3..10 {
            sinks.record(record(step));
        }
        let warning = "log `probe` failed, the next record tries again: no; ";
        assert!(notices[0].1.starts_with(warning), "{notices:?}");
        let later = sinks.finish(End::Finished);
        let warnings = notices
            .iter()
            .chain(&later)
            .filter(|(level, _)| *level == Level::Warning);
        assert_eq!(warnings.count(), 1, "{later:?}");
        assert!(seen.records.iter().map(|record| record.step).eq(0..10));
    }

    #[test]
    fn a_sink_that_fails_to_the_end_says_what_it_lost() {
        let (bad, _seen) = Probe::new(0..usize::MAX);
        let (good, seen) = Probe::new(0..0);
        let sinks = Sinks::start(vec![Box::new(bad), Box::new(good)]);
        for step in 0..5 {
            sinks.record(record(step));
        }
        let notices = sinks.finish(End::Finished);
        assert!(
            texts(&notices).contains(&"log `probe` lost its last 5 records"),
            "{notices:?}"
        );
        assert_eq!(seen.records.iter().count(), 5);
    }

    #[test]
    fn a_stuck_sink_keeps_neither_the_caller_nor_the_others() {
        let (stuck, stuck_seen, open) = Probe::gated();
        let (good, seen) = Probe::new(0..0);
        let bounds = Bounds {
            records: 2,
            ..BOUNDS
        };
        let sinks = Sinks::with_bounds(vec![Box::new(stuck), Box::new(good)], bounds);
        // The gate is shut; without threads of their own the other sink would see nothing.
        for step in 0..20 {
            sinks.record(record(step));
            assert_eq!(seen.records.recv().unwrap().step, step);
        }
        drop(open);
        let notices = sinks.finish(End::Finished);
        let records: Vec<Record> = stuck_seen.records.iter().collect();
        assert!(
            records.iter().map(|record| record.step).eq(0..20),
            "no scalar is dropped"
        );
        let n_texts: usize = records.iter().map(|record| record.texts.len()).sum();
        // One record may have been with the sink already, and two in the queue.
        assert!((2..=3).contains(&n_texts), "{n_texts}");
        let expected = format!("{} texts and charts were left out", 20 - n_texts);
        assert!(
            notices.iter().any(|(_, text)| text.ends_with(&expected)),
            "{notices:?}"
        );
    }

    #[test]
    fn a_stuck_sink_is_given_up_when_too_much_waits_for_it() {
        let (stuck, _seen, open) = Probe::gated();
        let bounds = Bounds {
            bytes_of_scalars: 10 * size(&record(0)),
            ..BOUNDS
        };
        let sinks = Sinks::with_bounds(vec![Box::new(stuck)], bounds);
        for step in 0..20 {
            sinks.record(record(step));
        }
        let notices = sinks.take_notices();
        assert_eq!(
            texts(&notices),
            [
                "log `probe` is switched off for this run: 11 records wait for it; `metrics.jsonl` has the numbers"
            ]
        );
        drop(open);
        assert!(sinks.finish(End::Finished).is_empty());
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let queue = Queue::new(BOUNDS);
        queue.push(&Arc::new(record(1))).unwrap();
        queue.close(End::Finished);
        assert_eq!(queue.wait_until_over(Instant::now()), (false, 1, 0));
        queue.give_up();
        let later = Instant::now() + Duration::from_secs(1000);
        assert_eq!(queue.wait_until_over(later), (true, 0, 0));
    }

    #[test]
    fn a_run_that_is_dropped_has_failed() {
        let (probe, seen) = Probe::new(0..0);
        drop(Sinks::start(vec![Box::new(probe)]));
        assert_eq!(seen.end.recv(), Ok(End::Failed));
    }

    #[test]
    fn charts_count_by_their_pixels() {
        let image = moeut_plot::Image {
            width: 10,
            height: 10,
            rgb: vec![0; 300],
            caption: String::new(),
        };
        let mut record = record(1);
        let without = size(&record);
        record.plots = vec![("image".to_owned(), Plot::Images(vec![image]))];
        assert_eq!(size(&record) - without, 300 + "image".len() + 64);
    }

    #[test]
    fn no_sinks_is_no_work() {
        let sinks = Sinks::start(Vec::new());
        sinks.record(record(1));
        assert!(sinks.finish(End::Finished).is_empty());
    }
}
