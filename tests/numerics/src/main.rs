//! `moeut-numerics <folder> [--kernel <name>]`: every recorded run of a folder, with every kernel, in both precisions.
//!
//! Developers start it with `cargo xtask fixtures`; the test `fixtures` does the same with the shared data.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

use moeut_numerics::Result;
use moeut_numerics::check::check;
use moeut_numerics::fixture;
use moeut_plugin_api::{DType, PluginError};
use std::path::Path;
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
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (folder, kernel) = match args[..] {
        [folder] => (folder, None),
        [folder, "--kernel", name] | ["--kernel", name, folder] => (folder, Some(name)),
        _ => {
            return Err(
                PluginError::new("no single folder with recorded runs is named")
                    .why(format!("the arguments are {args:?}"))
                    .fix("`cargo xtask fixtures <folder> [--kernel <name>]`")
                    .into(),
            );
        }
    };
    let fixtures = fixture::in_folder(Path::new(folder))?;
    let dtypes = [DType::F64, DType::F32];
    let verdict = check(&fixtures, kernel, &dtypes, |line| println!("{line}"))?;
    println!(
        "{} runs of {} fixtures: {} agree with the reference, {} do not",
        verdict.n_runs,
        verdict.n_fixtures,
        verdict.n_runs - verdict.n_failed,
        verdict.n_failed
    );
    Ok(verdict.n_failed == 0 && verdict.n_runs > 0)
}
