//! Lists of tensors on their way through the shim. Not a public type: callers see slices and vectors.

#![expect(unsafe_code, reason = "owns a C++ vector")]

use std::ptr;

use tch::{TchError, Tensor};

use crate::ffi::{self, RawList, check};

/// An owned `std::vector<at::Tensor>`.
pub(crate) struct List(*mut RawList);

impl List {
    pub(crate) fn new() -> Result<Self, TchError> {
        let mut list = ptr::null_mut();
        // SAFETY: the shim writes a fresh vector, or returns an error and leaves `list` alone.
        unsafe { check(ffi::moeut_list_new(&raw mut list)) }?;
        Ok(Self(list))
    }

    /// New references to the same storage.
    pub(crate) fn of(tensors: &[&Tensor]) -> Result<Self, TchError> {
        let list = Self::new()?;
        for tensor in tensors {
            // SAFETY: `list` is alive, and so is the tensor behind the reference; the shim copies its handle.
            unsafe { check(ffi::moeut_list_push(list.0, tensor.as_ptr())) }?;
        }
        Ok(list)
    }

    pub(crate) fn as_ptr(&self) -> *const RawList {
        self.0
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut RawList {
        self.0
    }

    /// The tensors, all of which must be defined.
    pub(crate) fn to_tensors(&self) -> Result<Vec<Tensor>, TchError> {
        // SAFETY: the list is alive.
        all_defined(unsafe { read(self.0) }?)
    }

    /// The tensor of a list of one.
    pub(crate) fn to_tensor(&self) -> Result<Tensor, TchError> {
        self.to_tensors()?
            .pop()
            .ok_or_else(|| TchError::Torch("the shim returned no tensor".to_owned()))
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by `moeut_list_new`, freed once.
        unsafe { ffi::moeut_list_free(self.0) }
    }
}

/// New references to the tensors of a borrowed list; `None` where one is undefined.
///
/// # Safety
/// `list` points to a living vector.
pub(crate) unsafe fn read(list: *const RawList) -> Result<Vec<Option<Tensor>>, TchError> {
    // SAFETY: the caller keeps the vector alive.
    let n_tensors = unsafe { ffi::moeut_list_len(list) };
    (0..n_tensors)
        .map(|index| {
            let mut tensor = ptr::null_mut();
            // SAFETY: as above; the shim writes a new `at::Tensor` or null.
            unsafe { check(ffi::moeut_list_get(list, index, &raw mut tensor)) }?;
            // SAFETY: not null, and ours alone.
            Ok((!tensor.is_null()).then(|| unsafe { Tensor::from_ptr(tensor) }))
        })
        .collect()
}

/// Appends tensors to a borrowed list.
///
/// # Safety
/// `list` points to a living vector that nobody else uses meanwhile.
pub(crate) unsafe fn write(list: *mut RawList, tensors: &[Option<Tensor>]) -> Result<(), TchError> {
    for tensor in tensors {
        let pointer = tensor.as_ref().map_or(ptr::null(), Tensor::as_ptr);
        // SAFETY: the caller keeps the vector alive; the tensor is borrowed and its handle copied.
        unsafe { check(ffi::moeut_list_push(list, pointer)) }?;
    }
    Ok(())
}

pub(crate) fn all_defined(tensors: Vec<Option<Tensor>>) -> Result<Vec<Tensor>, TchError> {
    let n_tensors = tensors.len();
    let defined: Vec<Tensor> = tensors.into_iter().flatten().collect();
    if defined.len() == n_tensors {
        Ok(defined)
    } else {
        let n_undefined = n_tensors - defined.len();
        Err(TchError::Torch(format!(
            "{n_undefined} of {n_tensors} tensors are undefined"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_shares_storage_and_has_no_cap() {
        let tensors: Vec<Tensor> = (0..100).map(Tensor::from).collect();
        let list = List::of(&tensors.iter().collect::<Vec<_>>()).unwrap();
        let back = list.to_tensors().unwrap();
        assert_eq!(back.len(), 100);
        for (one, other) in tensors.iter().zip(&back) {
            assert_eq!(one.data_ptr(), other.data_ptr());
        }
    }

    #[test]
    fn an_undefined_tensor_is_told_apart() {
        let list = List::of(&[&Tensor::new()]).unwrap();
        assert!(
            list.to_tensors()
                .unwrap_err()
                .to_string()
                .contains("1 of 1 tensors")
        );
    }
}
