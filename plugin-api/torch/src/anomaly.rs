//! libtorch's anomaly detection: a backward pass that makes a NaN ends with the name of the operation that made it.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use crate::ffi::{self, check};
use tch::TchError;

/// Turns the detection on or off, for the whole process. Backward passes are much slower with it.
///
/// # Errors
/// Never so far; libtorch may refuse.
///
/// # Source
/// PyTorch, `torch.autograd.set_detect_anomaly`.
pub fn detect(is_on: bool) -> Result<(), TchError> {
    // SAFETY: sets two flags of libtorch.
    unsafe { check(ffi::moeut_detect_anomaly(is_on)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_nan_in_a_backward_pass_is_named() {
        let backward = || {
            let x = Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            (x.sqrt() * 0.0).sum(Kind::Float).f_backward()
        };
        backward().unwrap();
        detect(true).unwrap();
        let error = backward().unwrap_err().to_string();
        detect(false).unwrap();
        assert!(error.contains("SqrtBackward0"), "{error}");
        backward().unwrap();
    }
}
