//! What a plugin may ask of the host: log, progress, folders, other components' kernels, cancellation.
//!
//! A plugin has its own statics and its own standard library, so it has no logger, thread pool or cache of its own.

use crate::abi::HostObject;
use crate::abi::client::KernelClient;
use crate::{DType, Device, PluginError, TensorHandle};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

/// The host's services, handed to every component when it is made. Cloning shares them.
#[derive(Clone)]
pub struct Host {
    object: Arc<HostObject>,
    info: Arc<HostInfo>,
}

/// Facts about the host that do not change during a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Folder for data that may be made anew: tokenizers, token caches, downloads.
    pub cache_dir: PathBuf,
    /// Processor cores that a component may keep busy.
    pub n_threads: usize,
    /// Whether to behave like the reference where the reference is wrong.
    pub compat: bool,
    /// Processes that train one model together, each its share of every batch.
    #[serde(default = "one")]
    pub n_ranks: usize,
}

fn one() -> usize {
    1
}

/// How the values of all processes become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reduction {
    /// Their sum.
    Sum = 0,
    /// The largest.
    Max = 1,
}

/// How much a message matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LogLevel {
    /// For whoever looks for a fault.
    Debug = 0,
    /// For everybody.
    Info = 1,
    /// Something that the user should look at.
    Warning = 2,
}

impl Host {
    pub(crate) fn new(object: HostObject) -> Result<Self, PluginError> {
        let info = serde_json::from_str(object.info().as_str()).map_err(|error| {
            PluginError::new("the host's description of itself cannot be read")
                .why(error.to_string())
                .fix("use a plugin built for this version of moeut-host")
        })?;
        Ok(Self {
            object: Arc::new(object),
            info: Arc::new(info),
        })
    }

    /// Facts that do not change.
    pub fn info(&self) -> &HostInfo {
        &self.info
    }

    /// A message for the user.
    pub fn log(&self, level: LogLevel, text: &str) {
        self.object.log(level as u8, text.into());
    }

    /// How far a long piece of work is; `total` 0 means unknown, `done == total` ends it.
    pub fn progress(&self, label: &str, done: u64, total: u64) {
        self.object.progress(label.into(), done, total);
    }

    /// Whether the user wants to stop; ask often in long work and return an error soon after.
    pub fn is_cancelled(&self) -> bool {
        self.object.is_cancelled()
    }

    /// A kernel by name; `auto` takes the fastest that supports device and element type.
    ///
    /// # Errors
    /// If no such kernel is loaded, or it does not support them.
    pub fn kernel(
        &self,
        name: &str,
        device: Device,
        dtype: DType,
    ) -> Result<KernelClient, PluginError> {
        let want = serde_json::to_string(&(name, device, dtype))
            .map_err(|error| PluginError::new("kernel request").why(error.to_string()))?;
        let object = self
            .object
            .kernel(want.as_str().into())
            .into_result()
            .map_err(PluginError::from)?;
        Ok(KernelClient::new(object))
    }

    /// Replaces a tensor by its sum or maximum over all [`HostInfo::n_ranks`] processes, in place and without a gradient.
    /// In training only, where all processes do the same in the same order.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn all_reduce(
        &self,
        tensor: TensorHandle,
        reduction: Reduction,
    ) -> Result<(), PluginError> {
        let reduced = self.object.all_reduce(tensor, reduction as u8);
        reduced.into_result().map_err(PluginError::from)
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}
