//! Two linear layers that score tokens: of routers one score per expert, of halting two.
//!
//! Shape letters: `D` `d_model`, or as wide as [`Context::aligned`] makes it, `E` scores.

use moeut_nn::padding::padded;
use moeut_nn::{Context, Init, Params};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// `z = W₃ · drop(act(W₀ x + b₀))`.
#[derive(Debug)]
pub(crate) struct Scorer {
    hidden_dd: Tensor,
    bias_d: Tensor,
    out_ed: Tensor,
}

/// Weights for all applications of a forward pass.
pub(crate) struct ScorerPass {
    hidden_dd: Tensor,
    bias_d: Tensor,
    out_ed: Tensor,
}

impl Scorer {
    /// Adds `0.weight`, `0.bias` and `3.weight`.
    pub(crate) fn new(params: &Params, d_model: i64, n_scores: i64, out: Init) -> Self {
        let hidden = params.sub("0");
        let weight = Init::linear_weight(d_model);
        Self {
            hidden_dd: hidden.parameter("weight", &[d_model, d_model], weight),
            bias_d: hidden.parameter("bias", &[d_model], Init::linear_bias(d_model)),
            out_ed: params
                .sub("3")
                .parameter("weight", &[n_scores, d_model], out),
        }
    }

    pub(crate) fn begin(&self, ctx: &Context) -> ScorerPass {
        let d_model = ctx.aligned(self.bias_d.size()[0]);
        ScorerPass {
            hidden_dd: ctx.operand_of(&self.hidden_dd, &[d_model, d_model]),
            bias_d: ctx.operand_of(&self.bias_d, &[d_model]),
            out_ed: padded(&self.out_ed, &[d_model]),
        }
    }
}

impl ScorerPass {
    /// Scores `[.., E]` of tokens `[.., D]`, as precise as routers'; `activation` has to leave 0 what it is.
    ///
    /// # Errors
    /// If autocast cannot be suspended.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        activation: impl Fn(Tensor) -> Tensor,
        dropout: f64,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let hidden = activation(x.linear(&self.hidden_dd, Some(&self.bias_d)));
        ctx.router_logits(&ctx.dropout(hidden, dropout), &self.out_ed, None)
    }
}
