//! What a run tells the outside: records for files and dashboards, progress for the terminal.
//!
//! The train loop hands a [`Record`] to [`Sinks`] and goes on; a thread for each [`Sink`] passes it on. No sink is an empty
//! list. Where a number comes from and how often it is logged is the caller's business.

mod jsonl;
mod plot_files;
mod protobuf;
mod sinks;
mod tensorboard;
mod terminal;
mod unhurried;
mod wandb;

use std::path::PathBuf;

use crate::signals::Ending;
use moeut_plot::Plot;

pub use jsonl::Jsonl;
pub use plot_files::{PlotFile, PlotFiles};
pub use sinks::Sinks;
pub use tensorboard::TensorBoard;
pub use terminal::{Level, StepLine, Terminal, TerminalMode};
pub use wandb::{Wandb, WandbRun, WandbStart, run_name};

/// What is known about one step. Names are paths such as `train/loss`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// Optimizer steps done.
    pub step: u64,
    /// Numbers by name; NaN and infinities are allowed.
    pub scalars: Vec<(String, f64)>,
    /// Texts by name.
    pub texts: Vec<(String, String)>,
    /// Charts by name.
    pub plots: Vec<(String, Plot)>,
}

/// A place that records go to.
pub trait Sink: Send {
    /// The name under which a user knows it: `tensorboard`.
    fn name(&self) -> &str;

    /// Takes one record, whose names are normalized.
    ///
    /// # Errors
    /// If the record was not taken. The same record is offered again later, so nothing of it may have been kept.
    fn write(&mut self, record: &Record) -> Result<(), SinkError>;

    /// Passes on what is still held back.
    ///
    /// # Errors
    /// If something held back is lost.
    fn flush(&mut self) -> Result<(), SinkError>;

    /// Ends the log, which is the last call of a run.
    ///
    /// # Errors
    /// As [`Self::flush`].
    fn finish(&mut self, _end: End) -> Result<(), SinkError> {
        self.flush()
    }

    /// What the user should know, since the last call.
    fn take_notices(&mut self) -> Vec<Notice> {
        Vec::new()
    }
}

/// A line for the user.
pub type Notice = (Level, String);

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It has done its last step.
    Finished,
    /// With an error.
    Failed,
    /// By a signal; it can go on.
    Stopped(Ending),
}

/// Why a sink could not take a record.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The file system refused.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Anything else, a service that does not answer say.
    #[error("{why}")]
    Other {
        /// The reason, with values.
        why: String,
    },
}

impl SinkError {
    fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Io { path, .. } => format!(
                "check space and permissions: `df -h {0}; ls -ld {0}`",
                path.display()
            ),
            Self::Other { .. } => {
                "training goes on without it; see `metrics.jsonl` for the numbers".to_owned()
            }
        }
    }
}

impl From<SinkError> for moeut_plugin_api::PluginError {
    fn from(error: SinkError) -> Self {
        Self::new("cannot write the log")
            .why(error.to_string())
            .fix(error.help())
    }
}

/// Joins the parts of a name with single slashes: `//train///loss/` becomes `train/loss`, as in the reference's
/// dashboards.
pub fn normalize_name(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
    parts.join("/")
}

/// The path of a file that is named after a metric: no part of it leads out of its folder or is longer than file systems
/// take.
fn path_of(name: &str) -> String {
    const MAX_BYTES: usize = 120;
    let part = |part: &str| match part {
        "." | ".." => "_".to_owned(),
        part => part[..part.floor_char_boundary(MAX_BYTES)].replace('\0', "_"),
    };
    let parts: Vec<String> = normalize_name(name).split('/').map(part).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_named_after_a_metric_stays_in_its_folder() {
        assert_eq!(path_of("/a/../b//."), "a/_/b/_");
        assert_eq!(path_of(&"ä".repeat(200)), "ä".repeat(60));
    }

    #[test]
    fn names_have_single_slashes_inside_only() {
        assert_eq!(normalize_name("//train///loss/"), "train/loss");
        assert_eq!(normalize_name("lr"), "lr");
        assert_eq!(normalize_name("/"), "");
    }
}
