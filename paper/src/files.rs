//! Reading and writing whole files, with reasons that name them.

use moeut_host::error::HostError;
use moeut_host::whole_file::{folder_of, write_or_explain};
use serde::de::DeserializeOwned;
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
    // A folder that cannot be made is one that the file cannot be written to.
    let _ = std::fs::create_dir_all(folder_of(path));
    write_or_explain(path, bytes)
}
