//! Writes checkpoints in the background and deletes old ones. A failure is a warning: a full disk must not end a run
//! that has days behind it.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use super::{CheckpointError, Snapshot, folder, retention};

/// The checkpoints of one run. At most one is being written at a time.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep_last: usize,
    keep_every: Option<Duration>,
    clock: fn() -> SystemTime,
    writing: Option<JoinHandle<Result<Saved, CheckpointError>>>,
    last_saved: Option<u64>,
    warnings: Vec<String>,
}

/// What the thread did: the checkpoint is whole even if an old one could not be deleted.
#[derive(Debug)]
struct Saved {
    step: u64,
    cleanup: Result<(), CheckpointError>,
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
            writing: None,
            last_saved: None,
            warnings: Vec::new(),
        }
    }

    /// Keeps one more checkpoint per `period` for good.
    #[must_use]
    pub fn keep_every(mut self, period: Duration) -> Self {
        self.keep_every = Some(period);
        self
    }

    /// Starts to write `snapshot`, after waiting for the one before it. A step that is saved already is skipped. A
    /// failure is reported by [`Self::take_warnings`], and the next save is the next attempt.
    pub fn save_in_background(&mut self, snapshot: Snapshot) {
        if let Err(error) = self.wait() {
            self.warn(&error);
        }
        if self.last_saved == Some(snapshot.step) {
            return;
        }
        let dir = self.dir.clone();
        let (keep_last, keep_every) = (self.keep_last, self.keep_every);
        let now = (self.clock)();
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let spawned = thread.spawn(move || {
            folder::write(&dir, &snapshot, now)?;
            Ok(Saved {
                step: snapshot.step,
                cleanup: delete_expired(&dir, snapshot.step, keep_last, keep_every, now),
            })
        });
        match spawned {
            Ok(handle) => self.writing = Some(handle),
            Err(error) => self.warn(&CheckpointError::io("start a thread to write", &self.dir)(
                error,
            )),
        }
    }

    /// Waits until the last save is on the disk.
    ///
    /// # Errors
    /// Why that save failed; training may go on. It is not among [`Self::take_warnings`] then.
    pub fn wait(&mut self) -> Result<(), CheckpointError> {
        let Some(handle) = self.writing.take() else {
            return Ok(());
        };
        let saved = handle.join().map_err(|panic| {
            let why = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic without a message");
            CheckpointError::Writer {
                why: why.to_owned(),
            }
        })??;
        self.last_saved = Some(saved.step);
        if let Err(error) = saved.cleanup {
            let help = error.help();
            self.warnings
                .push(format!("an old checkpoint stays: {error}; {help}"));
        }
        Ok(())
    }

    /// The failures since the last call, for the user.
    pub fn take_warnings(&mut self) -> Vec<String> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished)
            && let Err(error) = self.wait()
        {
            self.warn(&error);
        }
        std::mem::take(&mut self.warnings)
    }

    fn warn(&mut self, error: &CheckpointError) {
        self.warnings.push(format!(
            "checkpoint not saved, the next save tries again: {error}; {}",
            error.help()
        ));
    }
}

impl Drop for Checkpoints {
    /// A run that ends early still gets the checkpoint that was under way.
    fn drop(&mut self) {
        let _ = self.wait();
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
    #[test]
    fn a_folder_that_refuses_writes_is_a_warning_and_the_next_save_tries_again() {
        let dir = tempfile::tempdir().unwrap();
        let blocked = dir.path().join("file");
        std::fs::write(&blocked, "").unwrap();
        let mut checkpoints = Checkpoints::new(&blocked, 1);
        checkpoints.save_in_background(snapshot(1));
        checkpoints.save_in_background(snapshot(2));
        let warnings = checkpoints.take_warnings();
        assert!(!warnings.is_empty());
        assert!(
            warnings[0].starts_with("checkpoint not saved, the next save tries again: cannot ")
        );

        let _ = checkpoints.wait();
        std::fs::remove_file(&blocked).unwrap();
        checkpoints.save_in_background(snapshot(2));
        checkpoints.wait().unwrap();
        assert_eq!(load(&blocked).unwrap().snapshot.step, 2);
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
