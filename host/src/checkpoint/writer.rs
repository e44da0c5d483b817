//! Writes checkpoints in the background and deletes old ones. A failure is a warning: a full disk must not end a run
//! that has days behind it.
//!
//! One save at a time. The next one waits for it rather than being left out: which steps have a checkpoint then does
//! not depend on the speed of the disk, and no more than one copy of the tensors is held. A save that fails tries again
//! by itself, after [`FIRST_PAUSE`] and then ever longer, until it succeeds, a newer one takes its place, or somebody
//! waits for it.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::{CheckpointError, Snapshot, folder, retention};

/// Time from a failed attempt to the next; it doubles each time. Short beside the minutes between saves, long beside
/// what an attempt takes.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_mins(10);

/// The checkpoints of one run. At most one is being written at a time.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
    keep_every: Option<Duration>,
    clock: fn() -> SystemTime,
    first_pause: Duration,
    writing: Option<Writing>,
    last_saved: Option<u64>,
    last_took: Option<Duration>,
    warnings: Warnings,
}

type Warnings = Arc<Mutex<Vec<String>>>;

/// A save under way.
#[derive(Debug)]
struct Writing {
    step: u64,
    orders: Sender<Order>,
    /// Returns how long the attempt took that succeeded.
    thread: JoinHandle<Result<Duration, CheckpointError>>,
}

/// What a save does that has failed, instead of pausing.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// A newer one takes its place.
    GiveUp,
    /// Somebody waits for it.
    LastAttempt,
}

impl Checkpoints {
    /// Checkpoints below `dir`, of which the newest `keep_last` (at least one) are kept. `dir` is created by the
    /// first save. Unfinished folders that a killed process left there are removed: one process per `dir`.
    pub fn new(dir: impl Into<PathBuf>, keep_last: usize) -> Self {
        let dir = dir.into();
        folder::remove_leftovers(&dir);
        Self {
            dir,
            keep_last,
            keep_every: None,
            clock: SystemTime::now,
            first_pause: FIRST_PAUSE,
            writing: None,
            last_saved: None,
            last_took: None,
            warnings: Warnings::default(),
        }
    }

    /// Keeps one more checkpoint per `period` for good.
    #[must_use]
    pub fn keep_every(mut self, period: Duration) -> Self {
        self.keep_every = Some(period);
        self
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits for a write under way, and drops a snapshot that could not be written yet: call it before the tensors of
    /// the next one are copied.
    pub fn make_room(&mut self) {
        // A save that fails has given its warning already.
        if let Err(panicked @ CheckpointError::Writer { .. }) = self.end(Order::GiveUp) {
            warn(&self.warnings, format!("{panicked}; {}", panicked.help()));
        }
    }

    /// Starts to write `snapshot`, after [`Self::make_room`]. A step that is saved already is skipped. Failures are
    /// reported by [`Self::take_warnings`] and do not end the attempts.
    pub fn save_in_background(&mut self, snapshot: Snapshot) {
        self.make_room();
        let step = snapshot.step;
        if self.last_saved == Some(step) {
            return;
        }
        let (orders, receiver) = channel();
        let job = Job {
            dir: self.dir.clone(),
            snapshot,
            keep_last: self.keep_last,
            keep_every: self.keep_every,
            now: (self.clock)(),
            pause: self.first_pause,
            orders: receiver,
            warnings: Arc::clone(&self.warnings),
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        match thread.spawn(move || job.run()) {
            Ok(thread) => {
                self.writing = Some(Writing {
                    step,
                    orders,
                    thread,
                });
            }
            Err(error) => {
                let error = CheckpointError::io("start a thread to write", &self.dir)(error);
                warn(&self.warnings, not_saved(step, &error, "next save"));
            }
        }
    }

    /// Waits until the last save is on the disk; one that has failed so far gets a last attempt.
    ///
    /// # Errors
    /// [`CheckpointError::Unsaved`] if that fails too; the older checkpoints are as they were.
    pub fn wait(&mut self) -> Result<(), CheckpointError> {
        let step = self.writing.as_ref().map_or(0, |writing| writing.step);
        self.end(Order::LastAttempt)
            .map_err(|cause| CheckpointError::Unsaved {
                step,
                cause: Box::new(cause),
            })
    }

    fn end(&mut self, order: Order) -> Result<(), CheckpointError> {
        let Some(writing) = self.writing.take() else {
            return Ok(());
        };
        // Nobody listens if it is done already.
        let _ = writing.orders.send(order);
        let took = writing.thread.join().map_err(|panic| {
            let why = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic without a message");
            CheckpointError::Writer {
                why: why.to_owned(),
            }
        })??;
        self.last_saved = Some(writing.step);
        self.last_took = Some(took);
        Ok(())
    }

    /// How long the last save took in the background, once per save and known when the next one starts.
    pub fn take_save_time(&mut self) -> Option<Duration> {
        self.last_took.take()
    }

    /// The failures since the last call, for the user. Does not wait.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Checkpoints {
    /// A run that ends early still gets the checkpoint that was under way.
    fn drop(&mut self) {
        let _ = self.end(Order::LastAttempt);
    }
}

fn warn(warnings: &Warnings, text: String) {
    let mut warnings = warnings.lock().unwrap_or_else(PoisonError::into_inner);
    warnings.push(text);
}

fn not_saved(step: u64, error: &CheckpointError, next: &str) -> String {
    let help = error.help();
    format!("step {step} is not saved: {error}; {help}; next attempt: {next}")
}

/// What the thread does.
struct Job {
    dir: PathBuf,
    snapshot: Snapshot,
    keep_last: usize,
    keep_every: Option<Duration>,
    now: SystemTime,
    pause: Duration,
    orders: Receiver<Order>,
    warnings: Warnings,
}

impl Job {
    fn run(mut self) -> Result<Duration, CheckpointError> {
        loop {
            let error = match self.attempt() {
                Ok(took) => return Ok(took),
                Err(error) => error,
            };
            let next = format!("in {} s at the latest", self.pause.as_secs());
            let warning = not_saved(self.snapshot.step, &error, &next);
            warn(&self.warnings, warning);
            match self.orders.recv_timeout(self.pause) {
                Err(RecvTimeoutError::Timeout) => self.pause = (self.pause * 2).min(LONGEST_PAUSE),
                Ok(Order::LastAttempt) | Err(RecvTimeoutError::Disconnected) => {
                    return self.attempt();
                }
                Ok(Order::GiveUp) => return Err(error),
            }
        }
    }

    /// Old checkpoints are deleted only after the new one is whole and was read back.
    fn attempt(&self) -> Result<Duration, CheckpointError> {
        let start = Instant::now();
        // An attempt that lost its folder could not tidy up, and space may be what is missing.
        folder::remove_leftovers(&self.dir);
        folder::write(&self.dir, &self.snapshot, self.now)?;
        let newest = self.snapshot.step;
        let deleted = delete_expired(&self.dir, newest, self.keep_last, self.keep_every, self.now);
        if let Err(error) = deleted {
            let help = error.help();
            let text = format!("an old checkpoint stays: {error}; {help}");
            warn(&self.warnings, text);
        }
        Ok(start.elapsed())
    }
}

/// Deletes what [`retention::expired`] names. Folders of later steps belong to a line of training that was left by
/// restoring an earlier step, or are damaged; neither counts as the newest here, and both stay. So do folders
/// without a manifest: we did not write them to the end.
fn delete_expired(
    dir: &Path,
    newest: u64,
    keep_last: usize,
    keep_every: Option<Duration>,
    now: SystemTime,
) -> Result<(), CheckpointError> {
    let (whole, paths): (Vec<_>, Vec<_>) = folder::list(dir)?
        .into_iter()
        .filter(|&(step, _)| step <= newest)
        .filter_map(|(step, path)| Some(((step, folder::age(&path, now)?), path)))
        .unzip();
    let expired = retention::expired(&whole, keep_last, keep_every);
    for ((step, _), path) in whole.iter().zip(paths) {
        if expired.contains(step) {
            folder::remove(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::snapshot;
    use super::super::load;
    use super::*;

    fn steps(dir: &Path) -> Vec<u64> {
        let found = folder::list(dir).unwrap();
        found.into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn only_the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = Checkpoints::new(dir.path().join("checkpoint"), 2);
        for step in [8, 9, 10, 11] {
            checkpoints.save_in_background(snapshot(step));
        }
        checkpoints.wait().unwrap();
        assert!(checkpoints.take_warnings().is_empty());
        assert_eq!(steps(&dir.path().join("checkpoint")), [11, 10]);
    }

    #[test]
    fn a_later_damaged_checkpoint_does_not_push_out_the_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = Checkpoints::new(dir.path(), 1);
        checkpoints.save_in_background(snapshot(100));
        checkpoints.wait().unwrap();
        std::fs::write(dir.path().join("model-100/state.json"), "x").unwrap();

        checkpoints.save_in_background(snapshot(50));
        checkpoints.wait().unwrap();
        assert_eq!(steps(dir.path()), [100, 50]);
        assert_eq!(load(dir.path()).unwrap().snapshot.step, 50);
    }

    #[test]
    fn with_a_period_the_clock_decides() {
        const HOUR: Duration = Duration::from_hours(1);
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = Checkpoints::new(dir.path(), 1).keep_every(4 * HOUR);
        let clocks: [fn() -> SystemTime; 4] = [
            || SystemTime::UNIX_EPOCH,
            || SystemTime::UNIX_EPOCH + HOUR,
            || SystemTime::UNIX_EPOCH + 2 * HOUR,
            || SystemTime::UNIX_EPOCH + 5 * HOUR,
        ];
        for (step, clock) in (1..).zip(clocks) {
            checkpoints.clock = clock;
            checkpoints.save_in_background(snapshot(step));
        }
        checkpoints.wait().unwrap();
        assert_eq!(steps(dir.path()), [4, 3, 1]);
    }

    /// A path below a regular file refuses writes for root as well, as a read-only folder does for others.
    fn blocked(dir: &Path) -> (PathBuf, Checkpoints) {
        let path = dir.join("file");
        std::fs::write(&path, "").unwrap();
        let checkpoints = Checkpoints::new(&path, 1);
        (path, checkpoints)
    }

    #[test]
    fn a_folder_that_refuses_writes_is_a_warning_and_then_an_error_for_who_waits() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut checkpoints) = blocked(dir.path());
        checkpoints.save_in_background(snapshot(1));
        checkpoints.save_in_background(snapshot(2));
        let warnings = checkpoints.take_warnings();
        assert!(
            warnings[0].starts_with("step 1 is not saved: cannot create `"),
            "{warnings:?}"
        );
        assert!(
            warnings[0].ends_with("; next attempt: in 30 s at the latest"),
            "{warnings:?}"
        );

        let error = checkpoints.wait().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the checkpoint of step 2 is not saved: cannot create `"),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
        checkpoints.save_in_background(snapshot(2));
        checkpoints.wait().unwrap();
        assert_eq!(load(&path).unwrap().snapshot.step, 2);
    }

    #[test]
    fn a_save_that_failed_is_made_up_for_without_another_call() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut checkpoints) = blocked(dir.path());
        checkpoints.first_pause = Duration::from_millis(1);
        checkpoints.save_in_background(snapshot(1));
        while checkpoints.take_warnings().is_empty() {
            std::thread::yield_now();
        }
        std::fs::remove_file(&path).unwrap();
        while load(&path).is_err() {
            std::thread::yield_now();
        }
        checkpoints.wait().unwrap();
        assert!(checkpoints.take_save_time().is_some());
        assert!(checkpoints.take_save_time().is_none());
    }

    #[test]
    fn who_waits_does_not_wait_for_the_pause() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut checkpoints) = blocked(dir.path());
        checkpoints.first_pause = LONGEST_PAUSE;
        checkpoints.save_in_background(snapshot(1));
        while checkpoints.take_warnings().is_empty() {
            std::thread::yield_now();
        }
        std::fs::remove_file(&path).unwrap();
        checkpoints.wait().unwrap();
        assert_eq!(load(&path).unwrap().snapshot.step, 1);
    }

    #[test]
    fn a_failed_save_leaves_the_older_checkpoint_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = Checkpoints::new(dir.path(), 1);
        checkpoints.save_in_background(snapshot(1));
        checkpoints.wait().unwrap();
        // A tensor of a kind that the format lacks fails in the middle of the folder.
        let mut unwritable = snapshot(2);
        let complex = tch::Tensor::zeros([1], (tch::Kind::ComplexFloat, tch::Device::Cpu));
        unwritable.optimizer.push(("c".to_owned(), complex));
        checkpoints.save_in_background(unwritable);
        let error = checkpoints.wait().unwrap_err();
        assert!(error.to_string().contains("tensor `c`"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(load(dir.path()).unwrap().snapshot.step, 1);
    }

    #[test]
    fn a_step_that_is_saved_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut checkpoints = Checkpoints::new(dir.path(), 1);
        checkpoints.save_in_background(snapshot(1));
        checkpoints.wait().unwrap();
        std::fs::write(dir.path().join("model-1/marker"), "").unwrap();
        checkpoints.save_in_background(snapshot(1));
        checkpoints.wait().unwrap();
        assert!(dir.path().join("model-1/marker").exists());
    }
}
