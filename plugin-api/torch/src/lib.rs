//! What `tch` lacks of libtorch, behind safe functions: custom autograd functions, recomputed activations, fused
//! optimizer steps, gradient clipping without a host sync, random generator state, autocast, CUDA at run time and its
//! graphs, a linear layer that ends with a `relu`, and tensors as plugin handles.
//!
//! With the SentencePiece binding and `host/c10d`, this is the only C++ of the project. The crate is copied into every library that
//! uses it, so it holds no state but what a thread does at the moment: whatever must exist once per process lives in
//! libtorch or in the host. No C++ exception and no panic crosses from one language into the other; both arrive as
//! errors.
//!
//! It is not a second `tch`: what `tch` offers is used from there.

mod convert;
mod ffi;
mod list;
mod saving;

pub mod anomaly;
pub mod autocast;
pub mod cuda;
pub mod determinism;
pub mod error;
pub mod frugal;
pub mod function;
pub mod graph;
pub mod grouped;
pub mod handle;
pub mod memory;
pub mod optim;
pub mod padding;
pub mod profiler;
pub mod readback;
pub mod recompute;
pub mod relu_linear;
pub mod rng;
pub mod testing;
pub mod tf32;
pub mod uncaught;
pub mod version;

pub use autocast::Autocast;
pub use convert::{device, dtype, kind};
pub use error::{OrPluginError, one_line, plugin_error};
pub use function::{Context, Function, FunctionError, apply};
pub use handle::{IntoHandle, IntoTensor};
pub use version::{LIBTORCH_VERSION, runtime_version};
