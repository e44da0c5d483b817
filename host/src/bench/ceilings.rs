//! What the machine can do at most, as far as libtorch gets there: one large matrix product, one large copy.

use super::options::Effort;
use super::timer::{Spread, time};
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

/// Rows and columns of the square matrices.
const WIDTH_ON_GPU: i64 = 8192;
const WIDTH_ON_CPU: i64 = 1024;
/// Bytes of the copied tensor: more than a cache holds.
const BYTES_ON_GPU: i64 = 1 << 30;
const BYTES_ON_CPU: i64 = 1 << 28;

/// Two measured limits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Ceilings {
    /// A product of two square matrices.
    pub(super) matmul: Matmul,
    /// A copy within the memory of the device.
    pub(super) copy: Copy,
}

/// `A · B`, both `[width, width]`, in `2 · width³` operations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Matmul {
    pub(super) width: i64,
    pub(super) dtype: String,
    pub(super) seconds: Spread,
    pub(super) tflops_per_s: f64,
}

/// A tensor of so many bytes, each of which is read and written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Copy {
    pub(super) bytes: i64,
    pub(super) seconds: Spread,
    pub(super) gb_per_s: f64,
}

impl Ceilings {
    /// Measures both; products have elements of this kind.
    ///
    /// # Errors
    /// If libtorch refuses, for instance because there is no memory left.
    pub(super) fn measure(device: Device, kind: Kind) -> Result<Self, PluginError> {
        let effort = Effort {
            n_warmup: 3,
            n_rounds: 5,
            n_calls: if device.is_cuda() { 10 } else { 1 },
        };
        Ok(Self {
            matmul: matmul(device, kind, effort)?,
            copy: copy(device, effort)?,
        })
    }
}

fn matmul(device: Device, kind: Kind, effort: Effort) -> Result<Matmul, PluginError> {
    const WHAT: &str = "the largest product cannot be measured";
    let width = if device.is_cuda() {
        WIDTH_ON_GPU
    } else {
        WIDTH_ON_CPU
    };
    let square = || Tensor::f_rand([width, width], (Kind::Float, device)).map(|x| x.to_kind(kind));
    let [a, b] = [
        square().or_plugin_error(WHAT)?,
        square().or_plugin_error(WHAT)?,
    ];
    let seconds = time(device, effort, |n| {
        for _ in 0..n {
            drop(a.f_matmul(&b).or_plugin_error(WHAT)?);
        }
        Ok::<(), PluginError>(())
    })?;
    let n_operations = 2.0 * (width as f64).powi(3);
    Ok(Matmul {
        width,
        dtype: name(kind),
        tflops_per_s: n_operations / seconds.median / 1e12,
        seconds,
    })
}

fn copy(device: Device, effort: Effort) -> Result<Copy, PluginError> {
    const WHAT: &str = "the largest copy cannot be measured";
    let bytes = if device.is_cuda() {
        BYTES_ON_GPU
    } else {
        BYTES_ON_CPU
    };
    let tensor = || Tensor::f_ones([bytes / 4], (Kind::Float, device)).or_plugin_error(WHAT);
    let (source, mut target) = (tensor()?, tensor()?);
    let seconds = time(device, effort, |n| {
        for _ in 0..n {
            target.f_copy_(&source).or_plugin_error(WHAT)?;
        }
        Ok::<(), PluginError>(())
    })?;
    Ok(Copy {
        bytes,
        gb_per_s: 2.0 * bytes as f64 / seconds.median / 1e9,
        seconds,
    })
}

/// As users type it.
pub(super) fn name(kind: Kind) -> String {
    moeut_torch::dtype(kind).map_or_else(|| format!("{kind:?}"), |dtype| dtype.to_string())
}
