//! The test kit: a [`Sandbox`] with the real host and real plugin files, and what tests do to both.
//!
//! Not the tests themselves, which are in `tests/` by subject. Its functions panic where a test would.
#![expect(
    clippy::missing_panics_doc,
    reason = "a panic is how a test kit reports that a test cannot go on"
)]
#![expect(
    clippy::expect_used,
    reason = "see above; each message says what was attempted"
)]

mod build;
mod metrics;
mod pth;
mod ranks;
mod running;
mod sandbox;
mod tiny;
mod tools;
mod web;

pub use build::{
    Flavor, build_as, build_crate, build_new, cached_data, shared_data, staged_plugins,
};
pub use metrics::{checkpoint_files, losses, steps_seen};
pub use pth::{RawTensor, RawTensors, ReferenceRun, read_safetensors};
pub use ranks::{Ranks, free_port};
pub use running::Running;
pub use sandbox::{DEADLINE, Outcome, Sandbox, patch, read, wait_until};
pub use tiny::{Args, tiny, tiny_on};
pub use tools::{python, skip, torchrun};
pub use web::{Fault, Request, Web};

/// The plugin file of the main task.
pub const TASK: &str = "libmoeut_task_moeut_c4.so";
/// The plugin file of the dataset.
pub const DATASET: &str = "libmoeut_dataset_c4.so";
/// The plugin file of the model; it links libtorch.
pub const MODEL: &str = "libmoeut_model_moeut.so";
/// The plugin files of the main job.
const PLUGINS: [&str; 5] = [
    TASK,
    DATASET,
    MODEL,
    "libmoeut_kernel_reference.so",
    "libmoeut_kernel_grouped.so",
];
