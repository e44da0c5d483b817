//! Checkpoints: everything a run needs to go on after it was killed, in one folder per saved step.
//!
//! ```text
//! <dir>/model-<step>/
//!     model.safetensors       parameters and buffers
//!     optimizer.safetensors   moments, step counters, random states: whatever the caller keeps as tensors
//!     state.json              the rest of the training state
//!     args.json               the resolved command line
//!     MANIFEST.json           size and SHA-256 of each of the four, written last
//! ```
//!
//! A folder appears under its final name only when it is whole: it is written beside, every file and then the folder
//! is synced, and it is renamed into place. What a disk or a copy breaks later is found by size and checksum, and the
//! checkpoint before it is used.
//!
//! This module neither knows what the tensors mean nor decides when to save.

mod clean;
mod convert;
mod error;
mod export;
mod folder;
mod info;
mod pytorch;
mod reference;
mod retention;
mod source;
mod tensors;
mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tch::{Device, Tensor};

pub use convert::{Converted, convert};
pub use error::CheckpointError;
pub(crate) use export::write as write_whole;
pub use export::{Exported, Layout, export};
pub use folder::load_latest;
pub use info::info;
pub use source::{load, read_model_tensors};
pub use tensors::{read_tensors, write_tensors};
pub use writer::Checkpoints;

/// The state of a run after a step, detached from the run: training may go on while it is written.
#[derive(Debug)]
pub struct Snapshot {
    /// Optimizer steps done.
    pub step: u64,
    /// Parameters and buffers by name, on the CPU.
    pub model: Vec<(String, Tensor)>,
    /// Tensors of the optimizer and of the random generators by name, on the CPU.
    pub optimizer: Vec<(String, Tensor)>,
    /// All other state. JSON has no infinity and no NaN: `serde_json` makes both `null`.
    pub state: Value,
    /// The resolved arguments of the run.
    pub args: BTreeMap<String, String>,
}

impl Snapshot {
    /// Copies the tensors to the CPU, also those that are there already, because the next step overwrites them.
    ///
    /// # Errors
    /// [`CheckpointError::Tensor`] if a tensor cannot be copied, for want of memory say.
    pub fn detached_copy(
        step: u64,
        model: &[(String, Tensor)],
        optimizer: &[(String, Tensor)],
        state: Value,
        args: BTreeMap<String, String>,
    ) -> Result<Self, CheckpointError> {
        Ok(Self {
            step,
            model: copy_to_cpu(model)?,
            optimizer: copy_to_cpu(optimizer)?,
            state,
            args,
        })
    }
}

fn copy_to_cpu(tensors: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let copy = |tensor: &Tensor| {
        let detached = tensor.f_detach()?;
        let kind = detached.f_kind()?;
        detached
            .f_to_device_(Device::Cpu, kind, false, true)?
            .f_contiguous()
    };
    tensors
        .iter()
        .map(|(name, tensor)| match copy(tensor) {
            Ok(copied) => Ok((name.clone(), copied)),
            Err(source) => Err(CheckpointError::tensor(name, &source)),
        })
        .collect()
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Loaded {
    /// What was saved.
    pub snapshot: Snapshot,
    /// The folder it came from.
    pub path: PathBuf,
    /// One text for each newer checkpoint that could not be used, and why.
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_snapshot_keeps_its_values_while_the_parameters_change() {
        let mut weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let snapshot = Snapshot::detached_copy(
            1,
            &[("w".to_owned(), weight.shallow_clone())],
            &[],
            Value::Null,
            BTreeMap::new(),
        )
        .unwrap();
        tch::no_grad(|| {
            let _ = weight.fill_(7.0);
        });
        assert_eq!(
            Vec::<f32>::try_from(&snapshot.model[0].1).unwrap(),
            [1.0, 1.0]
        );
        assert!(!snapshot.model[0].1.requires_grad());
    }
}
