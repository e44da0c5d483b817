//! What the process says when nobody catches a C++ exception. The C++ library would print its type and dump core.

#![expect(unsafe_code, reason = "hands a function to the C++ shim")]

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

unsafe extern "C" {
    fn moeut_on_uncaught(say: unsafe extern "C" fn(what: *const c_char));
}

static SAY: OnceLock<fn(&str)> = OnceLock::new();

/// Lets `say` have the text of an exception that nobody catches, in the thread that threw it. The process then ends at
/// once, with exit code 2. The first call counts.
pub fn on_uncaught(say: fn(&str)) {
    SAY.get_or_init(|| say);
    // SAFETY: `hand_on` is there as long as the process, and may be called from any thread.
    unsafe { moeut_on_uncaught(hand_on) };
}

unsafe extern "C" fn hand_on(what: *const c_char) {
    // SAFETY: the shim hands over the text of an exception that lives until this returns.
    let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
    if let Some(say) = SAY.get() {
        // The process ends in either case.
        let _ = std::panic::catch_unwind(|| say(&what));
    }
}
