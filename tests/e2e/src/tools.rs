//! The Python programs with which tests read what the host writes.

use crate::build::repo;
use std::path::PathBuf;

/// The Python of `cargo xtask tools`, which has TensorBoard and Weights & Biases; its `bin` has their programs.
///
/// Where it is absent a test is skipped and says so, but never one that decides whether a change is good.
pub fn python() -> Option<PathBuf> {
    let python = repo().join(".tools/venv/bin/python");
    if python.exists() {
        return Some(python);
    }
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_ci, "`{}` is missing", python.display());
    skip("no Python tools; type `cargo xtask tools`");
    None
}

#[expect(clippy::print_stderr, reason = "the only voice of a test")]
fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
