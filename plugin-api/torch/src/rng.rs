//! The state of libtorch's default random generators, one per device.
//!
//! The generators belong to libtorch, so every library in the process sees the same ones. Code that must be
//! reproducible seeds or restores them explicitly; nothing here remembers a state.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use tch::{Device, TchError, Tensor};

use crate::convert::device_code;
use crate::ffi::{self, check};
use crate::list::List;

/// The generator state of a device: bytes on the CPU, for [`set_state`] or a checkpoint.
///
/// # Errors
/// If the device does not exist.
pub fn state(device: Device) -> Result<Tensor, TchError> {
    let code = device_code(device)?;
    let mut state = List::new()?;
    // SAFETY: the list outlives the call; the shim checks the device.
    unsafe { check(ffi::moeut_rng_state(code, state.as_mut_ptr())) }?;
    state.to_tensor()
}

/// Puts a generator back to a state that [`state`] gave for the same kind of device.
///
/// # Errors
/// If the device does not exist, or if `state` is not a generator state of its kind.
pub fn set_state(device: Device, state: &Tensor) -> Result<(), TchError> {
    let code = device_code(device)?;
    // SAFETY: the tensor is alive; the shim checks its type and the device.
    unsafe { check(ffi::moeut_rng_set_state(code, state.as_ptr())) }
}

/// Seeds the generators of the CPU and of every CUDA device; all 64 bits count.
///
/// Asks libtorch for CUDA devices, so [`crate::cuda::load`] comes first where CUDA is wanted.
///
/// # Errors
/// If libtorch refuses.
pub fn seed(seed: u64) -> Result<(), TchError> {
    // SAFETY: takes a number and touches libtorch's own generators under their locks.
    unsafe { check(ffi::moeut_rng_seed(seed)) }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use tch::Kind;

    use super::*;

    /// The CPU generator is one per process, and tests run in parallel.
    static GENERATOR: Mutex<()> = Mutex::new(());

    fn draw() -> Vec<f64> {
        Vec::try_from(Tensor::randn([8], (Kind::Double, Device::Cpu))).unwrap()
    }

    #[test]
    fn a_restored_state_gives_the_same_numbers() {
        let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        let saved = state(Device::Cpu).unwrap();
        let first = draw();
        let second = draw();
        assert_ne!(first, second);
        set_state(Device::Cpu, &saved).unwrap();
        assert_eq!((draw(), draw()), (first, second));
    }

    #[test]
    fn a_seed_decides_the_numbers_with_all_its_bits() {
        let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        let draw_from = |value| {
            seed(value).unwrap();
            state(Device::Cpu).unwrap()
        };
        let once = draw_from(u64::MAX);
        assert_eq!(once, draw_from(u64::MAX));
        assert_ne!(once, draw_from(1));
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state(Device::Cpu).unwrap();
        let floats = Tensor::zeros([10], (Kind::Float, Device::Cpu));
        assert!(
            set_state(Device::Cpu, &floats)
                .unwrap_err()
                .to_string()
                .contains("Uint8")
        );
        let short = Tensor::zeros([10], (Kind::Uint8, Device::Cpu));
        assert!(set_state(Device::Cpu, &short).is_err());
        assert!(set_state(Device::Cpu, &Tensor::new()).is_err());
        assert_eq!(before, state(Device::Cpu).unwrap());
    }

    #[test]
    fn a_missing_device_is_an_error() {
        assert!(state(Device::Cuda(100)).is_err());
        assert!(state(Device::Mps).is_err());
    }
}
