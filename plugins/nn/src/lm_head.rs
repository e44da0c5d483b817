//! From the last hidden state to logits.

use crate::padding::padded;
use crate::{Context, Init, LayerNorm, Linear, Params, Stream};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// `logits = drop(A · LN(x)) · weightᵀ + bias`; the weight is not tied to the embedding. `A` is an adapter to the width
/// of the embedding, if that is not `D`.
#[derive(Debug)]
pub struct LmHead {
    norm: Option<LayerNorm>,
    adapter: Option<Linear>,
    weight_vd: Tensor,
    bias_v: Tensor,
    dropout: f64,
}

impl LmHead {
    /// Parameters `out_norm.*` (if `has_norm`), `output_adapter.*` (if there is another width `d_embedding`) and
    /// `output.*` of `params`.
    pub fn new(
        params: &Params,
        vocab_size: i64,
        d_model: i64,
        d_embedding: Option<i64>,
        has_norm: bool,
        dropout: f64,
    ) -> Self {
        let output = params.sub("output");
        let d_in = d_embedding.unwrap_or(d_model);
        Self {
            norm: has_norm.then(|| LayerNorm::new(&params.sub("out_norm"), d_model)),
            adapter: d_embedding
                .map(|d_out| Linear::new(&params.sub("output_adapter"), d_model, d_out)),
            weight_vd: output.parameter("weight", &[vocab_size, d_in], Init::linear_weight(d_in)),
            bias_v: output.parameter("bias", &[vocab_size], Init::linear_bias(d_in)),
            dropout,
        }
    }

    /// `[B, T, D]` → `[T, B, V]`, contiguous; behind the `D` channels there may be more, which count nothing.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn forward(&self, x: &Stream, ctx: &Context) -> Result<Tensor, PluginError> {
        let x_btd = match &self.norm {
            Some(norm) => ctx.reading(x, Some(norm), false)?.normed,
            None => x.whole().shallow_clone(),
        };
        let x_btd = match &self.adapter {
            Some(adapter) => adapter.forward_to(&x_btd, self.weight_vd.size()[1]),
            None => x_btd,
        };
        // The small tensor is transposed, not the logits.
        let x_tbd = ctx
            .dropout(x_btd, self.dropout)
            .transpose(0, 1)
            .contiguous();
        let weight_vd = padded(&self.weight_vd, &x_tbd.size()[2..]);
        Ok(x_tbd.linear(&weight_vd, Some(&self.bias_v)))
    }
}
