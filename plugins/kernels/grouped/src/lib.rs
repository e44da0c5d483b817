//! `grouped`: the grouped matrix product and the σ-MoE layer by libtorch's own grouped kernel, each with a backward of
//! its own. The product keeps only its inputs, the layer also its pre-activations, if the call does not want less.
//!
//! Rows reach their expert and come back by permutations, so nothing is added atomically and two runs give the same
//! bits. What libtorch's kernel does not take (fp64) is refused; what it takes only in other shapes (rows that are no
//! multiple of 16 bytes) is padded here. It is not the oracle: that is `reference`.

mod mlp;
mod ops;
mod product;

use moeut_plugin_api::kernel::{Fused, FusedCall, MoeMlp};
use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle,
};
use moeut_torch::dtype;
use moeut_torch::grouped;
use tch::Tensor;

use mlp::Mlp;
use product::Product;

moeut_plugin_api::export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);
moeut_plugin_api::register_kernel!(Grouped);

/// Element types that libtorch's grouped matrix product takes.
const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// The kernel; it holds nothing.
#[derive(Debug)]
pub struct Grouped;

impl Kernel for Grouped {
    const NAME: &'static str = "grouped";
    const SUMMARY: &'static str = "libtorch's grouped matrix product, in f32, bf16 and f16";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        Capabilities {
            cpu: DTYPES.to_vec(),
            cuda: DTYPES.to_vec(),
            speed_rank: 10,
            is_deterministic: true,
            // Outside bf16 on recent devices libtorch copies the ends of the runs to the host.
            is_graph_safe: false,
            alignment_bytes: moeut_torch::padding::ALIGNMENT_BYTES,
            fused: vec![Fused {
                call: FusedCall::MoeMlp,
                activations: mlp::ACTIVATIONS.to_vec(),
                cpu: DTYPES.to_vec(),
                cuda: DTYPES.to_vec(),
            }],
        }
    }

    /// Computes in the element type of `x`, whatever autocast says; gradients have the types of their inputs.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        grouped::product(Self::NAME, call, check_dtype, |(), fanout| Product(fanout))
    }

    /// Computes and answers as [`Kernel::grouped_matmul`].
    fn moe_mlp(&self, call: MoeMlp) -> Result<TensorHandle, PluginError> {
        grouped::mlp(
            Self::NAME,
            &mlp::ACTIVATIONS,
            call,
            check_dtype,
            |(), top_k, options| Mlp { top_k, options },
        )
    }
}

fn check_dtype(x: &Tensor) -> Result<(), PluginError> {
    if dtype(x.kind()).is_some_and(|dtype| DTYPES.contains(&dtype)) {
        return Ok(());
    }
    Err(
        PluginError::new("kernel `grouped` cannot compute with this element type")
            .why(format!(
                "`x` is {:?}, and libtorch's grouped matrix product takes f32, bf16 and f16",
                x.kind()
            ))
            .fix("set `-moe.kernel reference`, or `-moe.kernel auto`"),
    )
}

#[cfg(test)]
mod tests {
    use moeut_plugin_api::abi::client::KernelClient;
    use moeut_torch::{IntoHandle, IntoTensor, testing};
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn it_conforms() {
        testing::check_kernel(&KernelClient::in_process(Grouped).unwrap());
    }

    #[test]
    fn fp64_is_refused_with_a_way_out() {
        let kernel = KernelClient::in_process(Grouped).unwrap();
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, Device::Cpu)).into_handle();
        let ids = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
        let error = kernel
            .grouped_matmul(GroupedMatmul {
                x: zeros(&[2, 4]),
                weight: zeros(&[1, 4, 4]),
                selection: testing::selection(&ids, 1),
                gate: None,
            })
            .unwrap_err();
        assert_eq!(
            error.what,
            "kernel `grouped` cannot compute with this element type"
        );
        assert_eq!(
            error.why,
            "`x` is Double, and libtorch's grouped matrix product takes f32, bf16 and f16"
        );
        assert_eq!(
            error.fix,
            "set `-moe.kernel reference`, or `-moe.kernel auto`"
        );
    }

    /// A parameter may be a slice of a larger buffer, which starts anywhere.
    #[test]
    fn a_weight_at_an_odd_address_is_accepted() {
        let options = (Kind::Float, Device::Cpu);
        let weight = Tensor::randn([33], options)
            .narrow(0, 1, 32)
            .view([2, 4, 4]);
        let kernel = KernelClient::in_process(Grouped).unwrap();
        let x = Tensor::eye(4, options);
        let ids = Tensor::from_slice(&[1_i64; 4]);
        let product = kernel
            .grouped_matmul(GroupedMatmul {
                x: x.into_handle(),
                weight: weight.share(),
                selection: testing::selection(&ids, 2),
                gate: None,
            })
            .unwrap();
        assert_eq!(product.into_tensor(), weight.get(1));
    }
}
