//! Matrix products in fp32 on tensor cores, as a scope: operands are rounded to TF32 (10 bits of mantissa instead of
//! 23), sums stay in fp32.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ffi::c_char;

use tch::TchError;

use crate::ffi::check;

unsafe extern "C" {
    fn moeut_tf32(is_on: bool, was_on: *mut bool) -> *mut c_char;
}

/// While it lives, cuBLAS may use TF32; dropped, it restores what was set before. The setting is the whole process's,
/// so products that other threads queue meanwhile may be rounded, too. The CPU computes as ever.
#[derive(Debug)]
#[must_use = "the scope ends when the guard is dropped"]
pub struct Tf32 {
    was_on: bool,
}

impl Tf32 {
    /// Begins the scope.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn new() -> Result<Self, TchError> {
        Ok(Self {
            was_on: switch(true)?,
        })
    }
}

impl Drop for Tf32 {
    fn drop(&mut self) {
        // Restoring what libtorch gave out does not fail.
        let _restored = switch(self.was_on);
    }
}

/// What was set before.
fn switch(is_on: bool) -> Result<bool, TchError> {
    let mut was_on = false;
    // SAFETY: the shim writes one flag.
    unsafe { check(moeut_tf32(is_on, &raw mut was_on)) }?;
    Ok(was_on)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_nest_and_restore() {
        let before = switch(false).unwrap();
        {
            let _outer = Tf32::new().unwrap();
            drop(Tf32::new().unwrap());
            assert!(switch(true).unwrap());
        }
        assert!(!switch(before).unwrap());
    }
}
