//! The C face of the shim (`cpp/*.cpp`), declared once. Nothing here is safe or public.

#![expect(
    unsafe_code,
    reason = "declares the shim's C functions and reads their errors"
)]

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::TchError;
use torch_sys::C_tensor;

/// `std::vector<at::Tensor>`.
#[repr(C)]
pub(crate) struct RawList {
    _private: [u8; 0],
}

/// `std::string` that receives the error of a callback.
#[repr(C)]
pub(crate) struct RawString {
    _private: [u8; 0],
}

/// One running forward or backward of a custom function.
#[repr(C)]
pub(crate) struct RawCall {
    _private: [u8; 0],
}

/// Numbers on their way to the host.
#[repr(C)]
pub(crate) struct RawReadback {
    _private: [u8; 0],
}

/// A piece of a thread's time that is recorded: `at::RecordFunction`.
#[repr(C)]
pub(crate) struct RawSpan {
    _private: [u8; 0],
}

/// A part of a forward pass that decides what is kept for the backward pass.
#[repr(C)]
pub(crate) struct RawSaving {
    _private: [u8; 0],
}

/// What was saved in such a part, by memory.
#[repr(C)]
pub(crate) struct RawLedger {
    _private: [u8; 0],
}

/// Captured work of a CUDA device.
#[repr(C)]
pub(crate) struct RawGraph {
    _private: [u8; 0],
}

pub(crate) type Callback = unsafe extern "C" fn(
    user: *mut c_void,
    call: *mut RawCall,
    given: *const RawList,
    returned: *mut RawList,
    error: *mut RawString,
) -> bool;

/// The Rust side of a custom function.
#[repr(C)]
pub(crate) struct Callbacks {
    pub(crate) forward: Callback,
    pub(crate) backward: Callback,
    pub(crate) drop: unsafe extern "C" fn(user: *mut c_void),
}

/// The Rust side of recomputed activations.
#[repr(C)]
pub(crate) struct AgainCallbacks {
    pub(crate) call: unsafe extern "C" fn(
        user: *mut c_void,
        given: *const RawList,
        made: *mut RawList,
        error: *mut RawString,
    ) -> bool,
    pub(crate) drop: unsafe extern "C" fn(user: *mut c_void),
}

/// Bytes of a CUDA device, as `MoeutMemory` in `device.cpp`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct RawMemory {
    pub(crate) allocated: i64,
    pub(crate) allocated_peak: i64,
    pub(crate) reserved: i64,
    pub(crate) reserved_peak: i64,
    pub(crate) free: i64,
    pub(crate) total: i64,
}

// Functions that return `*mut c_char` return an error text or null; `check` reads and frees it.
unsafe extern "C" {
    pub(crate) fn moeut_list_new(list: *mut *mut RawList) -> *mut c_char;
    pub(crate) fn moeut_list_free(list: *mut RawList);
    pub(crate) fn moeut_list_len(list: *const RawList) -> usize;
    pub(crate) fn moeut_list_push(list: *mut RawList, tensor: *const C_tensor) -> *mut c_char;
    pub(crate) fn moeut_list_get(
        list: *const RawList,
        index: usize,
        tensor: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn moeut_error_free(error: *mut c_char);
    pub(crate) fn moeut_error_set(error: *mut RawString, text: *const c_char, length: usize);

    pub(crate) fn moeut_function_apply(
        callbacks: Callbacks,
        user: *mut c_void,
        inputs: *const RawList,
        outputs: *mut RawList,
    ) -> *mut c_char;
    pub(crate) fn moeut_context_save(call: *mut RawCall, tensors: *const RawList) -> *mut c_char;
    pub(crate) fn moeut_context_saved(call: *const RawCall, tensors: *mut RawList) -> *mut c_char;
    pub(crate) fn moeut_context_needs_input_grad(
        call: *const RawCall,
        index: usize,
        needs_grad: *mut bool,
    ) -> *mut c_char;

    pub(crate) fn moeut_recompute_begin(
        again: AgainCallbacks,
        user: *mut c_void,
        saving: *mut *mut RawSaving,
    ) -> *mut c_char;
    pub(crate) fn moeut_saving_end(saving: *mut RawSaving);
    pub(crate) fn moeut_frugal_begin(is_frugal: bool, saving: *mut *mut RawSaving) -> *mut c_char;
    pub(crate) fn moeut_count_begin(
        ledger: *mut *mut RawLedger,
        saving: *mut *mut RawSaving,
    ) -> *mut c_char;
    pub(crate) fn moeut_count_bytes(ledger: *const RawLedger) -> usize;
    pub(crate) fn moeut_count_free(ledger: *mut RawLedger);
    pub(crate) fn moeut_frugal_give_away(
        tensor: *const C_tensor,
        from: *const RawList,
        again: AgainCallbacks,
        user: *mut c_void,
    ) -> *mut c_char;

    pub(crate) fn moeut_fused_adam(
        params: *const RawList,
        grads: *const RawList,
        exp_avgs: *const RawList,
        exp_avg_sqs: *const RawList,
        steps: *const RawList,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        is_decoupled: bool,
        skip: *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn moeut_fused_sgd(
        params: *const RawList,
        grads: *const RawList,
        momentum_buffers: *const RawList,
        lr: f64,
        momentum: f64,
        weight_decay: f64,
        skip: *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn moeut_fused_adagrad(
        params: *const RawList,
        grads: *const RawList,
        sums: *const RawList,
        steps: *const RawList,
        lr: f64,
        weight_decay: f64,
        eps: f64,
        skip: *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn moeut_unscale(
        tensors: *const RawList,
        inverse_scale: *const C_tensor,
        found: *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn moeut_clear_grads(tensors: *const RawList) -> *mut c_char;
    pub(crate) fn moeut_norms(tensors: *const RawList, norms: *mut RawList) -> *mut c_char;
    pub(crate) fn moeut_set_grads(tensors: *const RawList, grads: *const RawList) -> *mut c_char;
    pub(crate) fn moeut_scale(tensors: *const RawList, factor: *const C_tensor) -> *mut c_char;
    pub(crate) fn moeut_clip_grad_norm(
        tensors: *const RawList,
        max_norm: f64,
        norms: *mut RawList,
    ) -> *mut c_char;

    pub(crate) fn moeut_readback_start(
        tensors: *const RawList,
        readback: *mut *mut RawReadback,
    ) -> *mut c_char;
    pub(crate) fn moeut_readback_len(readback: *const RawReadback) -> usize;
    pub(crate) fn moeut_readback_wait(
        readback: *const RawReadback,
        values: *mut f64,
    ) -> *mut c_char;
    pub(crate) fn moeut_readback_free(readback: *mut RawReadback);

    pub(crate) fn moeut_rng_state(device: c_int, state: *mut RawList) -> *mut c_char;
    pub(crate) fn moeut_rng_set_state(device: c_int, state: *const C_tensor) -> *mut c_char;
    pub(crate) fn moeut_rng_seed(seed: u64) -> *mut c_char;
    pub(crate) fn moeut_autocast_enter(
        is_cuda: bool,
        is_enabled: bool,
        is_half: bool,
        was_enabled: *mut bool,
        previous_dtype: *mut c_int,
    ) -> *mut c_char;
    pub(crate) fn moeut_autocast_leave(
        is_cuda: bool,
        was_enabled: bool,
        previous_dtype: c_int,
    ) -> *mut c_char;
    pub(crate) fn moeut_cuda_load(has_device: *mut bool) -> *mut c_char;
    pub(crate) fn moeut_cuda_memory(device: c_int, memory: *mut RawMemory) -> *mut c_char;
    pub(crate) fn moeut_cuda_reset_peak(device: c_int) -> *mut c_char;
    pub(crate) fn moeut_cuda_stream(device: c_int, stream: *mut *mut c_void) -> *mut c_char;
    pub(crate) fn moeut_cuda_upload(
        tensor: *const C_tensor,
        device: c_int,
        copy: *mut RawList,
    ) -> *mut c_char;
    pub(crate) fn moeut_cuda_describe(
        device: c_int,
        name: *mut c_char,
        name_length: c_int,
        major: *mut c_int,
        minor: *mut c_int,
    ) -> *mut c_char;
    pub(crate) fn moeut_relu_linear(
        x: *const C_tensor,
        w: *const C_tensor,
        b: *const C_tensor,
        result: *mut RawList,
    ) -> *mut c_char;
    pub(crate) fn moeut_graph_begin(
        device: c_int,
        neighbor: *const RawGraph,
        graph: *mut *mut RawGraph,
    ) -> *mut c_char;
    pub(crate) fn moeut_graph_end(graph: *mut RawGraph) -> *mut c_char;
    pub(crate) fn moeut_graph_replay(graph: *mut RawGraph) -> *mut c_char;
    pub(crate) fn moeut_graph_free(graph: *mut RawGraph);
    pub(crate) fn moeut_profiler_prepare(with_cuda: bool) -> *mut c_char;
    pub(crate) fn moeut_profiler_start(with_cuda: bool) -> *mut c_char;
    pub(crate) fn moeut_profiler_stop(path: *const c_char) -> *mut c_char;
    pub(crate) fn moeut_span_begin(
        name: *const c_char,
        length: usize,
        span: *mut *mut RawSpan,
    ) -> *mut c_char;
    pub(crate) fn moeut_span_end(span: *mut RawSpan);
    pub(crate) fn moeut_detect_anomaly(is_on: bool) -> *mut c_char;
    pub(crate) fn moeut_header_version() -> *const c_char;
    pub(crate) fn moeut_build_settings() -> *mut c_char;
}

/// Turns what a shim function returned into a `Result`.
///
/// # Safety
/// `error` was just returned by a function of the shim and nobody else keeps it.
pub(crate) unsafe fn check(error: *mut c_char) -> Result<(), TchError> {
    // SAFETY: the caller passes an error of the shim.
    match unsafe { take_text(error) } {
        None => Ok(()),
        Some(text) => Err(TchError::Torch(text)),
    }
}

/// Copies and frees a text of the shim; `None` for null.
///
/// # Safety
/// `text` is null or was made by the shim, and nobody else keeps it.
pub(crate) unsafe fn take_text(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the shim's texts come from `strdup`, so they end in a zero byte and live until freed below.
    let owned = unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: see above; `owned` is a copy.
    unsafe { moeut_error_free(text) };
    Some(owned)
}
