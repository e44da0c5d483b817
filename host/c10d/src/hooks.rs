//! Callbacks when gradients are complete.

#![expect(unsafe_code, reason = "hands a closure to the C++ shim")]

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Tensor;

use crate::Error;
use crate::ffi::{self, RawCallback, RawHooks, RawString, check};
use crate::group::pointers;

/// Calls a function each time the gradient of a parameter has been accumulated by a backward pass; until dropped.
///
/// The call comes on libtorch's thread for the parameter's device, once per parameter and backward pass however often
/// the model uses it, and as soon as its gradient is complete: backward of the earlier layers still runs. The function
/// must not wait for that pass. If it panics, the backward pass ends with an error that quotes the panic.
#[derive(Debug)]
pub struct GradHooks {
    raw: *mut RawHooks,
    is_active: Arc<AtomicBool>,
}

// SAFETY: the shim's object is a list of counted references with atomic counts, touched again only to free it; the
// callback is `Send + Sync`.
unsafe impl Send for GradHooks {}
// SAFETY: a shared `GradHooks` can do nothing.
unsafe impl Sync for GradHooks {}

struct Callback<F> {
    function: F,
    is_active: Arc<AtomicBool>,
}

impl GradHooks {
    /// Registers `callback`, which gets the place of the parameter in `params`.
    ///
    /// # Errors
    /// If a tensor is no parameter: not a leaf, or without a gradient.
    pub fn new<F>(params: &[&Tensor], callback: F) -> Result<Self, Error>
    where
        F: Fn(usize) + Send + Sync + 'static,
    {
        let is_active = Arc::new(AtomicBool::new(true));
        let user = Box::into_raw(Box::new(Callback {
            function: callback,
            is_active: Arc::clone(&is_active),
        }));
        let raw_callback = RawCallback {
            call: call::<F>,
            drop: drop_callback::<F>,
        };
        let params = pointers(params);
        let mut raw = ptr::null_mut();
        // SAFETY: the tensors outlive the call; the shim owns `user` from here on, also if it fails, and calls it only
        // with the functions made for its type.
        unsafe {
            check(ffi::moeut_c10d_hooks_new(
                params.as_ptr(),
                params.len(),
                raw_callback,
                user.cast(),
                &raw mut raw,
            ))
        }?;
        Ok(Self { raw, is_active })
    }
}

impl Drop for GradHooks {
    /// A graph that is still alive keeps the hooks, and perhaps another thread is in one: they stay where they are and
    /// do nothing any more.
    fn drop(&mut self) {
        self.is_active.store(false, Ordering::SeqCst);
        // SAFETY: made by the shim, freed once.
        unsafe { ffi::moeut_c10d_hooks_free(self.raw) };
    }
}

unsafe extern "C" fn call<F: Fn(usize)>(
    user: *mut c_void,
    index: usize,
    error: *mut RawString,
) -> bool {
    // SAFETY: the shim passes the pointer made in `new`, alive until it calls `drop_callback`; several threads may be
    // here, and the closure is `Sync`.
    let callback = unsafe { &*user.cast::<Callback<F>>() };
    if !callback.is_active.load(Ordering::SeqCst) {
        return true;
    }
    let Err(payload) = catch_unwind(AssertUnwindSafe(|| (callback.function)(index))) else {
        return true;
    };
    let text = format!("panic: {}", panic_text(&*payload));
    // SAFETY: the shim lends `error` for the time of the callback and copies the bytes.
    unsafe { ffi::moeut_c10d_error_set(error, text.as_ptr().cast(), text.len()) };
    false
}

unsafe extern "C" fn drop_callback<F>(user: *mut c_void) {
    // SAFETY: the pointer made in `new`; the shim calls this once, after the last `call`.
    let callback = unsafe { Box::from_raw(user.cast::<Callback<F>>()) };
    // A panic in a destructor has nowhere to go.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(callback)));
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a payload that is no text")
}
