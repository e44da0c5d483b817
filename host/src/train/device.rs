//! Which device a run uses, and in which precision.

use crate::args::{GpuChoice, HostConfig};
use moeut_plugin_api::{DType, Device, PluginError};

/// Device and element types of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Where tensors live.
    pub device: Device,
    /// Element type of the parameters.
    pub dtype: DType,
    /// Element type of matrix products.
    pub compute_dtype: DType,
}

/// Chooses device and precision. `n_gpus` is how many CUDA devices libtorch sees.
///
/// # Errors
/// If the wished device or precision is not there.
pub fn place(config: &HostConfig, n_gpus: u32) -> Result<Placement, PluginError> {
    place_on(config, n_gpus, |device| {
        let card = moeut_torch::cuda::describe(moeut_torch::device(device));
        card.is_ok_and(|card| card.capability >= BF16_CAPABILITY)
    })
}

/// Compute capability from which on a card multiplies in bfloat16.
const BF16_CAPABILITY: (i32, i32) = (8, 0);

fn place_on(
    config: &HostConfig,
    n_gpus: u32,
    has_bf16: impl Fn(Device) -> bool,
) -> Result<Placement, PluginError> {
    let device = match config.gpu {
        GpuChoice::Cpu => Device::Cpu,
        GpuChoice::Auto if n_gpus == 0 => Device::Cpu,
        GpuChoice::Auto => Device::Cuda(0),
        GpuChoice::Index(index) if index < n_gpus => Device::Cuda(index),
        GpuChoice::Index(index) => {
            return Err(PluginError::new(format!("there is no GPU {index}"))
                .why(format!("libtorch sees {n_gpus} CUDA devices"))
                .fix("use `-gpu auto` or `-gpu none`; `moeut-host doctor` says what is missing"));
        }
    };
    // As the reference: mixed precision is a matter of GPUs.
    let is_mixed = config.amp && matches!(device, Device::Cuda(_));
    if is_mixed && config.dtype == DType::F64 {
        return Err(
            PluginError::new("`-amp 1` and `-dtype f64` contradict each other")
                .why("mixed precision keeps parameters in float32")
                .fix("drop one of them"),
        );
    }
    Ok(Placement {
        device,
        dtype: config.dtype,
        compute_dtype: match is_mixed {
            false => config.dtype,
            true if config.bfloat16 && has_bf16(device) => DType::Bf16,
            true => DType::F16,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Owner, parse};

    /// The second GPU is an old one.
    fn placed(line: &str, n_gpus: u32) -> Result<Placement, PluginError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let arguments = parse(&argv, &[Owner::host()], None).unwrap();
        let config = HostConfig::new(&arguments).unwrap();
        place_on(&config, n_gpus, |device| device == Device::Cuda(0))
    }

    #[test]
    fn devices_and_precisions() {
        let compute = |line, n_gpus| {
            placed(line, n_gpus)
                .map(|p| (p.device, p.compute_dtype))
                .unwrap()
        };
        assert_eq!(compute("-amp 1", 0), (Device::Cpu, DType::F32));
        assert_eq!(compute("-amp 1", 2), (Device::Cuda(0), DType::Bf16));
        assert_eq!(compute("-amp 1 -gpu none", 2), (Device::Cpu, DType::F32));
        assert_eq!(
            compute("-gpu 1 -dtype f64", 2),
            (Device::Cuda(1), DType::F64)
        );
        let half = (Device::Cuda(0), DType::F16);
        assert_eq!(compute("-gpu 0 -amp 1 -bfloat16 0", 2), half);
        assert_eq!(compute("-gpu 1 -amp 1", 2), (Device::Cuda(1), DType::F16));
        for line in ["-gpu 2", "-gpu 0 -amp 1 -dtype f64"] {
            assert!(placed(line, 1).is_err(), "{line}");
        }
    }
}
