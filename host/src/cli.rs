//! Entry point: which job is asked for, and the way from `argv` to a run.

use crate::args::{HostConfig, Owner, asks_for_help, help_text, parse, peek, render_resolved};
use crate::checkpoint::{self, Loaded};
use crate::checkpoint_cli;
use crate::doctor;
use crate::error::{EXIT_USER_ERROR, HostError};
use crate::generate;
use crate::log::{Level, Terminal, TerminalMode};
use crate::plugins::{Registry, search_path};
use crate::train;
use crate::train::build::{Blueprint, build};
use moeut_plugin_api::ComponentKind;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

const USAGE: &str = "\
usage: moeut-host -task <task> -name <name> [-<argument> <value> …]   train
       moeut-host plugins list                                        what is found, and where
       moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
       moeut-host checkpoint info|convert|export                      what one holds; from and to Python
       moeut-host generate -name <name> -prompt <text>                a trained model continues a text
       moeut-host doctor                                              what is wrong with this machine, and the fix
       moeut-host --help [-task <task>]                               every argument
";

/// Runs the program.
pub fn main() -> ExitCode {
    let start = Instant::now();
    let argv: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&argv, start) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let in_color =
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            write_err(&error.render(in_color));
            ExitCode::from(EXIT_USER_ERROR)
        }
    }
}

fn dispatch(argv: &[String], start: Instant) -> Result<(), HostError> {
    // Without it training is slower, and that is all: another C library need not know the options.
    let _ = moeut_torch::memory::keep_freed_blocks();
    // Before any other call of libtorch: a question about CUDA caches the answer "none" for good.
    let cuda = moeut_torch::cuda::load();
    let words: Vec<&str> = argv
        .iter()
        .map(String::as_str)
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let rest = &argv[words.len()..];
    match words[..] {
        [] if argv.is_empty() => {
            print(USAGE);
            Ok(())
        }
        [] if asks_for_help(argv) => help(argv),
        [] => train_command(argv, start),
        ["plugins", "list"] => {
            print(&doctor::plugin_table(&open_registry(rest)));
            Ok(())
        }
        ["config", "show"] => {
            let owners = owners(rest, &open_registry(rest))?;
            print(&render_resolved(&parse(rest, &owners, None)?, &owners));
            Ok(())
        }
        ["checkpoint", ..] => {
            print(&checkpoint_cli::run(&argv[1..])?);
            Ok(())
        }
        ["generate"] => generate::command(rest),
        ["doctor"] => {
            print(&doctor::report(&open_registry(rest), &cuda));
            Ok(())
        }
        _ => Err(HostError::new(
            format!("unknown command `{}`", words.join(" ")),
            "commands are `plugins list`, `config show`, `checkpoint`, `generate` and `doctor`; without one it trains",
            "type `moeut-host --help`",
        )),
    }
}

fn help(argv: &[String]) -> Result<(), HostError> {
    const WIDTH: usize = 110;
    let owners = owners(argv, &open_registry(argv))?;
    print(USAGE);
    print("\n");
    print(&help_text(&owners, WIDTH));
    Ok(())
}

/// Trains.
fn train_command(argv: &[String], start: Instant) -> Result<(), HostError> {
    let registry = Arc::new(open_registry(argv));
    let plugins_time = start.elapsed();
    let terminal = Arc::new(Terminal::new(TerminalMode::Auto));
    warn_about_plugins(&registry, &terminal);
    let owners = owners(argv, &registry)?;
    let blueprint = blueprint(argv, &owners)?;
    for warning in &blueprint.arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    // Stored once everything is built: arguments that cannot be built are none to come back to.
    let folder = blueprint.folder.clone();
    let raw_arguments = blueprint.arguments.raw_map();
    let _lock = lock_run(&folder)?;
    // Not before: another process may be training this run.
    if blueprint.config.reset && blueprint.config.restore.is_none() {
        reset(&folder)?;
    }
    write_startup_log(&folder, argv)?;
    terminal.message(
        Level::Info,
        &format!("plugins {:.2} s", plugins_time.as_secs_f64()),
    );
    let mut run = build(blueprint, &registry, &terminal)?;
    write_args(&folder, &raw_arguments)?;
    let outcome = train::train(&mut run);
    run.monitor.finish();
    Ok(outcome?)
}

/// Says which plugins cannot be used.
pub(crate) fn warn_about_plugins(registry: &Registry, terminal: &Terminal) {
    for text in registry.notes() {
        terminal.message(Level::Warning, text);
    }
    for problem in registry.problems() {
        terminal.message(
            Level::Warning,
            &format!("{}: {}", problem.error.what, problem.error.why),
        );
    }
}

/// The plugins of the search path that `argv` gives.
pub(crate) fn open_registry(argv: &[String]) -> Registry {
    let dirs: Vec<String> = peek(argv, "plugin_dir")
        .iter()
        .flat_map(|dirs| dirs.split(',').map(str::to_owned).collect::<Vec<_>>())
        .filter(|dir| !dir.is_empty() && !dir.eq_ignore_ascii_case("none"))
        .collect();
    Registry::open(search_path(&dirs))
}

/// Who accepts arguments: the host, the task that `argv` names, and every component that is no task.
///
/// Another task's defaults and profiles are none of this run's business. If no task is named (a run that goes on has
/// it in its stored arguments), all of them count.
///
/// # Errors
/// If there is no such task.
pub(crate) fn owners(argv: &[String], registry: &Registry) -> Result<Vec<Owner>, HostError> {
    let named = peek(argv, "task");
    let task = match named.last() {
        Some(name) => Some(registry.find(ComponentKind::Task, name)?.info),
        None => None,
    };
    let mut seen = BTreeSet::new();
    let mut owners = vec![Owner::host()];
    for component in registry.components() {
        let info = component.info;
        let is_wanted = match (info.kind, task) {
            (ComponentKind::Task, Some(task)) => info.name == task.name,
            _ => true,
        };
        if is_wanted && seen.insert((info.kind, &info.name)) {
            let plugin = &component.library.manifest.plugin;
            let plugin = format!("{} {}", plugin.name, plugin.version);
            owners.push(Owner::component(info, &plugin));
        }
    }
    Ok(owners)
}

/// Resolves the arguments: command line > stored ones of the run or checkpoint > profile > default.
fn blueprint(argv: &[String], owners: &[Owner]) -> Result<Blueprint, HostError> {
    // A first reading says which run or checkpoint there is to go on from; then its arguments join in.
    let config = HostConfig::new(&parse(argv, owners, None)?)?;
    let named = |config: &HostConfig| match &config.name {
        Some(name) => Ok(config.save_dir.join(name)),
        None => Err(HostError::new(
            "the run has no name",
            "its checkpoints and logs go to `save/<name>`, and `-name` is missing",
            "add `-name`, for instance `-name first`",
        )),
    };
    let restored = match (&config.restore, config.reset) {
        (Some(path), _) => Some(checkpoint::load(path)?),
        (None, true) => None,
        (None, false) => checkpoint::load_latest(&named(&config)?.join("checkpoint"))?,
    };
    let stored = match &restored {
        Some(loaded) => Some(loaded.snapshot.args.clone()),
        None if config.reset => None,
        None => read_args(&named(&config)?)?,
    };
    let mut arguments = parse(argv, owners, stored.as_ref())?;
    let config = HostConfig::new(&arguments)?;
    let folder = named(&config)?;
    arguments.warnings.extend(
        restored
            .iter()
            .flat_map(|loaded: &Loaded| loaded.warnings.clone()),
    );
    Ok(Blueprint {
        arguments,
        config,
        folder,
        restored,
    })
}

/// The arguments that a run of this name was started with.
fn read_args(folder: &Path) -> Result<Option<BTreeMap<String, String>>, HostError> {
    let path = folder.join("args.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(&path, &error)),
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        HostError::new(
            format!("`{}` cannot be read", path.display()),
            error.to_string(),
            "delete it, or start with `-reset 1`",
        )
    })
}

/// Stores the raw arguments, beside the old ones until they are complete.
fn write_args(folder: &Path, arguments: &BTreeMap<String, String>) -> Result<(), HostError> {
    let path = folder.join("args.json");
    let fail = |error: std::io::Error| io_error(&path, &error);
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(fail)?;
    let mut writer = serde_json::Serializer::with_formatter(
        &mut file,
        serde_json::ser::PrettyFormatter::with_indent(b"    "),
    );
    serde::Serialize::serialize(arguments, &mut writer).map_err(|error| fail(error.into()))?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(&path).map_err(|error| fail(error.error))?;
    Ok(())
}

/// Removes what an earlier run of this name left, but nothing else in its folder.
fn reset(folder: &Path) -> Result<(), HostError> {
    for name in [
        "checkpoint",
        "tensorboard",
        "export",
        "model_weights",
        "tmp",
    ] {
        let path = folder.join(name);
        match std::fs::remove_dir_all(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error(&path, &error)),
        }
    }
    Ok(())
}

/// Keeps two processes from training one run.
fn lock_run(folder: &Path) -> Result<File, HostError> {
    std::fs::create_dir_all(folder).map_err(|error| io_error(folder, &error))?;
    let path = folder.join("lock");
    let file = File::create(&path).map_err(|error| io_error(&path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(HostError::new(
            format!("the run `{}` is being trained", folder.display()),
            "another process holds its lock",
            "wait for it, or choose another `-name`",
        )),
        Err(std::fs::TryLockError::Error(error)) => Err(io_error(&path, &error)),
    }
}

fn write_startup_log(folder: &Path, argv: &[String]) -> Result<(), HostError> {
    let path = folder.join("startup_log.txt");
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let line = format!("{seconds} {} moeut-host {}\n", host.trim(), argv.join(" "));
    let mut file = File::options()
        .append(true)
        .create(true)
        .open(&path)
        .map_err(|error| io_error(&path, &error))?;
    file.write_all(line.as_bytes())
        .map_err(|error| io_error(&path, &error))
}

fn io_error(path: &Path, error: &std::io::Error) -> HostError {
    HostError::new(
        format!("`{}` cannot be used", path.display()),
        error.to_string(),
        "check its permissions and the free space",
    )
}

/// A closed pipe on the other side is no error: `moeut-host --help | head`.
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn write_err(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
