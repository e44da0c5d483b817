//! Reading and writing whole files, with reasons that name them.

use moeut_host::error::HostError;
use serde::de::DeserializeOwned;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The text of a file; nothing if there is no such file.
///
/// # Errors
/// If it is there and cannot be read.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("`{}` cannot be read: {error}", path.display())),
    }
}

/// What a JSON file says; nothing if it is absent or damaged, and so has to be made anew.
pub(crate) fn remembered<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Writes a file and its folder: beside an earlier version, which it replaces when it is whole.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        // As other programs make files: for all whom the user lets read.
        let mode = std::fs::Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new()
            .permissions(mode)
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|error| {
        HostError::new(
            format!("`{}` cannot be written", path.display()),
            error.to_string(),
            "check its permissions and the free space",
        )
    })
}
