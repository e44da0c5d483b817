//! From router logits to a [`Selection`]: which experts each token uses, sorted by expert once and shared by every
//! product of the layer.

use moeut_plugin_api::Selection;
use moeut_torch::{IntoHandle, IntoTensor};
use serde::Deserialize;
use tch::{Kind, Tensor};

/// How logits become gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Each expert for itself; gates do not sum to one.
    Sigmoid,
    /// The experts compete. The reference calls it `gate` in the feed-forward layer.
    #[serde(alias = "gate")]
    Softmax,
}

/// `M` selections sorted by expert, as the kernels want them. Making it costs one sort and no host sync.
#[derive(Debug)]
pub struct Routing {
    order_m: Tensor,
    inverse_m: Tensor,
    ends_e: Tensor,
    is_of_kernel: bool,
}

impl Routing {
    /// Sorts expert ids (int64, any shape, `M` in all, each below `n_experts`); equal ids keep their order.
    pub fn new(ids: &Tensor, n_experts: i64) -> Self {
        tch::no_grad(|| {
            // A radix sort takes a pass for each byte.
            let kind = if n_experts <= i64::from(i16::MAX) {
                Kind::Int16
            } else {
                Kind::Int64
            };
            let ids_m = ids.reshape([-1]).to_kind(kind);
            let (sorted_m, order_m) = ids_m.sort_stable(true, 0, false);
            let positions_m = Tensor::arange(order_m.size()[0], (Kind::Int64, ids.device()));
            let inverse_m = order_m.empty_like().scatter_(0, &order_m, &positions_m);
            let experts_e = Tensor::arange(n_experts, (kind, ids.device()));
            let ends_e = experts_e.searchsorted(&sorted_m, true, true, "right", None::<Tensor>);
            Self {
                order_m,
                inverse_m,
                ends_e,
                is_of_kernel: false,
            }
        })
    }

    /// What a kernel sorted.
    pub fn of_kernel(selection: Selection) -> Self {
        Self {
            order_m: selection.order.into_tensor(),
            inverse_m: selection.inverse.into_tensor(),
            ends_e: selection.ends.into_tensor(),
            is_of_kernel: true,
        }
    }

    /// The same once more, sharing its tensors.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            order_m: self.order_m.shallow_clone(),
            inverse_m: self.inverse_m.shallow_clone(),
            ends_e: self.ends_e.shallow_clone(),
            is_of_kernel: self.is_of_kernel,
        }
    }

    /// Whether a kernel made it.
    pub fn is_of_kernel(&self) -> bool {
        self.is_of_kernel
    }

    /// For a kernel call; the tensors are shared.
    pub fn selection(&self) -> Selection {
        Selection {
            order: self.order_m.share(),
            inverse: self.inverse_m.share(),
            ends: self.ends_e.share(),
        }
    }

    /// How often each expert was selected, int64 `[E]`.
    pub fn counts(&self) -> Tensor {
        let zero = self.ends_e.zeros_like().narrow(0, 0, 1);
        self.ends_e
            .diff(1, 0, Some(zero), None)
            .to_kind(Kind::Int64)
    }
}

/// Ids of the `k` largest scores over the last axis, in libtorch's order, int64 `[.., k]`; no gradient.
///
/// With `drop` > 0 each score takes part with probability `1 - drop` only.
pub fn top_k(scores: &Tensor, k: i64, drop: f64) -> Tensor {
    tch::no_grad(|| {
        let (_, ids) = if drop > 0.0 {
            let dropped = scores.rand_like().lt(drop);
            scores
                .masked_fill(&dropped, f64::NEG_INFINITY)
                .topk(k, -1, true, false)
        } else {
            scores.topk(k, -1, true, false)
        };
        ids
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(x: &Tensor) -> Vec<i64> {
        Vec::try_from(x.to_kind(Kind::Int64)).unwrap()
    }

    #[test]
    fn selections_are_sorted_stably_and_invertible() {
        let routing = Routing::new(&Tensor::from_slice(&[3i64, 0, 3, 1, 0, 3]), 5);
        let selection = routing.selection();
        assert_eq!(ints(&selection.order.tensor()), [1, 4, 3, 0, 2, 5]);
        assert_eq!(ints(&selection.inverse.tensor()), [3, 0, 4, 2, 1, 5]);
        assert_eq!(ints(&selection.ends.tensor()), [2, 3, 3, 6, 6]);
        assert_eq!(ints(&routing.counts()), [2, 1, 0, 3, 0]);
    }

    #[test]
    fn top_k_takes_the_best() {
        let scores = Tensor::from_slice2(&[[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]]);
        let (ids, _) = top_k(&scores, 2, 0.0).sort(-1, false);
        assert_eq!(ints(&ids.reshape([-1])), [1, 2, 0, 2]);
    }
}
