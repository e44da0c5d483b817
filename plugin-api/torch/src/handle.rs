//! Tensors as the plugin ABI's opaque handles, and back. Storage and autograd graph are shared, never copied.
//!
//! A handle frees its tensor with the code of the library that made it, also after the tensor became a
//! [`tch::Tensor`] elsewhere: [`IntoTensor`] takes a reference of its own.

#![expect(unsafe_code, reason = "opens and makes opaque handles")]

use std::ffi::c_void;
use std::mem::ManuallyDrop;

use moeut_plugin_api::TensorHandle;
use tch::Tensor;

/// From the plugin boundary into tch.
pub trait IntoTensor {
    /// The tensor behind the handle.
    fn into_tensor(self) -> Tensor;

    /// The same tensor (storage, graph and gradient), while the handle stays.
    fn tensor(&self) -> Tensor;
}

/// From tch to the plugin boundary.
pub trait IntoHandle {
    /// Hands the tensor over.
    fn into_handle(self) -> TensorHandle;

    /// A handle to the same tensor (storage, graph and gradient), which stays usable here.
    fn share(&self) -> TensorHandle;
}

impl IntoTensor for TensorHandle {
    fn into_tensor(self) -> Tensor {
        self.tensor()
    }

    fn tensor(&self) -> Tensor {
        // SAFETY: every handle was made from an `at::Tensor` of the one libtorch in this process (the contract of
        // `TensorHandle::from_raw`) and keeps it alive; the clone is a counted reference of our own.
        unsafe { Tensor::clone_from_ptr(self.as_ptr().cast()) }
    }
}

impl IntoHandle for Tensor {
    fn into_handle(self) -> TensorHandle {
        let pointer = ManuallyDrop::new(self).as_mut_ptr();
        // SAFETY: the pointer is a living `at::Tensor` that tch no longer frees; `release` frees it.
        unsafe { TensorHandle::from_raw(pointer.cast(), release) }
    }

    fn share(&self) -> TensorHandle {
        self.shallow_clone().into_handle()
    }
}

/// Frees the tensor of a handle made here.
unsafe extern "C" fn release(tensor: *mut c_void) {
    // SAFETY: called once by the handle, with the pointer that `into_handle` gave it.
    unsafe { torch_sys::at_free(tensor.cast()) }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::function::{Context, Function, FunctionError, apply};

    #[test]
    fn a_round_trip_shares_storage() {
        let tensor = Tensor::from_slice(&[1.0, 2.0, 3.0]);
        let storage = tensor.data_ptr();
        let handle = tensor.share();
        let mut seen = handle.tensor();
        assert_eq!(seen.data_ptr(), storage);
        let _ = seen.fill_(7.0);
        assert_eq!(Vec::<f64>::try_from(&tensor).unwrap(), [7.0; 3]);
        drop(tensor);
        let back = handle.into_tensor();
        assert_eq!(back.data_ptr(), storage);
        assert_eq!(
            Vec::<f64>::try_from(&back.into_handle().into_tensor()).unwrap(),
            [7.0; 3]
        );
    }

    #[test]
    fn the_graph_and_the_gradient_cross() {
        let x = Tensor::from_slice(&[3.0]).set_requires_grad(true);
        let y = (&x * &x).into_handle().into_tensor();
        y.backward();
        assert_eq!(
            Vec::<f64>::try_from(x.share().tensor().grad()).unwrap(),
            [6.0]
        );
    }

    /// Owns a count, which falls when the last reference to the graph goes.
    struct Identity {
        _owner: std::sync::Arc<()>,
    }

    impl Function for Identity {
        fn forward(
            &self,
            _: &mut Context,
            inputs: &[Tensor],
        ) -> Result<Vec<Tensor>, FunctionError> {
            Ok(vec![inputs[0].copy()])
        }

        fn backward(
            &self,
            _: &Context,
            grads: &[Option<Tensor>],
        ) -> Result<Vec<Option<Tensor>>, FunctionError> {
            Ok(grads
                .iter()
                .map(|g| g.as_ref().map(Tensor::shallow_clone))
                .collect())
        }
    }

    /// The graph node of the output owns the counter, so the count tells whether the tensor was freed.
    #[test]
    fn the_last_owner_frees_once() {
        let counter = std::sync::Arc::new(());
        let n_owners = || std::sync::Arc::strong_count(&counter);
        let x = Tensor::zeros([2], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let output = apply(
            Identity {
                _owner: counter.clone(),
            },
            &[&x],
        )
        .unwrap()
        .swap_remove(0);

        let shared = output.share();
        drop(output);
        assert_eq!(n_owners(), 2);
        let tensor = shared.tensor();
        drop(shared);
        assert_eq!(n_owners(), 2);
        let handle = tensor.into_handle();
        assert_eq!(n_owners(), 2);
        drop(handle);
        assert_eq!(n_owners(), 1);
    }
}
