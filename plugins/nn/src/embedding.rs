//! Token embedding.

use crate::{Init, Linear, Params};
use tch::Tensor;

/// `x = scale · A · weight[token]`, where `A` is an adapter to `D`, if the embedding has another width.
#[derive(Debug)]
pub struct Embedding {
    weight_vd: Tensor,
    adapter: Option<Linear>,
    scale: f64,
}

impl Embedding {
    /// Adds `embedding.weight`, whose rows are `N(0, 1/√width)`, and, if there is another width `d_embedding`,
    /// `embedding_adapter.*`.
    pub fn new(
        params: &Params,
        vocab_size: i64,
        d_model: i64,
        d_embedding: Option<i64>,
        scale: f64,
    ) -> Self {
        let width = d_embedding.unwrap_or(d_model);
        let init = Init::Normal(1.0 / (width as f64).sqrt());
        let adapter = |d_in| Linear::new(&params.sub("embedding_adapter"), d_in, d_model);
        Self {
            weight_vd: params
                .sub("embedding")
                .parameter("weight", &[vocab_size, width], init),
            adapter: d_embedding.map(adapter),
            scale,
        }
    }

    /// Token ids `[B, T]` → `[B, T, width]`, not yet adapted and scaled: dropout comes in between.
    pub fn forward(&self, tokens_bt: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight_vd, tokens_bt, -1, false, false)
    }

    /// `[B, T, width]` → `[B, T, D]`, scaled.
    pub fn adapted(&self, x: Tensor) -> Tensor {
        let x_btd = match &self.adapter {
            Some(adapter) => adapter.forward(&x),
            None => x,
        };
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
