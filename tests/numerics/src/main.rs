//! `moeut-numerics <folder> [flags]`: every recorded run of a folder, with every kernel, on one device.
//!
//! Developers start it with `cargo xtask fixtures`; the test `fixtures` does the same with the shared data. With
//! `--plugins <folder>` it needs neither cargo nor the sources: it runs where it was copied to, libtorch permitting.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

mod cli;

use moeut_numerics::check::check;
use moeut_numerics::{Result, fixture, placement, plugins};
use moeut_plugin_api::PluginError;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            match error.downcast_ref() {
                Some(PluginError { what, why, fix }) => {
                    eprintln!("Error: {what}\n  why: {why}\n  fix: {fix}");
                }
                None => eprintln!("Error: {error}"),
            }
            ExitCode::from(2)
        }
    }
}

/// Whether every run agrees with the reference.
fn run(args: &[String]) -> Result<bool> {
    let args = cli::parse(args)?;
    let fixtures = fixture::in_folder(&args.folder)?;
    if let Some(folder) = args.plugins {
        plugins::open_from(folder);
    }
    placement::open(args.device)?;
    let kernel = args.kernel.as_deref();
    let verdict = check(&fixtures, kernel, args.device, &args.dtypes, |line| {
        println!("{line}");
    })?;
    println!(
        "{} runs of {} fixtures: {} agree with the reference, {} do not",
        verdict.n_runs,
        verdict.n_fixtures,
        verdict.n_runs - verdict.n_failed,
        verdict.n_failed
    );
    Ok(verdict.n_failed == 0 && verdict.n_runs > 0)
}
