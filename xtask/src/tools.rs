//! `cargo xtask tools`: the Python programs that tests read our files with, in a virtual environment of their own.
//!
//! Not needed to build or to train. A test that wants one of them looks for `.tools/venv/bin/python`.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    failure::{Failure, passed},
    setup::check_python,
};

/// What is installed. The versions are those whose formats and messages the tests know.
const PACKAGES: [&str; 2] = ["tensorboard==2.21.0", "wandb==0.31.0"];

/// PyTorch with its launcher: 4.5 GB, for the one test that starts the host with it.
const TORCHRUN: [&str; 1] = ["torch==2.11.0"];

/// Installs what is missing below `repo`; a second call finds nothing to do.
pub(crate) fn tools(repo: &Path, args: &[String]) -> Result<(), Failure> {
    install(repo, "venv", &PACKAGES)?;
    match args {
        [] => Ok(()),
        [flag] if flag == "--torchrun" => install(repo, "torchrun", &TORCHRUN),
        _ => Err(Failure::new(
            format!("unknown arguments `{}`", args.join(" ")),
            "`tools` takes `--torchrun` or nothing",
            "`cargo xtask tools --torchrun`",
        )),
    }
}

/// Makes a virtual environment with these packages.
fn install(repo: &Path, name: &str, packages: &[&str]) -> Result<(), Failure> {
    let root = repo.join(".tools");
    let venv = root.join(name);
    // Written last, so that its content says what was installed completely.
    let stamp = venv.join("packages");
    let wanted = packages.join("\n");
    let is_complete = || fs::read_to_string(&stamp).is_ok_and(|found| found == wanted);
    if is_complete() {
        return Ok(());
    }
    check_python()?;
    fs::create_dir_all(&root).map_err(|error| Failure::io("create", &root, &error))?;
    let lock_path = root.join(".lock");
    let lock =
        fs::File::create(&lock_path).map_err(|error| Failure::io("create", &lock_path, &error))?;
    lock.lock()
        .map_err(|error| Failure::io("lock", &lock_path, &error))?;
    // Looked up again: another call may have held the lock and done the work.
    if is_complete() {
        return Ok(());
    }

    eprintln!("{} in `{}`", packages.join(", "), venv.display());
    // What an interrupted call left is not built upon.
    let mut python = Command::new("python3");
    python.args(["-m", "venv", "--clear"]).arg(&venv);
    run(&mut python, || {
        Failure::new(
            format!("cannot make the virtual environment `{}`", venv.display()),
            "see the messages above; on Debian and Ubuntu it is a package of its own",
            "`sudo apt-get install python3-venv`, then `cargo xtask tools`",
        )
    })?;
    let mut pip = Command::new(venv.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ])
    .args(packages);
    run(&mut pip, || {
        Failure::new(
            format!("cannot install {}", packages.join(", ")),
            "see the messages above",
            "check the network, `https_proxy`, and the index of `python3 -m pip config list`; then `cargo xtask tools`",
        )
    })?;
    fs::write(&stamp, &wanted).map_err(|error| Failure::io("write", &stamp, &error))
}

/// Runs a program whose messages the user sees.
fn run(command: &mut Command, failure: impl Fn() -> Failure) -> Result<(), Failure> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .map_err(|error| Failure::start(&command.get_program().to_string_lossy(), &error))?;
    passed(status).map_err(|_| failure())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complete_installation_is_left_alone() {
        let repo = tempfile::TempDir::new().unwrap();
        let venv = repo.path().join(".tools/venv");
        fs::create_dir_all(&venv).unwrap();
        fs::write(venv.join("packages"), PACKAGES.join("\n")).unwrap();
        tools(repo.path(), &[]).unwrap();
        assert!(
            !repo.path().join(".tools/.lock").exists(),
            "nothing was begun"
        );
    }

    #[test]
    fn a_program_that_fails_is_the_given_failure() {
        let failure = || Failure::new("a", "b", "c");
        assert!(run(&mut Command::new("true"), failure).is_ok());
        let error = run(&mut Command::new("false"), failure).unwrap_err();
        assert_eq!(error.to_string(), failure().to_string());
    }
}
