//! The stable plugin ABI of moeut-host, and the safe traits that plugin authors implement.
//!
//! An author writes a `cdylib` crate that implements [`Task`], [`TokenDataset`], [`ChoiceDataset`], [`Model`] or
//! [`Kernel`], registers it with `register_task!` and its sisters, and writes `export_plugin!()` once. The host finds the
//! library at run time. The [`book`] begins with concepts and ends with recipes.
//!
//! This crate knows nothing about libtorch: tensors are opaque [`TensorHandle`]s that `moeut-torch` opens.

pub mod abi;
pub mod args;
pub mod book;
pub mod chart;
pub mod choice;
pub mod component;
pub mod dataset;
pub mod error;
pub mod host;
pub mod kernel;
pub mod model;
pub mod task;
pub mod tensor;
pub mod testing;

pub use args::{ArgDef, ArgKind, ArgSpec, Profile, joined};
pub use chart::{AxisPart, Chart, ChartAxis, ChartKind, TokenRange};
pub use choice::{ChoiceDataset, ChoiceInfo, Question, ScoringRule};
pub use component::{ComponentInfo, ComponentKind};
pub use dataset::{DocumentCount, Split, StreamInfo, StreamRequest, TokenDataset};
pub use error::PluginError;
pub use host::{Host, HostInfo, LogLevel, Reduction};
pub use kernel::{Capabilities, GroupedMatmul, Kernel, Selection};
pub use model::{
    ForwardInput, ForwardOutput, LayerSummary, MapWish, Model, ModelAbilities, ModelSetup,
    ModelSummary, NamedTensor, Parameter, Past, Wishes,
};
pub use task::{EvaluationRequest, RunFacts, Task, TaskPlan};
pub use tensor::{DType, Device, TensorHandle};

/// What the macros of this crate expand to; not for authors.
#[doc(hidden)]
pub mod __private {
    pub use crate::abi::export::{
        LibHeader, RString, RootModuleResult, library_header, load, manifest, module,
    };
    pub use inventory;
}
