//! The stable boundary itself: everything in this folder may cross between separately compiled libraries.
//!
//! Rules, which a test of the layout enforces:
//! - Fields and methods are only ever appended, behind the one marked `last_prefix_field`; nothing is renamed,
//!   reordered or removed within a major version.
//! - What crosses is coarse: JSON in [`RString`], slices, tensor handles, boxed objects. Never generics, `dyn Trait` of
//!   std, `TypeId`, panics, or memory to be freed by the other side.
//! - Every call runs under `shim::guard`: a panic in a plugin becomes an error that names plugin, component and call.
//! - `abi_stable` is named here and nowhere else.
#![expect(unsafe_code, reason = "the ABI shim: handles and generated vtables")]
#![expect(
    missing_docs,
    non_local_definitions,
    clippy::used_underscore_binding,
    clippy::expl_impl_clone_on_copy,
    clippy::cast_ptr_alignment,
    clippy::no_effect_underscore_binding,
    reason = "abi_stable generates such items; what is written by hand here has docs"
)]

pub mod client;
pub mod export;
pub mod manifest;
pub mod shim;

use crate::PluginError;
use crate::kernel::{FusedCall, not_provided};
use abi_stable::{
    StableAbi,
    library::RootModule,
    package_version_strings, sabi_trait,
    sabi_types::VersionStrings,
    std_types::{RBox, ROption, RResult, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::ffi::c_void;

/// Major version of the ABI: another one is refused.
pub const ABI_MAJOR: u32 = 1;
/// Minor version of the ABI: raised when something is appended.
pub const ABI_MINOR: u32 = 4;

/// One `at::Tensor` of the process's libtorch, owned; opaque outside `moeut-torch`.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct TensorHandle {
    ptr: *mut c_void,
    release: unsafe extern "C" fn(*mut c_void),
}

// SAFETY: `at::Tensor` is a reference-counted handle with an atomic count; moving it between threads is sound, and
// the type offers no shared access.
unsafe impl Send for TensorHandle {}

impl TensorHandle {
    /// Takes ownership of a heap-allocated `at::Tensor`.
    ///
    /// # Safety
    /// `ptr` must be a valid `at::Tensor*` that nobody else frees, and `release` must free it.
    pub unsafe fn from_raw(ptr: *mut c_void, release: unsafe extern "C" fn(*mut c_void)) -> Self {
        Self { ptr, release }
    }

    /// The `at::Tensor*`, still owned by the handle.
    pub fn as_ptr(&self) -> *mut c_void {
        self.ptr
    }

    /// Gives up ownership of the `at::Tensor*`.
    pub fn into_raw(self) -> *mut c_void {
        std::mem::ManuallyDrop::new(self).ptr
    }
}

impl Drop for TensorHandle {
    fn drop(&mut self) {
        // SAFETY: `from_raw` was promised that `release` frees `ptr`, and `into_raw` skips this.
        unsafe { (self.release)(self.ptr) }
    }
}

/// A [`PluginError`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawError {
    what: RString,
    why: RString,
    fix: RString,
}

impl From<PluginError> for RawError {
    fn from(error: PluginError) -> Self {
        Self {
            what: error.what.into(),
            why: error.why.into(),
            fix: error.fix.into(),
        }
    }
}

impl From<RawError> for PluginError {
    fn from(raw: RawError) -> Self {
        Self {
            what: raw.what.into(),
            why: raw.why.into(),
            fix: raw.fix.into(),
        }
    }
}

/// Result of every call across the boundary.
pub type RawResult<T> = RResult<T, RawError>;

/// A tensor with a name.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawNamed {
    name: RString,
    tensor: TensorHandle,
    is_trainable: bool,
}

/// [`crate::model::ForwardInput`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawForwardInput {
    tokens_tb: TensorHandle,
    is_training: bool,
    wants_stats: bool,
}

/// [`crate::model::ForwardOutput`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawForwardOutput {
    logits_tbv: TensorHandle,
    regularizers: RVec<RawNamed>,
    stats: RVec<RawNamed>,
}

/// [`crate::Chart`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawChart {
    name: RString,
    kind_json: RString,
    values: TensorHandle,
}

/// All of [`crate::model::ForwardOutput`], where [`RawForwardOutput`] has what ABI 1.0 knew of it.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawReport {
    output: RawForwardOutput,
    charts: RVec<RawChart>,
    selections: RVec<RawNamed>,
}

/// [`crate::kernel::GroupedMatmul`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawGroupedMatmul {
    x: TensorHandle,
    weight: TensorHandle,
    order: TensorHandle,
    inverse: TensorHandle,
    ends: TensorHandle,
    gate: ROption<TensorHandle>,
}

/// [`crate::kernel::Route`] on its way across. Numbers cross as JSON: they may grow, a struct of the ABI may not.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawRoute {
    x: TensorHandle,
    norm_weight: ROption<TensorHandle>,
    norm_bias: ROption<TensorHandle>,
    weight: TensorHandle,
    bias: ROption<TensorHandle>,
    options_json: RString,
}

/// [`crate::kernel::Routed`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawRouted {
    logits: TensorHandle,
    gate: TensorHandle,
    ids: TensorHandle,
    order: TensorHandle,
    inverse: TensorHandle,
    ends: TensorHandle,
}

/// [`crate::kernel::MoeMlp`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawMoeMlp {
    x: TensorHandle,
    w1: TensorHandle,
    b1: ROption<TensorHandle>,
    w2: TensorHandle,
    gate: TensorHandle,
    order: TensorHandle,
    inverse: TensorHandle,
    ends: TensorHandle,
    options_json: RString,
}

/// [`crate::kernel::MoeProject`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawMoeProject {
    route: RawRoute,
    x: TensorHandle,
    weight: TensorHandle,
}

/// [`crate::kernel::Projected`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawProjected {
    y: TensorHandle,
    routed: RawRouted,
}

/// [`crate::kernel::ResidualNorm`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawResidualNorm {
    x: TensorHandle,
    update: ROption<TensorHandle>,
    weight: TensorHandle,
    bias: TensorHandle,
    options_json: RString,
}

/// [`crate::kernel::ResidualNormed`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawResidualNormed {
    sum: TensorHandle,
    plain: TensorHandle,
    normed: TensorHandle,
}

/// [`crate::kernel::Select`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawSelect {
    x: TensorHandle,
    weight: TensorHandle,
    options_json: RString,
}

/// [`crate::kernel::Selected`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawSelected {
    gate: TensorHandle,
    log_means: TensorHandle,
    ids: TensorHandle,
    order: TensorHandle,
    inverse: TensorHandle,
    ends: TensorHandle,
}

/// [`crate::kernel::Rotate`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawRotate {
    x: TensorHandle,
    cos: TensorHandle,
    sin: TensorHandle,
}

/// [`crate::kernel::CrossEntropy`] on its way across.
#[repr(C)]
#[derive(Debug, StableAbi)]
pub struct RawCrossEntropy {
    logits: TensorHandle,
    targets: TensorHandle,
}

/// What the host offers to plugins. What follows `kernel` came with ABI 1.3; the body is what older hosts do.
#[sabi_trait]
pub trait RawHost: Send + Sync {
    fn info(&self) -> RString;
    fn log(&self, level: u8, text: RStr<'_>);
    fn progress(&self, label: RStr<'_>, done: u64, total: u64);
    fn is_cancelled(&self) -> bool;
    #[sabi(last_prefix_field)]
    fn kernel(&self, request_json: RStr<'_>) -> RawResult<KernelObject>;
    fn all_reduce(&self, _tensor: TensorHandle, _reduction: u8) -> RawResult<()> {
        RResult::RErr(
            PluginError::new("this host trains in one process only")
                .why("it is of a version before 1.3 of the plugin interface")
                .fix("use a newer moeut-host")
                .into(),
        )
    }
}

/// A task inside a plugin.
#[sabi_trait]
pub trait RawTask: Send {
    #[sabi(last_prefix_field)]
    fn plan(&self, facts_json: RStr<'_>) -> RawResult<RString>;
}

/// A token dataset inside a plugin. What follows `decode` came with ABI 1.2.
#[sabi_trait]
pub trait RawTokenDataset: Send + Sync {
    fn info(&self) -> RawResult<RString>;
    fn read(&self, windows: RSlice<'_, u64>, tokens: RSliceMut<'_, i32>) -> RawResult<()>;
    fn encode(&self, text: RStr<'_>) -> RawResult<RVec<i32>>;
    #[sabi(last_prefix_field)]
    fn decode(&self, ids: RSlice<'_, i32>) -> RawResult<RString>;
    fn lengths(&self, _first: u64, _lengths: RSliceMut<'_, u32>) -> RawResult<()> {
        RResult::RErr(older_dataset("has no documents"))
    }
}

fn older_dataset(what: &str) -> RawError {
    PluginError::new(format!("the dataset {what}"))
        .why("its plugin was built against a version of the plugin interface before 1.2")
        .fix("build the plugin anew against this version")
        .into()
}

/// A choice dataset inside a plugin; ABI 1.2.
#[sabi_trait]
pub trait RawChoiceDataset: Send + Sync {
    /// JSON of [`crate::ChoiceInfo`].
    fn info(&self) -> RawResult<RString>;
    /// JSON array of [`crate::Question`].
    #[sabi(last_prefix_field)]
    fn read(&self, first: u64, n: u64) -> RawResult<RString>;
}

/// A model inside a plugin. What follows `graph_safe` came with ABI 1.1, and `forward_with_report` with ABI 1.3; the
/// bodies are what older plugins do.
#[sabi_trait]
pub trait RawModel {
    fn parameters(&self) -> RawResult<RVec<RawNamed>>;
    fn forward(&mut self, input: RawForwardInput) -> RawResult<RawForwardOutput>;
    #[sabi(last_prefix_field)]
    fn graph_safe(&self) -> RawResult<bool>;
    /// `past_json` is a [`crate::Past`] other than `None`.
    fn forward_with_past(
        &mut self,
        _input: RawForwardInput,
        _past_json: RStr<'_>,
    ) -> RawResult<RawForwardOutput> {
        RResult::RErr(older_than_1_1("see earlier tokens"))
    }
    /// JSON of [`crate::ModelAbilities`]; empty: the default.
    fn abilities(&self) -> RawResult<RString> {
        RResult::ROk(RString::new())
    }
    fn memory(&self) -> RawResult<RVec<RawNamed>> {
        RResult::ROk(RVec::new())
    }
    fn set_memory(&mut self, memory: RVec<RawNamed>) -> RawResult<()> {
        if memory.is_empty() {
            return RResult::ROk(());
        }
        RResult::RErr(older_than_1_1("keep anything between batches"))
    }
    /// JSON of [`crate::ModelSummary`]; empty: the default.
    fn summary(&self, _seq_len: u64) -> RawResult<RString> {
        RResult::ROk(RString::new())
    }
    /// `past_json` is a [`crate::Past`], empty for `None`; `wishes_json` is a [`crate::Wishes`].
    fn forward_with_report(
        &mut self,
        input: RawForwardInput,
        past_json: RStr<'_>,
        _wishes_json: RStr<'_>,
    ) -> RawResult<RawReport> {
        let output = if past_json.is_empty() {
            self.forward(input)
        } else {
            self.forward_with_past(input, past_json)
        };
        output.map(|output| RawReport {
            output,
            charts: RVec::new(),
            selections: RVec::new(),
        })
    }
}

fn older_than_1_1(what: &str) -> RawError {
    PluginError::new(format!("the model cannot {what}"))
        .why("its plugin was built against version 1.0 of the plugin interface")
        .fix("build the plugin anew against this version")
        .into()
}

/// A kernel inside a plugin. What follows `grouped_matmul` came with ABI 1.1, what follows `moe_project` with 1.3, what
/// follows `rotate` with 1.4; older kernels do not list such calls in their capabilities.
#[sabi_trait]
pub trait RawKernel {
    fn capabilities(&self) -> RawResult<RString>;
    #[sabi(last_prefix_field)]
    fn grouped_matmul(&self, call: RawGroupedMatmul) -> RawResult<TensorHandle>;
    fn route(&self, _call: RawRoute) -> RawResult<RawRouted> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::Route).into())
    }
    fn moe_mlp(&self, _call: RawMoeMlp) -> RawResult<TensorHandle> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::MoeMlp).into())
    }
    fn moe_project(&self, _call: RawMoeProject) -> RawResult<RawProjected> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::MoeProject).into())
    }
    fn residual_norm(&self, _call: RawResidualNorm) -> RawResult<RawResidualNormed> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::ResidualNorm).into())
    }
    fn select(&self, _call: RawSelect) -> RawResult<RawSelected> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::Select).into())
    }
    fn rotate(&self, _call: RawRotate) -> RawResult<TensorHandle> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::Rotate).into())
    }
    fn cross_entropy(&self, _call: RawCrossEntropy) -> RawResult<TensorHandle> {
        RResult::RErr(not_provided(OLDER_KERNEL, FusedCall::CrossEntropy).into())
    }
}

/// The name of a kernel whose plugin is older than the call.
const OLDER_KERNEL: &str = "of an older ABI";

/// The host's services as a boxed object.
pub type HostObject = RawHost_TO<'static, RBox<()>>;
/// A task as a boxed object.
pub type TaskObject = RawTask_TO<'static, RBox<()>>;
/// A token dataset as a boxed object.
pub type TokenDatasetObject = RawTokenDataset_TO<'static, RBox<()>>;
/// A choice dataset as a boxed object.
pub type ChoiceDatasetObject = RawChoiceDataset_TO<'static, RBox<()>>;
/// A model as a boxed object.
pub type ModelObject = RawModel_TO<'static, RBox<()>>;
/// A kernel as a boxed object.
pub type KernelObject = RawKernel_TO<'static, RBox<()>>;

/// What every plugin exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef, prefix_fields = PluginModulePrefix)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// The manifest's records, one JSON object a line; the same as in the file's section.
    pub manifest: extern "C" fn() -> RString,
    /// JSON array of [`crate::ComponentInfo`].
    pub components: extern "C" fn() -> RawResult<RString>,
    /// Makes the task `name` from its configuration.
    pub new_task: extern "C" fn(RStr<'_>, RStr<'_>, HostObject) -> RawResult<TaskObject>,
    /// Opens the dataset `name`: configuration, request.
    pub new_token_dataset:
        extern "C" fn(RStr<'_>, RStr<'_>, RStr<'_>, HostObject) -> RawResult<TokenDatasetObject>,
    /// Builds the model `name`: configuration, setup.
    pub new_model:
        extern "C" fn(RStr<'_>, RStr<'_>, RStr<'_>, HostObject) -> RawResult<ModelObject>,
    /// Makes the kernel `name`.
    #[sabi(last_prefix_field)]
    pub new_kernel: extern "C" fn(RStr<'_>, HostObject) -> RawResult<KernelObject>,
    /// Opens the choice dataset `name` from its configuration. This and what follows came with ABI 1.2.
    #[sabi(missing_field(option))]
    pub new_choice_dataset:
        extern "C" fn(RStr<'_>, RStr<'_>, HostObject) -> RawResult<ChoiceDatasetObject>,
    /// JSON of the [`crate::DocumentCount`] of the dataset `name`: configuration, request.
    #[sabi(missing_field(option))]
    pub count_documents:
        extern "C" fn(RStr<'_>, RStr<'_>, RStr<'_>, HostObject) -> RawResult<RString>,
}

impl RootModule for PluginModuleRef {
    abi_stable::declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "moeut_plugin";
    const NAME: &'static str = "moeut_plugin";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use abi_stable::abi_stability::PrefixStableAbi;
    use abi_stable::abi_stability::abi_checking::check_layout_compatibility;
    use abi_stable::type_layout::TLData;

    /// `export_plugin!` has to spell the symbol as a literal.
    #[test]
    fn header_symbol_is_the_one_abi_stable_looks_for() {
        let macro_text = include_str!("manifest.rs");
        assert!(macro_text.contains(abi_stable::library::ROOT_MODULE_LOADER_NAME));
    }

    fn fields(layout: &abi_stable::type_layout::TypeLayout) -> Vec<String> {
        let fields = match layout.data() {
            TLData::PrefixType(prefix) => prefix.fields,
            TLData::Struct { fields } => fields,
            other => panic!("{} has an unexpected shape: {other:?}", layout.name()),
        };
        fields.iter().map(|field| field.name().to_owned()).collect()
    }

    /// The frozen calls of ABI 1.0 and what later versions appended: a failure here means that published plugins would be refused.
    #[test]
    fn layout_of_the_calls_is_pinned() {
        assert_eq!(
            fields(<PluginModulePrefix as PrefixStableAbi>::LAYOUT),
            [
                "manifest",
                "components",
                "new_task",
                "new_token_dataset",
                "new_model",
                "new_kernel",
                // ABI 1.2.
                "new_choice_dataset",
                "count_documents",
            ]
        );
        assert_eq!(
            fields(<RawHost_trait::VTable_Prefix<(), RBox<()>> as PrefixStableAbi>::LAYOUT),
            [
                "_sabi_tys",
                "_sabi_vtable",
                "info",
                "log",
                "progress",
                "is_cancelled",
                "kernel",
                // ABI 1.3.
                "all_reduce",
            ]
        );
        assert_eq!(
            fields(<RawTokenDataset_trait::VTable_Prefix<(), RBox<()>> as PrefixStableAbi>::LAYOUT),
            [
                "_sabi_tys",
                "_sabi_vtable",
                "info",
                "read",
                "encode",
                "decode",
                // ABI 1.2.
                "lengths",
            ]
        );
        assert_eq!(
            fields(
                <RawChoiceDataset_trait::VTable_Prefix<(), RBox<()>> as PrefixStableAbi>::LAYOUT
            ),
            ["_sabi_tys", "_sabi_vtable", "info", "read"]
        );
        assert_eq!(
            fields(<RawModel_trait::VTable_Prefix<(), RBox<()>> as PrefixStableAbi>::LAYOUT),
            [
                "_sabi_tys",
                "_sabi_vtable",
                "parameters",
                "forward",
                "graph_safe",
                // ABI 1.1.
                "forward_with_past",
                "abilities",
                "memory",
                "set_memory",
                "summary",
                // ABI 1.3.
                "forward_with_report",
            ]
        );
        assert_eq!(
            fields(<RawKernel_trait::VTable_Prefix<(), RBox<()>> as PrefixStableAbi>::LAYOUT),
            [
                "_sabi_tys",
                "_sabi_vtable",
                "capabilities",
                "grouped_matmul",
                // ABI 1.1.
                "route",
                "moe_mlp",
                "moe_project",
                // ABI 1.3.
                "residual_norm",
                "select",
                "rotate",
                // ABI 1.4.
                "cross_entropy",
            ]
        );
    }

    /// Two objects as version 1.0 had them.
    mod version_1_0 {
        use crate::abi::{
            RawForwardInput, RawForwardOutput, RawGroupedMatmul, RawNamed, RawResult, TensorHandle,
        };
        use abi_stable::sabi_trait;
        use abi_stable::std_types::{RString, RVec};

        #[sabi_trait]
        pub(super) trait RawModel {
            fn parameters(&self) -> RawResult<RVec<RawNamed>>;
            fn forward(&mut self, input: RawForwardInput) -> RawResult<RawForwardOutput>;
            #[sabi(last_prefix_field)]
            fn graph_safe(&self) -> RawResult<bool>;
        }

        #[sabi_trait]
        pub(super) trait RawKernel {
            fn capabilities(&self) -> RawResult<RString>;
            #[sabi(last_prefix_field)]
            fn grouped_matmul(&self, call: RawGroupedMatmul) -> RawResult<TensorHandle>;
        }
    }

    /// The model as version 1.2 had it.
    mod version_1_2 {
        use crate::abi::{RawForwardInput, RawForwardOutput, RawNamed, RawResult, older_than_1_1};
        use abi_stable::sabi_trait;
        use abi_stable::std_types::{RResult, RStr, RString, RVec};

        #[sabi_trait]
        pub(super) trait RawModel {
            fn parameters(&self) -> RawResult<RVec<RawNamed>>;
            fn forward(&mut self, input: RawForwardInput) -> RawResult<RawForwardOutput>;
            #[sabi(last_prefix_field)]
            fn graph_safe(&self) -> RawResult<bool>;
            fn forward_with_past(
                &mut self,
                _input: RawForwardInput,
                _past_json: RStr<'_>,
            ) -> RawResult<RawForwardOutput> {
                RResult::RErr(older_than_1_1("see earlier tokens"))
            }
            fn abilities(&self) -> RawResult<RString> {
                RResult::ROk(RString::new())
            }
            fn memory(&self) -> RawResult<RVec<RawNamed>> {
                RResult::ROk(RVec::new())
            }
            fn set_memory(&mut self, _memory: RVec<RawNamed>) -> RawResult<()> {
                RResult::ROk(())
            }
            fn summary(&self, _seq_len: u64) -> RawResult<RString> {
                RResult::ROk(RString::new())
            }
        }
    }

    /// What [`client::PluginClient::open`] asks of a plugin of an older version, and of one that is not of this version.
    #[test]
    fn objects_of_older_versions_are_accepted() {
        type Model = version_1_0::RawModel_TO<'static, RBox<()>>;
        type Model1_2 = version_1_2::RawModel_TO<'static, RBox<()>>;
        type Kernel = version_1_0::RawKernel_TO<'static, RBox<()>>;
        let fits = |plugin, host| check_layout_compatibility(plugin, host).is_ok();
        assert!(fits(Model::LAYOUT, ModelObject::LAYOUT));
        assert!(fits(Model1_2::LAYOUT, ModelObject::LAYOUT));
        assert!(!fits(ModelObject::LAYOUT, Model1_2::LAYOUT));
        assert!(fits(Kernel::LAYOUT, KernelObject::LAYOUT));
        assert!(!fits(ModelObject::LAYOUT, Model::LAYOUT));
        assert!(!fits(Kernel::LAYOUT, ModelObject::LAYOUT));
    }

    /// A model of ABI 1.1 or 1.2: it knows the past and no wishes.
    struct Older;

    fn handle() -> TensorHandle {
        extern "C" fn keep(_: *mut c_void) {}
        // SAFETY: nobody opens the handle, and there is nothing to free.
        unsafe { TensorHandle::from_raw(std::ptr::null_mut(), keep) }
    }

    fn answer(name: &str) -> RawForwardOutput {
        RawForwardOutput {
            logits_tbv: handle(),
            regularizers: RVec::new(),
            stats: RVec::from(vec![RawNamed {
                name: name.into(),
                tensor: handle(),
                is_trainable: false,
            }]),
        }
    }

    impl RawModel for Older {
        fn parameters(&self) -> RawResult<RVec<RawNamed>> {
            RResult::ROk(RVec::new())
        }

        fn forward(&mut self, _: RawForwardInput) -> RawResult<RawForwardOutput> {
            RResult::ROk(answer("alone"))
        }

        fn graph_safe(&self) -> RawResult<bool> {
            RResult::ROk(false)
        }

        fn forward_with_past(
            &mut self,
            _: RawForwardInput,
            past_json: RStr<'_>,
        ) -> RawResult<RawForwardOutput> {
            RResult::ROk(answer(past_json.as_str()))
        }
    }

    #[test]
    fn an_older_model_grants_what_it_knows() {
        let report = |past: &str| {
            let input = RawForwardInput {
                tokens_tb: handle(),
                is_training: true,
                wants_stats: true,
            };
            let report = Older.forward_with_report(input, past.into(), "{\"details\":true}".into());
            let report = report.into_result().map_err(PluginError::from).unwrap();
            assert!(report.charts.is_empty() && report.selections.is_empty());
            report.output.stats[0].name.to_string()
        };
        assert_eq!(report(""), "alone");
        assert_eq!(report("{\"Cache\":1}"), "{\"Cache\":1}");
    }

    /// The frozen layout of what the calls carry.
    #[test]
    fn layout_of_the_records_is_pinned() {
        assert_eq!(
            fields(<RawGroupedMatmul as StableAbi>::LAYOUT),
            ["x", "weight", "order", "inverse", "ends", "gate"]
        );
        assert_eq!(
            fields(<RawRoute as StableAbi>::LAYOUT),
            [
                "x",
                "norm_weight",
                "norm_bias",
                "weight",
                "bias",
                "options_json"
            ]
        );
        assert_eq!(
            fields(<RawRouted as StableAbi>::LAYOUT),
            ["logits", "gate", "ids", "order", "inverse", "ends"]
        );
        assert_eq!(
            fields(<RawMoeMlp as StableAbi>::LAYOUT),
            [
                "x",
                "w1",
                "b1",
                "w2",
                "gate",
                "order",
                "inverse",
                "ends",
                "options_json"
            ]
        );
        assert_eq!(
            fields(<RawMoeProject as StableAbi>::LAYOUT),
            ["route", "x", "weight"]
        );
        assert_eq!(fields(<RawProjected as StableAbi>::LAYOUT), ["y", "routed"]);
        assert_eq!(
            fields(<RawResidualNorm as StableAbi>::LAYOUT),
            ["x", "update", "weight", "bias", "options_json"]
        );
        assert_eq!(
            fields(<RawResidualNormed as StableAbi>::LAYOUT),
            ["sum", "plain", "normed"]
        );
        assert_eq!(
            fields(<RawSelect as StableAbi>::LAYOUT),
            ["x", "weight", "options_json"]
        );
    }

    /// The rest of it.
    #[test]
    fn layout_of_the_other_records_is_pinned() {
        assert_eq!(
            fields(<RawSelected as StableAbi>::LAYOUT),
            ["gate", "log_means", "ids", "order", "inverse", "ends"]
        );
        assert_eq!(
            fields(<RawRotate as StableAbi>::LAYOUT),
            ["x", "cos", "sin"]
        );
        assert_eq!(
            fields(<RawCrossEntropy as StableAbi>::LAYOUT),
            ["logits", "targets"]
        );
        assert_eq!(
            fields(<RawForwardInput as StableAbi>::LAYOUT),
            ["tokens_tb", "is_training", "wants_stats"]
        );
        assert_eq!(
            fields(<RawForwardOutput as StableAbi>::LAYOUT),
            ["logits_tbv", "regularizers", "stats"]
        );
        assert_eq!(
            fields(<RawNamed as StableAbi>::LAYOUT),
            ["name", "tensor", "is_trainable"]
        );
        assert_eq!(
            fields(<RawReport as StableAbi>::LAYOUT),
            ["output", "charts", "selections"]
        );
        assert_eq!(
            fields(<RawChart as StableAbi>::LAYOUT),
            ["name", "kind_json", "values"]
        );
        assert_eq!(
            fields(<TensorHandle as StableAbi>::LAYOUT),
            ["ptr", "release"]
        );
        for (layout, size) in [
            (<RawGroupedMatmul as StableAbi>::LAYOUT, 104),
            (<RawRoute as StableAbi>::LAYOUT, 136),
            (<RawRouted as StableAbi>::LAYOUT, 96),
            (<RawMoeMlp as StableAbi>::LAYOUT, 168),
            (<RawMoeProject as StableAbi>::LAYOUT, 168),
            (<RawProjected as StableAbi>::LAYOUT, 112),
            (<RawResidualNorm as StableAbi>::LAYOUT, 104),
            (<RawResidualNormed as StableAbi>::LAYOUT, 48),
            (<RawSelect as StableAbi>::LAYOUT, 64),
            (<RawSelected as StableAbi>::LAYOUT, 96),
            (<RawRotate as StableAbi>::LAYOUT, 48),
            (<RawCrossEntropy as StableAbi>::LAYOUT, 32),
            (<RawForwardInput as StableAbi>::LAYOUT, 24),
            (<RawForwardOutput as StableAbi>::LAYOUT, 80),
            (<RawNamed as StableAbi>::LAYOUT, 56),
            (<RawReport as StableAbi>::LAYOUT, 144),
            (<RawChart as StableAbi>::LAYOUT, 80),
            (<RawError as StableAbi>::LAYOUT, 96),
        ] {
            assert_eq!(layout.size(), size, "{}", layout.name());
        }
    }
}
