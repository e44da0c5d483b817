//! Calls of a kernel, opened and checked once for every kernel that is a node of the graph: tensors out of handles, the
//! shapes of a grouped matrix product and of a σ-MoE layer, and the order of a node's inputs. See
//! [`moeut_plugin_api::Kernel`] for what the letters mean. Computes nothing.

use moeut_plugin_api::kernel::{Activation, MoeMlp, MoeMlpOptions};
use moeut_plugin_api::{GroupedMatmul, PluginError, TensorHandle};
use tch::Tensor;

use crate::error::OrPluginError;
use crate::function::{Function, apply};
use crate::handle::{IntoHandle, IntoTensor};

/// Positions among the inputs of a [`product`]'s node.
pub mod product_inputs {
    /// `x [R, K]`.
    pub const X: usize = 0;
    /// `weight [E, K, N]`; `order`, `inverse` and `ends` follow.
    pub const WEIGHT: usize = 1;
    /// `gate [M / n, n]`, which may be absent.
    pub const GATE: usize = 5;
}

/// Positions among the inputs of an [`mlp`]'s node.
pub mod mlp_inputs {
    /// `x [T, D]`.
    pub const X: usize = 0;
    /// `w1 [E, D, S]`.
    pub const W1: usize = 1;
    /// `w2 [E, S, D]`.
    pub const W2: usize = 2;
    /// `gate [T, K]`; `order`, `inverse` and `ends` follow.
    pub const GATE: usize = 3;
    /// `b1 [E, S]`, which may be absent.
    pub const B1: usize = 7;
    /// With `b1`.
    pub const N_INPUTS: usize = 8;
}

/// Applies the node that kernel `name` has for a grouped matrix product. `open` looks at `x` first and refuses what the
/// kernel does not take.
///
/// # Errors
/// Whatever `open` says, shapes that do not fit, and whatever the node says.
pub fn product<O, F: Function>(
    name: &str,
    call: GroupedMatmul,
    open: impl FnOnce(&Tensor) -> Result<O, PluginError>,
    node: impl FnOnce(O, Fanout) -> F,
) -> Result<TensorHandle, PluginError> {
    let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
    let opened = open(&x)?;
    let order = call.selection.order.into_tensor();
    let inverse = call.selection.inverse.into_tensor();
    let ends = call.selection.ends.into_tensor();
    let gate = call.gate.map(IntoTensor::into_tensor);
    let fanout = Fanout::of(&x, &weight, &order, gate.as_ref())?;
    let mut inputs = vec![&x, &weight, &order, &inverse, &ends];
    inputs.extend(&gate);
    apply(node(opened, fanout), &inputs)
        .map(|mut outputs| outputs.swap_remove(0).into_handle())
        .or_plugin_error(&format!(
            "kernel `{name}` cannot compute the grouped matrix product"
        ))
}

/// Applies the node that kernel `name` has for a σ-MoE layer with one of `activations`: `node` gets what `open` made,
/// the selections per token, and the options.
///
/// # Errors
/// As [`product`], and for another activation.
pub fn mlp<O, F: Function>(
    name: &str,
    activations: &[Activation],
    call: MoeMlp,
    open: impl FnOnce(&Tensor) -> Result<O, PluginError>,
    node: impl FnOnce(O, i64, MoeMlpOptions) -> F,
) -> Result<TensorHandle, PluginError> {
    let tensor = IntoTensor::into_tensor;
    let (x, w1, w2) = (tensor(call.x), tensor(call.w1), tensor(call.w2));
    let opened = open(&x)?;
    let activation = call.options.activation;
    if !activations.contains(&activation) {
        return Err(
            PluginError::new(format!("kernel `{name}` does not know this activation"))
                .why(format!(
                    "its `moe_mlp` has {activations:?}, not {activation:?}"
                ))
                .fix("set `-moe.kernel reference`"),
        );
    }
    let (gate, b1) = (tensor(call.gate), call.b1.map(tensor));
    let order = tensor(call.selection.order);
    let inverse = tensor(call.selection.inverse);
    let ends = tensor(call.selection.ends);
    let top_k = mlp_top_k(&x, &w1, b1.as_ref(), &w2, &gate, &order)?;
    let mut inputs = vec![&x, &w1, &w2, &gate, &order, &inverse, &ends];
    inputs.extend(&b1);
    apply(node(opened, top_k, call.options), &inputs)
        .map(|mut outputs| outputs.swap_remove(0).into_handle())
        .or_plugin_error(&format!("kernel `{name}` cannot compute the σ-MoE layer"))
}

/// How selections relate to rows of input and of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fanout {
    /// Selections per row of `x` (`f`); 1 if there are none.
    pub per_row: i64,
    /// Selections that a gate sums (`n`); 1 without a gate.
    pub n_summed: i64,
}

impl Fanout {
    /// Reads it off the shapes `x [R, K]`, `weight [E, K, N]`, `order [M]`, `gate [M / n, n]`.
    ///
    /// # Errors
    /// If they do not fit each other.
    pub fn of(
        x: &Tensor,
        weight: &Tensor,
        order: &Tensor,
        gate: Option<&Tensor>,
    ) -> Result<Self, PluginError> {
        let (x, weight, order) = (x.size(), weight.size(), order.size());
        let gate = gate.map(Tensor::size);
        Self::from_sizes(&x, &weight, &order, gate.as_deref()).ok_or_else(|| {
            PluginError::new("the shapes of a grouped matrix product do not fit")
                .why(format!("x is {x:?}, weight {weight:?}, order {order:?}, gate {gate:?}"))
                .fix("pass x [R, K], weight [E, K, N], order [M] with M a multiple of R, gate [M / n, n]")
        })
    }

    fn from_sizes(x: &[i64], weight: &[i64], order: &[i64], gate: Option<&[i64]>) -> Option<Self> {
        let (&[n_rows, d_in], &[_, d_weight, _], &[n_selections]) = (x, weight, order) else {
            return None;
        };
        let fits = d_in == d_weight
            && (n_selections == 0) == (n_rows == 0)
            && n_selections % n_rows.max(1) == 0;
        let n_summed = match gate {
            None => 1,
            Some(&[n_sums, n]) if n > 0 && n_sums * n == n_selections => n,
            Some(_) => return None,
        };
        fits.then_some(Self {
            per_row: (n_selections / n_rows.max(1)).max(1),
            n_summed,
        })
    }
}

/// Selections per token, off the shapes of [`moeut_plugin_api::kernel::MoeMlp`].
///
/// # Errors
/// If they do not fit each other.
fn mlp_top_k(
    x: &Tensor,
    w1: &Tensor,
    b1: Option<&Tensor>,
    w2: &Tensor,
    gate: &Tensor,
    order: &Tensor,
) -> Result<i64, PluginError> {
    let [x, w1, w2, gate, order] = [x, w1, w2, gate, order].map(Tensor::size);
    let b1 = b1.map(Tensor::size);
    mlp_top_k_from_sizes([&x, &w1, &w2, &gate, &order], b1.as_deref()).ok_or_else(|| {
        PluginError::new("the shapes of a σ-MoE layer do not fit")
            .why(format!(
                "x is {x:?}, w1 {w1:?}, b1 {b1:?}, w2 {w2:?}, gate {gate:?}, order {order:?}"
            ))
            .fix("pass x [T, D], w1 [E, D, S], b1 [E, S], w2 [E, S, D], gate [T, K], order [T·K]")
    })
}

fn mlp_top_k_from_sizes([x, w1, w2, gate, order]: [&[i64]; 5], b1: Option<&[i64]>) -> Option<i64> {
    let (&[n_tokens, d_model], &[n_experts, d_in, d_expert]) = (x, w1) else {
        return None;
    };
    let &[n_gated, top_k] = gate else {
        return None;
    };
    let fits = d_in == d_model
        && w2 == [n_experts, d_expert, d_model]
        && b1.is_none_or(|b1| b1 == [n_experts, d_expert])
        && n_gated == n_tokens
        && order == [n_tokens * top_k]
        && top_k > 0;
    fits.then_some(top_k)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_and_what_does_not_fit() {
        let of = |x: &[i64], w2: &[i64], gate: &[i64], order: i64, b1: Option<&[i64]>| {
            mlp_top_k_from_sizes([x, &[4, 8, 3], w2, gate, &[order]], b1)
        };
        let w2 = &[4, 3, 8];
        assert_eq!(of(&[6, 8], w2, &[6, 2], 12, None), Some(2));
        assert_eq!(of(&[6, 8], w2, &[6, 2], 12, Some(&[4, 3])), Some(2));
        assert_eq!(of(&[0, 8], w2, &[0, 2], 0, None), Some(2));
        assert_eq!(of(&[6, 7], w2, &[6, 2], 12, None), None);
        assert_eq!(of(&[6, 8], &[4, 8, 3], &[6, 2], 12, None), None);
        assert_eq!(of(&[6, 8], w2, &[5, 2], 12, None), None);
        assert_eq!(of(&[6, 8], w2, &[6, 2], 11, None), None);
        assert_eq!(of(&[6, 8], w2, &[6, 0], 0, None), None);
        assert_eq!(of(&[6, 8], w2, &[6, 2], 12, Some(&[3])), None);
    }

    #[test]
    fn the_four_uses_and_what_does_not_fit() {
        let of = |x: &[i64], weight: &[i64], order: i64, gate: Option<&[i64]>| {
            Fanout::from_sizes(x, weight, &[order], gate)
                .map(|fanout| (fanout.per_row, fanout.n_summed))
        };
        assert_eq!(of(&[6, 8], &[4, 8, 3], 12, None), Some((2, 1)));
        assert_eq!(of(&[12, 3], &[4, 3, 8], 12, Some(&[6, 2])), Some((1, 2)));
        assert_eq!(of(&[6, 8], &[4, 8, 3], 24, Some(&[12, 2])), Some((4, 2)));
        assert_eq!(of(&[0, 8], &[4, 8, 3], 0, Some(&[0, 2])), Some((1, 2)));
        for (x, weight, order, gate) in [
            (&[6, 7][..], &[4, 8, 3][..], 12, None),
            (&[6, 8], &[4, 8], 12, None),
            (&[5, 8], &[4, 8, 3], 12, None),
            (&[0, 8], &[4, 8, 3], 12, None),
            (&[6, 8], &[4, 8, 3], 12, Some(&[5, 2][..])),
            (&[6, 8], &[4, 8, 3], 12, Some(&[6, 0])),
        ] {
            assert_eq!(
                of(x, weight, order, gate),
                None,
                "{x:?} {weight:?} {order} {gate:?}"
            );
        }
    }
}
