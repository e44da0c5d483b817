//! The engine between ranks of this machine: threads of one process, and processes. Loopback, CPU.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where it is allowed")]

mod collectives;
mod failures;
mod hooks;
mod processes;
mod store;
mod support;
