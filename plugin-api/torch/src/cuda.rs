//! CUDA at run time: one build serves CPU and GPU, and opens libtorch's CUDA half when somebody asks for it.

#![expect(unsafe_code, reason = "calls into the C++ shim, which opens a library")]

use std::ffi::{c_char, c_int, c_void};

use moeut_plugin_api::PluginError;
use tch::{Device, TchError, Tensor};

use crate::convert::device_code;
use crate::error::one_line;
use crate::ffi::{self, RawMemory, check};
use crate::list::List;

/// Opens `libtorch_cuda.so` beside the libtorch of this process and says whether there is a device.
///
/// **Call it before any other use of libtorch**, as the first line of the program if CUDA may be wanted: a question
/// about CUDA before that (seeding and a backward pass ask, too) makes libtorch remember, for the whole process, that
/// there is none. Calling it again is harmless.
///
/// # Errors
/// If the library or one of those it needs is not installed; the CPU still works then.
pub fn load() -> Result<bool, PluginError> {
    let mut has_device = false;
    // SAFETY: opens a library of the installation that this process already runs; the shim writes one flag.
    let loaded = unsafe { check(ffi::moeut_cuda_load(&raw mut has_device)) };
    loaded.map(|()| has_device).map_err(|error| {
        PluginError::new("cannot load libtorch's CUDA libraries")
            .why(one_line(&error))
            .fix("set `-gpu none`, or run `cargo xtask setup --cuda`")
    })
}

/// Memory of one CUDA device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryStats {
    /// Held by tensors.
    pub allocated: u64,
    /// The most that tensors held since the start or [`reset_peak_memory`].
    pub allocated_peak: u64,
    /// Held by libtorch's caching allocator, tensors included.
    pub reserved: u64,
    /// The most that the allocator held.
    pub reserved_peak: u64,
    /// Free on the device, as the driver sees it.
    pub free: u64,
    /// Of the device.
    pub total: u64,
}

/// What libtorch's allocator and the driver say about a CUDA device.
///
/// # Errors
/// If `device` is not a CUDA device that libtorch sees.
pub fn memory_stats(device: Device) -> Result<MemoryStats, TchError> {
    let code = device_code(device)?;
    let mut raw = RawMemory::default();
    // SAFETY: the shim checks the device and fills the struct.
    unsafe { check(ffi::moeut_cuda_memory(code, &raw mut raw)) }?;
    // The allocator's counters are signed and never negative.
    let bytes = |count: i64| u64::try_from(count).unwrap_or(0);
    Ok(MemoryStats {
        allocated: bytes(raw.allocated),
        allocated_peak: bytes(raw.allocated_peak),
        reserved: bytes(raw.reserved),
        reserved_peak: bytes(raw.reserved_peak),
        free: bytes(raw.free),
        total: bytes(raw.total),
    })
}

/// Lets the peaks of [`memory_stats`] start from what is held now.
///
/// # Errors
/// As [`memory_stats`].
pub fn reset_peak_memory(device: Device) -> Result<(), TchError> {
    let code = device_code(device)?;
    // SAFETY: the shim checks the device.
    unsafe { check(ffi::moeut_cuda_reset_peak(code)) }
}

/// The driver's handle (`CUstream`) of the stream on which libtorch queues this thread's work on `device`. Kernels
/// launched there run after what libtorch queued before, and memory that libtorch frees later stays valid for them.
///
/// # Errors
/// If `device` is not a CUDA device that libtorch sees.
pub fn current_stream(device: Device) -> Result<*mut c_void, TchError> {
    let code = device_code(device)?;
    let mut stream = std::ptr::null_mut();
    // SAFETY: the shim checks the device and writes the handle.
    unsafe { check(ffi::moeut_cuda_stream(code, &raw mut stream)) }?;
    Ok(stream)
}

/// Copies a tensor of the CPU to a device, behind what this thread has queued there, and does not wait for it.
///
/// # Errors
/// If `device` is not a CUDA device that libtorch sees, or memory does not suffice.
pub fn upload(tensor: &Tensor, device: Device) -> Result<Tensor, TchError> {
    let code = device_code(device)?;
    let mut copy = List::new()?;
    // SAFETY: tensor and list outlive the call; the shim checks the device and fills the list.
    unsafe {
        check(ffi::moeut_cuda_upload(
            tensor.as_ptr(),
            code,
            copy.as_mut_ptr(),
        ))
    }?;
    copy.to_tensor()
}

/// What the driver says about a CUDA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, major and minor; bfloat16 products need 8.
    pub capability: (i32, i32),
}

/// Describes a CUDA device.
///
/// # Errors
/// If `device` is not a CUDA device that libtorch sees.
pub fn describe(device: Device) -> Result<Description, TchError> {
    const NAME_LENGTH: c_int = 256;
    let code = device_code(device)?;
    let mut name: [c_char; NAME_LENGTH as usize] = [0; NAME_LENGTH as usize];
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the shim checks the device; the driver writes at most `NAME_LENGTH` bytes, the zero at the end included.
    unsafe {
        check(ffi::moeut_cuda_describe(
            code,
            name.as_mut_ptr(),
            NAME_LENGTH,
            &raw mut major,
            &raw mut minor,
        ))
    }?;
    let bytes: Vec<u8> = name
        .iter()
        .take_while(|&&byte| byte != 0)
        .map(|&byte| byte.to_ne_bytes()[0])
        .collect();
    Ok(Description {
        name: String::from_utf8_lossy(&bytes).into_owned(),
        capability: (major, minor),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without CUDA libraries `load` must say so and how to go on; with them it must agree with tch.
    #[test]
    fn loading_works_or_explains_itself() {
        match load() {
            Ok(has_device) => assert_eq!(has_device, tch::Cuda::is_available()),
            Err(error) => {
                assert_eq!(error.what, "cannot load libtorch's CUDA libraries");
                assert!(!error.why.is_empty() && !error.why.contains('\n'));
                assert!(error.fix.contains("cargo xtask setup"));
            }
        }
    }

    #[test]
    fn memory_of_what_is_no_cuda_device_is_an_error() {
        for device in [Device::Cpu, Device::Cuda(100), Device::Mps] {
            assert!(memory_stats(device).is_err(), "{device:?}");
            assert!(reset_peak_memory(device).is_err(), "{device:?}");
            assert!(describe(device).is_err(), "{device:?}");
            assert!(current_stream(device).is_err(), "{device:?}");
            let tensor = Tensor::from_slice(&[1i64, 2]);
            assert!(upload(&tensor, device).is_err(), "{device:?}");
        }
    }
}
