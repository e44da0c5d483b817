//! The caller's side of the boundary: objects of a plugin as ordinary Rust values.
//!
//! The host uses all of it; a model plugin uses [`KernelClient`], which the host hands on from another plugin.

use super::{
    HostObject, KernelObject, ModelObject, PluginModuleRef, RawForwardInput, RawGroupedMatmul,
    RawHost, RawHost_TO, RawNamed, RawResult, TaskObject, TokenDatasetObject,
};
use crate::host::{HostInfo, LogLevel};
use crate::kernel::{Capabilities, GroupedMatmul};
use crate::model::{
    ForwardInput, ForwardOutput, ModelAbilities, ModelSetup, ModelSummary, NamedTensor, Parameter,
    Past,
};
use crate::{
    ComponentInfo, DType, Device, PluginError, RunFacts, StreamInfo, StreamRequest, TaskPlan,
    TensorHandle,
};
use abi_stable::library::{LibraryError, lib_header_from_path};
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{RResult, RStr, RString};
use serde::{Serialize, de::DeserializeOwned};
use std::path::Path;
use std::sync::Arc;

/// What the host implements so that plugins can call back; see [`crate::Host`] for the other side.
pub trait HostServices: Send + Sync + 'static {
    /// Facts that do not change.
    fn info(&self) -> HostInfo;
    /// A message for the user.
    fn log(&self, level: LogLevel, text: &str);
    /// Progress of a long piece of work.
    fn progress(&self, label: &str, done: u64, total: u64);
    /// Whether the user wants to stop.
    fn is_cancelled(&self) -> bool;
    /// Makes a kernel.
    ///
    /// # Errors
    /// If there is none of that name, or it does not support device and element type.
    fn kernel(&self, name: &str, device: Device, dtype: DType)
    -> Result<KernelClient, PluginError>;
}

struct Services(Arc<dyn HostServices>);

impl RawHost for Services {
    fn info(&self) -> RString {
        serde_json::to_string(&self.0.info())
            .unwrap_or_default()
            .into()
    }

    fn log(&self, level: u8, text: RStr<'_>) {
        let level = match level {
            0 => LogLevel::Debug,
            1 => LogLevel::Info,
            _ => LogLevel::Warning,
        };
        self.0.log(level, text.as_str());
    }

    fn progress(&self, label: RStr<'_>, done: u64, total: u64) {
        self.0.progress(label.as_str(), done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }

    fn kernel(&self, request_json: RStr<'_>) -> RawResult<KernelObject> {
        let made = decode::<(String, Device, DType)>(request_json.as_str())
            .and_then(|(name, device, dtype)| self.0.kernel(&name, device, dtype));
        match made {
            Ok(kernel) => RResult::ROk(kernel.object),
            Err(error) => RResult::RErr(error.into()),
        }
    }
}

fn host_object(services: &Arc<dyn HostServices>) -> HostObject {
    RawHost_TO::from_value(Services(Arc::clone(services)), TD_Opaque)
}

/// An opened plugin library. It is never unloaded: its objects and statics may live anywhere.
#[derive(Clone, Copy)]
pub struct PluginClient {
    module: PluginModuleRef,
}

/// Why a library could not be opened as a plugin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system's loader refused it; the text is the loader's.
    #[error("{0}")]
    Loader(String),
    /// It is a library, but exports no plugin module.
    #[error("it exports no moeut plugin module")]
    NotAPlugin,
    /// It was built against another layout of the API; the long explanation is for `-v`.
    #[error("{summary}")]
    Layout {
        /// One line.
        summary: String,
        /// all that `abi_stable` says.
        details: String,
    },
}

impl PluginClient {
    /// Opens a library and checks its layout. Opening runs its constructors: verify it before.
    ///
    /// # Errors
    /// If the loader refuses the file, or it is no plugin of this API.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let header = lib_header_from_path(path).map_err(open_error)?;
        let module = header
            .init_root_module::<PluginModuleRef>()
            .map_err(open_error)?;
        Ok(Self { module })
    }

    /// The manifest records, one JSON object a line.
    pub fn manifest(&self) -> String {
        (self.module.manifest())().into()
    }

    /// What the plugin registers.
    ///
    /// # Errors
    /// If the plugin fails to say.
    pub fn components(&self) -> Result<Vec<ComponentInfo>, PluginError> {
        decode(result((self.module.components())())?.as_str())
    }

    /// Makes a task.
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn new_task(
        &self,
        name: &str,
        config: &serde_json::Value,
        services: &Arc<dyn HostServices>,
    ) -> Result<TaskClient, PluginError> {
        let config = config.to_string();
        let made =
            (self.module.new_task())(name.into(), config.as_str().into(), host_object(services));
        Ok(TaskClient {
            object: result(made)?,
        })
    }

    /// Opens a dataset.
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn new_token_dataset(
        &self,
        name: &str,
        config: &serde_json::Value,
        request: &StreamRequest,
        services: &Arc<dyn HostServices>,
    ) -> Result<TokenDatasetClient, PluginError> {
        let (config, request) = (config.to_string(), encode(request)?);
        let made = (self.module.new_token_dataset())(
            name.into(),
            config.as_str().into(),
            request.as_str().into(),
            host_object(services),
        );
        Ok(TokenDatasetClient {
            object: result(made)?,
        })
    }

    /// Builds a model.
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn new_model(
        &self,
        name: &str,
        config: &serde_json::Value,
        setup: &ModelSetup,
        services: &Arc<dyn HostServices>,
    ) -> Result<ModelClient, PluginError> {
        let (config, setup) = (config.to_string(), encode(setup)?);
        let made = (self.module.new_model())(
            name.into(),
            config.as_str().into(),
            setup.as_str().into(),
            host_object(services),
        );
        Ok(ModelClient {
            object: result(made)?,
        })
    }

    /// Makes a kernel.
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn new_kernel(
        &self,
        name: &str,
        services: &Arc<dyn HostServices>,
    ) -> Result<KernelClient, PluginError> {
        let made = (self.module.new_kernel())(name.into(), host_object(services));
        Ok(KernelClient {
            object: result(made)?,
        })
    }
}

/// A task in a plugin.
pub struct TaskClient {
    object: TaskObject,
}

impl TaskClient {
    /// See [`crate::Task::plan`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn plan(&self, facts: &RunFacts) -> Result<TaskPlan, PluginError> {
        decode(result(self.object.plan(encode(facts)?.as_str().into()))?.as_str())
    }
}

/// A token dataset in a plugin.
pub struct TokenDatasetClient {
    object: TokenDatasetObject,
}

impl TokenDatasetClient {
    /// See [`crate::TokenDataset::info`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn info(&self) -> Result<StreamInfo, PluginError> {
        decode(result(self.object.info())?.as_str())
    }

    /// See [`crate::TokenDataset::read`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn read(&self, windows: &[u64], tokens: &mut [i32]) -> Result<(), PluginError> {
        result(self.object.read(windows.into(), tokens.into()))
    }

    /// See [`crate::TokenDataset::encode`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, PluginError> {
        Ok(result(self.object.encode(text.into()))?.into())
    }

    /// See [`crate::TokenDataset::decode`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn decode(&self, ids: &[i32]) -> Result<String, PluginError> {
        Ok(result(self.object.decode(ids.into()))?.into())
    }
}

/// A model in a plugin.
pub struct ModelClient {
    object: ModelObject,
}

impl ModelClient {
    /// See [`crate::Model::parameters`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn parameters(&self) -> Result<Vec<Parameter>, PluginError> {
        Ok(result(self.object.parameters())?
            .into_iter()
            .map(|raw| Parameter {
                name: raw.name.into(),
                tensor: raw.tensor,
                is_trainable: raw.is_trainable,
            })
            .collect())
    }

    /// See [`crate::Model::forward`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn forward(&mut self, input: ForwardInput) -> Result<ForwardOutput, PluginError> {
        let raw = RawForwardInput {
            tokens_tb: input.tokens_tb,
            is_training: input.is_training,
            wants_stats: input.wants_stats,
        };
        let raw = result(match input.past {
            Past::None => self.object.forward(raw),
            past => {
                let past = encode(&past)?;
                self.object.forward_with_past(raw, past.as_str().into())
            }
        })?;
        Ok(ForwardOutput {
            logits_tbv: raw.logits_tbv,
            regularizers: raw.regularizers.into_iter().map(named).collect(),
            stats: raw.stats.into_iter().map(named).collect(),
        })
    }

    /// See [`crate::Model::graph_safe`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn graph_safe(&self) -> Result<bool, PluginError> {
        result(self.object.graph_safe())
    }

    /// See [`crate::Model::abilities`]; none for a plugin of ABI 1.0.
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn abilities(&self) -> Result<ModelAbilities, PluginError> {
        decode_or_default(&result(self.object.abilities())?)
    }

    /// See [`crate::Model::memory`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn memory(&self) -> Result<Vec<NamedTensor>, PluginError> {
        Ok(result(self.object.memory())?
            .into_iter()
            .map(named)
            .collect())
    }

    /// See [`crate::Model::set_memory`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn set_memory(&mut self, memory: Vec<NamedTensor>) -> Result<(), PluginError> {
        let memory = memory.into_iter().map(|value| RawNamed {
            name: value.name.into(),
            tensor: value.tensor,
            is_trainable: false,
        });
        result(self.object.set_memory(memory.collect()))
    }

    /// See [`crate::Model::summary`]; empty for a plugin of ABI 1.0.
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn summary(&self, seq_len: u64) -> Result<ModelSummary, PluginError> {
        decode_or_default(&result(self.object.summary(seq_len))?)
    }
}

/// A kernel in a plugin, usually another one than the caller.
pub struct KernelClient {
    object: KernelObject,
}

impl KernelClient {
    pub(crate) fn new(object: KernelObject) -> Self {
        Self { object }
    }

    /// Wraps a kernel of the same library, for tests and benchmarks.
    ///
    /// # Errors
    /// Never; the signature leaves room.
    pub fn in_process<K: crate::Kernel>(kernel: K) -> Result<Self, PluginError> {
        Ok(Self {
            object: super::shim::kernel_object(kernel),
        })
    }

    /// See [`crate::Kernel::capabilities`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn capabilities(&self) -> Result<Capabilities, PluginError> {
        decode(result(self.object.capabilities())?.as_str())
    }

    /// See [`crate::Kernel::grouped_matmul`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        result(self.object.grouped_matmul(RawGroupedMatmul {
            x: call.x,
            weight: call.weight,
            order: call.selection.order,
            inverse: call.selection.inverse,
            ends: call.selection.ends,
            gate: call.gate.into(),
        }))
    }
}

fn result<T>(raw: RawResult<T>) -> Result<T, PluginError> {
    raw.into_result().map_err(PluginError::from)
}

fn named(raw: RawNamed) -> NamedTensor {
    NamedTensor {
        name: raw.name.into(),
        tensor: raw.tensor,
    }
}

fn encode(value: &impl Serialize) -> Result<String, PluginError> {
    serde_json::to_string(value).map_err(|error| {
        PluginError::new("a value cannot be written as JSON").why(error.to_string())
    })
}

fn decode<T: DeserializeOwned>(json: &str) -> Result<T, PluginError> {
    serde_json::from_str(json).map_err(|error| {
        PluginError::new("the other side of the plugin boundary sent something unreadable")
            .why(error.to_string())
            .fix("rebuild the plugin against this host's version of moeut-plugin-api")
    })
}

/// The answers of calls that an older plugin lacks are empty.
fn decode_or_default<T: DeserializeOwned + Default>(json: &str) -> Result<T, PluginError> {
    if json.is_empty() {
        Ok(T::default())
    } else {
        decode(json)
    }
}

fn open_error(error: LibraryError) -> OpenError {
    match error {
        LibraryError::OpenError { err, .. } => OpenError::Loader(err.to_string()),
        LibraryError::GetSymbolError { .. } => OpenError::NotAPlugin,
        LibraryError::IncompatibleVersionNumber {
            expected_version,
            actual_version,
            ..
        } => OpenError::Layout {
            summary: format!(
                "it was built with moeut-plugin-api {actual_version}, and this host with {expected_version}"
            ),
            details: String::new(),
        },
        // Pages of types follow, which say nothing to whoever has to rebuild the plugin.
        other => OpenError::Layout {
            summary: "its plugin module is laid out otherwise than this host's".to_owned(),
            details: other.to_string(),
        },
    }
}
