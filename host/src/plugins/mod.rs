//! Finding, checking, opening and choosing plugins.
//!
//! Data flow: [`folders`] says where to look, [`inspect`] reads a file's manifest without running it, [`library`]
//! opens what passed and [`lock`] lets through, both under [`screening`]; [`registry`] resolves names to components.
//! [`listing`] shows them, from what is [`known`] of files that were opened before. [`verify`] is inspection in small
//! steps, [`needs`] what a file asks of other libraries, [`package`] how plugins travel. One bad file never hides the
//! good ones.

pub mod folders;
pub mod inspect;
pub mod known;
pub mod library;
pub mod listing;
pub mod lock;
pub mod needs;
pub mod package;
pub mod registry;
pub mod screening;
pub mod verify;

pub use folders::{Folder, search_path};
pub use inspect::{Manifest, Refusal};
pub use lock::{Gate, Lock, Policy};
pub use registry::{Component, Registry};
pub use screening::Problem;
