//! What the host itself asks of kernels: a σ-MoE layer after its routing, to test ([`self_test`]) and to time
//! ([`crate::bench`]), and the loss.

pub mod self_test;

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{Activation, CrossEntropy, MoeMlp, MoeMlpOptions};
use moeut_plugin_api::{GroupedMatmul, PluginError, Selection};
use moeut_torch::testing::selection;
use moeut_torch::{IntoHandle, IntoTensor};
use tch::Tensor;

/// A selection that many calls share.
pub struct Sorted([Tensor; 3]);

impl Sorted {
    /// Sorts expert indices (int64, any shape, in `0..n_experts`).
    pub fn new(ids: &Tensor, n_experts: i64) -> Self {
        let Selection {
            order,
            inverse,
            ends,
        } = selection(ids, n_experts);
        Self([order, inverse, ends].map(IntoTensor::into_tensor))
    }

    fn share(&self) -> Selection {
        let [order, inverse, ends] = self.0.each_ref().map(IntoHandle::share);
        Selection {
            order,
            inverse,
            ends,
        }
    }
}

/// The grouped product; see [`moeut_plugin_api::Kernel`].
///
/// # Errors
/// Whatever the kernel says.
pub fn product(
    kernel: &KernelClient,
    selection: &Sorted,
    x: &Tensor,
    weight: &Tensor,
    gate: Option<&Tensor>,
) -> Result<Tensor, PluginError> {
    let y = kernel.grouped_matmul(GroupedMatmul {
        x: x.share(),
        weight: weight.share(),
        selection: selection.share(),
        gate: gate.map(IntoHandle::share),
    })?;
    Ok(y.into_tensor())
}

/// `y_t = Σ_k gate[t, k] · ReLU(x_t · w1[e(t, k)]) · w2[e(t, k)]`, of `x`, `w1`, `w2` and `gate`: in one call if
/// `is_fused`, or of two grouped products as a layer composes it.
///
/// # Errors
/// Whatever the kernel says.
pub fn sigma_moe(
    kernel: &KernelClient,
    is_fused: bool,
    selection: &Sorted,
    [x, w1, w2, gate]: [&Tensor; 4],
) -> Result<Tensor, PluginError> {
    if !is_fused {
        let hidden = product(kernel, selection, x, w1, None)?.relu();
        return product(kernel, selection, &hidden, w2, Some(gate));
    }
    let y = kernel.moe_mlp(MoeMlp {
        x: x.share(),
        w1: w1.share(),
        b1: None,
        w2: w2.share(),
        gate: gate.share(),
        selection: selection.share(),
        options: MoeMlpOptions {
            activation: Activation::Relu,
            keeps_less: false,
        },
    })?;
    Ok(y.into_tensor())
}

/// The loss of each token, `[N]`, of logits `[N, V]`; see [`CrossEntropy`].
///
/// # Errors
/// Whatever the kernel says.
pub fn cross_entropy(
    kernel: &KernelClient,
    logits_nv: &Tensor,
    targets_n: &Tensor,
) -> Result<Tensor, PluginError> {
    let losses = kernel.cross_entropy(CrossEntropy {
        logits: logits_nv.share(),
        targets: targets_n.share(),
    })?;
    Ok(losses.into_tensor())
}
