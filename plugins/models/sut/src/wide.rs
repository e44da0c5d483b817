//! Rows of whole 16 bytes for the products of a layer. The residual stream stays as wide as it is.
//!
//! Of a model with 412 channels, the 16-bit products are slow because their rows do not begin at multiples of 16 bytes; a
//! few zeros behind each row, and as many zero rows or columns of the weights, change no result.

use moeut_nn::Context;
use moeut_plugin_api::PluginError;
use moeut_torch::{Context as GraphContext, Function, FunctionError, OrPluginError, apply};
use tch::{Kind, Tensor};

/// How wide rows of `d_model` channels are inside a layer, `D'`.
pub(crate) fn width(d_model: i64, ctx: &Context) -> i64 {
    ctx.aligned(d_model)
}

/// Zeros behind `x` along each of `axes` of its one to three, until it has `width` there.
pub(crate) fn padded(x: &Tensor, axes: &[i64], width: i64) -> Tensor {
    let size = x.size();
    let mut missing: Vec<_> = size.iter().map(|_| [0, 0]).collect();
    for &axis in axes {
        let axis = usize::try_from(axis).unwrap_or(0);
        missing[axis][1] = width - size[axis];
    }
    // Padding is listed from the last axis on.
    missing.reverse();
    let missing = missing.concat();
    if missing.iter().all(|&n| n == 0) {
        return x.shallow_clone();
    }
    x.constant_pad_nd(missing)
}

/// Rows `[.., D]` of the stream as products read them: `[.., D']` in the compute type, in one pass over memory.
///
/// # Errors
/// If libtorch has no memory.
pub(crate) fn rows(x: &Tensor, ctx: &Context) -> Result<Tensor, PluginError> {
    let d_model = x.size().last().copied().unwrap_or(0);
    let width = width(d_model, ctx);
    if width == d_model {
        return Ok(x.to_kind(ctx.compute));
    }
    let widen = Widen {
        d_model,
        width,
        from: x.kind(),
        to: ctx.compute,
    };
    apply(widen, &[x])
        .map(|mut outputs| outputs.swap_remove(0))
        .or_plugin_error("cannot pad the rows of a layer's input")
}

/// Rounds and pads at once, and in the backward pass the opposite.
struct Widen {
    d_model: i64,
    width: i64,
    from: Kind,
    to: Kind,
}

impl Function for Widen {
    fn forward(
        &self,
        _: &mut GraphContext,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, FunctionError> {
        let [x] = inputs else {
            return Err("too few inputs".into());
        };
        let mut size = x.size();
        size.pop();
        size.push(self.width);
        let y = Tensor::f_empty(&size, (self.to, x.device()))?;
        y.f_narrow(-1, 0, self.d_model)?.f_copy_(x)?;
        let _ = y
            .f_narrow(-1, self.d_model, self.width - self.d_model)?
            .f_zero_()?;
        Ok(vec![y])
    }

    fn backward(
        &self,
        _: &GraphContext,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let Some(Some(dy)) = grads.first() else {
            return Ok(vec![None]);
        };
        let dx = dy.f_narrow(-1, 0, self.d_model)?;
        Ok(vec![Some(dx.f_to_kind(self.from)?.f_contiguous()?)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use tch::Device;

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

    #[test]
    fn zeros_follow_and_have_no_gradient() {
        let ctx = Context {
            is_mixed: true,
            ..testing::context(true)
        };
        let x = Tensor::randn([2, 3, 13], DOUBLE).set_requires_grad(true);
        let y = rows(&x, &ctx).unwrap();
        assert_eq!(y.size(), [2, 3, 16]);
        assert!(
            y.narrow(2, 0, 13).equal(&x) && y.narrow(2, 13, 3).abs().max().double_value(&[]) == 0.0
        );
        let cotangent = Tensor::randn([2, 3, 16], DOUBLE);
        (y * &cotangent).sum(None).backward();
        assert!(x.grad().equal(&cotangent.narrow(2, 0, 13)));
    }

    #[test]
    fn weights_are_padded_along_the_axes_that_are_named() {
        let weight = Tensor::randn([2, 5, 7], DOUBLE);
        let size = |axes: &[i64], width| padded(&weight, axes, width).size();
        assert_eq!(size(&[1], 8), [2, 8, 7]);
        assert_eq!(size(&[2], 8), [2, 5, 8]);
        assert_eq!(size(&[1, 2], 8), [2, 8, 8]);
        assert_eq!(size(&[1], 5), [2, 5, 7]);
    }
}
