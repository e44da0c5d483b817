//! Finding, checking, opening and choosing plugins.
//!
//! Data flow: [`folders`] says where to look, [`inspect`] reads a file's manifest without running it, [`library`]
//! opens what passed, [`registry`] resolves names to components. One bad file never hides the good ones.

pub mod folders;
pub mod inspect;
pub mod library;
pub mod registry;

pub use folders::{Folder, search_path};
pub use inspect::{Manifest, Refusal};
pub use registry::{Component, Problem, Registry};
