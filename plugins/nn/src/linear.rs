//! `y = x · weightᵀ + bias`.

use crate::{Init, Params};
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
}
