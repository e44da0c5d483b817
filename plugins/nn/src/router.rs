//! Router logits, and how precise they are.

use moeut_torch::tf32::Tf32;
use moeut_torch::{Autocast, Context as GraphContext, Function, FunctionError, apply};
use serde::Deserialize;
use tch::{Device, Kind, TchError, Tensor};

use crate::context::at_least_f32;

/// In which type routers compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterDtype {
    /// At least single precision.
    F32,
    /// Under mixed precision on a GPU, operands rounded to 10 bits of mantissa, sums and logits in fp32: tensor cores
    /// do it, and logits do not tie. Elsewhere as `F32`.
    Tf32,
    /// Under mixed precision, operands rounded to autocast's type; sums and logits in fp32, so that logits do not tie.
    /// Elsewhere as `F32`.
    Mixed,
    /// As everything else, like the reference's.
    Amp,
}

/// `x · weightᵀ + bias`, `[.., D] → [.., rows]`; `mixed` is autocast's type, where it is on.
///
/// The reference computes it in the autocast type; with bf16 that makes 39 % of the tokens tie at the last place of the
/// top-k (387 experts, 16 taken, logits N(0, 1)), so that rounding decides.
pub(crate) fn logits(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    dtype: RouterDtype,
    mixed: Option<Kind>,
) -> Result<Tensor, TchError> {
    if dtype == RouterDtype::Amp {
        return x.f_linear(weight, bias);
    }
    let is_mixed = mixed.is_some();
    let _full = is_mixed
        .then(|| Autocast::new(x.device(), None))
        .transpose()?;
    let kind = at_least_f32(weight.kind());
    let bias = bias.map(|bias| bias.to_kind(kind));
    let operand = |operand: &Tensor| match (dtype, mixed) {
        // What fits the half type fits TF32, too.
        (RouterDtype::Mixed, Some(half)) => operand.f_to_kind(half)?.f_to_kind(kind),
        _ => operand.f_to_kind(kind),
    };
    let (x, weight) = (operand(x)?, operand(weight)?);
    if dtype == RouterDtype::F32 || !is_mixed || x.device() == Device::Cpu {
        return x.f_linear(&weight, bias.as_ref());
    }
    let z = apply(Tf32Linear, &[&x, &weight])?.swap_remove(0);
    match bias {
        Some(bias) => z.f_add(&bias),
        None => Ok(z),
    }
}

/// `x · weightᵀ` in TF32, forward and backward.
///
/// cuBLAS needs rows of whole 16 bytes for it, and numbers of experts are seldom even, so rows of logits are padded
/// here.
struct Tf32Linear;

/// Elements of fp32 in 16 bytes.
const ALIGNMENT: i64 = 4;

impl Function for Tf32Linear {
    fn forward(
        &self,
        ctx: &mut GraphContext,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, FunctionError> {
        let [x, weight] = inputs else {
            return Err("too few inputs".into());
        };
        ctx.save(&[x, weight])?;
        let _tf32 = Tf32::new()?;
        let z = rows(x)?.f_mm(&padded(weight)?.f_tr()?)?;
        let mut shape = x.size();
        let n_rows = weight.size()[0];
        shape.pop();
        shape.push(n_rows);
        Ok(vec![z.f_narrow(1, 0, n_rows)?.f_reshape(&shape)?])
    }

    fn backward(
        &self,
        ctx: &GraphContext,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let ([x, weight], Some(Some(dz))) = (&saved[..], grads.first()) else {
            return Ok(vec![None, None]);
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let _tf32 = Tf32::new()?;
        let n_rows = weight.size()[0];
        let dz = rows(dz)?.f_constant_pad_nd([0, missing(n_rows)])?;
        let dx = if ctx.needs_input_grad(0) {
            Some(dz.f_mm(&padded(weight)?)?.f_view(&x.size()[..])?)
        } else {
            None
        };
        let dweight = if ctx.needs_input_grad(1) {
            Some(dz.f_tr()?.f_mm(&rows(x)?)?.f_narrow(0, 0, n_rows)?)
        } else {
            None
        };
        Ok(vec![dx, dweight])
    }
}

/// `[.., D]` as a matrix.
fn rows(x: &Tensor) -> Result<Tensor, TchError> {
    let width = *x.size().last().unwrap_or(&1);
    x.f_reshape([-1, width])
}

/// Rows of zeros below `weight`.
fn padded(weight: &Tensor) -> Result<Tensor, TchError> {
    weight.f_constant_pad_nd([0, 0, 0, missing(weight.size()[0])])
}

fn missing(n_rows: i64) -> i64 {
    (ALIGNMENT - n_rows % ALIGNMENT) % ALIGNMENT
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference's routers compute in autocast's type; ours do so only if asked to.
    #[test]
    fn router_logits_are_rounded_only_on_request() {
        let options = (Kind::Float, Device::Cpu);
        let (x, weight) = (Tensor::ones([2, 3], options), Tensor::ones([4, 3], options));
        let _bf16 = Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
        for (dtype, kind) in [
            (RouterDtype::F32, Kind::Float),
            (RouterDtype::Tf32, Kind::Float),
            (RouterDtype::Mixed, Kind::Float),
            (RouterDtype::Amp, Kind::BFloat16),
        ] {
            let logits = super::logits(&x, &weight, None, dtype, Some(Kind::BFloat16)).unwrap();
            assert_eq!(logits.kind(), kind);
        }
    }

    /// On a CPU TF32 is fp32, so the function must be the linear layer to rounding, padding and all.
    #[test]
    fn the_function_is_a_linear_layer() {
        let options = (Kind::Float, Device::Cpu);
        for n_rows in [4, 5, 7] {
            let of = |use_function: bool| {
                tch::manual_seed(3);
                let x = Tensor::randn([2, 6, 9], options).set_requires_grad(true);
                let weight = Tensor::randn([n_rows, 9], options).set_requires_grad(true);
                let z = if use_function {
                    apply(Tf32Linear, &[&x, &weight]).unwrap().swap_remove(0)
                } else {
                    x.linear(&weight, None::<&Tensor>)
                };
                (&z * &z).sum(Kind::Float).backward();
                [z, x.grad(), weight.grad()]
            };
            for (got, want) in of(true).iter().zip(&of(false)) {
                assert_eq!(got.size(), want.size());
                assert!(got.allclose(want, 1e-5, 1e-5, false));
            }
        }
    }
}
