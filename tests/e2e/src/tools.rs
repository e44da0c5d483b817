//! The Python programs with which tests read what the host writes.

use crate::build::repo;
use std::path::PathBuf;

/// The Python of `cargo xtask tools`, which has TensorBoard and Weights & Biases; its `bin` has their programs.
///
/// Where it is absent a test is skipped and says so, but never one that decides whether a change is good.
pub fn python() -> Option<PathBuf> {
    tool(".tools/venv/bin/python", "cargo xtask tools")
}

/// PyTorch's launcher, of `cargo xtask tools --torchrun`. Skipped as above.
pub fn torchrun() -> Option<PathBuf> {
    tool(
        ".tools/torchrun/bin/torchrun",
        "cargo xtask tools --torchrun",
    )
}

fn tool(path: &str, fix: &str) -> Option<PathBuf> {
    let program = repo().join(path);
    if program.exists() {
        return Some(program);
    }
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_ci, "`{}` is missing", program.display());
    skip(&format!(
        "`{}` is not there; type `{fix}`",
        program.display()
    ));
    None
}

/// Says that a test does not take place, and why.
#[expect(clippy::print_stderr, reason = "the only voice of a test")]
pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
