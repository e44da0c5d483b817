//! A harness that runs models in their real plugin libraries against recorded runs of the Python reference.
//!
//! It is a small host: it opens plugins, hands kernels to models and trains. It does not use `moeut-host`, so that a
//! difference can only come from model, kernel or optimizer step. The tests of this package and `cargo xtask fixtures`
//! share it.

pub mod check;
pub mod error_of;
pub mod errors;
pub mod fixture;
pub mod placement;
pub mod plugins;
pub mod replay;
pub mod subject;
pub mod tiny;
mod untied;

/// Errors of all kinds; a test only shows them.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
