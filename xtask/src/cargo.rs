//! Calls of cargo: which packages are plugins, with which flags and environment everything is built.
//!
//! cargo does the work; this file adds what it does not do alone: select the plugins, tell them the commit, and keep
//! the rpath right wherever the output goes.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use serde_json::Value;

use crate::{
    failure::{Failure, passed},
    setup::{Set, foreign_libtorch, libtorch_root, setup},
    stage::stage,
    tools::tools,
};

/// The package with the executable, and the executable.
const HOST: &str = "moeut-host";

/// The package with the program for the paper's tables and figures, built together with the host's library.
const PAPER: &str = "moeut-paper";

/// The package with the harness for recorded runs, and its program.
const NUMERICS: &str = "moeut-numerics";

/// The package with the program for recorded tokenizers, and the program.
const TEXT: &str = "moeut-text";
const TOKENIZER_FIXTURES: &str = "moeut-tokenizer-fixtures";
/// What every recorded tokenizer has.
const TOKENIZER_FILE: &str = "tokenizer.model.model";

/// Kinds of plugin, each a folder below `plugins`. Packages directly in `plugins` are libraries.
const KINDS: [&str; 4] = ["tasks", "datasets", "models", "kernels"];

/// The two profiles that the workspace knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// What users, tests and CI use.
    Release,
    /// Without optimization; `torch-sys` is compiled once more for it.
    Dev,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "dev",
        }
    }
}

/// What `cargo metadata` says about the workspace.
struct Workspace {
    target_directory: PathBuf,
    /// Names of the plugin packages, sorted.
    plugins: Vec<String>,
}

/// Builds host and plugins and stages the plugins. Returns the executable.
pub(crate) fn build(repo: &Path, profile: Profile, args: &[String]) -> Result<PathBuf, Failure> {
    setup(repo, Set::Cpu)?;
    let workspace = workspace(repo)?;
    let mut command = cargo(repo, &workspace)?;
    command.args([
        "build",
        "--profile",
        profile.name(),
        "--message-format=json-render-diagnostics",
    ]);
    command.args(["--package", HOST, "--package", PAPER]);
    for plugin in &workspace.plugins {
        command.args(["--package", plugin]);
    }
    command.args(args).stderr(Stdio::inherit());
    let output = command
        .output()
        .map_err(|error| Failure::start("cargo", &error))?;
    passed(output.status)?;

    let artifacts = artifacts(&String::from_utf8_lossy(&output.stdout), &workspace.plugins);
    let Some(executable) = artifacts.executable else {
        return Err(Failure::new(
            format!("the build made no executable `{HOST}`"),
            format!(
                "package `{HOST}` has no binary target of that name, or the arguments {args:?} exclude it"
            ),
            "`cargo xtask build`, without further arguments",
        ));
    };
    let folder = executable.with_file_name("plugins");
    stage(&folder, &artifacts.libraries)?;
    eprintln!(
        "staged {} plugins in `{}`",
        artifacts.libraries.len(),
        folder.display()
    );
    Ok(executable)
}

/// Builds everything, then runs all tests of the workspace with `args`.
pub(crate) fn test(repo: &Path, args: &[String]) -> Result<(), Failure> {
    build(repo, Profile::Release, &[])?;
    tools(repo, &[])?;
    let workspace = workspace(repo)?;
    run(cargo(repo, &workspace)?
        .args(["test", "--release", "--workspace"])
        .args(args))
}

/// Runs what is recorded of the reference: tokenizers in a folder and below it, then the runs in the folder itself. The
/// harness of `tests/numerics` builds models and kernels itself.
pub(crate) fn fixtures(repo: &Path, args: &[String]) -> Result<(), Failure> {
    setup(repo, Set::Cpu)?;
    let folder = first_positional(args);
    let has_tokenizers = folder.is_some_and(|folder| has_below(Path::new(folder), TOKENIZER_FILE));
    let has_runs = folder.is_some_and(|folder| has_runs(Path::new(folder)));
    let mut statuses = Vec::new();
    if has_tokenizers {
        statuses.push(harness(repo, TEXT, TOKENIZER_FIXTURES, folder)?);
    }
    // It also says what is wrong with the arguments, or that there is nothing to run.
    if has_runs || !has_tokenizers {
        statuses.push(harness(repo, NUMERICS, NUMERICS, args)?);
    }
    statuses.into_iter().try_for_each(passed)
}

/// The first argument that is neither a flag nor the value behind one: each has one, or carries it behind `=`. Whether
/// flags are known is the program's matter.
fn first_positional(args: &[String]) -> Option<&String> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            return Some(arg);
        }
        if !arg.contains('=') {
            args.next();
        }
    }
    None
}

/// Builds a program of a package and runs it.
fn harness<'a>(
    repo: &Path,
    package: &str,
    program: &str,
    args: impl IntoIterator<Item = &'a String>,
) -> Result<ExitStatus, Failure> {
    let workspace = workspace(repo)?;
    let build = [
        "build",
        "--quiet",
        "--release",
        "--package",
        package,
        "--bin",
        program,
    ];
    run(cargo(repo, &workspace)?.args(build))?;
    let program = workspace.target_directory.join("release").join(program);
    // In the user's folder, so that relative paths are theirs; with the same commit, or plugins would be built twice.
    let mut command = Command::new(&program);
    command.args(args).env("MOEUT_GIT_HASH", git_hash(repo));
    command
        .status()
        .map_err(|error| Failure::start(&program.to_string_lossy(), &error))
}

/// Whether there is a `.json` other than a recorded tokenizer's.
fn has_runs(folder: &Path) -> bool {
    entries(folder).any(|path| {
        path.extension() == Some(OsStr::new("json")) && !path.ends_with("expected.json")
    })
}

fn has_below(folder: &Path, name: &str) -> bool {
    entries(folder).any(|path| path.ends_with(name) || has_below(&path, name))
}

/// What is in a folder; nothing if it is none.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// Formatting, then clippy as `cargo lint` runs it (the alias in `.cargo/config.toml`).
pub(crate) fn lint(repo: &Path, args: &[String]) -> Result<(), Failure> {
    setup(repo, Set::Cpu)?;
    let workspace = workspace(repo)?;
    run(cargo(repo, &workspace)?.args(["fmt", "--all", "--check"]))?;
    run(cargo(repo, &workspace)?.arg("lint").args(args))
}

fn run(command: &mut Command) -> Result<(), Failure> {
    passed(
        command
            .status()
            .map_err(|error| Failure::start("cargo", &error))?,
    )
}

/// cargo in `repo`, so that it reads `.cargo/config.toml`, with everything that a build needs.
fn cargo(repo: &Path, workspace: &Workspace) -> Result<Command, Failure> {
    check_rustflags(|name| env::var_os(name).and_then(|value| value.into_string().ok()))?;
    let mut command = plain_cargo(repo);
    command
        .env_remove("RUSTFLAGS")
        .env("MOEUT_GIT_HASH", git_hash(repo));
    if let Some(folder) = absolute_rpath(repo, &workspace.target_directory) {
        let folder = folder.display();
        command.arg("--config");
        command.arg(format!(
            r#"target.'cfg(target_os = "linux")'.rustflags=["-C", "link-arg=-Wl,-rpath,{folder}"]"#
        ));
    }
    Ok(command)
}

fn plain_cargo(repo: &Path) -> Command {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(repo);
    command
}

/// Flags in the environment replace those of `.cargo/config.toml`, and with them the rpath: the build succeeds and
/// the executable does not find libtorch. An empty variable does so too, but can simply be taken away.
fn check_rustflags(variable: impl Fn(&str) -> Option<String>) -> Result<(), Failure> {
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        if let Some(value) = variable(name).filter(|value| !value.is_empty()) {
            return Err(Failure::new(
                format!("`{name}` in the environment would lose the path to libtorch"),
                format!(
                    "`{name}={value}` replaces the flags of `.cargo/config.toml`, the rpath among them"
                ),
                format!(
                    "`unset {name}`, and give your flags as `rustflags` below `[target.x86_64-unknown-linux-gnu]` in \
                     `~/.cargo/config.toml`: those are added to ours"
                ),
            ));
        }
    }
    Ok(())
}

/// The folder of libtorch, where the relative rpaths of `.cargo/config.toml` do not lead: with an output folder other
/// than `target`, or a libtorch of the user's own.
fn absolute_rpath(repo: &Path, target_directory: &Path) -> Option<PathBuf> {
    match foreign_libtorch(repo) {
        Some(libtorch) => Some(libtorch.join("lib")),
        None if target_directory == repo.join("target") => None,
        None => Some(libtorch_root(repo).join("torch/lib")),
    }
}

/// The commit for the plugins' manifests: short, with `-dirty` if tracked files differ, `unknown` outside git. Whoever
/// builds from an archive, or wants no rebuild with each commit, sets `MOEUT_GIT_HASH`.
fn git_hash(repo: &Path) -> String {
    if let Ok(hash) = env::var("MOEUT_GIT_HASH")
        && !hash.is_empty()
    {
        return hash;
    }
    commit(repo)
}

fn commit(repo: &Path) -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git")
            .current_dir(repo)
            .args(args)
            .stderr(Stdio::null())
            .output()
            .ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(hash) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => hash,
        _ => hash + "-dirty",
    }
}

fn workspace(repo: &Path) -> Result<Workspace, Failure> {
    let metadata = metadata(repo, &["--no-deps"])?;
    Ok(Workspace {
        target_directory: PathBuf::from(text(&metadata, "target_directory")),
        plugins: plugins(repo, &metadata),
    })
}

/// What `cargo metadata` says.
pub(crate) fn metadata(repo: &Path, args: &[&str]) -> Result<Value, Failure> {
    let output = plain_cargo(repo)
        .args(["metadata", "--format-version=1"])
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::start("cargo", &error))?;
    passed(output.status)?;
    serde_json::from_slice(&output.stdout).map_err(|error| {
        Failure::new(
            "`cargo metadata` wrote something unexpected",
            error,
            "`cargo metadata --no-deps` shows it",
        )
    })
}

/// Every package below `plugins/<kind>` that makes a dynamic library: a new plugin is a new folder and no edit here.
fn plugins(repo: &Path, metadata: &Value) -> Vec<String> {
    let is_plugin = |package: &&Value| {
        let manifest = Path::new(text(package, "manifest_path"));
        KINDS
            .iter()
            .any(|kind| manifest.starts_with(repo.join("plugins").join(kind)))
            && list(package, "targets").any(is_cdylib)
    };
    let mut names: Vec<String> = list(metadata, "packages")
        .filter(is_plugin)
        .map(|package| text(package, "name").to_owned())
        .collect();
    names.sort();
    names
}

fn is_cdylib(target: &Value) -> bool {
    list(target, "crate_types").any(|kind| kind == "cdylib")
}

/// What a build made, of what interests us.
struct Artifacts {
    executable: Option<PathBuf>,
    libraries: Vec<PathBuf>,
}

/// Reads cargo's messages, one JSON object a line.
fn artifacts(messages: &str, plugins: &[String]) -> Artifacts {
    let mut artifacts = Artifacts {
        executable: None,
        libraries: Vec::new(),
    };
    let parsed = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    for message in parsed.filter(|message| text(message, "reason") == "compiler-artifact") {
        let target = &message["target"];
        if let Some(path) = message["executable"]
            .as_str()
            .filter(|_| text(target, "name") == HOST)
        {
            artifacts.executable = Some(PathBuf::from(path));
        }
        // Dependencies may be dynamic libraries too; only the selected packages are plugins.
        if is_cdylib(target)
            && plugins
                .iter()
                .any(|name| is_package(text(&message, "package_id"), name))
        {
            let files = list(&message, "filenames")
                .filter_map(Value::as_str)
                .map(PathBuf::from);
            artifacts
                .libraries
                .extend(files.filter(|file| file.extension() == Some(OsStr::new("so"))));
        }
    }
    artifacts.libraries.sort();
    artifacts
}

/// A package id ends in `/<folder>#<version>`, or in `#<name>@<version>` where the folder has another name.
fn is_package(id: &str, name: &str) -> bool {
    let (source, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((package, _)) => package == name,
        None => source.rsplit('/').next() == Some(name),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn plugins_are_the_dynamic_libraries_below_the_four_kinds() {
        let package = |name: &str, folder: &str, kind: &str| {
            json!({
                "name": name,
                "manifest_path": format!("/repo/{folder}/Cargo.toml"),
                "targets": [{ "crate_types": [kind] }],
            })
        };
        let metadata = json!({ "packages": [
            package("moeut-task-toy", "plugins/tasks/toy", "cdylib"),
            package("moeut-kernel-naive", "plugins/kernels/naive", "cdylib"),
            package("helper", "plugins/tasks/helper", "lib"),
            package("moeut-nn", "plugins/nn", "lib"),
            package("elsewhere", "tests/fixture", "cdylib"),
        ] });
        assert_eq!(
            plugins(Path::new("/repo"), &metadata),
            ["moeut-kernel-naive", "moeut-task-toy"]
        );
    }

    #[test]
    fn artifacts_are_the_host_and_the_selected_libraries() {
        let messages = [
            r#"{"reason":"compiler-artifact","package_id":"path+file:///r/plugins/tasks/toy#moeut-task-toy@0.1.0","target":{"name":"toy","crate_types":["cdylib"]},"filenames":["/t/release/libtoy.so"]}"#,
            r#"{"reason":"compiler-artifact","package_id":"registry+x#other@1.0.0","target":{"name":"other","crate_types":["cdylib","lib"]},"filenames":["/t/release/libother.so"]}"#,
            r#"{"reason":"compiler-artifact","package_id":"path+file:///r/host#moeut-host@0.1.0","target":{"name":"moeut-host","crate_types":["bin"]},"filenames":["/t/release/moeut-host"],"executable":"/t/release/moeut-host"}"#,
            "something else",
            r#"{"reason":"build-finished","success":true}"#,
        ];
        let artifacts = artifacts(&messages.join("\n"), &["moeut-task-toy".to_owned()]);
        assert_eq!(
            artifacts.executable.as_deref(),
            Some(Path::new("/t/release/moeut-host"))
        );
        assert_eq!(artifacts.libraries, [PathBuf::from("/t/release/libtoy.so")]);
    }

    #[test]
    fn recorded_tokenizers_are_found_below_and_recorded_runs_in_the_folder() {
        let folder = tempfile::TempDir::new().unwrap();
        let tokenizer = folder.path().join("tokenizer/c4");
        fs::create_dir_all(&tokenizer).unwrap();
        assert!(!has_below(folder.path(), TOKENIZER_FILE));
        for name in ["expected.json", TOKENIZER_FILE] {
            fs::write(tokenizer.join(name), "").unwrap();
        }
        assert!(has_below(folder.path(), TOKENIZER_FILE) && has_below(&tokenizer, TOKENIZER_FILE));
        assert!(!has_runs(folder.path()) && !has_runs(&tokenizer));
        fs::write(folder.path().join("01_dense.json"), "").unwrap();
        assert!(has_runs(folder.path()));
    }

    #[test]
    fn the_folder_stands_anywhere_among_flags() {
        let folder = |line: &str| {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            first_positional(&args).cloned()
        };
        for line in [
            "runs",
            "runs --kernel grouped",
            "--kernel grouped runs --device cuda",
            "--dtype=bf16 runs",
            "--dtype bf16,f16 --device=cuda:1 runs",
        ] {
            assert_eq!(folder(line).as_deref(), Some("runs"), "{line}");
        }
        for line in ["", "--kernel", "--kernel grouped", "--device=cpu"] {
            assert_eq!(folder(line), None, "{line}");
        }
    }

    #[test]
    fn package_id_names_its_folder_or_its_name() {
        assert!(is_package(
            "path+file:///r/plugins/tasks/toy#moeut-task-toy@0.1.0",
            "moeut-task-toy"
        ));
        assert!(is_package("path+file:///r/plugins/tasks/toy#0.1.0", "toy"));
        assert!(!is_package(
            "path+file:///r/plugins/tasks/toy#0.1.0",
            "moeut-task-toy"
        ));
    }

    #[test]
    fn rustflags_in_the_environment_are_refused_unless_empty() {
        let with =
            |value: &'static str| move |name: &str| (name == "RUSTFLAGS").then(|| value.to_owned());
        assert!(check_rustflags(|_| None).is_ok());
        assert!(check_rustflags(with("")).is_ok());
        let message = check_rustflags(with("-D warnings"))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("RUSTFLAGS=-D warnings") && message.contains("unset RUSTFLAGS"),
            "{message}"
        );
    }

    #[test]
    fn hash_outside_git_is_unknown() {
        let folder = tempfile::TempDir::new().unwrap();
        assert_eq!(commit(folder.path()), "unknown");
    }
}
