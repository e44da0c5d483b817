//! Which libtorch this was compiled against, and which one runs.

#![expect(unsafe_code, reason = "reads texts of the C++ shim")]

use std::ffi::CStr;

use crate::ffi;

/// The libtorch that plugins are built for, as their manifests say it.
pub const LIBTORCH_VERSION: &str = "2.11.0";

/// The version of the libtorch in this process, without a suffix such as `+cu130`; `None` if it does not tell.
pub fn runtime_version() -> Option<String> {
    // SAFETY: the shim returns null or a text that is ours.
    let settings = unsafe { ffi::take_text(ffi::moeut_build_settings()) }?;
    let (_, version) = settings.split_once("TORCH_VERSION=")?;
    let end = version
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(version.len());
    Some(version[..end].to_owned())
}

/// The version in the headers that the shim was compiled with.
pub fn header_version() -> String {
    // SAFETY: a string literal of the shim.
    let text = unsafe { CStr::from_ptr(ffi::moeut_header_version()) };
    text.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_headers_and_library_agree() {
        assert_eq!(header_version(), LIBTORCH_VERSION);
        assert_eq!(runtime_version().as_deref(), Some(LIBTORCH_VERSION));
    }
}
