//! Files that are either whole or absent, and the lock that keeps two processes from making the same one.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use crate::{
    error::TextError,
    progress::{Progress, Watch},
};

/// Creates a folder and those above it.
pub(crate) fn create_folder(folder: &Path) -> Result<(), TextError> {
    fs::create_dir_all(folder).map_err(|source| TextError::io("create", folder, source))
}

/// Writes a file that appears under its name only once all its bytes are on the disk.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), TextError> {
    let mut file = AtomicFile::create(path)?;
    file.write(bytes)?;
    file.finish()
}

/// A file in the making, beside its final place. Dropped unfinished, it is removed.
pub(crate) struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    /// None once finished.
    writer: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts `<path>.tmp`. The caller holds the cache's lock, so nobody else writes it.
    pub(crate) fn create(path: &Path) -> Result<Self, TextError> {
        let temporary = beside(path, ".tmp");
        let file = File::create(&temporary)
            .map_err(|source| TextError::io("create", &temporary, source))?;
        Ok(Self {
            path: path.to_owned(),
            temporary,
            writer: Some(BufWriter::with_capacity(1 << 20, file)),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), TextError> {
        let Some(writer) = self.writer.as_mut() else {
            return Ok(());
        };
        writer
            .write_all(bytes)
            .map_err(|source| TextError::io("write", &self.temporary, source))
    }

    /// Brings everything to the disk, then gives the file its name.
    pub(crate) fn finish(mut self) -> Result<(), TextError> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let named = || {
            let file = writer
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error)?;
            give_name(&file, &self.temporary, &self.path)
        };
        let outcome: std::io::Result<()> = named();
        outcome.map_err(|source| {
            // The first error is the one to report.
            let _ = fs::remove_file(&self.temporary);
            TextError::io("write", &self.path, source)
        })
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            // Nobody reads a `.tmp`; one that cannot be removed is overwritten next time.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// `<path><suffix>`
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Brings a written file to the disk, and then under its final name.
pub(crate) fn give_name(file: &File, temporary: &Path, path: &Path) -> std::io::Result<()> {
    file.sync_all()?;
    fs::rename(temporary, path)?;
    // The name itself is on the disk only once the folder is.
    path.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Holds a lock file until dropped; the system frees it if the process dies.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Waits until nobody else holds `<folder>/lock`. The folder is created.
    pub(crate) fn of_folder(folder: &Path, watch: Watch<'_>) -> Result<Self, TextError> {
        create_folder(folder)?;
        Self::acquire(&folder.join("lock"), watch)
    }

    /// Waits until nobody else holds the lock file at `path`.
    pub(crate) fn acquire(path: &Path, watch: Watch<'_>) -> Result<Self, TextError> {
        let cannot_lock = |source| TextError::io("lock", path, source);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(cannot_lock)?;
        let mut has_told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::Error(source)) => return Err(cannot_lock(source)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !has_told {
                watch.tell(Progress::WaitingForLock {
                    path: path.to_owned(),
                });
                has_told = true;
            }
            // Asking again, rather than blocking in the system, lets the host cancel the wait.
            watch.check()?;
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, sync::mpsc};

    use super::*;

    #[test]
    fn an_unfinished_file_never_shows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chunk_0.bin");
        let mut file = AtomicFile::create(&path).unwrap();
        file.write(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        write_atomically(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_second_waits_says_so_once_and_can_be_cancelled() {
        let folder = tempfile::tempdir().unwrap();
        let first = FileLock::of_folder(folder.path(), Watch::nobody()).unwrap();
        let n_asked = Cell::new(0);
        let is_cancelled = || {
            n_asked.set(n_asked.get() + 1);
            n_asked.get() > 2
        };
        let news = Cell::new(0);
        let watch = Watch {
            progress: &|_| news.set(news.get() + 1),
            is_cancelled: &is_cancelled,
        };
        assert!(matches!(
            FileLock::of_folder(folder.path(), watch),
            Err(TextError::Cancelled)
        ));
        assert_eq!(news.get(), 1);

        let (waits, waiting) = mpsc::channel();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                let tell = move |_| waits.send(()).unwrap();
                FileLock::of_folder(
                    folder.path(),
                    Watch {
                        progress: &tell,
                        is_cancelled: &|| false,
                    },
                )
                .is_ok()
            });
            waiting.recv().unwrap();
            drop(first);
            assert!(second.join().unwrap());
        });
    }
}
