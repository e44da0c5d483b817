//! What the tests of several layers need beyond [`moeut_nn::testing`]: parameters by name, and finite differences.

use crate::args::ARGS;
use crate::config::Config;
use crate::losses::{LossWeights, MiFormula, Tally};
use moeut_nn::Params;
pub(crate) use moeut_nn::testing::context;
use moeut_torch::IntoTensor;
use tch::Tensor;

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
    Tally::new(weights, MiFormula::MutualInformation, true)
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
    moeut_nn::testing::config(ARGS, flags)
}
