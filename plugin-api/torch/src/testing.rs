//! The conformance suite of kernels: what a kernel crate runs in its own `#[test]`s.
//!
//! The oracles are independent of every kernel: dense products with one-hot experts in fp64, differentiated by
//! libtorch. Shape letters are those of [`moeut_plugin_api::Kernel`].

mod loss;
mod mlp;
mod product;
mod select;
mod stream;
mod subject;

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{FusedCall, MoeProject, Route, RouteOptions, RouterScoring};
use moeut_plugin_api::{DType, Device as AbiDevice, Selection};
use tch::{Kind, Tensor};

use crate::{IntoHandle, convert, cuda};
use subject::{assert_explained, unwrap};

/// All selections of `ids` (int64, any shape, in `0..n_experts`), sorted by expert.
pub fn selection(ids: &Tensor, n_experts: i64) -> Selection {
    let ids = ids.reshape([-1]);
    let (_, order) = ids.sort_stable(true, 0, false);
    let ends = ids
        .bincount(None::<&Tensor>, n_experts)
        .cumsum(0, Kind::Int64);
    Selection {
        inverse: order.argsort(0, false).into_handle(),
        order: order.into_handle(),
        ends: ends.to_kind(Kind::Int).into_handle(),
    }
}

/// Checks that a kernel computes [`moeut_plugin_api::Kernel`]'s product, the fused calls that it provides, and all
/// gradients wherever its capabilities say so, and refuses everything else with an error that explains itself. CUDA is
/// checked where there is a device.
///
/// # Panics
/// With the case that does not conform.
pub fn check_kernel(kernel: &KernelClient) {
    let has_cuda = cuda::load().unwrap_or(false);
    let capabilities = unwrap(kernel.capabilities());
    assert!(
        !capabilities.cpu.is_empty() || !capabilities.cuda.is_empty(),
        "the kernel runs nowhere: {capabilities:?}"
    );
    for fused in &capabilities.fused {
        assert!(
            matches!(
                fused.call,
                FusedCall::MoeMlp
                    | FusedCall::ResidualNorm
                    | FusedCall::Select
                    | FusedCall::Rotate
                    | FusedCall::CrossEntropy
            ),
            "this suite has no oracle for {:?}, which the kernel provides",
            fused.call
        );
    }
    check_absent_calls(kernel);
    let devices = [AbiDevice::Cpu, AbiDevice::Cuda(0)];
    for device in devices.into_iter().take(1 + usize::from(has_cuda)) {
        for dtype in [DType::F64, DType::F32, DType::Bf16, DType::F16] {
            product::check(kernel, &capabilities, device, dtype);
            mlp::check(kernel, &capabilities, device, dtype);
            stream::check(kernel, &capabilities, device, dtype);
            select::check(kernel, &capabilities, device, dtype);
            loss::check(kernel, &capabilities, device, dtype);
        }
    }
}

/// What a kernel does not provide it must say, however valid the call.
fn check_absent_calls(kernel: &KernelClient) {
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, tch::Device::Cpu)).into_handle();
    let route = || Route {
        x: ones(&[3, 4]),
        norm_weight: Some(ones(&[4])),
        norm_bias: None,
        weight: ones(&[2, 4]),
        bias: None,
        options: RouteOptions {
            n_groups: 1,
            top_k: 1,
            scoring: RouterScoring::Sigmoid,
            norm_eps: 1e-5,
        },
    };
    assert_explained("`route`, which is not listed", kernel.route(route()));
    let project = MoeProject {
        route: route(),
        x: ones(&[3, 4]),
        weight: ones(&[2, 4, 5]),
    };
    assert_explained(
        "`moe_project`, which is not listed",
        kernel.moe_project(project),
    );
}

/// Checks the gradients of a kernel with fp64 on the CPU against central differences.
///
/// # Panics
/// If one is off, or if the kernel has no fp64.
pub fn check_finite_differences(kernel: &KernelClient) {
    product::small(kernel, tch::Device::Cpu).check_finite_differences();
}

/// Which experts the `m`-th selection goes to.
#[derive(Clone, Copy)]
enum Routing {
    /// All experts, in an order without pattern.
    Mixed,
    /// Only expert 1, as when a router has collapsed.
    One,
    /// Every other expert gets nothing.
    Sparse,
    /// Expert 0 gets 15 % more than its share.
    Skewed,
}

impl Routing {
    /// int64 `[M]`.
    fn ids(self, n_selections: i64, n_experts: i64, device: tch::Device) -> Tensor {
        let m = Tensor::arange(n_selections, (Kind::Int64, device));
        // A full-period sequence modulo a prime beyond all sizes here.
        let mixed = |n: i64| (&m * 7919 + 13).remainder(10_007).remainder(n);
        match self {
            Self::Mixed => mixed(n_experts),
            Self::One => m.ones_like(),
            Self::Sparse => mixed(n_experts / 2) * 2,
            Self::Skewed => mixed(n_experts) * mixed(20).ge(3).to_kind(Kind::Int64),
        }
    }
}

/// tch's name of a device of the suite.
fn tch_device(device: AbiDevice) -> tch::Device {
    convert::device(device)
}
