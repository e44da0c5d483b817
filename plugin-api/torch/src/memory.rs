//! How the C library hands out the large blocks that CPU tensors live in. CUDA memory is [`crate::cuda`]'s matter.

#![expect(unsafe_code, reason = "sets two options of the C library's allocator")]

use std::ffi::c_int;

/// `mallopt`: free memory at the heap's top beyond which it goes back to the system.
const M_TRIM_THRESHOLD: c_int = -1;
/// `mallopt`: how many blocks may be mappings of their own.
const M_MMAP_MAX: c_int = -4;

unsafe extern "C" {
    fn mallopt(option: c_int, value: c_int) -> c_int;
}

/// Keeps freed blocks in the process instead of giving each back to the system at once.
///
/// A training step allocates the same tensors again and again; by default glibc maps every large one anew, and the
/// kernel clears its pages each time. On 2 cores with other work on them, 40 steps of the demo took 22.0 s without and
/// 15.7 s with the same options set from outside, system time 8.5 s and 0.5 s (one run each). The price is that the process keeps its peak. Call it once, before tensors are made.
///
/// Returns whether the C library took both options.
pub fn keep_freed_blocks() -> bool {
    // SAFETY: `mallopt` is thread-safe, takes two integers and changes nothing of what is allocated.
    unsafe { mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, c_int::MAX) == 1 }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_allocator_takes_the_options() {
        assert!(super::keep_freed_blocks());
    }
}
