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
    if is_mixed && !config.bfloat16 {
        return Err(PluginError::new("`-amp 1 -bfloat16 0` is not available")
            .why("float16 needs loss scaling, which this version does not have")
            .fix("use `-bfloat16 1` (compute capability 8 or higher) or `-amp 0`"));
    }
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
        compute_dtype: if is_mixed { DType::Bf16 } else { config.dtype },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Owner, parse};

    fn placed(line: &str, n_gpus: u32) -> Result<Placement, PluginError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let arguments = parse(&argv, &[Owner::host()], None).unwrap();
        place(&HostConfig::new(&arguments).unwrap(), n_gpus)
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
        for line in [
            "-gpu 2",
            "-gpu 0 -amp 1 -bfloat16 0",
            "-gpu 0 -amp 1 -dtype f64",
        ] {
            assert!(placed(line, 1).is_err(), "{line}");
        }
    }
}
