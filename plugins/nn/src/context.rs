//! What all layers of one forward pass share: the kernel, precision, and whether the pass trains or reports.

use crate::Routing;
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{GroupedMatmul, PluginError};
use moeut_torch::{Autocast, IntoHandle, IntoTensor, OrPluginError};
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Facts about one forward pass.
#[derive(Clone)]
pub struct Context {
    /// The grouped matrix product.
    pub kernel: Rc<KernelClient>,
    /// Element type of the grouped product's operands.
    pub compute: Kind,
    /// Whether autocast is on around the pass.
    pub is_mixed: bool,
    /// Dropout and regularizers are on.
    pub is_training: bool,
    /// Statistics are wanted.
    pub wants_stats: bool,
}

impl Context {
    /// The grouped product `[R, K] × [E, K, N]` of [`moeut_plugin_api::Kernel`], in the compute type.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn grouped_matmul(
        &self,
        x: &Tensor,
        weight: &Tensor,
        routing: &Routing,
        gate: Option<&Tensor>,
    ) -> Result<Tensor, PluginError> {
        let operand = |x: &Tensor| x.to_kind(self.compute).into_handle();
        let product = self.kernel.grouped_matmul(GroupedMatmul {
            x: operand(x),
            weight: operand(weight),
            selection: routing.selection(),
            gate: gate.map(operand),
        })?;
        Ok(product.into_tensor())
    }

    /// Dropout with probability `p` while training.
    pub fn dropout(&self, x: Tensor, p: f64) -> Tensor {
        if p > 0.0 && self.is_training {
            x.dropout(p, true)
        } else {
            x
        }
    }

    /// Router logits `x · weightᵀ + bias`, `[.., D] → [.., rows]`, never in a half type.
    ///
    /// The reference computes them in the autocast type; with bf16 that makes 39 % of the tokens tie at the last
    /// place of the top-k (387 experts, 16 taken, logits N(0, 1)), so that rounding decides.
    ///
    /// # Errors
    /// If autocast cannot be suspended.
    pub fn router_logits(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, PluginError> {
        let _full = self
            .is_mixed
            .then(|| Autocast::new(x.device(), None).or_plugin_error("cannot suspend autocast"))
            .transpose()?;
        let kind = at_least_f32(weight.kind());
        let bias = bias.map(|bias| bias.to_kind(kind));
        Ok(x.to_kind(kind).linear(&weight.to_kind(kind), bias.as_ref()))
    }
}

/// `F32` for half types, else the type itself.
fn at_least_f32(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        wide => wide,
    }
}
