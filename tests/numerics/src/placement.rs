//! Where a run computes, and how precisely.

use crate::Result;
use moeut_plugin_api::{DType, Device, ModelSetup, PluginError};
use moeut_torch::{Autocast, cuda};

/// Device and precision of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Where the model's tensors are. What is recorded stays in main memory, and is compared there.
    pub device: Device,
    /// Element type of matrix products. One of 16 bits is mixed precision: parameters are in fp32, and the rest is as
    /// precise as models and autocast have it, as in a training with `-amp 1`.
    ///
    /// Products of fp32 are fp32's on GPUs, too: TF32 is off unless a model asks for it, and its rounding (5e-4) would
    /// be far above the bounds.
    pub dtype: DType,
}

impl Placement {
    /// On the CPU.
    pub fn on_cpu(dtype: DType) -> Self {
        let device = Device::Cpu;
        Self { device, dtype }
    }

    /// What a model is built with: compatible with the reference.
    pub fn setup(self, vocab_size: u64) -> ModelSetup {
        ModelSetup {
            vocab_size,
            device: self.device,
            dtype: if self.is_mixed() {
                DType::F32
            } else {
                self.dtype
            },
            compute_dtype: self.dtype,
            compat: true,
            is_shape_only: false,
        }
    }

    /// Whether products are in 16 bits.
    pub fn is_mixed(self) -> bool {
        matches!(self.dtype, DType::Bf16 | DType::F16)
    }

    /// The scope of a forward pass.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn autocast(self) -> Result<Autocast> {
        let half = self.is_mixed().then(|| moeut_torch::kind(self.dtype));
        Ok(Autocast::new(moeut_torch::device(self.device), half)?)
    }

    /// What a loss is multiplied with before its backward pass: gradients of f16 underflow without. It is where a
    /// training begins; there it adapts.
    pub fn loss_scale(self) -> f64 {
        if self.dtype == DType::F16 {
            65536.0
        } else {
            1.0
        }
    }
}

/// Makes a device usable. The first use of libtorch in the program, if it may be a GPU: see [`cuda::load`].
///
/// # Errors
/// If it is not there.
pub fn open(device: Device) -> Result<()> {
    let Device::Cuda(index) = device else {
        return Ok(());
    };
    let absent = |why: String, fix: &str| {
        let error = PluginError::new(format!("there is no device `{device}`"));
        error.why(why).fix(fix)
    };
    let has_device = cuda::load().map_err(|error| {
        let why = format!("{}: {}", error.what, error.why);
        absent(why, "run `cargo xtask setup --cuda`, or `--device cpu`")
    })?;
    let n_devices = if has_device {
        tch::Cuda::device_count()
    } else {
        0
    };
    if i64::from(index) < n_devices {
        return Ok(());
    }
    Err(absent(
        format!("libtorch sees {n_devices} CUDA devices"),
        "use `--device cpu`, or one of those that `nvidia-smi -L` lists",
    )
    .into())
}
