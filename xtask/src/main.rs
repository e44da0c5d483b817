//! `cargo xtask`: from a fresh clone to a run, without anything to configure.
//!
//! Not part of the product: users of the built files never see it. Depends on nothing that needs libtorch, because it
//! installs libtorch.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

mod cargo;
mod dist;
mod failure;
mod faults;
mod setup;
mod stage;
mod tools;
mod wheels;

use std::{
    env,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use cargo::Profile;
use failure::Failure;
use setup::Set;

const USAGE: &str = "\
Usage: cargo xtask <command>

  setup [--cuda]                         install libtorch 2.11.0 and cmake below `.libtorch`, each file once;
                                         --cuda adds NVIDIA's run time, to train on a GPU
  build [--profile release|dev] [args]   build the host and all plugins, stage the plugins in `target/release/plugins`;
                                         args go to `cargo build`
  run [--] [args]                        build, then run `moeut-host` with args
  tools [--torchrun]                     install TensorBoard and Weights & Biases below `.tools`, with which tests read
                                         what we write; --torchrun adds PyTorch (4.5 GB) for a test with its launcher
  test [args]                            build, install tools, then `cargo test --release --workspace` with args
  fixtures <folder> [flags]              run every recorded run of the reference in a folder (`<name>.json` and
                                         `<name>.safetensors`) with every kernel, and every recorded tokenizer below it
                                         (folders with `tokenizer.model.model`); one line each. Flags of recorded runs:
                                         --kernel <name>     only this kernel
                                         --device <device>   cpu (default), cuda, or cuda:<n>
                                         --dtype <list>      of f64, f32, and mixed with parameters in fp32 bf16, f16;
                                                             default f64,f32
                                         --plugins <folder>  plugins as they lie there; default: build them
  faults [--short] [--seed <number>]     build, then kill, starve and damage runs, and count what is lost; about
                                         5 minutes, a short one 1 minute
  dist [--libtorch]                      build, then pack `target/dist/moeut-host-….tar.gz`, which runs without Rust;
                                         --libtorch puts libtorch into it, else it is looked for where it runs
  lint [args]                            check formatting, then clippy on everything; warnings are errors

`build`, `run`, `test`, `fixtures`, `faults`, `dist` and `lint` do `setup` first if something is missing.
";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    match dispatch(&repo(), &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

/// The checkout: where cargo found this package now, not where it was compiled once.
fn repo() -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package
        .parent()
        .map_or_else(|| package.clone(), Path::to_owned)
}

fn dispatch(repo: &Path, args: &[String]) -> Result<(), Failure> {
    let Some((command, args)) = args.split_first() else {
        print!("{USAGE}");
        return Ok(());
    };
    match command.as_str() {
        "setup" => {
            setup::setup(repo, parse_set(args)?)?;
            eprintln!("everything is installed; next: `cargo xtask build`");
            Ok(())
        }
        "build" => {
            let (profile, args) = parse_profile(args)?;
            cargo::build(repo, profile, args).map(drop)
        }
        "run" => {
            let host = cargo::build(repo, Profile::Release, &[])?;
            let args = args.strip_prefix(&["--".to_owned()]).unwrap_or(args);
            let error = Command::new(&host).args(args).exec();
            Err(Failure::start(&host.to_string_lossy(), &error))
        }
        "tools" => tools::tools(repo, args),
        "test" => cargo::test(repo, args),
        "faults" => faults::faults(repo, args),
        "dist" => dist::dist(repo, args),
        "fixtures" => cargo::fixtures(repo, args),
        "lint" => cargo::lint(repo, args),
        "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(())
        }
        other => Err(Failure::new(
            format!("unknown command `{other}`"),
            "the commands are `setup`, `build`, `run`, `tools`, `test`, `fixtures`, `faults`, `dist` and `lint`",
            "`cargo xtask help`",
        )),
    }
}

fn parse_set(args: &[String]) -> Result<Set, Failure> {
    match args {
        [] => Ok(Set::Cpu),
        [flag] if flag == "--cuda" => Ok(Set::Cuda),
        _ => Err(Failure::new(
            "invalid arguments of `setup`",
            format!("got {args:?}, the only one is `--cuda`"),
            "`cargo xtask setup` or `cargo xtask setup --cuda`",
        )),
    }
}

/// Our own `--profile`, if it comes first, and the arguments for cargo.
fn parse_profile(args: &[String]) -> Result<(Profile, &[String]), Failure> {
    let (name, rest) = match args {
        [flag, name, rest @ ..] if flag == "--profile" => (name.as_str(), rest),
        [flag, rest @ ..] if flag == "--profile" => ("", rest),
        [flag, rest @ ..] if flag.starts_with("--profile=") => (&flag["--profile=".len()..], rest),
        [flag, rest @ ..] if flag == "--release" => ("release", rest),
        _ => return Ok((Profile::Release, args)),
    };
    match name {
        "release" => Ok((Profile::Release, rest)),
        "dev" => Ok((Profile::Dev, rest)),
        _ => Err(Failure::new(
            format!("unknown profile `{name}`"),
            "the profiles are `release` (the default) and `dev`",
            "`cargo xtask build --profile release`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn profile_comes_first_and_the_rest_is_for_cargo() {
        let parse = |text: &str| {
            let args = words(text);
            parse_profile(&args)
                .map(|(profile, rest)| (profile, rest.join(" ")))
                .map_err(|f| f.to_string())
        };
        assert_eq!(parse(""), Ok((Profile::Release, String::new())));
        assert_eq!(parse("-j 1"), Ok((Profile::Release, "-j 1".to_owned())));
        assert_eq!(
            parse("--profile dev -j 1"),
            Ok((Profile::Dev, "-j 1".to_owned()))
        );
        assert_eq!(
            parse("--profile=release"),
            Ok((Profile::Release, String::new()))
        );
        assert!(
            parse("--profile fast")
                .unwrap_err()
                .contains("unknown profile `fast`")
        );
        assert!(parse("--profile").is_err());
    }

    #[test]
    fn unknown_command_lists_the_commands() {
        let message = dispatch(Path::new("/"), &words("biuld"))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("`biuld`") && message.contains("`build`"),
            "{message}"
        );
    }

    #[test]
    fn setup_takes_one_flag() {
        assert_eq!(parse_set(&[]).ok(), Some(Set::Cpu));
        assert_eq!(parse_set(&words("--cuda")).ok(), Some(Set::Cuda));
        assert!(parse_set(&words("--gpu")).is_err());
    }
}
