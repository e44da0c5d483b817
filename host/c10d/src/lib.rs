//! Collectives between processes, by libtorch's own engine: PyTorch's c10d with Gloo for CPUs, NCCL for GPUs and the TCP
//! store through which ranks find each other. Nothing here is home-made below that: who knows `torch.distributed`
//! knows its time-outs, its environment and its failures.
//!
//! A rank makes a [`Store`] with the others, then a [`Group`], then calls the same operations in the same order as
//! all others. An operation starts at once and returns a [`Work`]; [`GradHooks`] says when a gradient is complete, so
//! that its operation can start while backward still runs.
//!
//! What launches the processes, which ranks there are, and what to do after a failure is the caller's.

mod address;
mod environment;
mod error;
mod ffi;
mod group;
mod hooks;
mod store;
mod work;

pub use environment::prepare_environment;
pub use error::Error;
pub use group::{Backend, Group, Reduction};
pub use hooks::GradHooks;
pub use store::Store;
pub use work::Work;
