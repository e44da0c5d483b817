//! The non-linearity between the two products of a feed-forward layer.

use moeut_plugin_api::kernel;
use tch::Tensor;

/// A non-linearity; some compare the hidden units of a token, the last axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// `x` where it is among the `k` largest, else 0; ties with the `k`-th stay.
    TopK(i64),
    /// What the reference makes of that: 0 where `x` is among the `k` largest, else `x`.
    AllButTopK(i64),
}

impl Activation {
    /// How many tensors of its input's size the backward pass of it and of the following product needs.
    pub fn n_kept(self) -> u64 {
        match self {
            // The output serves both.
            Self::Relu | Self::Sigmoid | Self::Softmax | Self::Identity => 1,
            Self::Gelu | Self::TopK(_) | Self::AllButTopK(_) => 2,
        }
    }

    /// Its name in calls of a kernel, if kernels know it.
    pub fn of_kernels(self) -> Option<kernel::Activation> {
        match self {
            Self::Relu => Some(kernel::Activation::Relu),
            Self::Gelu => Some(kernel::Activation::Gelu),
            Self::Identity
            | Self::Sigmoid
            | Self::Softmax
            | Self::TopK(_)
            | Self::AllButTopK(_) => None,
        }
    }

    /// Applies it; the shape stays.
    pub fn forward(self, x: Tensor) -> Tensor {
        match self {
            Self::Relu => x.relu(),
            Self::Gelu => x.gelu("none"),
            Self::Identity => x,
            Self::Sigmoid => x.sigmoid(),
            Self::Softmax => x.softmax(-1, None),
            Self::TopK(k) => x.masked_fill(&x.lt_tensor(&kth_largest(&x, k)), 0.0),
            Self::AllButTopK(k) => x.masked_fill(&x.ge_tensor(&kth_largest(&x, k)), 0.0),
        }
    }
}

/// `[.., n]` → `[.., 1]`.
fn kth_largest(x: &Tensor, k: i64) -> Tensor {
    let (largest, _) = tch::no_grad(|| x.topk(k, -1, true, true));
    largest.narrow(-1, k - 1, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_keeps_the_largest_and_its_opposite_the_others() {
        let x = || Tensor::from_slice2(&[[-1.0, 3.0, 2.0], [5.0, -4.0, -3.0]]);
        let values = |x: Tensor| Vec::<f64>::try_from(x.reshape([-1])).unwrap();
        let kept = values(Activation::TopK(2).forward(x()));
        assert_eq!(kept, [0.0, 3.0, 2.0, 5.0, 0.0, -3.0]);
        let others = values(Activation::AllButTopK(2).forward(x()));
        assert_eq!(others, [-1.0, 0.0, 0.0, 0.0, -4.0, 0.0]);
    }
}
