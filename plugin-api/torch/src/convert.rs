//! Element types and devices between the plugin ABI's words and tch's.

use std::ffi::c_int;

use moeut_plugin_api::tensor;
use tch::{Device, Kind, TchError};

/// tch's name of an element type.
pub fn kind(dtype: tensor::DType) -> Kind {
    match dtype {
        tensor::DType::F64 => Kind::Double,
        tensor::DType::F32 => Kind::Float,
        tensor::DType::Bf16 => Kind::BFloat16,
        tensor::DType::F16 => Kind::Half,
    }
}

/// The ABI's name of an element type; `None` for those of no parameter or activation.
pub fn dtype(kind: Kind) -> Option<tensor::DType> {
    match kind {
        Kind::Double => Some(tensor::DType::F64),
        Kind::Float => Some(tensor::DType::F32),
        Kind::BFloat16 => Some(tensor::DType::Bf16),
        Kind::Half => Some(tensor::DType::F16),
        _ => None,
    }
}

/// tch's name of a device.
pub fn device(device: tensor::Device) -> Device {
    match device {
        tensor::Device::Cpu => Device::Cpu,
        tensor::Device::Cuda(index) => Device::Cuda(index as usize),
    }
}

/// The shim's number of a device: -1 for the CPU, else the CUDA index.
pub(crate) fn device_code(device: Device) -> Result<c_int, TchError> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(index) => c_int::try_from(index)
            .map_err(|_| TchError::Convert(format!("CUDA device index {index} is too large"))),
        other => Err(TchError::Convert(format!(
            "{other:?} is neither the CPU nor a CUDA device"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_survive_the_round_trip() {
        use tensor::DType::{Bf16, F16, F32, F64};
        for one in [F64, F32, Bf16, F16] {
            assert_eq!(dtype(kind(one)), Some(one));
        }
        assert_eq!(dtype(Kind::Int64), None);
    }

    #[test]
    fn devices_map_by_index() {
        assert_eq!(device(tensor::Device::Cpu), Device::Cpu);
        assert_eq!(device(tensor::Device::Cuda(3)), Device::Cuda(3));
        assert_eq!(device_code(Device::Cuda(3)).unwrap(), 3);
        assert!(device_code(Device::Mps).is_err());
        assert!(device_code(Device::Cuda(usize::MAX)).is_err());
    }
}
