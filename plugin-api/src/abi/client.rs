//! The caller's side of the boundary: objects of a plugin as ordinary Rust values.
//!
//! The host uses all of it; a model plugin uses [`KernelClient`], which the host hands on from another plugin.

use super::{
    ChoiceDatasetObject, HostObject, KernelObject, ModelObject, PluginModuleRef, RawChart,
    RawCrossEntropy, RawForwardInput, RawGroupedMatmul, RawHost, RawHost_TO, RawMoeMlp,
    RawMoeProject, RawNamed, RawReport, RawResidualNorm, RawResult, RawRotate, RawRoute, RawRouted,
    RawSelect, TaskObject, TokenDatasetObject, older_dataset,
};
use crate::host::{HostInfo, LogLevel, Reduction};
use crate::kernel::{
    Activation, Capabilities, CrossEntropy, FusedCall, GroupedMatmul, MoeMlp, MoeProject,
    Projected, ResidualNorm, ResidualNormed, Rotate, Route, Routed, Select, Selected, Selection,
};
use crate::model::{
    ForwardInput, ForwardOutput, ModelAbilities, ModelSetup, ModelSummary, NamedTensor, Parameter,
    Past,
};
use crate::{
    Chart, ChoiceInfo, ComponentInfo, DType, Device, DocumentCount, PluginError, Question,
    RunFacts, StreamInfo, StreamRequest, TaskPlan, TensorHandle,
};
use abi_stable::StableAbi;
use abi_stable::abi_stability::abi_checking::{
    CheckingGlobals, check_layout_compatibility_with_globals,
};
use abi_stable::library::{LibraryError, lib_header_from_path};
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{RResult, RStr, RString, RVec};
use serde::{Serialize, de::DeserializeOwned};
use std::cell::OnceCell;
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
    /// Replaces a tensor by its sum or maximum over all processes that train; one alone leaves it as it is.
    ///
    /// # Errors
    /// If another process has ended.
    fn all_reduce(&self, tensor: TensorHandle, reduction: Reduction) -> Result<(), PluginError> {
        let _ = (tensor, reduction);
        Ok(())
    }
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

    fn all_reduce(&self, tensor: TensorHandle, reduction: u8) -> RawResult<()> {
        let reduction = match reduction {
            0 => Reduction::Sum,
            _ => Reduction::Max,
        };
        match self.0.all_reduce(tensor, reduction) {
            Ok(()) => RResult::ROk(()),
            Err(error) => RResult::RErr(error.into()),
        }
    }
}

/// The services as a plugin sees them, for tests that build a component of their own library.
///
/// # Errors
/// If the services cannot describe themselves.
pub fn host_in_process(services: &Arc<dyn HostServices>) -> Result<crate::Host, PluginError> {
    crate::Host::new(host_object(services))
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
        let layout = header.layout().ok_or(OpenError::NotAPlugin)?;
        // `abi_stable` lets an implementation have more calls than its interface, but a plugin of an older minor version
        // has fewer than this host. So the plugin counts as the interface, all of which the host must know. Each plugin is
        // compared with this host alone: the library's own memory of earlier comparisons takes the first plugin that it
        // meets for the standard, and would refuse every newer one after an old one.
        let nothing_before = CheckingGlobals::new();
        check_layout_compatibility_with_globals(layout, PluginModuleRef::LAYOUT, &nothing_before)
            .map_err(|errors| other_layout(errors.to_string()))?;
        // SAFETY: every field of the plugin's layout was just found at its place in the host's; calls that the plugin
        // lacks are looked up in its own tables at run time, and have bodies of their own on this side.
        let module = unsafe { header.init_root_module_with_unchecked_layout::<PluginModuleRef>() };
        Ok(Self {
            module: module.map_err(open_error)?,
        })
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
            name: name.into(),
        })
    }

    /// Counts the documents of a dataset's split; see [`crate::TokenDataset::count`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn count_documents(
        &self,
        name: &str,
        config: &serde_json::Value,
        request: &StreamRequest,
        services: &Arc<dyn HostServices>,
    ) -> Result<DocumentCount, PluginError> {
        let call = self
            .module
            .count_documents()
            .ok_or_else(|| PluginError::from(older_dataset("cannot count its documents")))?;
        let (config, request) = (config.to_string(), encode(request)?);
        let counted = call(
            name.into(),
            config.as_str().into(),
            request.as_str().into(),
            host_object(services),
        );
        decode(result(counted)?.as_str())
    }

    /// Opens a choice dataset.
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn new_choice_dataset(
        &self,
        name: &str,
        config: &serde_json::Value,
        services: &Arc<dyn HostServices>,
    ) -> Result<ChoiceDatasetClient, PluginError> {
        // A plugin that is older has none to be asked for.
        let call = self
            .module
            .new_choice_dataset()
            .ok_or_else(|| PluginError::from(older_dataset("has no questions")))?;
        let config = config.to_string();
        let made = call(name.into(), config.as_str().into(), host_object(services));
        Ok(ChoiceDatasetClient {
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
            name: name.into(),
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
        Ok(KernelClient::new(result(made)?))
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
    name: Arc<str>,
}

impl TokenDatasetClient {
    /// The component's name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

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

    /// See [`crate::TokenDataset::lengths`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn lengths(&self, first: u64, lengths: &mut [u32]) -> Result<(), PluginError> {
        result(self.object.lengths(first, lengths.into()))
    }
}

/// A choice dataset in a plugin.
pub struct ChoiceDatasetClient {
    object: ChoiceDatasetObject,
}

impl ChoiceDatasetClient {
    /// See [`crate::ChoiceDataset::info`].
    ///
    /// # Errors
    /// If the plugin panics.
    pub fn info(&self) -> Result<ChoiceInfo, PluginError> {
        decode(result(self.object.info())?.as_str())
    }

    /// See [`crate::ChoiceDataset::read`].
    ///
    /// # Errors
    /// Whatever the plugin says.
    pub fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        decode(result(self.object.read(first, n))?.as_str())
    }
}

/// A model in a plugin.
pub struct ModelClient {
    object: ModelObject,
    name: Arc<str>,
}

impl ModelClient {
    /// The component's name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

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
            wants_stats: input.wishes.stats,
        };
        let past = match input.past {
            Past::None => String::new(),
            past => encode(&past)?,
        };
        if !input.wishes.is_plain() {
            let wishes = encode(&input.wishes)?;
            let call = (past.as_str().into(), wishes.as_str().into());
            return forward_output(result(
                self.object.forward_with_report(raw, call.0, call.1),
            )?);
        }
        let output = if past.is_empty() {
            self.object.forward(raw)
        } else {
            self.object.forward_with_past(raw, past.as_str().into())
        };
        forward_output(RawReport {
            output: result(output)?,
            charts: RVec::new(),
            selections: RVec::new(),
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

fn forward_output(raw: RawReport) -> Result<ForwardOutput, PluginError> {
    let chart = |raw: RawChart| {
        Ok(Chart {
            kind: decode(&raw.kind_json)?,
            name: raw.name.into(),
            values: raw.values,
        })
    };
    let RawReport {
        output,
        charts,
        selections,
    } = raw;
    Ok(ForwardOutput {
        logits_tbv: output.logits_tbv,
        regularizers: output.regularizers.into_iter().map(named).collect(),
        stats: output.stats.into_iter().map(named).collect(),
        charts: charts
            .into_iter()
            .map(chart)
            .collect::<Result<_, PluginError>>()?,
        selections: selections.into_iter().map(named).collect(),
    })
}

/// A kernel in a plugin, usually another one than the caller.
pub struct KernelClient {
    object: KernelObject,
    /// Layers ask in every forward pass; the answer never changes.
    capabilities: OnceCell<Capabilities>,
}

impl KernelClient {
    pub(crate) fn new(object: KernelObject) -> Self {
        Self {
            object,
            capabilities: OnceCell::new(),
        }
    }

    /// Wraps a kernel of the same library, for tests and benchmarks.
    ///
    /// # Errors
    /// Never; the signature leaves room.
    pub fn in_process<K: crate::Kernel>(kernel: K) -> Result<Self, PluginError> {
        Ok(Self::new(super::shim::kernel_object(kernel)))
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

    /// See [`Capabilities::provides`]; a kernel that fails to say provides nothing.
    pub fn provides(
        &self,
        call: FusedCall,
        activation: Option<Activation>,
        device: Device,
        dtype: DType,
    ) -> bool {
        self.capabilities
            .get_or_init(|| self.capabilities().unwrap_or_default())
            .provides(call, activation, device, dtype)
    }

    /// See [`crate::Kernel::route`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn route(&self, call: Route) -> Result<Routed, PluginError> {
        Ok(routed(result(self.object.route(raw_route(call)?))?))
    }

    /// See [`crate::Kernel::moe_mlp`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn moe_mlp(&self, call: MoeMlp) -> Result<TensorHandle, PluginError> {
        result(self.object.moe_mlp(RawMoeMlp {
            x: call.x,
            w1: call.w1,
            b1: call.b1.into(),
            w2: call.w2,
            gate: call.gate,
            order: call.selection.order,
            inverse: call.selection.inverse,
            ends: call.selection.ends,
            options_json: encode(&call.options)?.into(),
        }))
    }

    /// See [`crate::Kernel::moe_project`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn moe_project(&self, call: MoeProject) -> Result<Projected, PluginError> {
        let raw = result(self.object.moe_project(RawMoeProject {
            route: raw_route(call.route)?,
            x: call.x,
            weight: call.weight,
        }))?;
        Ok(Projected {
            y: raw.y,
            routed: routed(raw.routed),
        })
    }

    /// See [`crate::Kernel::residual_norm`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn residual_norm(&self, call: ResidualNorm) -> Result<ResidualNormed, PluginError> {
        let raw = result(self.object.residual_norm(RawResidualNorm {
            x: call.x,
            update: call.update.into(),
            weight: call.weight,
            bias: call.bias,
            options_json: encode(&call.options)?.into(),
        }))?;
        Ok(ResidualNormed {
            sum: raw.sum,
            plain: raw.plain,
            normed: raw.normed,
        })
    }

    /// See [`crate::Kernel::select`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn select(&self, call: Select) -> Result<Selected, PluginError> {
        let raw = result(self.object.select(RawSelect {
            x: call.x,
            weight: call.weight,
            options_json: encode(&call.options)?.into(),
        }))?;
        Ok(Selected {
            gate: raw.gate,
            log_means: raw.log_means,
            ids: raw.ids,
            selection: Selection {
                order: raw.order,
                inverse: raw.inverse,
                ends: raw.ends,
            },
        })
    }

    /// See [`crate::Kernel::rotate`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn rotate(&self, call: Rotate) -> Result<TensorHandle, PluginError> {
        result(self.object.rotate(RawRotate {
            x: call.x,
            cos: call.cos,
            sin: call.sin,
        }))
    }

    /// See [`crate::Kernel::cross_entropy`].
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn cross_entropy(&self, call: CrossEntropy) -> Result<TensorHandle, PluginError> {
        result(self.object.cross_entropy(RawCrossEntropy {
            logits: call.logits,
            targets: call.targets,
        }))
    }
}

fn raw_route(call: Route) -> Result<RawRoute, PluginError> {
    Ok(RawRoute {
        x: call.x,
        norm_weight: call.norm_weight.into(),
        norm_bias: call.norm_bias.into(),
        weight: call.weight,
        bias: call.bias.into(),
        options_json: encode(&call.options)?.into(),
    })
}

fn routed(raw: RawRouted) -> Routed {
    Routed {
        logits: raw.logits,
        gate: raw.gate,
        ids: raw.ids,
        selection: Selection {
            order: raw.order,
            inverse: raw.inverse,
            ends: raw.ends,
        },
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
        other => other_layout(other.to_string()),
    }
}

/// The details are pages of types, which say nothing to whoever has to rebuild the plugin.
fn other_layout(details: String) -> OpenError {
    OpenError::Layout {
        summary: "its plugin module is laid out otherwise than this host's".to_owned(),
        details,
    }
}
