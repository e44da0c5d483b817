//! From the last hidden state to logits.

use crate::{Context, LayerNorm, Params, init};
use tch::Tensor;

/// `logits = drop(LN(x)) · weightᵀ + bias`; the weight is not tied to the embedding.
#[derive(Debug)]
pub struct LmHead {
    norm: Option<LayerNorm>,
    weight_vd: Tensor,
    bias_v: Tensor,
    dropout: f64,
}

impl LmHead {
    /// Parameters `out_norm.*` (if `has_norm`) and `output.*` of `params`.
    pub fn new(
        params: &Params,
        vocab_size: i64,
        d_model: i64,
        has_norm: bool,
        dropout: f64,
    ) -> Self {
        let output = params.sub("output");
        let init = |shape: &[i64]| init::linear_default(shape, d_model, params.options());
        Self {
            norm: has_norm.then(|| LayerNorm::new(&params.sub("out_norm"), d_model)),
            weight_vd: output.trainable("weight", &init(&[vocab_size, d_model])),
            bias_v: output.trainable("bias", &init(&[vocab_size])),
            dropout,
        }
    }

    /// `[B, T, D]` → `[T, B, V]`, contiguous.
    pub fn forward(&self, x_btd: &Tensor, ctx: &Context) -> Tensor {
        let x_btd = crate::norm::normed(self.norm.as_ref(), x_btd);
        // The small tensor is transposed, not the logits.
        let x_tbd = ctx
            .dropout(x_btd, self.dropout)
            .transpose(0, 1)
            .contiguous();
        x_tbd.linear(&self.weight_vd, Some(&self.bias_v))
    }
}
