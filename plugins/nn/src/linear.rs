//! `y = x · weightᵀ + bias`.

use crate::padding::padded;
use crate::{Init, Params};
use tch::{Kind, Tensor};

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

    /// The same once more, sharing its parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            weight: self.weight.shallow_clone(),
            bias: self.bias.shallow_clone(),
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
        let (weight, bias) = self.operands(self.weight.kind(), [width, d_in]);
        x.linear(&weight, Some(&bias))
    }

    /// Weight and bias as wide as `shape`, with zeros behind their own, and of this element type.
    pub(crate) fn operands(&self, kind: Kind, shape: [i64; 2]) -> (Tensor, Tensor) {
        let weight = padded(&self.weight.to_kind(kind), &shape);
        let bias = padded(&self.bias.to_kind(kind), &shape[..1]);
        (weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

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
}
