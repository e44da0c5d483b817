//! Files that are there whole or not at all: written beside an earlier version, synced, and renamed over it.

use crate::error::HostError;
use std::fs::{File, Permissions};
use std::io::{Result, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The folder of a file; a name alone is in the working folder.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Puts `bytes` in the place of `path`, for all whom the user's mask lets read.
///
/// # Errors
/// If the system refuses; an earlier version is as it was.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fill(path, |error| error, |file| file.write_all(bytes))
}

/// As [`write`], for whoever has no more to say about it.
///
/// # Errors
/// As [`write`].
pub fn write_or_explain(path: &Path, bytes: &[u8]) -> std::result::Result<(), HostError> {
    write(path, bytes).map_err(|error| {
        HostError::new(
            format!("`{}` cannot be written", path.display()),
            error.to_string(),
            "check its permissions and the free space",
        )
    })
}

/// As [`write`], with contents that `fill` writes and errors that `io` makes of the system's.
///
/// # Errors
/// As [`write`], and whatever `fill` says.
pub fn fill<E>(
    path: &Path,
    io: impl Fn(std::io::Error) -> E,
    fill: impl FnOnce(&mut File) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let mut beside = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder_of(path))
        .map_err(&io)?;
    fill(beside.as_file_mut())?;
    beside.as_file().sync_all().map_err(&io)?;
    beside.persist(path).map_err(|error| io(error.error))?;
    // The name, too; a file system that cannot do that for a folder has no more to give.
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_fails_leaves_the_earlier_version_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write(&path, b"one").unwrap();
        let failed = fill(
            &path,
            |error| error,
            |file| {
                file.write_all(b"tw")?;
                Err(std::io::Error::other("full"))
            },
        );
        assert_eq!(failed.unwrap_err().to_string(), "full");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"three").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        // As `File::create` makes it.
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        File::create(dir.path().join("y")).unwrap();
        assert_eq!(mode(&path), mode(&dir.path().join("y")));
        let error = write_or_explain(&dir.path().join("no/x"), b"").unwrap_err();
        assert!(error.to_string().contains("cannot be written"));
    }
}
