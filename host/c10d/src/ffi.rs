//! The C face of the shim (`cpp/*.cpp`), declared once. Nothing here is safe or public.

#![expect(
    unsafe_code,
    reason = "declares the shim's C functions and reads their errors"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::time::Duration;

use torch_sys::C_tensor;

use crate::Error;

/// A connection to the key-value store.
#[repr(C)]
pub(crate) struct RawStore {
    _private: [u8; 0],
}

/// A process group on one device.
#[repr(C)]
pub(crate) struct RawGroup {
    _private: [u8; 0],
}

/// The operations that one call started.
#[repr(C)]
pub(crate) struct RawWork {
    _private: [u8; 0],
}

/// The nodes that accumulate gradients and carry our hooks.
#[repr(C)]
pub(crate) struct RawHooks {
    _private: [u8; 0],
}

/// `std::string` that receives the error of a callback.
#[repr(C)]
pub(crate) struct RawString {
    _private: [u8; 0],
}

/// Bytes that are lent for the time of a call.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawText<'bytes> {
    data: *const c_char,
    length: usize,
    _lent: PhantomData<&'bytes [u8]>,
}

impl<'bytes> RawText<'bytes> {
    pub(crate) fn new(bytes: &'bytes [u8]) -> Self {
        Self {
            data: bytes.as_ptr().cast(),
            length: bytes.len(),
            _lent: PhantomData,
        }
    }
}

/// The Rust side of hooks.
#[repr(C)]
pub(crate) struct RawCallback {
    pub(crate) call:
        unsafe extern "C" fn(user: *mut c_void, index: usize, error: *mut RawString) -> bool,
    pub(crate) drop: unsafe extern "C" fn(user: *mut c_void),
}

// Functions that return `*mut c_char` return an error text or null; `check` reads and frees it.
unsafe extern "C" {
    fn moeut_c10d_text_free(text: *mut c_char);
    pub(crate) fn moeut_c10d_error_set(error: *mut RawString, text: *const c_char, length: usize);

    pub(crate) fn moeut_c10d_store_tcp(
        host: RawText,
        port: u16,
        is_server: bool,
        n_ranks: *const u64,
        timeout_ms: u64,
        store: *mut *mut RawStore,
        bound_port: *mut u16,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_free(store: *mut RawStore);
    pub(crate) fn moeut_c10d_store_set(
        store: *const RawStore,
        key: RawText,
        value: RawText,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_get(
        store: *const RawStore,
        key: RawText,
        value: *mut *mut c_char,
        length: *mut usize,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_clone(
        store: *const RawStore,
        clone: *mut *mut RawStore,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_wait(
        store: *const RawStore,
        keys: *const RawText,
        n_keys: usize,
        timeout_ms: u64,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_check(
        store: *const RawStore,
        keys: *const RawText,
        n_keys: usize,
        has_all: *mut bool,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_store_add(
        store: *const RawStore,
        key: RawText,
        amount: i64,
        sum: *mut i64,
    ) -> *mut c_char;

    pub(crate) fn moeut_c10d_gloo_new(
        store: *const RawStore,
        prefix: RawText,
        rank: c_int,
        n_ranks: c_int,
        timeout_ms: u64,
        interfaces: *const RawText,
        n_interfaces: usize,
        address: RawText,
        group: *mut *mut RawGroup,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_nccl_new(
        store: *const RawStore,
        prefix: RawText,
        rank: c_int,
        n_ranks: c_int,
        timeout_ms: u64,
        device: c_int,
        group: *mut *mut RawGroup,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_group_free(group: *mut RawGroup);
    pub(crate) fn moeut_c10d_group_abort(group: *mut RawGroup) -> *mut c_char;
    pub(crate) fn moeut_c10d_group_has_failed(
        group: *mut RawGroup,
        has_failed: *mut bool,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_all_reduce(
        group: *mut RawGroup,
        tensors: *const *const C_tensor,
        n_tensors: usize,
        op: c_int,
        work: *mut *mut RawWork,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_broadcast(
        group: *mut RawGroup,
        tensors: *const *const C_tensor,
        n_tensors: usize,
        root: c_int,
        work: *mut *mut RawWork,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_all_gather(
        group: *mut RawGroup,
        into: *const C_tensor,
        from: *const C_tensor,
        work: *mut *mut RawWork,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_reduce_scatter(
        group: *mut RawGroup,
        into: *const C_tensor,
        from: *const C_tensor,
        work: *mut *mut RawWork,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_barrier(group: *mut RawGroup, work: *mut *mut RawWork) -> *mut c_char;
    pub(crate) fn moeut_c10d_work_wait(work: *mut RawWork) -> *mut c_char;
    pub(crate) fn moeut_c10d_work_is_done(work: *mut RawWork, is_done: *mut bool) -> *mut c_char;
    pub(crate) fn moeut_c10d_work_free(work: *mut RawWork);

    pub(crate) fn moeut_c10d_hooks_new(
        params: *const *const C_tensor,
        n_params: usize,
        callback: RawCallback,
        user: *mut c_void,
        hooks: *mut *mut RawHooks,
    ) -> *mut c_char;
    pub(crate) fn moeut_c10d_hooks_free(hooks: *mut RawHooks);
}

/// Turns what a shim function returned into a `Result`.
///
/// # Safety
/// `error` was just returned by a function of the shim and nobody else keeps it.
pub(crate) unsafe fn check(error: *mut c_char) -> Result<(), Error> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the shim's texts come from `strdup`, so they end in a zero byte and live until freed below.
    let text = unsafe { CStr::from_ptr(error) };
    let told = Error::new(&text.to_string_lossy());
    // SAFETY: see above; `told` is a copy.
    unsafe { moeut_c10d_text_free(error) };
    Err(told)
}

/// Copies and frees the bytes that the shim returned.
///
/// # Safety
/// The shim just allocated `length` bytes at `bytes`, and nobody else keeps them.
pub(crate) unsafe fn take_bytes(bytes: *mut c_char, length: usize) -> Vec<u8> {
    // SAFETY: as the caller promises; the shim allocates at least one byte, so `bytes` is not null.
    let owned = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), length) }.to_vec();
    // SAFETY: as the caller promises; `owned` is a copy.
    unsafe { moeut_c10d_text_free(bytes) };
    owned
}

/// Whole milliseconds, which the shim brings into the range that c10d can count in.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
