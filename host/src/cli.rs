//! Entry point: which job is asked for, and the way from `argv` to a run.

use crate::args::{HostConfig, asks_for_help, help_text, parse, peek, render_resolved};
use crate::checkpoint::{self, Loaded};
use crate::checkpoint_cli;
use crate::doctor;
use crate::error::{EXIT_USER_ERROR, HostError};
use crate::generate;
use crate::log::{Level, Terminal, TerminalMode};
use crate::model_show;
use crate::plan::{Resolved, candidates, resolve};
use crate::plugins::{Registry, search_path};
use crate::train;
use crate::train::build::{Blueprint, build};
use std::collections::BTreeMap;
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
       moeut-host model show -task <task> [-<argument> <value> …]     size, cost and layers of the model; --json
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
            let resolved = resolve(rest, None, &Arc::new(open_registry(rest)), &terminal())?;
            print(&render_resolved(&resolved.arguments, &resolved.owners));
            Ok(())
        }
        ["checkpoint", ..] => {
            print(&checkpoint_cli::run(&argv[1..])?);
            Ok(())
        }
        ["generate"] => generate::command(rest),
        ["model", "show"] => model_show(rest),
        ["doctor"] => {
            print(&doctor::report(&open_registry(rest), &cuda));
            Ok(())
        }
        _ => Err(HostError::new(
            format!("unknown command `{}`", words.join(" ")),
            "commands are `plugins list`, `config show`, `model show`, `checkpoint`, `generate` and `doctor`; without one it trains",
            "type `moeut-host --help`",
        )),
    }
}

fn help(argv: &[String]) -> Result<(), HostError> {
    const WIDTH: usize = 110;
    let registry = Arc::new(open_registry(argv));
    let is_question = |word: &&String| matches!(word.trim_start_matches('-'), "h" | "help");
    let rest: Vec<String> = argv
        .iter()
        .filter(|word| !is_question(word))
        .cloned()
        .collect();
    // Help is wanted most when something is wrong: then it is about everything that may be meant.
    let owners = match resolve(&rest, None, &registry, &terminal()) {
        Ok(resolved) => resolved.owners,
        Err(_) => candidates(&rest, &registry)?,
    };
    print(USAGE);
    print("\n");
    print(&help_text(&owners, WIDTH));
    Ok(())
}

/// Shows the model that would be trained.
fn model_show(argv: &[String]) -> Result<(), HostError> {
    let (json, rest): (Vec<String>, Vec<String>) = argv
        .iter()
        .cloned()
        .partition(|word| word.trim_start_matches('-') == "json");
    let registry = Arc::new(open_registry(&rest));
    let overview = model_show::overview(&rest, &registry, &terminal())?;
    let text = if json.is_empty() {
        overview.to_string()
    } else {
        serde_json::json!(overview).to_string() + "\n"
    };
    print(&text);
    Ok(())
}

/// Trains.
fn train_command(argv: &[String], start: Instant) -> Result<(), HostError> {
    let registry = Arc::new(open_registry(argv));
    let plugins_time = start.elapsed();
    let terminal = terminal();
    warn_about_plugins(&registry, &terminal);
    let blueprint = blueprint(argv, &registry, &terminal)?;
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

fn terminal() -> Arc<Terminal> {
    Arc::new(Terminal::new(TerminalMode::Auto))
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

/// Resolves the arguments: command line > stored ones of the run or checkpoint > profile > default.
fn blueprint(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Blueprint, HostError> {
    // A first reading says which run or checkpoint there is to go on from; then its arguments join in.
    let config = HostConfig::new(&parse(argv, &candidates(argv, registry)?, None)?)?;
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
    let Resolved { mut arguments, .. } = resolve(argv, stored.as_ref(), registry, terminal)?;
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
