//! What the engine reads from the environment, once, and has to be told in time.

#![expect(unsafe_code, reason = "sets variables while there is one thread")]

use std::{env, fs};

use crate::Error;

/// Variable and value: set unless the user did.
///
/// After a time-out or a failure of NCCL, c10d's watchdog ends the process with an abort and a C++ stack by default.
/// With 2 it ends the communication alone: the stream runs on, and the host reports the failure its own way.
const DEFAULTS: [(&str, &str); 1] = [("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")];

/// Sets the engine's variables for a program that handles failures itself. Call it at the start of `main`: the
/// environment may be written only while the process has one thread. What the user has set stays.
///
/// # Errors
/// If the process has more threads already.
pub fn prepare_environment() -> Result<(), Error> {
    let n_threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if n_threads != 1 {
        let message = format!("the environment cannot be set with {n_threads} threads running");
        return Err(Error::new(&message));
    }
    for (name, value) in DEFAULTS {
        if env::var_os(name).is_none() {
            // SAFETY: this is the only thread, so nobody reads the environment at the same time.
            unsafe { env::set_var(name, value) };
        }
    }
    Ok(())
}
