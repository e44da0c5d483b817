//! What has to be the same in all processes that train one model, compared before the first step.

use super::device::Placement;
use super::evaluate::EvalStream;
use super::run::Named;
use super::stream::Stream;
use crate::args::Arguments;
use crate::distributed::Group;
use crate::eval::EvalSet;
use crate::plugins::Registry;
use moeut_plugin_api::{Device, PluginError};
use std::collections::BTreeMap;
use tch::Tensor;

/// Arguments that may differ from host to host.
const LOCAL: &[&str] = &[
    "data.cache_dir",
    "data.dir",
    "gpu",
    "plugin_dir",
    "save_dir",
    "threads",
];

/// What to do about most differences.
const SAME: &str = "start the same program with the same plugins and arguments on all hosts";

/// Version and commit of this program, and every plugin's hash.
///
/// # Errors
/// In all processes if one differs from the first.
pub fn on_program(group: &Group, registry: &Registry) -> Result<(), PluginError> {
    let program = [
        ("version", env!("CARGO_PKG_VERSION")),
        ("commit", option_env!("MOEUT_GIT_HASH").unwrap_or_default()),
    ];
    let program = program.map(|(name, value)| (name.to_owned(), value.to_owned()));
    group.agree("program", &program.into(), SAME)?;
    group.agree("plugin", &registry.hashes(), SAME)
}

/// The arguments that mean something in the run.
///
/// # Errors
/// As [`on_program`].
pub fn on_arguments(group: &Group, arguments: &Arguments) -> Result<(), PluginError> {
    let values = arguments.values.iter();
    let facts = values
        .filter(|(name, _)| !LOCAL.contains(&name.as_str()))
        .map(|(name, value)| (name.clone(), value.to_string()));
    group.agree("argument", &facts.collect(), SAME)
}

/// The kind of device, and the types of parameters and products.
///
/// # Errors
/// As [`on_program`].
pub(super) fn on_device(group: &Group, placement: Placement) -> Result<(), PluginError> {
    let kind = match placement.device {
        Device::Cpu => "CPU",
        Device::Cuda(_) => "GPU",
    };
    let facts = [
        ("kind", kind.to_owned()),
        ("parameters", placement.dtype.to_string()),
        ("products", placement.compute_dtype.to_string()),
    ];
    let facts = facts.map(|(name, value)| (name.to_owned(), value));
    let fix = "start no more processes on a host than it has GPUs, all of one kind, or train on CPUs with `-gpu none`; \
               `moeut-host doctor` says what each host has";
    group.agree("device", &facts.into(), fix)
}

/// Sizes of the data, wherever it lies.
///
/// # Errors
/// As [`on_program`].
pub(super) fn on_data(
    group: &Group,
    train: &Stream,
    vocab_size: u64,
    validation: &[EvalStream],
    evaluations: &[EvalSet],
) -> Result<(), PluginError> {
    let own = [
        ("windows".to_owned(), train.n_windows()),
        ("vocabulary".to_owned(), vocab_size),
    ];
    let validation = validation
        .iter()
        .map(|stream| (stream.name.clone(), stream.stream.n_windows()));
    let evaluations = evaluations
        .iter()
        .map(|set| (set.name.clone(), set.len() as u64));
    let all = own.into_iter().chain(validation).chain(evaluations);
    let facts = all.map(|(name, n)| (name, n.to_string()));
    let fix = "give all hosts the same files (`-data.dir`), or remove the one's `-data.cache_dir`, which is made anew";
    group.agree("data", &facts.collect(), fix)
}

/// Names, types and shapes of the model's tensors.
///
/// # Errors
/// As [`on_program`].
pub(super) fn on_parameters(group: &Group, parameters: &Named) -> Result<(), PluginError> {
    let shape = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
    let facts: BTreeMap<String, String> = parameters
        .iter()
        .map(|(name, tensor)| (name.clone(), shape(tensor)))
        .collect();
    group.agree("parameter", &facts, SAME)
}
