//! `y = x · weightᵀ + bias`.

use crate::padding::padded;
use crate::{Activation, Context, Init, Params};
use moeut_plugin_api::PluginError;
use moeut_torch::{Autocast, Context as GraphContext, Function, FunctionError, OrPluginError, apply};
use tch::Tensor;

/// The plain layer, with a bias; `[.., in]` → `[.., out]`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// Adds `weight` and `bias`, initially as PyTorch's.
    pub fn new(params: &Params, d_in: i64, d_out: i64) -> Self {
        let (weight, bias) = (Init::linear_weight(d_in), Init::linear_bias(d_in));
        Self::with_init(params, [d_out, d_in], weight, bias)
    }

    /// Adds `weight` `[out, in]` and `bias`.
    pub fn with_init(params: &Params, shape: [i64; 2], weight: Init, bias: Init) -> Self {
        Self {
            weight: params.parameter("weight", &shape, weight),
            bias: params.parameter("bias", &shape[..1], bias),
        }
    }

    /// Applies it.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }

    /// Applies it and appends zeros up to `width` outputs; an input may have more values than there are weights for, which
    /// count nothing.
    pub fn forward_to(&self, x: &Tensor, width: i64) -> Tensor {
        let d_in = x.size().last().copied().unwrap_or(0);
        let weight = padded(&self.weight, &[width, d_in]);
        x.linear(&weight, Some(&padded(&self.bias, &[width])))
    }

    /// `activation` of [`Self::forward_to`]. In mixed precision the product itself ends with a `ReLU`, so that the hidden units
    /// go through memory once less.
    ///
    /// # Errors
    /// If libtorch has no memory for it.
    pub fn forward_to_activation(
        &self,
        x: &Tensor,
        width: i64,
        activation: Activation,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        if activation != Activation::Relu || !ctx.is_mixed {
            return Ok(activation.forward(self.forward_to(x, width)));
        }
        let mut shape = x.size();
        let d_in = shape.pop().unwrap_or(0);
        shape.push(width);
        let x = x.to_kind(ctx.compute).reshape([-1, d_in]);
        let weight = ctx.operand_of(&self.weight, &[width, d_in]);
        let bias = ctx.operand_of(&self.bias, &[width]);
        let y = apply(ReluLinear, &[&x, &weight, &bias]).or_plugin_error("no hidden units")?;
        Ok(y[0].view(&shape[..]))
    }
}

/// `relu(x · weightᵀ + bias)` of `[N, in]`, `[out, in]` and `[out]`.
struct ReluLinear;

impl Function for ReluLinear {
    fn forward(
        &self,
        ctx: &mut GraphContext,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, FunctionError> {
        let [x, weight, bias] = inputs else {
            return Err("too few inputs".into());
        };
        let _own_types = Autocast::new(x.device(), None)?;
        let y = if x.device().is_cuda() {
            bias.f_internal_addmm_activation(x, &weight.f_tr()?, false)?
        } else {
            // There it forgets the bias (libtorch 2.11, bf16).
            bias.f_addmm(x, &weight.f_tr()?)?.f_relu_()?
        };
        ctx.save(&[x, weight, &y])?;
        Ok(vec![y])
    }

    fn backward(
        &self,
        ctx: &GraphContext,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let ([x, weight, y], Some(Some(dy))) = (&saved[..], grads.first()) else {
            return Ok(vec![None, None, None]);
        };
        let _own_types = Autocast::new(x.device(), None)?;
        let dh = y.f_threshold_backward(dy, 0.0)?;
        let dx = if ctx.needs_input_grad(0) {
            Some(dh.f_mm(weight)?)
        } else {
            None
        };
        let dweight = dh.f_tr()?.f_mm(x)?;
        let dbias = dh.f_sum_dim_intlist(0_i64, false, dh.kind())?;
        Ok(vec![dx, Some(dweight), Some(dbias)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::context;
    use tch::{Device, Kind};

    /// Three hidden units more change neither the result nor a gradient.
    #[test]
    fn a_wider_hidden_layer_is_the_same_function() {
        moeut_torch::rng::seed(2).unwrap();
        let x = Tensor::randn([2, 4, 6], (Kind::Double, Device::Cpu));
        let params = Params::new(Kind::Double, Device::Cpu);
        let first = Linear::new(&params.sub("first"), 6, 13);
        let second = Linear::new(&params.sub("second"), 13, 5);
        let pass = |hidden: Tensor| {
            let y = second.forward_to(&hidden.relu(), 5);
            let inputs = [&first.weight, &first.bias, &second.weight, &second.bias];
            let loss = y.square().sum(Kind::Double);
            (y, Tensor::run_backward(&[loss], &inputs, false, false))
        };
        let (plain, plain_grads) = pass(first.forward_to(&x, 13));
        let (wide, wide_grads) = pass(first.forward_to(&x, 16));
        assert!((plain - wide).abs().max().double_value(&[]) < 1e-12);
        for (plain, wide) in plain_grads.iter().zip(&wide_grads) {
            assert!((plain - wide).abs().max().double_value(&[]) < 1e-12);
        }
    }

    /// The product that ends with a `ReLU` is the product, and then a `ReLU`.
    #[test]
    fn a_fused_relu_is_the_same_function() {
        moeut_torch::rng::seed(3).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let x = Tensor::randn([2, 4, 6], options)
            .to_kind(Kind::BFloat16)
            .set_requires_grad(true);
        let params = Params::new(Kind::Float, Device::Cpu);
        let layer = Linear::new(&params, 6, 13);
        let ctx = Context {
            is_mixed: true,
            compute: Kind::BFloat16,
            ..context(true)
        };
        let pass = |y: Tensor| {
            let inputs = [&x, &layer.weight, &layer.bias];
            let loss = (&y * Tensor::arange(2 * 4 * 16, options).view_as(&y)).sum(Kind::Float);
            (y, Tensor::run_backward(&[loss], &inputs, false, false))
        };
        let fused = layer.forward_to_activation(&x, 16, Activation::Relu, &ctx);
        let (fused, fused_grads) = pass(fused.unwrap());
        let autocast = Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
        let plain = layer.forward_to(&x, 16).relu();
        drop(autocast);
        let (plain, plain_grads) = pass(plain);
        assert!(plain.allclose(&fused, 1e-2, 1e-2, false));
        assert!(plain.gt(0).any().int64_value(&[]) == 1);
        for (plain, fused) in plain_grads.iter().zip(&fused_grads) {
            let largest = plain.abs().max().double_value(&[]);
            assert!((plain - fused).abs().max().double_value(&[]) < 1e-2 * largest);
        }
    }
}
