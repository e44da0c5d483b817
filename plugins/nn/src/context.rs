//! What all layers of one forward pass share: the kernel, precision, and whether the pass trains or reports.

use crate::Routing;
use crate::router::{self, RouterDtype};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{Activation, FusedCall, MoeMlp, MoeMlpOptions};
use moeut_plugin_api::{Device, GroupedMatmul, PluginError, Wishes};
use moeut_torch::{Autocast, IntoHandle, IntoTensor, OrPluginError, dtype};
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Facts about one forward pass.
#[derive(Clone)]
pub struct Context {
    /// The grouped matrix product, if the model has experts.
    pub kernel: Option<Rc<KernelClient>>,
    /// Element type of the grouped product's operands.
    pub compute: Kind,
    /// Whether autocast is on around the pass.
    pub is_mixed: bool,
    /// In which type routers compute.
    pub router_dtype: RouterDtype,
    /// Dropout and regularizers are on.
    pub is_training: bool,
    /// What the pass should tell about itself.
    pub wishes: Wishes,
    /// Statistics have the reference's definitions where those are wrong.
    pub is_compat: bool,
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
        let Some(kernel) = &self.kernel else {
            return Err(PluginError::new("experts without a grouped matrix product")
                .why("the model was built without a kernel")
                .fix("report this to the authors of the model's plugin"));
        };
        let operand = |x: &Tensor| x.to_kind(self.compute).into_handle();
        let product = kernel.grouped_matmul(GroupedMatmul {
            x: operand(x),
            weight: operand(weight),
            selection: routing.selection(),
            gate: gate.map(operand),
        })?;
        Ok(product.into_tensor())
    }

    /// A whole σ-MoE layer after its routing, [`moeut_plugin_api::Kernel::moe_mlp`], in the compute type; nothing if
    /// the kernel has no such call.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn moe_mlp(
        &self,
        activation: Activation,
        x: &Tensor,
        [w1, w2]: [&Tensor; 2],
        b1: Option<&Tensor>,
        gate: &Tensor,
        routing: &Routing,
    ) -> Result<Option<Tensor>, PluginError> {
        let (Some(kernel), Some(dtype)) = (&self.kernel, dtype(self.compute)) else {
            return Ok(None);
        };
        let device = match x.device() {
            tch::Device::Cuda(index) => Device::Cuda(u32::try_from(index).unwrap_or(u32::MAX)),
            _ => Device::Cpu,
        };
        if !kernel.provides(FusedCall::MoeMlp, Some(activation), device, dtype) {
            return Ok(None);
        }
        let operand = |x: &Tensor| x.to_kind(self.compute).into_handle();
        let y = kernel.moe_mlp(MoeMlp {
            x: operand(x),
            w1: operand(w1),
            b1: b1.map(operand),
            w2: operand(w2),
            gate: operand(gate),
            selection: routing.selection(),
            options: MoeMlpOptions { activation },
        })?;
        Ok(Some(y.into_tensor()))
    }

    /// Dropout with probability `p` while training.
    pub fn dropout(&self, x: Tensor, p: f64) -> Tensor {
        if p > 0.0 && self.is_training {
            x.dropout(p, true)
        } else {
            x
        }
    }

    /// Router logits `x · weightᵀ + bias`, `[.., D] → [.., rows]`, in the type that [`RouterDtype`] says.
    ///
    /// # Errors
    /// If autocast cannot be suspended, or libtorch has no memory.
    pub fn router_logits(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, PluginError> {
        router::logits(x, weight, bias, self.router_dtype, self.is_mixed)
            .or_plugin_error("cannot compute router logits")
    }

    /// Suspends autocast while it lives: for statistics, whose rounding would show.
    ///
    /// # Errors
    /// If the device has no autocast.
    pub fn full_precision(&self, device: tch::Device) -> Result<Option<Autocast>, PluginError> {
        self.is_mixed
            .then(|| Autocast::new(device, None))
            .transpose()
            .or_plugin_error("mixed precision cannot be suspended")
    }

    /// Whether routers compute in autocast's type, with its rounding of scores.
    pub fn is_router_rounded(&self) -> bool {
        self.router_dtype == RouterDtype::Amp
    }
}

/// `F32` for half types, else the type itself.
pub(crate) fn at_least_f32(kind: Kind) -> Kind {
    match kind {
        Kind::Half | Kind::BFloat16 => Kind::Float,
        wide => wide,
    }
}
