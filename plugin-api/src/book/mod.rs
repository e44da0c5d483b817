//! The book for plugin authors. Its code is compiled and run as tests.
//!
//! 1. [`concepts`]: what a plugin is, and what the host does with it
//! 2. [`lifecycle`]: which call comes when, on which thread, and what may go wrong
//! 3. [`abi`]: what holds between versions, compilers and settings, and how to ship a library
//! 4. [`cookbook`]: a new task in five minutes, a dataset, a model, a kernel with its backward pass

#[doc = include_str!("concepts.md")]
pub mod concepts {}

#[doc = include_str!("lifecycle.md")]
pub mod lifecycle {}

#[doc = include_str!("abi.md")]
pub mod abi {}

#[doc = include_str!("cookbook.md")]
pub mod cookbook {}
