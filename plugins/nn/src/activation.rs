//! The non-linearity between the two products of a feed-forward layer.

use serde::Deserialize;
use tch::Tensor;

/// An elementwise non-linearity, or a softmax over the hidden units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x · Φ(x)`, exact.
    Gelu,
    /// `x`.
    Identity,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// Over the last axis.
    Softmax,
}

impl Activation {
    /// Applies it; the shape stays.
    pub fn forward(self, x: Tensor) -> Tensor {
        match self {
            Self::Relu => x.relu(),
            Self::Gelu => x.gelu("none"),
            Self::Identity => x,
            Self::Sigmoid => x.sigmoid(),
            Self::Softmax => x.softmax(-1, None),
        }
    }
}
