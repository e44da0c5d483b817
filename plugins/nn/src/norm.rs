//! Layer normalization, and where a block puts it.

use crate::padding::padded;
use crate::{Init, Params};
use serde::Deserialize;
use tch::Tensor;

/// Where a block normalizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// `x + f(LN(x))`.
    Pre,
    /// `LN(x + f(x))`.
    Post,
    /// `x + f(x)`, where only what feeds a softmax or sigmoid (q, k, routers) sees `LN(x)`: the paper's
    /// peri-layernorm.
    Peri,
}

impl Norm {
    /// Its name.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Pre => "pre-layernorm",
            Self::Post => "post-layernorm",
            Self::Peri => "peri-layernorm",
        }
    }
}

/// `y = (x - mean) / √(var + 1e-5) · weight + bias` over the last axis.
#[derive(Debug)]
pub struct LayerNorm {
    affine: Option<(Tensor, Tensor)>,
    d: i64,
}

impl LayerNorm {
    /// Added to the variance, as everywhere in the reference.
    pub const EPS: f64 = 1e-5;

    /// With weight and bias, initially one and zero.
    pub fn new(params: &Params, d: i64) -> Self {
        let weight = params.parameter("weight", &[d], Init::Ones);
        let bias = params.parameter("bias", &[d], Init::Zeros);
        Self {
            affine: Some((weight, bias)),
            d,
        }
    }

    /// Without parameters.
    pub fn plain(d: i64) -> Self {
        Self { affine: None, d }
    }

    /// The same once more, sharing its parameters.
    #[must_use]
    pub fn share(&self) -> Self {
        let share =
            |(weight, bias): (&Tensor, &Tensor)| (weight.shallow_clone(), bias.shallow_clone());
        Self {
            affine: self.affine().map(share),
            d: self.d,
        }
    }

    /// Weight and bias, if it has them.
    pub fn affine(&self) -> Option<(&Tensor, &Tensor)> {
        self.affine.as_ref().map(|(weight, bias)| (weight, bias))
    }

    /// `[.., d]` → `[.., d]`; channels behind the first `d` count nothing, and become zero.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = self.affine().unzip();
        let width = x.size().last().copied().unwrap_or(0);
        let normed = x
            .narrow(-1, 0, self.d)
            .layer_norm([self.d], weight, bias, Self::EPS, true);
        padded(&normed, &[width])
    }
}

/// `LN(x)` where there is a norm, else `x`.
pub(crate) fn normed(norm: Option<&LayerNorm>, x: &Tensor) -> Tensor {
    norm.map_or_else(|| x.shallow_clone(), |norm| norm.forward(x))
}
