//! Token embedding.

use crate::{Params, init};
use tch::Tensor;

/// `x = scale · weight[token]`.
#[derive(Debug)]
pub struct Embedding {
    weight_vd: Tensor,
    scale: f64,
}

impl Embedding {
    /// Rows are `N(0, 1/√D)`.
    pub fn new(params: &Params, vocab_size: i64, d_model: i64, scale: f64) -> Self {
        let std = 1.0 / (d_model as f64).sqrt();
        let weight = init::normal(&[vocab_size, d_model], std, params.options());
        Self {
            weight_vd: params.trainable("weight", &weight),
            scale,
        }
    }

    /// Token ids `[B, T]` → `[B, T, D]`, not yet scaled: dropout comes in between.
    pub fn forward(&self, tokens_bt: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight_vd, tokens_bt, -1, false, false)
    }

    /// Multiplies by the scale.
    pub fn scaled(&self, x_btd: Tensor) -> Tensor {
        #[expect(
            clippy::float_cmp,
            reason = "1.0 is the exact default that needs no work"
        )]
        if self.scale == 1.0 {
            x_btd
        } else {
            x_btd * self.scale
        }
    }
}
