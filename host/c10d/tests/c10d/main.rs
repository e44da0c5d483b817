//! The engine between ranks of this machine: threads of one process, and processes. Loopback, CPU.

mod collectives;
mod failures;
mod hooks;
mod processes;
mod store;
mod support;
