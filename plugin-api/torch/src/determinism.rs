//! Settings of the process that decide whether two runs on a GPU give the same bits, and in which order GPUs count.
//!
//! Both libraries of NVIDIA read variables of the environment when they are first used, and have no other setting.

#![expect(
    unsafe_code,
    reason = "calls into the C++ shim, and sets variables of the environment"
)]

use std::ffi::c_char;

use tch::TchError;

use crate::ffi::check;

/// cuBLAS then works in buffers of its own, eight of 4 MiB for each stream: the setting that NVIDIA documents for
/// results that repeat.
const CUBLAS_WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// CUDA counts the fastest GPU first by default; by bus is how NVIDIA's management library counts.
const DEVICE_ORDER: (&str, &str) = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID");

unsafe extern "C" {
    fn moeut_deterministic(is_on: bool) -> *mut c_char;
    fn moeut_is_deterministic() -> bool;
}

/// Lets libtorch use only operations that repeat their results; one that has no such version becomes an error that
/// names it. Call it before the first use of a GPU.
///
/// # Errors
/// If libtorch refuses.
pub fn set(is_on: bool) -> Result<(), TchError> {
    if is_on {
        set_default(CUBLAS_WORKSPACE);
    }
    // SAFETY: the shim sets two flags of libtorch.
    unsafe { check(moeut_deterministic(is_on)) }
}

/// Whether [`set`] is on.
pub fn is_set() -> bool {
    // SAFETY: the shim reads a flag of libtorch.
    unsafe { moeut_is_deterministic() }
}

/// Counts GPUs by their places on the bus, unless the user wants another order. Call it before the first use of CUDA.
pub fn order_devices_by_bus() {
    set_default(DEVICE_ORDER);
}

/// Lets this process see one GPU only, as number 0: the one with this place among those that the user lets it see. With
/// a choice of one nothing changes; if there is no such place, it sees none. Call it before the first use of CUDA.
pub fn see_only(place: usize) {
    const NAME: &str = "CUDA_VISIBLE_DEVICES";
    let visible = std::env::var(NAME).unwrap_or_default();
    let choice = match visible.split(',').collect::<Vec<_>>()[..] {
        [""] => place.to_string(),
        [_] => return,
        ref all => all.get(place).map_or("", |gpu| gpu.trim()).to_owned(),
    };
    // SAFETY: as in `set_default`.
    unsafe { std::env::set_var(NAME, choice) };
}

/// Sets a variable of the environment that is not set. While the program starts only.
pub(crate) fn set_default((name, value): (&str, &str)) {
    if std::env::var_os(name).is_none() {
        // SAFETY: called while the program starts, when no other thread of ours reads the environment; `std` guards
        // its own readers by a lock.
        unsafe { std::env::set_var(name, value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_setting_reaches_libtorch() {
        set(true).unwrap();
        assert!(is_set());
        assert!(std::env::var_os(CUBLAS_WORKSPACE.0).is_some());
        set(false).unwrap();
        assert!(!is_set());
    }
}
