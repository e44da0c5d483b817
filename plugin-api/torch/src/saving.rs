//! Scopes that decide what libtorch keeps for the backward pass, and closures that it calls there.

#![expect(
    unsafe_code,
    reason = "callbacks from C++ into Rust and a scope behind a pointer"
)]

use std::ffi::c_void;
use std::marker::PhantomData;

use tch::Tensor;

use crate::FunctionError;
use crate::ffi::{self, AgainCallbacks, RawList, RawSaving, RawString};
use crate::function::{catch, report};
use crate::list;

/// A scope of this thread, which it ends.
pub(crate) struct Saving {
    saving: *mut RawSaving,
    _of_this_thread: PhantomData<*const ()>,
}

impl Saving {
    /// Takes one over that the shim has just begun on this thread.
    pub(crate) fn of(saving: *mut RawSaving) -> Self {
        Self {
            saving,
            _of_this_thread: PhantomData,
        }
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        // SAFETY: begun by the shim on this thread, ended once; scopes of Rust end in reverse order.
        unsafe { ffi::moeut_saving_end(self.saving) };
    }
}

/// A closure as the shim takes it: callbacks, and the object that they belong to, which the shim shall drop once.
pub(crate) fn boxed<F>(again: F) -> (AgainCallbacks, *mut c_void)
where
    F: Fn(Vec<Tensor>) -> Result<Vec<Tensor>, FunctionError> + 'static,
{
    let callbacks = AgainCallbacks {
        call: call_again::<F>,
        drop: drop_again::<F>,
    };
    (callbacks, Box::into_raw(Box::new(again)).cast())
}

unsafe extern "C" fn call_again<F>(
    user: *mut c_void,
    given: *const RawList,
    made: *mut RawList,
    error: *mut RawString,
) -> bool
where
    F: Fn(Vec<Tensor>) -> Result<Vec<Tensor>, FunctionError>,
{
    let outcome = catch(|| {
        // SAFETY: `user` is the `F` that `boxed` made, alive until it is dropped; the shim calls on the thread that made
        // it, and only there.
        let again = unsafe { &*user.cast::<F>() };
        // SAFETY: the shim lends both lists for the time of this call.
        let given = list::all_defined(unsafe { list::read(given) }?)?;
        let outputs: Vec<_> = again(given)?.into_iter().map(Some).collect();
        // SAFETY: see above.
        Ok(unsafe { list::write(made, &outputs) }?)
    });
    report(outcome, error)
}

unsafe extern "C" fn drop_again<F>(user: *mut c_void) {
    // A panic in a destructor has nobody to be told to, and must not unwind into C++.
    let _outcome = catch(|| {
        // SAFETY: the shim calls this once, with the pointer that `boxed` made, on the thread that made it.
        drop(unsafe { Box::from_raw(user.cast::<F>()) });
        Ok(())
    });
}
