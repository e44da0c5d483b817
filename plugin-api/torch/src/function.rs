//! Custom autograd functions: a forward and a backward written in Rust, recorded by libtorch as one graph node.
//!
//! The callbacks may run on another thread than the one that called [`apply`]: libtorch runs a CUDA device's backward
//! on a thread of its own. Changing an input in place inside `forward` is not supported.

#![expect(
    unsafe_code,
    reason = "callbacks from C++ into Rust and a graph context behind a pointer"
)]

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{TchError, Tensor};

use crate::error::one_line;
use crate::ffi::{self, Callbacks, RawCall, RawList, RawString, check};
use crate::list::{self, List};

/// A differentiable function. The object lives as long as the graph node and is dropped once.
pub trait Function: Send + 'static {
    /// Computes the outputs, at least one. Runs without recording a graph.
    ///
    /// # Errors
    /// Whatever keeps it from computing; [`apply`] returns it. A panic counts as an error.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError>;

    /// Computes one gradient per input from one gradient per output.
    ///
    /// `None` in `grads` is an output that the loss does not use; `None` in the result is an input without gradient
    /// (an index, or one for which [`Context::needs_input_grad`] is false).
    ///
    /// # Errors
    /// Whatever keeps it from computing; the backward pass returns it. A panic counts as an error.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError>;
}

/// Applies `function` to `inputs` and records it in the graph if an input needs a gradient.
///
/// # Errors
/// If `forward` fails or panics, if `inputs` is empty or holds an undefined tensor, or if libtorch refuses.
pub fn apply<F: Function>(function: F, inputs: &[&Tensor]) -> Result<Vec<Tensor>, TchError> {
    let inputs = List::of(inputs)?;
    let mut outputs = List::new()?;
    let callbacks = Callbacks {
        forward: call_forward::<F>,
        backward: call_backward::<F>,
        drop: drop_function::<F>,
    };
    let user = Box::into_raw(Box::new(function)).cast();
    // SAFETY: the shim owns `user` from here on and drops it once; both lists live through the call.
    unsafe {
        check(ffi::moeut_function_apply(
            callbacks,
            user,
            inputs.as_ptr(),
            outputs.as_mut_ptr(),
        ))
    }?;
    outputs.to_tensors()
}

/// What a function keeps from forward to backward.
pub struct Context<'call> {
    call: *mut RawCall,
    _borrowed: PhantomData<&'call RawCall>,
}

impl Context<'_> {
    /// Keeps tensors for backward, inputs and outputs included, without reference cycles. Once per forward.
    ///
    /// # Errors
    /// If called twice or in backward, or if a tensor is undefined.
    pub fn save(&mut self, tensors: &[&Tensor]) -> Result<(), FunctionError> {
        let tensors = List::of(tensors)?;
        // SAFETY: the call outlives the context, the list outlives the call below.
        unsafe { check(ffi::moeut_context_save(self.call, tensors.as_ptr())) }?;
        Ok(())
    }

    /// The tensors given to [`Context::save`], in its order.
    ///
    /// # Errors
    /// If called in forward, if a saved tensor was changed in place since, or if the graph was freed by an earlier
    /// backward.
    pub fn saved(&self) -> Result<Vec<Tensor>, FunctionError> {
        let mut tensors = List::new()?;
        // SAFETY: as in `save`.
        unsafe { check(ffi::moeut_context_saved(self.call, tensors.as_mut_ptr())) }?;
        Ok(tensors.to_tensors()?)
    }

    /// Whether input `index` needs a gradient: in forward, whether the graph will ask for one; in backward, whether
    /// this pass does.
    ///
    /// # Panics
    /// If there is no such input, which is a bug in the function; it ends as an error of forward or backward.
    pub fn needs_input_grad(&self, index: usize) -> bool {
        let mut needs_grad = false;
        // SAFETY: as in `save`; the shim checks the index.
        let checked = unsafe {
            check(ffi::moeut_context_needs_input_grad(
                self.call,
                index,
                &raw mut needs_grad,
            ))
        };
        assert!(checked.is_ok(), "no input {index}: {checked:?}");
        needs_grad
    }
}

/// Why a forward or backward did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionError(String);

impl fmt::Display for FunctionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FunctionError {}

impl From<TchError> for FunctionError {
    fn from(error: TchError) -> Self {
        Self(one_line(&error))
    }
}

impl From<String> for FunctionError {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for FunctionError {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

unsafe extern "C" fn call_forward<F: Function>(
    user: *mut c_void,
    call: *mut RawCall,
    given: *const RawList,
    returned: *mut RawList,
    error: *mut RawString,
) -> bool {
    let outcome = catch(|| {
        // SAFETY: `user` is the `F` that `apply` boxed, and is alive while the shim's holder is.
        let function = unsafe { &*user.cast::<F>() };
        // SAFETY: the shim lends both lists for the time of this call.
        let inputs = list::all_defined(unsafe { list::read(given) }?)?;
        let outputs = function.forward(&mut context(call), &inputs)?;
        let outputs: Vec<_> = outputs.into_iter().map(Some).collect();
        // SAFETY: see above.
        Ok(unsafe { list::write(returned, &outputs) }?)
    });
    report(outcome, error)
}

unsafe extern "C" fn call_backward<F: Function>(
    user: *mut c_void,
    call: *mut RawCall,
    given: *const RawList,
    returned: *mut RawList,
    error: *mut RawString,
) -> bool {
    let outcome = catch(|| {
        // SAFETY: as in `call_forward`; libtorch holds the node's lock, so no other thread uses the object.
        let function = unsafe { &*user.cast::<F>() };
        // SAFETY: the shim lends both lists for the time of this call.
        let grads = unsafe { list::read(given) }?;
        let input_grads = function.backward(&context(call), &grads)?;
        // SAFETY: see above.
        Ok(unsafe { list::write(returned, &input_grads) }?)
    });
    report(outcome, error)
}

unsafe extern "C" fn drop_function<F: Function>(user: *mut c_void) {
    // A panic in a destructor has nobody to be told to, and must not unwind into C++.
    let _outcome = catch(|| {
        // SAFETY: the shim calls this once, with the pointer that `apply` made.
        drop(unsafe { Box::from_raw(user.cast::<F>()) });
        Ok(())
    });
}

fn context<'call>(call: *mut RawCall) -> Context<'call> {
    Context {
        call,
        _borrowed: PhantomData,
    }
}

pub(crate) fn catch(body: impl FnOnce() -> Result<(), FunctionError>) -> Result<(), FunctionError> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(panic_text(&*payload)))
}

fn panic_text(payload: &(dyn Any + Send)) -> FunctionError {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a payload that is no text");
    FunctionError(format!("panic: {text}"))
}

/// Hands an error to the shim and says whether there was none.
pub(crate) fn report(outcome: Result<(), FunctionError>, error: *mut RawString) -> bool {
    let Err(FunctionError(text)) = outcome else {
        return true;
    };
    // SAFETY: the shim lends `error` for the time of the callback and copies the bytes.
    unsafe { ffi::moeut_error_set(error, text.as_ptr().cast(), text.len()) };
    false
}

#[cfg(test)]
mod tests;
