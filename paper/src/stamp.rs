//! What a product was made from, so that nothing is made twice: like make, by size and time of files.

use crate::files;
use crate::run::Reason;
use moeut_host::error::HostError;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// A file as it was: path, and bytes and nanoseconds since 1970 if it was there.
type Seen = (PathBuf, Option<(u64, u128)>);

/// Everything that a product depends on.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Inputs {
    /// Another program may make other figures.
    program: Option<Seen>,
    files: Vec<Seen>,
}

impl Inputs {
    /// Looks at files, whether they are there or not.
    pub(crate) fn look(files: Vec<PathBuf>) -> Self {
        Self {
            program: std::env::current_exe().ok().map(seen),
            files: files.into_iter().map(seen).collect(),
        }
    }
}

fn seen(path: PathBuf) -> Seen {
    let metadata = std::fs::metadata(&path).ok();
    let state = metadata.and_then(|metadata| {
        let since = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some((metadata.len(), since.as_nanos()))
    });
    (path, state)
}

/// What was made from what.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) inputs: Inputs,
    /// Names of the files that were made.
    pub(crate) outputs: Vec<String>,
    /// Said again whenever the product is asked for.
    pub(crate) left_out: Vec<(String, Reason)>,
}

impl Stamp {
    fn path(out: &Path, product: &str) -> PathBuf {
        out.join(".made").join(format!("{product}.json"))
    }

    /// The stamp of a product, if it is as it would be made now.
    pub(crate) fn current(out: &Path, product: &str, inputs: &Inputs) -> Option<Self> {
        let stamp: Self = files::remembered(&Self::path(out, product))?;
        let is_there =
            |name: &String| std::fs::metadata(out.join(name)).is_ok_and(|file| file.len() > 0);
        (stamp.inputs == *inputs && stamp.outputs.iter().all(is_there)).then_some(stamp)
    }

    /// Remembers what was made.
    ///
    /// # Errors
    /// If the stamp cannot be written.
    pub(crate) fn write(&self, out: &Path, product: &str) -> Result<(), HostError> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        files::write(&Self::path(out, product), text.as_bytes())
    }
}
