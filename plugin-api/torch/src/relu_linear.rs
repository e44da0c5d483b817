//! A linear layer that ends with a `relu`, on GPUs without passes over memory for bias and `relu`.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use tch::{Device, Kind, TchError, Tensor};

use crate::autocast::Autocast;
use crate::ffi::{self, check};
use crate::function::{Context, Function, FunctionError, apply};
use crate::list::List;

/// Whether [`relu_linear`] is faster than its parts: on a GPU, in 16 bits.
pub fn is_worthwhile(device: Device, kind: Kind) -> bool {
    device.is_cuda() && matches!(kind, Kind::Half | Kind::BFloat16)
}

/// `relu(x · wᵀ + b)`, differentiable in all three, of which the backward pass keeps `x`, `w` and the result.
///
/// ```text
/// x [.., D]   w [S, D]   b [S]   →   [.., S]
/// ```
/// All have one element type, and the result has it, too, whatever autocast says. On GPUs widths are multiples of 8.
///
/// # Errors
/// If shapes, types or devices do not fit, and where libtorch or cuBLAS refuse.
pub fn relu_linear(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
    let mut shape = x.size();
    let width = shape.pop().unwrap_or(0);
    shape.push(*w.size().first().unwrap_or(&0));
    let x = x.f_reshape([-1, width])?;
    let y = apply(ReluLinear, &[&x, w, b])?.swap_remove(0);
    y.f_reshape(&shape)
}

struct ReluLinear;

impl Function for ReluLinear {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [x, w, b] = inputs else {
            return Err("three inputs are needed".into());
        };
        let _as_they_are = Autocast::new(x.device(), None)?;
        let y = if is_worthwhile(x.device(), x.kind()) {
            fused(&x.f_contiguous()?, &w.f_contiguous()?, &b.f_contiguous()?)?
        } else {
            b.f_addmm(x, &w.f_tr()?)?.f_relu_()?
        };
        ctx.save(&[x, w, &y])?;
        Ok(vec![y])
    }

    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let ([x, w, y], Some(Some(dy))) = (&saved[..], grads.first()) else {
            return Ok(vec![None, None, None]);
        };
        let _as_they_are = Autocast::new(x.device(), None)?;
        let dz = y.f_threshold_backward(dy, 0.0)?;
        let dx = if ctx.needs_input_grad(0) {
            Some(dz.f_mm(w)?)
        } else {
            None
        };
        let dw = dz.f_tr()?.f_mm(x)?;
        let db = dz.f_sum_dim_intlist(0i64, false, dz.kind())?;
        Ok(vec![dx, Some(dw), Some(db)])
    }
}

fn fused(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor, TchError> {
    let mut result = List::new()?;
    let results = result.as_mut_ptr();
    // SAFETY: tensors and list outlive the call, and the shim checks them.
    unsafe {
        check(ffi::moeut_relu_linear(
            x.as_ptr(),
            w.as_ptr(),
            b.as_ptr(),
            results,
        ))
    }?;
    result.to_tensor()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda;

    /// Result and gradients of the function, or of its parts.
    fn pass(inputs: &[Tensor], is_function: bool) -> Vec<Tensor> {
        let leaves: Vec<Tensor> = inputs
            .iter()
            .map(|input| input.copy().set_requires_grad(true))
            .collect();
        let [x, w, b] = &leaves[..] else {
            panic!("three inputs");
        };
        let y = if is_function {
            relu_linear(x, w, b).unwrap()
        } else {
            x.linear(w, Some(b)).relu()
        };
        y.square().mean(Kind::Float).backward();
        let grads = leaves.iter().map(Tensor::grad);
        std::iter::once(y.detach()).chain(grads).collect()
    }

    fn inputs(kind: Kind, device: Device, (n, d, s): (i64, i64, i64)) -> Vec<Tensor> {
        let shapes: [&[i64]; 3] = [&[2, n, d], &[s, d], &[s]];
        let waves = |shape: &[i64]| {
            let places = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, device));
            (places * 1.7).sin().reshape(shape).to_kind(kind)
        };
        shapes.into_iter().map(waves).collect()
    }

    fn compare(inputs: &[Tensor], bound: f64) {
        let exact: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
        for (i, (got, want)) in pass(inputs, true)
            .iter()
            .zip(pass(&exact, false))
            .enumerate()
        {
            assert_eq!((got.size(), got.kind()), (want.size(), inputs[0].kind()));
            let error = (got.to_kind(Kind::Double) - &want).norm() / want.norm();
            let error = error.double_value(&[]);
            assert!(error < bound, "tensor {i}: {error}");
        }
    }

    #[test]
    fn it_is_a_linear_layer_and_a_relu() {
        compare(&inputs(Kind::Double, Device::Cpu, (5, 6, 11)), 1e-12);
    }

    /// On machines with a GPU, where cuBLAS does both.
    #[test]
    fn on_gpus_it_is_the_same_but_for_rounding() {
        if !matches!(cuda::load(), Ok(true)) {
            return;
        }
        for kind in [Kind::BFloat16, Kind::Half] {
            for sizes in [(33, 64, 136), (500, 128, 520)] {
                compare(&inputs(kind, Device::Cuda(0), sizes), 2e-2);
            }
        }
    }

    #[test]
    fn widths_that_do_not_fit_are_errors() {
        let mut inputs = inputs(Kind::Float, Device::Cpu, (2, 6, 4));
        inputs[1] = Tensor::zeros([4, 5], (Kind::Float, Device::Cpu));
        let [x, w, b] = &inputs[..] else {
            panic!("three inputs");
        };
        assert!(relu_linear(x, w, b).is_err());
    }
}
