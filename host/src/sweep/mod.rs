//! Sweeps: a W&B sweep file becomes runs, with or without W&B.
//!
//! ```text
//! yaml → file → space     what the file says: parameters and what each may be
//!         ↓
//!        runs             the runs in W&B's order, checked against the arguments of the task and its components
//!         ↓
//!        queue, slurm     who trains them: children of this process, or an array of SLURM jobs
//!         ↓
//!        record → table   what they reached, read from their own folders
//! ```
//! [`convert`] writes the file anew for `wandb agent`. Words of the command line are read in [`crate::sweep_cli`].
//!
//! There is no state besides the runs' own folders: a run is done if its checkpoint and its last validation say so, and
//! a sweep that is started again goes on from there.

pub mod convert;
pub mod file;
pub mod queue;
pub mod record;
pub mod runs;
pub mod slurm;
pub mod space;
pub mod table;
pub mod yaml;

use crate::error::HostError;
use std::path::Path;

/// What is wrong with a sweep file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Counted from 1.
    pub line: usize,
    what: String,
    why: String,
    fix: String,
}

impl Mistake {
    fn new(
        line: usize,
        what: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            line,
            what: what.into(),
            why: why.into(),
            fix: fix.into(),
        }
    }

    /// With the place in front.
    pub fn in_file(self, path: &Path) -> HostError {
        let what = format!("{}, line {}: {}", path.display(), self.line, self.what);
        HostError::new(what, self.why, self.fix)
    }
}
