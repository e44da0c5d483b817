//! Operations that have been started.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;
use crate::ffi::{self, RawWork, check};

/// An operation under way. Its tensors belong to the engine until [`wait`](Self::wait) has returned: reading them before
/// yields anything, writing them changes what travels. Dropping it does not stop the operation.
#[derive(Debug)]
#[must_use = "until it has been waited for, the tensors hold anything"]
pub struct Work {
    raw: *mut RawWork,
    is_aborted: Arc<AtomicBool>,
}

// SAFETY: c10d's work guards its state by a mutex, its count of references is atomic, and it may be waited for from a
// thread other than the one that started it.
unsafe impl Send for Work {}

impl Work {
    /// `raw` was just made by the shim and is freed with this object.
    pub(crate) fn new(raw: *mut RawWork, is_aborted: Arc<AtomicBool>) -> Self {
        Self { raw, is_aborted }
    }

    /// Waits until the tensors hold the result. On NCCL the current stream waits for the GPUs and the host goes on; a
    /// failure there is told by [`Group::check`](crate::Group::check).
    ///
    /// # Errors
    /// If a rank is gone, did not answer within the group's time-out or called another operation, or the group was
    /// aborted.
    pub fn wait(self) -> Result<(), Error> {
        // SAFETY: `raw` is alive until `self` drops.
        let waited = unsafe { check(ffi::moeut_c10d_work_wait(self.raw)) };
        if self.is_aborted.load(Ordering::SeqCst) {
            return Err(aborted());
        }
        waited
    }

    /// Whether the operation has ended, well or not. Does not wait.
    pub fn is_done(&self) -> bool {
        let mut is_done = false;
        // SAFETY: `raw` is alive until `self` drops.
        let asked = unsafe { check(ffi::moeut_c10d_work_is_done(self.raw, &raw mut is_done)) };
        // An operation that cannot be asked has failed: `wait` will say how.
        is_done || asked.is_err()
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once.
        unsafe { ffi::moeut_c10d_work_free(self.raw) };
    }
}

pub(crate) fn aborted() -> Error {
    Error::new("the group was aborted")
}
