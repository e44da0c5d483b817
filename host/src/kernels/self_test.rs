//! Whether a kernel computes what it should: a small σ-MoE layer and the loss of some tokens, forward and backward,
//! beside plain tensor operations in double precision.
//!
//! `-moe.kernel auto` takes the fastest kernel that passes. That a kernel can be made and returns without an error is not
//! enough: drivers and compilers accept kernels for devices on which they compute nothing (the reference's Triton kernels
//! give zeros in float16 on Volta), and a run would train on that for days. This finds such gross mistakes in
//! milliseconds; whether a kernel is right in every case is what [`moeut_torch::testing`] checks.

use super::{Sorted, cross_entropy, sigma_moe};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{Activation, FusedCall};
use moeut_plugin_api::{DType, Device, PluginError};
use moeut_torch::OrPluginError;
use tch::{Kind, TchError, Tensor};

const N_TOKENS: i64 = 48;
const TOP_K: i64 = 2;
const D_MODEL: i64 = 64;
const D_EXPERT: i64 = 32;
const N_EXPERTS: i64 = 5;
/// Odd, so that rows of logits begin anywhere.
const N_IDS: i64 = 101;
/// The result, and the gradients of the inputs in their order.
const NAMES: [&str; 5] = ["y", "dx", "dw1", "dw2", "dgate"];
const FAILED: &str = "it fails its self-test";

type Outcome = Result<Tensor, PluginError>;

/// Tests the grouped product, and the fused layer and the loss if the kernel provides them.
///
/// # Errors
/// Whatever the kernel says, or with what is off.
pub fn check(kernel: &KernelClient, device: Device, dtype: DType) -> Result<(), PluginError> {
    let test = Test::new(device, dtype)?;
    test.check("grouped_matmul", |inputs| {
        sigma_moe(kernel, false, &test.sorted, inputs)
    })?;
    if kernel.provides(FusedCall::MoeMlp, Some(Activation::Relu), device, dtype) {
        test.check("moe_mlp", |inputs| {
            sigma_moe(kernel, true, &test.sorted, inputs)
        })?;
    }
    if kernel.provides(FusedCall::CrossEntropy, None, device, dtype) {
        check_loss(device, dtype, |logits, targets| {
            cross_entropy(kernel, logits, targets)
        })?;
    }
    Ok(())
}

/// Compares losses, and the gradient of logits, with the formula. Some tokens have no target.
fn check_loss(
    device: Device,
    dtype: DType,
    losses: impl Fn(&Tensor, &Tensor) -> Outcome,
) -> Result<(), PluginError> {
    let there = moeut_torch::device(device);
    let logits = (waves(0.6, &[N_TOKENS, N_IDS]) * 8.0).to_kind(moeut_torch::kind(dtype));
    let token = Tensor::arange(N_TOKENS, (Kind::Int64, tch::Device::Cpu));
    let targets = (&token * &token).remainder(N_IDS + 7) - 7;
    let expected = differentiate([&logits.to_kind(Kind::Double)], |[logits]| {
        let ids = targets.clamp_min(0).unsqueeze(-1);
        let of_targets = logits.gather(-1, &ids, false).squeeze_dim(-1);
        Ok((logits.logsumexp(-1i64, false) - of_targets) * targets.ge(0))
    })?;
    let (logits, targets) = (logits.to_device(there), targets.to_device(there));
    let found = differentiate([&logits], |[logits]| losses(logits, &targets))?;
    let (names, whose) = (["the loss", "its gradient"], "by `cross_entropy`");
    compare(&names, whose, (device, dtype), &found, &expected)
}

/// Compares results with what they should be.
fn compare(
    names: &[&str],
    whose: &str,
    (device, dtype): (Device, DType),
    found: &[Tensor],
    expected: &[Tensor],
) -> Result<(), PluginError> {
    for (name, (found, expected)) in names.iter().zip(found.iter().zip(expected)) {
        let verdict = judge(found, expected, tolerance(dtype)).or_plugin_error(FAILED)?;
        if let Err(wrong) = verdict {
            return Err(PluginError::new(FAILED)
                .why(format!("{name} {whose} {wrong}, in {dtype} on {device}"))
                .fix("set `-moe.kernel` to another one; `moeut-host plugins list` shows them"));
        }
    }
    Ok(())
}

/// ‖found - expected‖ / ‖expected‖, above any rounding (fp32 may be multiplied in TF32) and far below a mistake.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-9,
        DType::F32 | DType::Bf16 | DType::F16 => 5e-2,
    }
}

/// What is wrong with a tensor, if something is.
fn judge(
    found: &Tensor,
    expected: &Tensor,
    tolerance: f64,
) -> Result<Result<(), String>, TchError> {
    if !found.defined() {
        return Ok(Err("is missing".to_owned()));
    }
    if found.size() != expected.size() {
        return Ok(Err(format!("has the shape {:?}", found.size())));
    }
    let found = found
        .f_to_device(tch::Device::Cpu)?
        .f_to_kind(Kind::Double)?;
    let error = found
        .f_sub(expected)?
        .f_norm()?
        .f_div(&expected.f_norm()?)?;
    let error = error.f_double_value(&[])?;
    Ok(if error <= tolerance {
        Ok(())
    } else if error.is_finite() {
        Err(format!("is off by {:.0} %", 100.0 * error))
    } else {
        Err("is not finite".to_owned())
    })
}

/// Inputs and routing. Nothing is drawn, so that a run's random numbers do not depend on the kernels that are there.
struct Test {
    device: Device,
    dtype: DType,
    /// `x`, `w1`, `w2` and `gate`.
    inputs: [Tensor; 4],
    sorted: Sorted,
    /// The result and the gradients by the formula, in double precision on the CPU.
    expected: Vec<Tensor>,
}

impl Test {
    fn new(device: Device, dtype: DType) -> Result<Self, PluginError> {
        let (kind, there) = (moeut_torch::kind(dtype), moeut_torch::device(device));
        let inputs = [
            waves(0.1, &[N_TOKENS, D_MODEL]),
            waves(0.2, &[N_EXPERTS, D_MODEL, D_EXPERT]) * 0.2,
            waves(0.3, &[N_EXPERTS, D_EXPERT, D_MODEL]) * 0.2,
            waves(0.4, &[N_TOKENS, TOP_K]).abs(),
        ];
        let inputs = inputs.map(|input| input.to_kind(kind));
        let exact = inputs.each_ref().map(|input| input.to_kind(Kind::Double));
        let expected = differentiate(exact.each_ref(), |inputs| Ok(formula(inputs)))?;
        Ok(Self {
            device,
            dtype,
            inputs: inputs.map(|input| input.to_device(there)),
            sorted: Sorted::new(&ids().to_device(there), N_EXPERTS),
            expected,
        })
    }

    /// Compares a layer, and its gradients, with the formula.
    fn check(
        &self,
        name: &str,
        layer: impl Fn([&Tensor; 4]) -> Outcome,
    ) -> Result<(), PluginError> {
        let found = differentiate(self.inputs.each_ref(), layer)?;
        let whose = format!("of a small σ-MoE layer by `{name}`");
        let place = (self.device, self.dtype);
        compare(&NAMES, &whose, place, &found, &self.expected)
    }
}

/// Two different experts for each token, and another number of tokens for each expert: `[tokens, k]`, on the CPU.
fn ids() -> Tensor {
    let token = Tensor::arange(N_TOKENS, (Kind::Int64, tch::Device::Cpu));
    let first = (&token * &token).remainder(N_EXPERTS);
    let second = (&first + 1 + token.remainder(2)).remainder(N_EXPERTS);
    Tensor::stack(&[first, second], 1)
}

/// A product for every selection.
fn formula([x, w1, w2, gate]: [&Tensor; 4]) -> Tensor {
    let ids = ids().reshape([-1]);
    let rows = x.repeat_interleave_self_int(TOP_K, 0, None).unsqueeze(1);
    let hidden = rows.bmm(&w1.index_select(0, &ids)).relu();
    let y = hidden.bmm(&w2.index_select(0, &ids));
    let y = y.view([N_TOKENS, TOP_K, D_MODEL]) * gate.unsqueeze(-1);
    y.sum_dim_intlist(1i64, false, None)
}

/// The result of a layer, and the gradients of its inputs.
fn differentiate<const N: usize>(
    inputs: [&Tensor; N],
    layer: impl Fn([&Tensor; N]) -> Outcome,
) -> Result<Vec<Tensor>, PluginError> {
    tch::with_grad(|| {
        let inputs = inputs.map(|input| input.detach().set_requires_grad(true));
        let y = layer(inputs.each_ref())?;
        let upstream = waves(0.5, &y.size())
            .to_kind(y.kind())
            .to_device(y.device());
        if y.requires_grad() {
            y.f_mul(&upstream)
                .and_then(|products| products.f_sum(Kind::Float))
                .and_then(|loss| loss.f_backward())
                .or_plugin_error(FAILED)?;
        }
        let gradients = inputs.iter().map(Tensor::grad);
        Ok(std::iter::once(y.detach()).chain(gradients).collect())
    })
}

/// Values in [-1, 1] without a pattern, in double precision on the CPU.
fn waves(phase: f64, shape: &[i64]) -> Tensor {
    let n_values: i64 = shape.iter().product();
    let index = Tensor::arange(n_values, (Kind::Double, tch::Device::Cpu));
    (&index * &index * 0.7 + phase).sin().reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(dtype: DType, change: impl Fn(Tensor) -> Tensor) -> Result<(), String> {
        let test = Test::new(Device::Cpu, dtype).unwrap();
        let layer = |inputs: [&Tensor; 4]| Ok(change(formula(inputs)));
        let outcome = test.check("test", layer);
        outcome.map_err(|error| error.why)
    }

    #[test]
    fn rounding_passes() {
        for dtype in [DType::F64, DType::F32, DType::Bf16, DType::F16] {
            assert_eq!(verdict(dtype, |y| y), Ok(()), "{dtype}");
        }
    }

    #[test]
    fn losses_are_those_of_libtorch() {
        let check = |dtype, change: fn(&Tensor) -> Tensor| {
            let losses = |logits: &Tensor, targets: &Tensor| {
                let log_p = change(logits).log_softmax(-1, Kind::Float);
                let targets = targets.where_self(&targets.ge(0), &targets.full_like(-100));
                log_p
                    .f_nll_loss(&targets, None::<&Tensor>, tch::Reduction::None, -100)
                    .or_plugin_error(FAILED)
            };
            check_loss(Device::Cpu, dtype, losses).map_err(|error| error.why)
        };
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            assert_eq!(check(dtype, Tensor::shallow_clone), Ok(()), "{dtype}");
        }
        let said = [
            check(DType::Bf16, |logits| logits * 0.5 + logits.detach() * 0.5),
            check(DType::F32, |logits| logits.clamp_max(6.0)),
        ];
        insta::assert_snapshot!(said.map(Result::unwrap_err).join("\n"), @r"
        its gradient by `cross_entropy` is off by 50 %, in bf16 on cpu
        the loss by `cross_entropy` is off by 10 %, in f32 on cpu
        ");
    }

    #[test]
    fn mistakes_do_not() {
        let wrong = |change: fn(Tensor) -> Tensor| {
            let [single, half] = [DType::F32, DType::F16].map(|dtype| verdict(dtype, change));
            let said = single.unwrap_err();
            assert_eq!(Some(said.replace("f32", "f16")), half.err());
            said
        };
        let said = [
            wrong(|y| y.zeros_like() * y),
            wrong(|y| y * f64::NAN),
            wrong(|y| y * 0.9),
            wrong(|y| &y * 0.5 + y.detach() * 0.5),
            wrong(|y| y.detach()),
            wrong(|y| y.narrow(0, 0, 3)),
        ];
        insta::assert_snapshot!(said.join("\n"), @r"
        y of a small σ-MoE layer by `test` is off by 100 %, in f32 on cpu
        y of a small σ-MoE layer by `test` is not finite, in f32 on cpu
        y of a small σ-MoE layer by `test` is off by 10 %, in f32 on cpu
        dx of a small σ-MoE layer by `test` is off by 50 %, in f32 on cpu
        dx of a small σ-MoE layer by `test` is missing, in f32 on cpu
        y of a small σ-MoE layer by `test` has the shape [3, 64], in f32 on cpu
        ");
    }
}
