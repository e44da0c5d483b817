//! What the tests of several layers need: a kernel that is obviously right, contexts, and finite differences.

use crate::args::ARGS;
use crate::config::Config;
use crate::losses::{LossWeights, MiFormula, Tally};
use moeut_nn::{Context, Params};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{
    ArgDef, Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle, args,
};
use moeut_torch::{IntoHandle, IntoTensor};
use serde::Deserialize;
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Copies each selection's weight and multiplies.
struct Copies;

impl Kernel for Copies {
    const NAME: &'static str = "copies";
    const SUMMARY: &'static str = "For tests";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        Capabilities {
            cpu: vec![DType::F64],
            cuda: Vec::new(),
            speed_rank: 0,
            is_deterministic: true,
            ..Capabilities::default()
        }
    }

    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
        let (ends, inverse) = (
            call.selection.ends.into_tensor(),
            call.selection.inverse.into_tensor(),
        );
        let n_selections = inverse.size()[0];
        let positions = Tensor::arange(n_selections, (Kind::Int, x.device()));
        let sorted = positions.searchsorted(&ends, false, true, "right", None::<Tensor>);
        let experts = sorted.index_select(0, &inverse);
        let x = x.repeat_interleave_self_int(n_selections / x.size()[0], 0, None);
        let y = x
            .unsqueeze(1)
            .bmm(&weight.index_select(0, &experts))
            .squeeze_dim(1);
        let Some(gate) = call.gate.map(IntoTensor::into_tensor) else {
            return Ok(y.into_handle());
        };
        let n = gate.size()[1];
        let y = y.view([-1, n, y.size()[1]]) * gate.unsqueeze(-1);
        Ok(y.sum_dim_intlist(1i64, false, None).into_handle())
    }
}

/// A full-precision context with the test kernel.
///
/// # Panics
/// If the kernel cannot be made, which is a fault of the test.
pub(crate) fn context(is_training: bool) -> Context {
    let kernel = match KernelClient::in_process(Copies) {
        Ok(kernel) => kernel,
        Err(error) => panic!("{error}"),
    };
    Context {
        kernel: Some(Rc::new(kernel)),
        compute: Kind::Double,
        is_mixed: false,
        is_router_rounded: false,
        is_training,
        wants_stats: false,
    }
}

/// The parameter of this name, shared with its layer.
///
/// # Panics
/// If there is none.
pub(crate) fn parameter(params: &Params, name: &str) -> Tensor {
    let mut all = params.parameters().into_iter();
    match all.find(|parameter| parameter.name == name) {
        Some(parameter) => parameter.tensor.into_tensor(),
        None => panic!("no parameter `{name}`"),
    }
}

/// Overwrites a parameter.
///
/// # Panics
/// If there is none of that name.
pub(crate) fn set(params: &Params, name: &str, value: &Tensor) {
    tch::no_grad(|| parameter(params, name).copy_(value));
}

/// All losses with weights of their own.
pub(crate) fn tally() -> Tally {
    let weights = LossWeights {
        cv: 0.2,
        switch: 0.3,
        z: 0.5,
        mi: 0.7,
    };
    Tally::new(weights, MiFormula::MutualInformation)
}

/// Compares the gradients of `loss` with central differences at up to 40 elements of each tensor.
///
/// # Panics
/// With the element that is off.
pub(crate) fn check_gradients(inputs: &[(&str, &Tensor)], loss: &dyn Fn() -> Tensor) {
    const STEP: f64 = 1e-5;
    loss().backward();
    for (name, input) in inputs {
        let (gradient, values) = (input.grad().reshape([-1]), input.detach().view([-1]));
        let n = gradient.size()[0];
        for index in (0..n).step_by(usize::try_from(n / 40).unwrap_or(0).max(1)) {
            let at = |shift: f64| {
                let _ = values.get(index).g_add_scalar_(shift);
                let loss = tch::no_grad(loss).double_value(&[]);
                let _ = values.get(index).g_add_scalar_(-shift);
                loss
            };
            let want = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let got = gradient.double_value(&[index]);
            assert!(
                (got - want).abs() <= 1e-7 * want.abs().max(1.0),
                "d{name}[{index}] is {got}, central differences say {want}"
            );
        }
    }
}

/// The arguments that a user typed, the rest defaults.
///
/// # Panics
/// If a flag is unknown or its value malformed.
pub(crate) fn config(flags: &[(&str, &str)]) -> Config {
    let defs: Vec<ArgDef> = ARGS.iter().map(ArgDef::from).collect();
    let parse = |&(flag, raw): &(&str, &str)| {
        let def = defs.iter().find(|def| def.name == flag);
        match def.map(|def| def.parse(raw)) {
            Some(Ok(value)) => (flag.to_owned(), value),
            other => panic!("`{flag}` {raw}: {other:?}"),
        }
    };
    match args::configuration(&defs, &flags.iter().map(parse).collect()) {
        Ok(config) => match Config::deserialize(config) {
            Ok(config) => config,
            Err(error) => panic!("{error}"),
        },
        Err(error) => panic!("{error}"),
    }
}
