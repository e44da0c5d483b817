//! The plugin's side of the boundary: author traits in, guarded objects out.

use super::{
    ChoiceDatasetObject, HostObject, KernelObject, ModelObject, RawChart, RawChoiceDataset,
    RawChoiceDataset_TO, RawCrossEntropy, RawError, RawForwardInput, RawForwardOutput,
    RawGroupedMatmul, RawKernel, RawKernel_TO, RawModel, RawModel_TO, RawMoeMlp, RawMoeProject,
    RawNamed, RawProjected, RawReport, RawResidualNorm, RawResidualNormed, RawResult, RawRotate,
    RawRoute, RawRouted, RawSelect, RawSelected, RawTask, RawTask_TO, RawTokenDataset,
    RawTokenDataset_TO, TaskObject, TensorHandle, TokenDatasetObject,
};
use crate::args::read_configuration;
use crate::kernel::{
    CrossEntropy, GroupedMatmul, Kernel, MoeMlp, MoeProject, ResidualNorm, Rotate, Route, Routed,
    Select, Selection,
};
use crate::model::{ForwardInput, ForwardOutput, Model, NamedTensor, Past, Wishes};
use crate::{
    Chart, ChoiceDataset, ComponentInfo, ComponentKind, Host, PluginError, Task, TokenDataset,
};
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{RResult, RSlice, RSliceMut, RStr, RString, RVec};
use serde::{Serialize, de::DeserializeOwned};
use std::cell::{Cell, RefCell};
use std::io::Write;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// Which plugin and component a call belongs to, for errors.
#[derive(Debug, Clone, Copy)]
pub struct Origin {
    /// The plugin's crate name.
    pub plugin: &'static str,
    /// The component's name.
    pub component: &'static str,
}

thread_local! {
    /// How many guarded calls this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Where the last panic inside one of them was.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keeps panics of guarded calls off stderr: they reach the user as errors, and libtorch's texts fill pages. With
/// `RUST_BACKTRACE` set, and outside of guarded calls, they are printed as usual.
fn quiet_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            return;
        }
        let usual = take_hook();
        set_hook(Box::new(move |info| {
            if DEPTH.get() == 0 {
                usual(info);
            } else {
                PLACE.set(info.location().map(ToString::to_string));
            }
        }));
    });
}

/// Where libtorch starts to append its C++ stack, as `unwrap` writes it.
const CPP_STACK: &str = r"\nException raised from";

/// Runs a plugin's code so that neither error nor panic leaves it unnamed.
pub(super) fn guard<T>(
    origin: Origin,
    call: &str,
    body: impl FnOnce() -> Result<T, PluginError>,
) -> RawResult<T> {
    quiet_guarded_panics();
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let foreign = ForeignException { origin, call };
        let outcome = body();
        std::mem::forget(foreign);
        outcome
    }));
    DEPTH.set(DEPTH.get() - 1);
    match outcome {
        Ok(Ok(value)) => RResult::ROk(value),
        Ok(Err(error)) => RResult::RErr(error.into()),
        Err(payload) => {
            let Origin { plugin, component } = origin;
            let reason = payload
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| payload.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            // What libtorch throws and nobody caught ends with its C++ stack, of use to nobody who reads this.
            let reason = reason.split(CPP_STACK).next().unwrap_or(reason);
            let error = PluginError::new(format!(
                "`{component}` of plugin `{plugin}` panicked in `{call}`"
            ))
            .why(match PLACE.take() {
                Some(place) => format!("{reason} (at {place})"),
                None => reason.to_owned(),
            })
            .fix(format!(
                "this is a defect of `{plugin}`: report it to its authors"
            ));
            // A payload may panic when it is dropped; there is nothing left to tell then.
            std::mem::forget(payload);
            RResult::RErr(RawError::from(error))
        }
    }
}

/// Dropped by an exception of C++ on its way through a plugin's Rust. Rust cannot catch it and would abort without a
/// word about whose it is.
struct ForeignException<'a> {
    origin: Origin,
    call: &'a str,
}

impl Drop for ForeignException<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let Origin { plugin, component } = self.origin;
        let text = format!(
            "Error: `{component}` of plugin `{plugin}` let a C++ exception out of `{}`\n  \
             why: Rust cannot catch it, so this process ends; the last checkpoint is intact\n  \
             fix: this is a defect of `{plugin}`: report it to its authors\n",
            self.call
        );
        let _ = std::io::stderr().write_all(text.as_bytes());
        std::process::exit(EXIT_ERROR);
    }
}

/// The host's exit code for errors.
const EXIT_ERROR: i32 = 2;

/// One component that a plugin crate registers; `inventory` collects them.
#[derive(Clone, Copy)]
pub struct Registration {
    /// For errors.
    pub origin: Origin,
    /// The component's record in the manifest section, kept alive from here.
    pub record: &'static [u8],
    info: fn() -> ComponentInfo,
    maker: Maker,
}

#[derive(Clone, Copy)]
enum Maker {
    Task(fn(Origin, &str, Host) -> Result<TaskObject, PluginError>),
    Dataset {
        open: fn(Origin, &str, &str, Host) -> Result<TokenDatasetObject, PluginError>,
        count: fn(&str, &str, Host) -> Result<RString, PluginError>,
    },
    Choice(fn(Origin, &str, Host) -> Result<ChoiceDatasetObject, PluginError>),
    Model(fn(Origin, &str, &str, Host) -> Result<ModelObject, PluginError>),
    Kernel(fn(Origin, Host) -> Result<KernelObject, PluginError>),
}

inventory::collect!(Registration);

impl Registration {
    /// Registers a task.
    pub const fn task<T: Task>(plugin: &'static str, record: &'static [u8]) -> Self {
        Self {
            origin: Origin {
                plugin,
                component: T::NAME,
            },
            record,
            info: || {
                ComponentInfo::new(ComponentKind::Task, T::NAME, T::SUMMARY)
                    .aliases(T::ALIASES)
                    .args(T::ARGS)
                    .profiles(T::PROFILES)
            },
            maker: Maker::Task(|origin, config, host| {
                let task = T::new(read_configuration(config, T::ARGS)?, &host)?;
                Ok(RawTask_TO::from_value(Shim::new(origin, task), TD_Opaque))
            }),
        }
    }

    /// Registers a token dataset.
    pub const fn token_dataset<D: TokenDataset>(
        plugin: &'static str,
        record: &'static [u8],
    ) -> Self {
        Self {
            origin: Origin {
                plugin,
                component: D::NAME,
            },
            record,
            info: || ComponentInfo::new(ComponentKind::Dataset, D::NAME, D::SUMMARY).args(D::ARGS),
            maker: Maker::Dataset {
                open: |origin, config, request, host| {
                    let request = decode(request, "request")?;
                    let dataset = D::open(read_configuration(config, D::ARGS)?, &request, &host)?;
                    Ok(RawTokenDataset_TO::from_value(
                        Shim::new(origin, dataset),
                        TD_Opaque,
                    ))
                },
                count: |config, request, host| {
                    let request = decode(request, "request")?;
                    encode(&D::count(
                        read_configuration(config, D::ARGS)?,
                        &request,
                        &host,
                    )?)
                },
            },
        }
    }

    /// Registers a choice dataset.
    pub const fn choice_dataset<D: ChoiceDataset>(
        plugin: &'static str,
        record: &'static [u8],
    ) -> Self {
        Self {
            origin: Origin {
                plugin,
                component: D::NAME,
            },
            record,
            info: || {
                ComponentInfo::new(ComponentKind::ChoiceDataset, D::NAME, D::SUMMARY).args(D::ARGS)
            },
            maker: Maker::Choice(|origin, config, host| {
                let dataset = D::open(read_configuration(config, D::ARGS)?, &host)?;
                Ok(RawChoiceDataset_TO::from_value(
                    Shim::new(origin, dataset),
                    TD_Opaque,
                ))
            }),
        }
    }

    /// Registers a model.
    pub const fn model<M: Model>(plugin: &'static str, record: &'static [u8]) -> Self {
        Self {
            origin: Origin {
                plugin,
                component: M::NAME,
            },
            record,
            info: || ComponentInfo::new(ComponentKind::Model, M::NAME, M::SUMMARY).args(M::ARGS),
            maker: Maker::Model(|origin, config, setup, host| {
                let setup = decode(setup, "setup")?;
                let model = M::build(read_configuration(config, M::ARGS)?, &setup, &host)?;
                Ok(RawModel_TO::from_value(Shim::new(origin, model), TD_Opaque))
            }),
        }
    }

    /// Registers a kernel.
    pub const fn kernel<K: Kernel>(plugin: &'static str, record: &'static [u8]) -> Self {
        Self {
            origin: Origin {
                plugin,
                component: K::NAME,
            },
            record,
            info: || {
                ComponentInfo::new(ComponentKind::Kernel, K::NAME, K::SUMMARY)
                    .capabilities(K::capabilities())
            },
            maker: Maker::Kernel(|origin, host| {
                let kernel = K::new(&host)?;
                Ok(RawKernel_TO::from_value(
                    Shim::new(origin, kernel),
                    TD_Opaque,
                ))
            }),
        }
    }
}

/// What [`crate::export_plugin!`] puts behind [`super::PluginModule::components`].
pub extern "C" fn components() -> RawResult<RString> {
    let origin = Origin {
        plugin: "this plugin",
        component: "registry",
    };
    guard(origin, "components", || {
        let mut all: Vec<ComponentInfo> = registrations()
            .map(|registration| (registration.info)())
            .collect();
        all.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
        encode(&all)
    })
}

/// The component records of this plugin, one JSON object a line.
pub fn component_records() -> String {
    registrations()
        .map(|registration| String::from_utf8_lossy(registration.record))
        .collect()
}

/// Behind [`super::PluginModule::new_task`].
pub extern "C" fn new_task(
    name: RStr<'_>,
    config: RStr<'_>,
    host: HostObject,
) -> RawResult<TaskObject> {
    make(name, host, |origin, maker, host| match maker {
        Maker::Task(make) => Some(make(origin, config.as_str(), host)),
        _ => None,
    })
}

/// Behind [`super::PluginModule::new_token_dataset`].
pub extern "C" fn new_token_dataset(
    name: RStr<'_>,
    config: RStr<'_>,
    request: RStr<'_>,
    host: HostObject,
) -> RawResult<TokenDatasetObject> {
    make(name, host, |origin, maker, host| match maker {
        Maker::Dataset { open, .. } => Some(open(origin, config.as_str(), request.as_str(), host)),
        _ => None,
    })
}

/// Behind [`super::PluginModule::count_documents`].
pub extern "C" fn count_documents(
    name: RStr<'_>,
    config: RStr<'_>,
    request: RStr<'_>,
    host: HostObject,
) -> RawResult<RString> {
    make(name, host, |_, maker, host| match maker {
        Maker::Dataset { count, .. } => Some(count(config.as_str(), request.as_str(), host)),
        _ => None,
    })
}

/// Behind [`super::PluginModule::new_choice_dataset`].
pub extern "C" fn new_choice_dataset(
    name: RStr<'_>,
    config: RStr<'_>,
    host: HostObject,
) -> RawResult<ChoiceDatasetObject> {
    make(name, host, |origin, maker, host| match maker {
        Maker::Choice(make) => Some(make(origin, config.as_str(), host)),
        _ => None,
    })
}

/// Behind [`super::PluginModule::new_model`].
pub extern "C" fn new_model(
    name: RStr<'_>,
    config: RStr<'_>,
    setup: RStr<'_>,
    host: HostObject,
) -> RawResult<ModelObject> {
    make(name, host, |origin, maker, host| match maker {
        Maker::Model(make) => Some(make(origin, config.as_str(), setup.as_str(), host)),
        _ => None,
    })
}

/// Behind [`super::PluginModule::new_kernel`].
pub extern "C" fn new_kernel(name: RStr<'_>, host: HostObject) -> RawResult<KernelObject> {
    make(name, host, |origin, maker, host| match maker {
        Maker::Kernel(make) => Some(make(origin, host)),
        _ => None,
    })
}

fn registrations() -> impl Iterator<Item = &'static Registration> {
    inventory::iter::<Registration>.into_iter()
}

/// Finds the registration called `name` for which `build` has an answer, and runs it under guard.
fn make<T>(
    name: RStr<'_>,
    host: HostObject,
    build: impl Fn(Origin, Maker, Host) -> Option<Result<T, PluginError>>,
) -> RawResult<T> {
    let name = name.as_str();
    let origin = registrations()
        .find(|registration| registration.origin.component == name)
        .map_or(
            Origin {
                plugin: "this plugin",
                component: "registry",
            },
            |found| found.origin,
        );
    guard(origin, "new", || {
        let host = Host::new(host)?;
        registrations()
            .filter(|registration| registration.origin.component == name)
            .find_map(|registration| build(registration.origin, registration.maker, host.clone()))
            .unwrap_or_else(|| {
                Err(PluginError::new(format!(
                    "the plugin has no component `{name}`"
                )))
            })
    })
}

/// An author's value behind a stable vtable.
struct Shim<T> {
    origin: Origin,
    inner: ManuallyDrop<T>,
}

impl<T> Shim<T> {
    fn new(origin: Origin, inner: T) -> Self {
        Self {
            origin,
            inner: ManuallyDrop::new(inner),
        }
    }
}

impl<T> Drop for Shim<T> {
    /// A panic must not reach the vtable, which would abort. It is printed, as there is no result for it to be in.
    fn drop(&mut self) {
        let inner = &mut self.inner;
        let dropped = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: the value is not used again: this is the end of what holds it.
            unsafe { ManuallyDrop::drop(inner) };
        }));
        if let Err(payload) = dropped {
            std::mem::forget(payload);
        }
    }
}

impl<T: Task> RawTask for Shim<T> {
    fn plan(&self, facts_json: RStr<'_>) -> RawResult<RString> {
        guard(self.origin, "plan", || {
            encode(&self.inner.plan(&decode(facts_json.as_str(), "facts")?)?)
        })
    }
}

impl<D: TokenDataset> RawTokenDataset for Shim<D> {
    fn info(&self) -> RawResult<RString> {
        guard(self.origin, "info", || encode(&self.inner.info()))
    }

    fn read(&self, windows: RSlice<'_, u64>, mut tokens: RSliceMut<'_, i32>) -> RawResult<()> {
        guard(self.origin, "read", || {
            self.inner.read(windows.as_slice(), tokens.as_mut_slice())
        })
    }

    fn encode(&self, text: RStr<'_>) -> RawResult<RVec<i32>> {
        guard(self.origin, "encode", || {
            Ok(self.inner.encode(text.as_str())?.into())
        })
    }

    fn decode(&self, ids: RSlice<'_, i32>) -> RawResult<RString> {
        guard(self.origin, "decode", || {
            Ok(self.inner.decode(ids.as_slice())?.into())
        })
    }

    fn lengths(&self, first: u64, mut lengths: RSliceMut<'_, u32>) -> RawResult<()> {
        guard(self.origin, "lengths", || {
            self.inner.lengths(first, lengths.as_mut_slice())
        })
    }
}

impl<D: ChoiceDataset> RawChoiceDataset for Shim<D> {
    fn info(&self) -> RawResult<RString> {
        guard(self.origin, "info", || encode(&self.inner.info()))
    }

    fn read(&self, first: u64, n: u64) -> RawResult<RString> {
        guard(self.origin, "read", || encode(&self.inner.read(first, n)?))
    }
}

impl<M: Model> RawModel for Shim<M> {
    fn parameters(&self) -> RawResult<RVec<RawNamed>> {
        guard(self.origin, "parameters", || {
            let all = self.inner.parameters().into_iter();
            Ok(all
                .map(|parameter| RawNamed {
                    name: parameter.name.into(),
                    tensor: parameter.tensor,
                    is_trainable: parameter.is_trainable,
                })
                .collect())
        })
    }

    fn forward(&mut self, input: RawForwardInput) -> RawResult<RawForwardOutput> {
        guard(self.origin, "forward", || {
            let input = full_input(input, Past::None, None);
            Ok(raw_report(self.inner.forward(input)?)?.output)
        })
    }

    fn graph_safe(&self) -> RawResult<bool> {
        guard(self.origin, "graph_safe", || Ok(self.inner.graph_safe()))
    }

    fn forward_with_past(
        &mut self,
        input: RawForwardInput,
        past_json: RStr<'_>,
    ) -> RawResult<RawForwardOutput> {
        guard(self.origin, "forward", || {
            let past = decode(past_json.as_str(), "past")?;
            let input = full_input(input, past, None);
            Ok(raw_report(self.inner.forward(input)?)?.output)
        })
    }

    fn abilities(&self) -> RawResult<RString> {
        guard(self.origin, "abilities", || encode(&self.inner.abilities()))
    }

    fn memory(&self) -> RawResult<RVec<RawNamed>> {
        guard(self.origin, "memory", || {
            Ok(self.inner.memory().into_iter().map(named).collect())
        })
    }

    fn set_memory(&mut self, memory: RVec<RawNamed>) -> RawResult<()> {
        guard(self.origin, "set_memory", || {
            let memory = memory.into_iter().map(|raw| NamedTensor {
                name: raw.name.into(),
                tensor: raw.tensor,
            });
            self.inner.set_memory(memory.collect())
        })
    }

    fn summary(&self, seq_len: u64) -> RawResult<RString> {
        guard(self.origin, "summary", || {
            encode(&self.inner.summary(seq_len))
        })
    }

    fn forward_with_report(
        &mut self,
        input: RawForwardInput,
        past_json: RStr<'_>,
        wishes_json: RStr<'_>,
    ) -> RawResult<RawReport> {
        guard(self.origin, "forward", || {
            let past = match past_json.as_str() {
                "" => Past::None,
                past => decode(past, "past")?,
            };
            let wishes = decode(wishes_json.as_str(), "wishes")?;
            let input = full_input(input, past, Some(wishes));
            raw_report(self.inner.forward(input)?)
        })
    }
}

/// Callers of older versions wish for statistics or for nothing.
fn full_input(raw: RawForwardInput, past: Past, wishes: Option<Wishes>) -> ForwardInput {
    ForwardInput {
        tokens_tb: raw.tokens_tb,
        is_training: raw.is_training,
        wishes: wishes.unwrap_or(Wishes {
            stats: raw.wants_stats,
            ..Wishes::default()
        }),
        past,
    }
}

fn raw_report(output: ForwardOutput) -> Result<RawReport, PluginError> {
    let chart = |chart: Chart| {
        Ok(RawChart {
            name: chart.name.into(),
            kind_json: encode(&chart.kind)?,
            values: chart.values,
        })
    };
    let charts = output.charts.into_iter().map(chart);
    Ok(RawReport {
        charts: charts.collect::<Result<_, PluginError>>()?,
        output: RawForwardOutput {
            logits_tbv: output.logits_tbv,
            regularizers: output.regularizers.into_iter().map(named).collect(),
            stats: output.stats.into_iter().map(named).collect(),
        },
        selections: output.selections.into_iter().map(named).collect(),
    })
}

impl<K: Kernel> RawKernel for Shim<K> {
    fn capabilities(&self) -> RawResult<RString> {
        guard(self.origin, "capabilities", || encode(&K::capabilities()))
    }

    fn grouped_matmul(&self, call: RawGroupedMatmul) -> RawResult<TensorHandle> {
        guard(self.origin, "grouped_matmul", || {
            self.inner.grouped_matmul(GroupedMatmul {
                x: call.x,
                weight: call.weight,
                selection: Selection {
                    order: call.order,
                    inverse: call.inverse,
                    ends: call.ends,
                },
                gate: call.gate.into_option(),
            })
        })
    }

    fn route(&self, call: RawRoute) -> RawResult<RawRouted> {
        guard(self.origin, "route", || {
            Ok(raw_routed(self.inner.route(route(call)?)?))
        })
    }

    fn moe_mlp(&self, call: RawMoeMlp) -> RawResult<TensorHandle> {
        guard(self.origin, "moe_mlp", || {
            self.inner.moe_mlp(MoeMlp {
                x: call.x,
                w1: call.w1,
                b1: call.b1.into_option(),
                w2: call.w2,
                gate: call.gate,
                selection: Selection {
                    order: call.order,
                    inverse: call.inverse,
                    ends: call.ends,
                },
                options: decode(call.options_json.as_str(), "options of `moe_mlp`")?,
            })
        })
    }

    fn moe_project(&self, call: RawMoeProject) -> RawResult<RawProjected> {
        guard(self.origin, "moe_project", || {
            let projected = self.inner.moe_project(MoeProject {
                route: route(call.route)?,
                x: call.x,
                weight: call.weight,
            })?;
            Ok(RawProjected {
                y: projected.y,
                routed: raw_routed(projected.routed),
            })
        })
    }

    fn residual_norm(&self, call: RawResidualNorm) -> RawResult<RawResidualNormed> {
        guard(self.origin, "residual_norm", || {
            let normed = self.inner.residual_norm(ResidualNorm {
                x: call.x,
                update: call.update.into_option(),
                weight: call.weight,
                bias: call.bias,
                options: decode(call.options_json.as_str(), "options of `residual_norm`")?,
            })?;
            Ok(RawResidualNormed {
                sum: normed.sum,
                plain: normed.plain,
                normed: normed.normed,
            })
        })
    }

    fn select(&self, call: RawSelect) -> RawResult<RawSelected> {
        guard(self.origin, "select", || {
            let selected = self.inner.select(Select {
                x: call.x,
                weight: call.weight,
                options: decode(call.options_json.as_str(), "options of `select`")?,
            })?;
            Ok(RawSelected {
                gate: selected.gate,
                log_means: selected.log_means,
                ids: selected.ids,
                order: selected.selection.order,
                inverse: selected.selection.inverse,
                ends: selected.selection.ends,
            })
        })
    }

    fn rotate(&self, call: RawRotate) -> RawResult<TensorHandle> {
        guard(self.origin, "rotate", || {
            self.inner.rotate(Rotate {
                x: call.x,
                cos: call.cos,
                sin: call.sin,
            })
        })
    }

    fn cross_entropy(&self, call: RawCrossEntropy) -> RawResult<TensorHandle> {
        guard(self.origin, "cross_entropy", || {
            self.inner.cross_entropy(CrossEntropy {
                logits: call.logits,
                targets: call.targets,
            })
        })
    }
}

fn route(raw: RawRoute) -> Result<Route, PluginError> {
    Ok(Route {
        x: raw.x,
        norm_weight: raw.norm_weight.into_option(),
        norm_bias: raw.norm_bias.into_option(),
        weight: raw.weight,
        bias: raw.bias.into_option(),
        options: decode(raw.options_json.as_str(), "options of `route`")?,
    })
}

fn raw_routed(routed: Routed) -> RawRouted {
    RawRouted {
        logits: routed.logits,
        gate: routed.gate,
        ids: routed.ids,
        order: routed.selection.order,
        inverse: routed.selection.inverse,
        ends: routed.selection.ends,
    }
}

fn named(value: NamedTensor) -> RawNamed {
    RawNamed {
        name: value.name.into(),
        tensor: value.tensor,
        is_trainable: false,
    }
}

fn encode(value: &impl Serialize) -> Result<RString, PluginError> {
    serde_json::to_string(value)
        .map(RString::from)
        .map_err(|error| {
            PluginError::new("a value cannot be written as JSON").why(error.to_string())
        })
}

fn decode<T: DeserializeOwned>(json: &str, what: &str) -> Result<T, PluginError> {
    serde_json::from_str(json).map_err(|error| {
        PluginError::new(format!("invalid {what}"))
            .why(error.to_string())
            .fix("build the host and the plugin from the same sources")
    })
}

/// A kernel of this very library as an object, for tests that need no second library.
pub(super) fn kernel_object<K: Kernel>(kernel: K) -> KernelObject {
    let origin = Origin {
        plugin: "in process",
        component: K::NAME,
    };
    RawKernel_TO::from_value(Shim::new(origin, kernel), TD_Opaque)
}
