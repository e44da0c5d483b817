//! Profiles of a thread: libtorch's operators and CUDA kernels, and spans of our own among them, in Chrome's trace
//! format.
//!
//! Operators of backward passes are recorded on whatever thread libtorch runs them; other threads are not recorded.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ffi::CString;
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tch::{Device, TchError};

use crate::determinism::set_default;
use crate::ffi::{self, RawSpan, check};

/// Above all levels of the recorder's own messages.
const SILENCE: (&str, &str) = ("KINETO_LOG_LEVEL", "5");

/// Keeps the recorder from complaining on stderr that there is no GPU. **Call it while the program starts**, and only
/// where there is none: a GPU that cannot be recorded is worth a complaint.
pub fn expect_no_gpu() {
    set_default(SILENCE);
}

/// Makes ready for [`Profiler::start`]. On a GPU this takes long the first time, so it belongs some work ahead of what
/// is to be measured.
///
/// # Errors
/// If libtorch was built without its profiler.
pub fn prepare(device: Device) -> Result<(), TchError> {
    // SAFETY: sets up libtorch's profiler, which is one for the process and locks for itself.
    unsafe { check(ffi::moeut_profiler_prepare(device.is_cuda())) }
}

/// A recording of this thread. Dropped without [`Profiler::stop`] it is thrown away.
#[derive(Debug)]
#[must_use = "the recording ends when this is dropped"]
pub struct Profiler {
    is_on: bool,
    _of_this_thread: PhantomData<*const ()>,
}

impl Profiler {
    /// Records from now on, on CUDA devices, too, if `device` is one.
    ///
    /// # Errors
    /// If [`prepare`] was not called, or another recording is going on.
    pub fn start(device: Device) -> Result<Self, TchError> {
        // SAFETY: changes libtorch's state of this thread only.
        unsafe { check(ffi::moeut_profiler_start(device.is_cuda())) }?;
        Ok(Self {
            is_on: true,
            _of_this_thread: PhantomData,
        })
    }

    /// Ends the recording and writes it to a file, as JSON. All spans must have ended; on a GPU, wait for it before.
    ///
    /// # Errors
    /// If `path` cannot be written; libtorch may say so on stderr only, so look whether the file is there.
    pub fn stop(mut self, path: &Path) -> Result<(), TchError> {
        let text = CString::new(path.as_os_str().as_bytes())
            .map_err(|_| TchError::FileFormat(format!("`{}` has a zero byte", path.display())))?;
        self.is_on = false;
        // SAFETY: the text lives until the call returns. The type is not `Send`: this is the thread that started.
        unsafe { check(ffi::moeut_profiler_stop(text.as_ptr())) }
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        if self.is_on {
            // SAFETY: as in `stop`; null stands for no file. There is nobody to tell about an error.
            let _thrown_away = unsafe { check(ffi::moeut_profiler_stop(std::ptr::null())) };
        }
    }
}

/// A named piece of this thread's time in a [`Profiler`]'s recording. Without one it costs a few nanoseconds. Spans
/// nest and must end in reverse order, which Rust's scopes do by themselves.
#[derive(Debug)]
#[must_use = "the span ends when this is dropped"]
pub struct Span(*mut RawSpan);

impl Span {
    /// Begins.
    pub fn begin(name: &str) -> Self {
        let mut span = std::ptr::null_mut();
        // SAFETY: the shim copies the name, whose length it gets, and writes the pointer.
        let begun = unsafe {
            check(ffi::moeut_span_begin(
                name.as_ptr().cast(),
                name.len(),
                &raw mut span,
            ))
        };
        // A span that cannot be recorded is missing in a picture, and no more.
        Self(if begun.is_ok() {
            span
        } else {
            std::ptr::null_mut()
        })
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        // SAFETY: made by `begin` on this thread, since the type is not `Send`, and given up here. Null is allowed.
        unsafe { ffi::moeut_span_end(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use tch::{Kind, Tensor};

    #[test]
    fn a_recording_has_our_spans_with_the_operators_in_them() {
        let ignored = Span::begin("before anything is recorded");
        drop(ignored);
        let work = || {
            let _outer = Span::begin("outer");
            let a = Tensor::ones([8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let product = {
                let _inner = Span::begin("inner");
                a.mm(&a)
            };
            let _backward = Span::begin("backward");
            product.sum(Kind::Float).backward();
        };
        let path = std::env::temp_dir().join(format!("profiler-{}.json", std::process::id()));
        prepare(Device::Cpu).unwrap();
        // One that is thrown away leaves nothing behind, also not a profiler that is on.
        drop(Profiler::start(Device::Cpu).unwrap());
        prepare(Device::Cpu).unwrap();
        let profiler = Profiler::start(Device::Cpu).unwrap();
        work();
        profiler.stop(&path).unwrap();
        work();
        let trace: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        std::fs::remove_file(&path).unwrap();

        let found = |name: &str| -> Vec<(f64, f64)> {
            let events = trace["traceEvents"].as_array().unwrap().iter();
            events
                .filter(|event| event["ph"] == "X" && event["name"] == name)
                .map(|event| {
                    let start = event["ts"].as_f64().unwrap();
                    (start, start + event["dur"].as_f64().unwrap())
                })
                .collect()
        };
        let is_in = |a: (f64, f64), b: (f64, f64)| b.0 <= a.0 && a.1 <= b.1;
        let [outer] = found("outer")[..] else {
            panic!("one recorded call: {:?}", found("outer"));
        };
        let (inner, backward) = (found("inner")[0], found("backward")[0]);
        assert!(is_in(inner, outer) && is_in(backward, outer) && inner.1 <= backward.0);
        let products = found("aten::mm");
        assert_eq!(products.len(), 3, "one forward, two backward");
        let within = |span| products.iter().filter(|&&p| is_in(p, span)).count();
        assert_eq!((within(inner), within(backward)), (1, 2));
        assert_eq!(found("before anything is recorded"), []);
    }

    #[test]
    fn without_a_recording_a_span_is_nothing() {
        assert!(Span::begin("nobody records").0.is_null());
    }
}
