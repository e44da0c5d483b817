//! `cuda`: the σ-MoE layer and the grouped matrix product by kernels of our own, for NVIDIA GPUs of compute capability
//! 8.0 and later, in bf16 and f16.
//!
//! The kernels read rows where they are, so no gathered copy of a tensor exists; every sum has one fixed order, so two
//! runs give the same bits. They are compiled for the GPU when they are first needed, by the compiler that comes with
//! libtorch's CUDA libraries, and kept in the cache folder. Other element types and the CPU are left to `grouped`.

mod driver;
mod mlp;
mod module;
mod nvrtc;
mod ops;
mod product;

use std::path::Path;

use moeut_plugin_api::kernel::{Fused, FusedCall, MoeMlp};
use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle,
};
use moeut_torch::grouped::{Fanout, mlp_top_k};
use moeut_torch::padding::ALIGNMENT_BYTES;
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError, apply};
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
        let (device, kind) = (x.device(), x.kind());
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
            // No call waits for the device, but none has been captured yet.
            is_graph_safe: false,
            alignment_bytes: ALIGNMENT_BYTES,
            fused: vec![Fused {
                call: FusedCall::MoeMlp,
                activations: mlp::ACTIVATIONS.to_vec(),
                cpu: Vec::new(),
                cuda: DTYPES.to_vec(),
            }],
        }
    }

    /// Computes in the element type of `x`, whatever autocast says; gradients have the types of their inputs.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
        let ops = self.ops_for(&x)?;
        let order = call.selection.order.into_tensor();
        let inverse = call.selection.inverse.into_tensor();
        let ends = call.selection.ends.into_tensor();
        let gate = call.gate.map(IntoTensor::into_tensor);
        let fanout = Fanout::of(&x, &weight, &order, gate.as_ref())?;
        let mut inputs = vec![&x, &weight, &order, &inverse, &ends];
        inputs.extend(&gate);
        apply(Product { ops, fanout }, &inputs)
            .map(|mut outputs| outputs.swap_remove(0).into_handle())
            .or_plugin_error("kernel `cuda` cannot compute the grouped matrix product")
    }

    /// Computes and answers as [`Kernel::grouped_matmul`].
    fn moe_mlp(&self, call: MoeMlp) -> Result<TensorHandle, PluginError> {
        let tensor = IntoTensor::into_tensor;
        let (x, w1, w2) = (tensor(call.x), tensor(call.w1), tensor(call.w2));
        let ops = self.ops_for(&x)?;
        let activation = call.options.activation;
        if !mlp::ACTIVATIONS.contains(&activation) {
            return Err(
                PluginError::new("kernel `cuda` does not know this activation")
                    .why(format!(
                        "its `moe_mlp` has {:?}, not {activation:?}",
                        mlp::ACTIVATIONS
                    ))
                    .fix("set `-moe.kernel reference`"),
            );
        }
        let (gate, b1) = (tensor(call.gate), call.b1.map(tensor));
        let order = tensor(call.selection.order);
        let inverse = tensor(call.selection.inverse);
        let ends = tensor(call.selection.ends);
        let top_k = mlp_top_k(&x, &w1, b1.as_ref(), &w2, &gate, &order)?;
        let mlp = Mlp {
            ops,
            top_k,
            activation,
        };
        let mut inputs = vec![&x, &w1, &w2, &gate, &order, &inverse, &ends];
        inputs.extend(&b1);
        apply(mlp, &inputs)
            .map(|mut outputs| outputs.swap_remove(0).into_handle())
            .or_plugin_error("kernel `cuda` cannot compute the σ-MoE layer")
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
