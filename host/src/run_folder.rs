//! The folder of a run, `save/<name>`: its lock, its arguments, and what `-reset` removes.
//!
//! ```text
//! save/<name>/
//!     lock              held by the process that trains, with its id and machine
//!     args.json         the arguments as typed, for the next start
//!     startup_log.txt   each start: command, program, machine, plugins
//!     checkpoint/       see `checkpoint`
//!     metrics.jsonl, plots/, tensorboard/, wandb/   see `log`
//!     tensorboard.log   what the TensorBoard server said last
//! ```

use crate::error::HostError;
use crate::whole_file;
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// Folders that `-reset` removes, as in the reference; everything else is the user's.
const STATE: &[&str] = &[
    "checkpoint",
    "tensorboard",
    "export",
    "model_weights",
    "tmp",
    "plots",
];

/// The folder of a run that this process alone may change.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// The system lets go of the lock when the process ends, however it ends.
    _lock: File,
}

impl RunFolder {
    /// Makes the folder if there is none, and locks it.
    ///
    /// # Errors
    /// If another process trains this run, or the folder cannot be written.
    pub fn lock(path: &Path) -> Result<Self, HostError> {
        std::fs::create_dir_all(path).map_err(|error| io_error(path, &error))?;
        let lock_path = path.join("lock");
        let fail = |error: std::io::Error| io_error(&lock_path, &error);
        // Not truncated: it says who holds the lock.
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(path, &mut file)),
            Err(TryLockError::Error(error)) => return Err(fail(error)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "process {} on {}", std::process::id(), machine()))
            .map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            _lock: file,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what an earlier run of this name left, but nothing else.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn reset(&self) -> Result<(), HostError> {
        for name in STATE {
            let path = self.path.join(name);
            match std::fs::remove_dir_all(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error(&path, &error)),
            }
        }
        Ok(())
    }

    /// Stores the arguments as typed, beside the old ones until they are complete.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write_args(&self, arguments: &BTreeMap<String, String>) -> Result<(), HostError> {
        let path = self.path.join("args.json");
        let mut text = Vec::new();
        let mut writer = serde_json::Serializer::with_formatter(
            &mut text,
            serde_json::ser::PrettyFormatter::with_indent(b"    "),
        );
        serde::Serialize::serialize(arguments, &mut writer)
            .map_err(std::io::Error::from)
            .and_then(|()| whole_file::write(&path, &text))
            .map_err(|error| io_error(&path, &error))
    }

    /// Adds a start to `startup_log.txt`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn log_start(&self, text: &str) -> Result<(), HostError> {
        let path = self.path.join("startup_log.txt");
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| io_error(&path, &error))
    }
}

/// The arguments that a run of this folder was started with, if there was one.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read_args(folder: &Path) -> Result<Option<BTreeMap<String, String>>, HostError> {
    let path = folder.join("args.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(&path, &error)),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        HostError::new(
            format!("`{}` cannot be read", path.display()),
            error.to_string(),
            "delete it, or start with `-reset 1`",
        )
    })
}

/// Name of this machine.
pub fn machine() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

fn taken(path: &Path, lock: &mut File) -> HostError {
    let mut holder = String::new();
    // The other process may be about to write its line.
    let _ = lock.read_to_string(&mut holder);
    let holder = match holder.trim() {
        "" => "another process",
        line => line,
    };
    HostError::new(
        format!("the run `{}` is being trained", path.display()),
        format!("{holder} holds its lock"),
        "wait for it, end it with `kill <process>` (it saves first), or choose another `-name`",
    )
}

fn io_error(path: &Path, error: &std::io::Error) -> HostError {
    HostError::new(
        format!("`{}` cannot be used", path.display()),
        error.to_string(),
        "check its permissions and the free space",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_folder_has_one_holder_and_the_next_one_comes_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let first = RunFolder::lock(&path).unwrap();
        let error = RunFolder::lock(&path).unwrap_err().render(false);
        let id = std::process::id().to_string();
        assert!(
            error.contains("is being trained") && error.contains(&id),
            "{error}"
        );
        drop(first);
        RunFolder::lock(&path).unwrap();
    }

    #[test]
    fn reset_leaves_what_is_not_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(dir.path()).unwrap();
        std::fs::create_dir_all(dir.path().join("checkpoint/model-1")).unwrap();
        std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        folder.reset().unwrap();
        assert!(!dir.path().join("checkpoint").exists());
        assert!(dir.path().join("notes.txt").exists());
    }

    #[test]
    fn arguments_come_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_args(dir.path()).unwrap(), None);
        let folder = RunFolder::lock(dir.path()).unwrap();
        let args = BTreeMap::from([("lr".to_owned(), "1e-4".to_owned())]);
        folder.write_args(&args).unwrap();
        assert_eq!(read_args(dir.path()).unwrap(), Some(args));
    }
}
