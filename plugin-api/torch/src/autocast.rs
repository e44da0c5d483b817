//! Automatic mixed precision of one device type on this thread, as a scope.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ffi::c_int;
use std::marker::PhantomData;

use tch::{Device, Kind, TchError};

use crate::convert::device_code;
use crate::ffi::{self, check};

/// While it lives, libtorch runs matrix products and the like in a lower precision; dropped, it restores what was set
/// before. Scopes nest and must end in reverse order, which Rust's scopes do by themselves.
///
/// Autocast belongs to the thread, therefore so does the guard.
#[derive(Debug)]
#[must_use = "autocast ends when the guard is dropped"]
pub struct Autocast {
    is_cuda: bool,
    was_enabled: bool,
    previous_dtype: c_int,
    _of_this_thread: PhantomData<*const ()>,
}

impl Autocast {
    /// Computes in `kind` on devices like `device`, or in full precision inside an outer scope if `kind` is `None`.
    ///
    /// # Errors
    /// If `kind` is neither `Half` nor `BFloat16`, or if `device` is neither the CPU nor a CUDA device.
    pub fn new(device: Device, kind: Option<Kind>) -> Result<Self, TchError> {
        let is_half = match kind {
            None | Some(Kind::BFloat16) => false,
            Some(Kind::Half) => true,
            Some(other) => {
                return Err(TchError::Kind(format!(
                    "autocast to {other:?}, not Half or BFloat16"
                )));
            }
        };
        let is_cuda = device_code(device)? >= 0;
        let mut was_enabled = false;
        let mut previous_dtype = 0;
        // SAFETY: the shim writes both values; the state it changes belongs to this thread.
        unsafe {
            check(ffi::moeut_autocast_enter(
                is_cuda,
                kind.is_some(),
                is_half,
                &raw mut was_enabled,
                &raw mut previous_dtype,
            ))
        }?;
        Ok(Self {
            is_cuda,
            was_enabled,
            previous_dtype,
            _of_this_thread: PhantomData,
        })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: hands back what `new` read on this thread. Restoring flags that libtorch gave out does not fail.
        let _restored = unsafe {
            check(ffi::moeut_autocast_leave(
                self.is_cuda,
                self.was_enabled,
                self.previous_dtype,
            ))
        };
    }
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    fn product_kind() -> Kind {
        let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        a.matmul(&a).kind()
    }

    #[test]
    fn scopes_nest_and_restore() {
        assert_eq!(product_kind(), Kind::Float);
        {
            let _bf16 = Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
            assert_eq!(product_kind(), Kind::BFloat16);
            {
                let _off = Autocast::new(Device::Cpu, None).unwrap();
                assert_eq!(product_kind(), Kind::Float);
            }
            {
                let _half = Autocast::new(Device::Cpu, Some(Kind::Half)).unwrap();
                assert_eq!(product_kind(), Kind::Half);
            }
            assert_eq!(product_kind(), Kind::BFloat16);
        }
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn another_device_type_is_left_alone() {
        let _cuda = Autocast::new(Device::Cuda(0), Some(Kind::Half)).unwrap();
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn a_cast_weight_is_not_kept_beyond_the_scope() {
        let mut weight = Tensor::ones([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        let product = |weight: &Tensor| {
            let _bf16 = Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
            x.matmul(weight).int64_value(&[0, 0])
        };
        assert_eq!(product(&weight), 4);
        tch::no_grad(|| {
            let _ = weight.fill_(2.0);
        });
        assert_eq!(product(&weight), 8);
    }

    #[test]
    fn other_kinds_and_devices_are_refused() {
        assert!(Autocast::new(Device::Cpu, Some(Kind::Double)).is_err());
        assert!(Autocast::new(Device::Mps, Some(Kind::Half)).is_err());
    }
}
