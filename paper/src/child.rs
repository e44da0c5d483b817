//! Programs beside this one, and this one itself, as children: they train, evaluate, and start where they should.

use moeut_host::error::HostError;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Who is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// `moeut-host`.
    Host,
    /// This program.
    Paper,
}

impl Program {
    fn path(self) -> Result<PathBuf, HostError> {
        let own = std::env::current_exe().map_err(|error| {
            HostError::new(
                "this program does not know where it is",
                error.to_string(),
                "",
            )
        })?;
        let path = match self {
            Self::Paper => own,
            Self::Host => own.with_file_name("moeut-host"),
        };
        if path.is_file() {
            return Ok(path);
        }
        Err(HostError::new(
            format!("`{}` is not there", path.display()),
            "this program lets it train and evaluate",
            "build both with `cargo xtask build`",
        ))
    }
}

/// Runs a program in a folder to its end; whether it went well. What it says goes to where our messages go.
///
/// # Errors
/// If it cannot be started.
pub(crate) fn run(program: Program, folder: &Path, args: &[String]) -> Result<bool, HostError> {
    let path = program.path()?;
    let status = Command::new(&path)
        .args(args)
        .current_dir(folder)
        .stdout(std::io::stderr())
        .status()
        .map_err(|error| {
            let what = format!("`{}` cannot be started", path.display());
            HostError::new(what, error.to_string(), "")
        })?;
    Ok(status.success())
}
