//! Reads numbers from the device later than they were asked for, so that a step does not wait for its own results.
//!
//! An ordinary read (`Tensor::double_value`) waits for everything that was enqueued before it, the step after included.

#![expect(unsafe_code, reason = "calls into the C++ shim and owns its object")]

use std::ptr;

use tch::{TchError, Tensor};

use crate::ffi::{self, RawReadback, check};
use crate::list::List;

/// Copies of tensors on their way to the host.
#[derive(Debug)]
pub struct Readback {
    raw: *mut RawReadback,
    lengths: Vec<usize>,
}

impl Readback {
    /// Starts to copy `tensors`, of any types and shapes and of one device; later changes of theirs do not show.
    ///
    /// # Errors
    /// If there is none, or one is undefined.
    pub fn start(tensors: &[&Tensor]) -> Result<Self, TchError> {
        let list = List::of(tensors)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the list outlives the call; the shim writes a new object, or returns an error and leaves `raw` alone.
        unsafe { check(ffi::moeut_readback_start(list.as_ptr(), &raw mut raw)) }?;
        Ok(Self {
            raw,
            lengths: tensors.iter().map(|tensor| tensor.numel()).collect(),
        })
    }

    /// The elements of each tensor; waits until they have arrived.
    ///
    /// # Errors
    /// If the device failed meanwhile.
    pub fn wait(self) -> Result<Vec<Vec<f64>>, TchError> {
        // SAFETY: `raw` lives until `self` is dropped.
        let mut values = vec![0.0; unsafe { ffi::moeut_readback_len(self.raw) }];
        // SAFETY: as above; `values` has room for as many numbers as the shim said.
        unsafe { check(ffi::moeut_readback_wait(self.raw, values.as_mut_ptr())) }?;
        let mut rest = &values[..];
        let split = |length: &usize| {
            let (head, tail) = rest.split_at(*length);
            rest = tail;
            head.to_vec()
        };
        Ok(self.lengths.iter().map(split).collect())
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        // SAFETY: made by `moeut_readback_start`, freed once. A copy under way keeps its pinned memory: libtorch's
        // allocator does not hand it out again before the stream is past it.
        unsafe { ffi::moeut_readback_free(self.raw) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn values_come_back_as_they_were(device: Device) {
        let mut one = Tensor::from_slice(&[1.5_f32, -2.0]).to_device(device);
        let flag = Tensor::from(true).to_device(device);
        let readback = Readback::start(&[&one, &flag]).unwrap();
        let _ = one.fill_(7.0);
        assert_eq!(readback.wait().unwrap(), [vec![1.5, -2.0], vec![1.0]]);
    }

    #[test]
    fn values_of_the_cpu() {
        values_come_back_as_they_were(Device::Cpu);
        assert!(Readback::start(&[]).is_err());
        assert!(Readback::start(&[&Tensor::new()]).is_err());
    }

    /// Where there is a GPU; elsewhere the copy above is all there is.
    #[test]
    fn values_of_a_gpu() {
        if crate::cuda::load().unwrap_or(false) {
            values_come_back_as_they_were(Device::Cuda(0));
            let matrix = Tensor::ones([512, 512], (Kind::Float, Device::Cuda(0)));
            let sum = matrix.matmul(&matrix).sum(Kind::Float);
            let values = Readback::start(&[&sum]).unwrap().wait().unwrap();
            assert_eq!(values, [vec![512.0 * 512.0 * 512.0]]);
        }
    }
}
