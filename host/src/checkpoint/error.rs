//! What can go wrong with a checkpoint, and what a user can do about it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use moeut_plugin_api::PluginError;

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `rename`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is there, but it is not what was written.
    #[error("`{}` is damaged: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What differs, with values.
        why: String,
    },
    /// A folder holds no checkpoint.
    #[error("no checkpoint in `{}`: {why}", path.display())]
    None {
        /// The folder that was searched.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// A folder holds checkpoints, and none of them can be used.
    #[error("no usable checkpoint in `{}`: {}", path.display(), reasons.join("; "))]
    AllUnusable {
        /// The folder that was searched.
        path: PathBuf,
        /// One reason for each checkpoint, the newest first.
        reasons: Vec<String>,
    },
    /// A tensor could not be copied, or is of a kind that the file format lacks.
    #[error("cannot store or restore tensor `{name}`: {why}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// libtorch's reason, its first line.
        why: String,
    },
    /// A save was waited for, and every attempt failed.
    #[error("the checkpoint of step {step} is not saved: {cause}")]
    Unsaved {
        /// The step.
        step: u64,
        /// Why the last attempt failed.
        cause: Box<CheckpointError>,
    },
    /// A file or a layout of another program that cannot be read or written.
    #[error("cannot use `{}`: {why}", path.display())]
    Foreign {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, with values.
        why: String,
        /// What to do about it.
        fix: String,
    },
    /// The thread that writes panicked, which is a bug of ours.
    #[error("the checkpoint writer stopped: {why}")]
    Writer {
        /// The message of the panic.
        why: String,
    },
}

impl CheckpointError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(super) fn corrupt(path: &Path, why: impl Into<String>) -> Self {
        Self::Corrupt {
            path: path.to_owned(),
            why: why.into(),
        }
    }

    pub(super) fn foreign(path: &Path, why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Foreign {
            path: path.to_owned(),
            why: why.into(),
            fix: fix.into(),
        }
    }

    /// libtorch appends a C++ backtrace to its messages; only the first line is for a user.
    pub(super) fn tensor(name: &str, source: &tch::TchError) -> Self {
        let text = source.to_string();
        let why = text.lines().next().unwrap_or_default().to_owned();
        Self::Tensor {
            name: name.to_owned(),
            why,
        }
    }

    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Io { path, source, .. } => help_with_io(path, source.kind()),
            Self::Corrupt { path, .. } => {
                let siblings = path.parent().and_then(Path::parent).unwrap_or(Path::new("."));
                format!(
                    "restore the newest whole checkpoint beside it: `-restore {}`",
                    siblings.display()
                )
            }
            Self::None { .. } => {
                "give `-restore` a `model-<step>` folder or that of a run: `-restore save/<name>`".to_owned()
            }
            Self::AllUnusable { .. } => {
                "start again with `-reset 1`, or give `-restore` another run's checkpoint folder".to_owned()
            }
            Self::Tensor { .. } => {
                "store tensors as bool, u8, i8, i16, i32, i64, f16, bf16, f32 or f64, and check free memory: `free -h`"
                    .to_owned()
            }
            Self::Unsaved { cause, .. } => format!(
                "{}; then type the same command again: it goes on from the newest whole checkpoint",
                cause.help()
            ),
            Self::Foreign { fix, .. } => fix.clone(),
            Self::Writer { .. } => "report this with the message above; training itself is not affected".to_owned(),
        }
    }
}

fn help_with_io(path: &Path, kind: ErrorKind) -> String {
    // The file itself may be gone or never have been; a link that leads nowhere is there.
    let is_there = |path: &&Path| path.symlink_metadata().is_ok();
    let there = path.ancestors().find(is_there).unwrap_or(Path::new("."));
    let there = there.display();
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!("free space: `df -h {there}`"),
        ErrorKind::FileTooLarge => {
            "raise the limit on file sizes: `ulimit -f unlimited`".to_owned()
        }
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            format!("move away what is in the folder's place: `ls -ld {there}` shows it")
        }
        ErrorKind::NotFound => format!("check the name: `ls {there}` shows what there is"),
        _ => format!("check that the folder exists and is writable: `ls -ld {there}`"),
    }
}

impl From<CheckpointError> for PluginError {
    fn from(error: CheckpointError) -> Self {
        let fix = error.help();
        let text = error.to_string();
        match text.split_once(": ") {
            Some((what, why)) => Self::new(what).why(why).fix(fix),
            None => Self::new(text).fix(fix),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_three_parts() {
        let error = CheckpointError::corrupt(
            Path::new("save/a/model-5/state.json"),
            "3 bytes instead of 9",
        );
        let parts = PluginError::from(error);
        assert_eq!(parts.what, "`save/a/model-5/state.json` is damaged");
        assert_eq!(parts.why, "3 bytes instead of 9");
        assert_eq!(
            parts.fix,
            "restore the newest whole checkpoint beside it: `-restore save/a`"
        );
    }
}
