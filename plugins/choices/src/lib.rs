//! Choice datasets: from published files to questions. A library, not a plugin: each set is a plugin of its own that
//! says which files it is made of, and how a line becomes a question.
//!
//! Reading order is the way of the data: [`published`] finds files or downloads them, over [`archive`] if they are in
//! one; [`file`](mod@file) gives their lines, [`questions`] is what the host reads. [`python`] has the few operations of
//! Python that texts must be built with to be those of the reference, [`error`] is what a user hears.

pub mod archive;
pub mod error;
pub mod file;
pub mod published;
pub mod python;
pub mod questions;
pub mod testing;

pub use error::ChoicesError;
pub use file::{Line, SetFile};
pub use moeut_text::{Progress, Watch};
pub use published::{DATA_DIR, DataDir, Published};
pub use questions::Questions;
