//! `-dump_logs 1`: which experts were selected how often, step by step, as files.
//!
//! ```text
//! save/<name>/export/log_dumps/<step>/selections.safetensors
//! save/<name>/export/log_dumps/<step>/valid/<stream>/selections.safetensors
//! ```
//! A σ-MoE layer has `unique_layers.<g>.pkm/counts` `[L, E]` and `…/pairs` `[E, E]`, SwitchHead
//! `unique_layers.<g>.self_attn/counts/<side>` `[L, H, A]` and `…/sel_correlation` `[H, A, A]`, all int64; `L`
//! applications of the layer. The reference makes these folders and leaves them empty.

use crate::checkpoint::{CheckpointError, write_tensors, write_whole};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Where the files go.
#[derive(Debug, Clone)]
pub struct Dumps {
    folder: PathBuf,
}

impl Dumps {
    /// Below the folder of a run.
    pub fn new(run_folder: &Path) -> Self {
        Self {
            folder: run_folder.join("export/log_dumps"),
        }
    }

    /// Writes the counts of a step, or of a stream's validation.
    pub(super) fn write(
        &self,
        step: u64,
        stream: Option<&str>,
        selections: &[(String, Tensor)],
    ) -> Result<(), CheckpointError> {
        let mut folder = self.folder.join(step.to_string());
        if let Some(stream) = stream {
            folder = folder.join("valid").join(stream);
        }
        std::fs::create_dir_all(&folder).map_err(CheckpointError::io("create", &folder))?;
        write_whole(&folder.join("selections.safetensors"), |out, path| {
            write_tensors(out, path, selections)
        })
    }
}
