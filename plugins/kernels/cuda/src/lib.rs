//! `cuda`: the σ-MoE layer, the grouped matrix product, routing, what happens to the residual stream between products,
//! and the loss, by kernels of our own, for NVIDIA GPUs of compute capability 8.0 and later, in bf16 and f16.
//!
//! The kernels read rows where they are, so no gathered copy of a tensor exists. On Hopper GPUs products of experts add
//! to the rows of tokens in whatever order they come; all other sums have one fixed order, and so have these where
//! libtorch was told to use deterministic algorithms: two runs then give the same bits. Kernels are compiled for the GPU
//! when they are first needed, by the compiler that comes with libtorch's CUDA libraries, and kept in the cache folder.
//! Other element types and the CPU are left to `grouped`.

mod driver;
mod loss;
mod mlp;
mod module;
mod nvrtc;
mod ops;
mod product;
mod select;
mod stream;

use std::path::Path;

use moeut_plugin_api::kernel::{
    Activation, CrossEntropy, Fused, FusedCall, MoeMlp, ResidualNorm, ResidualNormed, Rotate,
    Select, Selected,
};
use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle,
};
use moeut_torch::grouped;
use moeut_torch::padding::ALIGNMENT_BYTES;
use tch::{Device, Kind, Tensor};

use mlp::Mlp;
use module::Modules;
use ops::Ops;
use product::Product;

moeut_plugin_api::export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);
moeut_plugin_api::register_kernel!(Cuda);

/// Element types of the kernels.
const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];

/// The kernel.
pub struct Cuda {
    modules: Modules,
}

impl Cuda {
    /// Keeps compiled kernels below `cache_dir`.
    fn with_cache(cache_dir: &Path) -> Self {
        Self {
            modules: Modules::new(cache_dir.join("kernels")),
        }
    }

    /// The kernels that can compute with `x`.
    fn ops_for(&self, x: &Tensor) -> Result<Ops, PluginError> {
        self.ops_in(x, x.kind())
    }

    /// The kernels that compute in `kind` on the device of `x`.
    fn ops_in(&self, x: &Tensor, kind: Kind) -> Result<Ops, PluginError> {
        let device = x.device();
        match device {
            Device::Cuda(index) if matches!(kind, Kind::BFloat16 | Kind::Half) => Ok(Ops {
                module: self.modules.get(index, kind)?,
                device,
                kind,
            }),
            _ => Err(PluginError::new("kernel `cuda` cannot compute with this tensor")
                .why(format!(
                    "`x` is {kind:?} on {device:?}, and its kernels take bf16 and f16 on an NVIDIA GPU"
                ))
                .fix("set `-moe.kernel grouped`, or `-moe.kernel auto`")),
        }
    }
}

impl Kernel for Cuda {
    const NAME: &'static str = "cuda";
    const SUMMARY: &'static str = "Kernels of our own for NVIDIA GPUs, in bf16 and f16";

    fn new(host: &Host) -> Result<Self, PluginError> {
        driver::driver().map_err(|why| module::needs_gpu(&why))?;
        nvrtc::nvrtc().map_err(|why| {
            PluginError::new("kernel `cuda` needs NVIDIA's run-time compiler")
                .why(why)
                .fix("run `cargo xtask setup --cuda`, or set `-moe.kernel grouped`")
        })?;
        Ok(Self::with_cache(&host.info().cache_dir))
    }

    fn capabilities() -> Capabilities {
        Capabilities {
            cpu: Vec::new(),
            cuda: DTYPES.to_vec(),
            speed_rank: 20,
            is_deterministic: true,
            is_graph_safe: true,
            alignment_bytes: ALIGNMENT_BYTES,
            fused: vec![
                fused(FusedCall::MoeMlp, &mlp::ACTIVATIONS, &DTYPES),
                fused(FusedCall::ResidualNorm, &[], &DTYPES),
                fused(FusedCall::Rotate, &[], &DTYPES),
                fused(
                    FusedCall::Select,
                    &[],
                    &[DType::Bf16, DType::F16, DType::F32],
                ),
                fused(FusedCall::CrossEntropy, &[], &DTYPES),
            ],
        }
    }

    /// Computes in the element type of `x`, whatever autocast says; gradients have the types of their inputs.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        grouped::product(
            Self::NAME,
            call,
            |x| self.ops_for(x),
            |ops, fanout| Product { ops, fanout },
        )
    }

    /// Computes and answers as [`Kernel::grouped_matmul`].
    fn moe_mlp(&self, call: MoeMlp) -> Result<TensorHandle, PluginError> {
        grouped::mlp(
            Self::NAME,
            &mlp::ACTIVATIONS,
            call,
            |x| self.ops_for(x),
            |ops, top_k, options| Mlp {
                ops,
                top_k,
                options,
            },
        )
    }

    /// Computes in the type that the options name, whatever autocast says.
    fn residual_norm(&self, call: ResidualNorm) -> Result<ResidualNormed, PluginError> {
        stream::residual_norm(call, |x, kind| self.ops_in(x, kind))
    }

    /// Computes in the type of `x`, whatever autocast says.
    fn rotate(&self, call: Rotate) -> Result<TensorHandle, PluginError> {
        stream::rotate(call, |x| self.ops_for(x))
    }

    /// Multiplies with cuBLAS in the type of `x`, whatever autocast says; logits are in fp32.
    fn select(&self, call: Select) -> Result<Selected, PluginError> {
        select::select(call, |x| match x.kind() {
            // Logits are in fp32 in every module.
            Kind::Float => self.ops_in(x, Kind::BFloat16),
            kind => self.ops_in(x, kind),
        })
    }

    /// Sums in one order. A target that is no id has a loss that is not a number.
    fn cross_entropy(&self, call: CrossEntropy) -> Result<TensorHandle, PluginError> {
        loss::cross_entropy(call, |logits| self.ops_for(logits))
    }
}

/// A call that runs on GPUs.
fn fused(call: FusedCall, activations: &[Activation], dtypes: &[DType]) -> Fused {
    Fused {
        call,
        activations: activations.to_vec(),
        cpu: Vec::new(),
        cuda: dtypes.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use moeut_plugin_api::abi::client::KernelClient;
    use moeut_torch::testing;

    use super::*;

    fn kernel(folder: &tempfile::TempDir) -> KernelClient {
        KernelClient::in_process(Cuda::with_cache(folder.path())).unwrap()
    }

    /// On a machine without a GPU, that everything is refused with a way out.
    #[test]
    fn it_conforms() {
        let folder = tempfile::tempdir().unwrap();
        testing::check_kernel(&kernel(&folder));
    }
}
