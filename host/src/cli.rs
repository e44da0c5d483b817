//! Entry point: which job is asked for, and the way from `argv` to a run.

use crate::args::{HostConfig, Owner, asks_for_help, help_text, parse, peek, render_resolved};
use crate::checkpoint::{self, Loaded};
use crate::doctor;
use crate::error::{EXIT_USER_ERROR, HostError};
use crate::job::Job;
use crate::log::{Level, Terminal, TerminalMode};
use crate::plugins::{Registry, search_path};
use crate::run_folder::{RunFolder, read_args};
use crate::signals::{Ending, Signals};
use crate::startup_log;
use crate::train;
use crate::train::build::{Blueprint, build};
use moeut_plugin_api::{ComponentKind, PluginError};
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

const USAGE: &str = "\
usage: moeut-host -task <task> -name <name> [-<argument> <value> …]   train
       moeut-host plugins list                                        what is found, and where
       moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
       moeut-host doctor                                              what is wrong with this machine, and the fix
       moeut-host --help [-task <task>]                               every argument
";

/// Runs the program.
pub fn main() -> ExitCode {
    let start = Instant::now();
    let argv: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&argv, start) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let in_color =
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            write_err(&error.render(in_color));
            ExitCode::from(EXIT_USER_ERROR)
        }
    }
}

/// Does what is asked for; returns the exit code.
fn dispatch(argv: &[String], start: Instant) -> Result<u8, HostError> {
    // Without it training is slower, and that is all: another C library need not know the options.
    let _ = moeut_torch::memory::keep_freed_blocks();
    // Before any other call of libtorch: a question about CUDA caches the answer "none" for good.
    moeut_torch::determinism::order_devices_by_bus();
    let cuda = moeut_torch::cuda::load();
    let words: Vec<&str> = argv
        .iter()
        .map(String::as_str)
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let rest = &argv[words.len()..];
    match words[..] {
        [] if argv.is_empty() => print(USAGE),
        [] if asks_for_help(argv) => help(argv)?,
        [] => return train_command(argv, &cuda, start),
        ["plugins", "list"] => print(&doctor::plugin_table(&open_registry(rest))),
        ["config", "show"] => {
            let owners = owners(rest, &open_registry(rest))?;
            print(&render_resolved(&parse(rest, &owners, None)?, &owners));
        }
        ["doctor"] => print(&doctor::report(&open_registry(rest), &cuda)),
        _ => {
            return Err(HostError::new(
                format!("unknown command `{}`", words.join(" ")),
                "commands are `plugins list`, `config show` and `doctor`; without one, moeut-host trains",
                "type `moeut-host --help`",
            ));
        }
    }
    Ok(0)
}

fn help(argv: &[String]) -> Result<(), HostError> {
    const WIDTH: usize = 110;
    let owners = owners(argv, &open_registry(argv))?;
    print(USAGE);
    print("\n");
    print(&help_text(&owners, WIDTH));
    Ok(())
}

/// Trains; or validates once, or tries one step out. Returns the exit code.
fn train_command(
    argv: &[String],
    cuda: &Result<bool, PluginError>,
    start: Instant,
) -> Result<u8, HostError> {
    let job = Job::find(|name| std::env::var(name).ok());
    let signals = Arc::new(Signals::listen(job.is_some())?);
    let registry = Arc::new(open_registry(argv));
    let plugins_time = start.elapsed();
    let terminal = Arc::new(Terminal::new(TerminalMode::Auto));
    for text in registry.notes() {
        terminal.message(Level::Warning, text);
    }
    for problem in registry.problems() {
        terminal.message(
            Level::Warning,
            &format!("{}: {}", problem.error.what, problem.error.why),
        );
    }
    let owners = owners(argv, &registry)?;
    let (blueprint, folder) = blueprint(argv, &owners, job, &signals)?;
    for warning in &blueprint.arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    if let Some(folder) = &folder {
        folder.log_start(&startup_log::describe(
            argv,
            &registry,
            &doctor::machine(cuda),
        ))?;
    }
    terminal.message(
        Level::Info,
        &format!("plugins {:.2} s", plugins_time.as_secs_f64()),
    );
    let (is_dry, is_test) = (blueprint.config.dry_run, blueprint.config.test_only);
    let keeps_alive = blueprint.config.keep_alive;
    let is_training = blueprint.is_training();
    let raw_arguments = blueprint.arguments.raw_map();
    let mut run = match build(blueprint, &registry, &terminal) {
        Ok(run) => run,
        // Whoever prepared data has stopped because of the signal, and says so in words of its own.
        Err(_) if signals.is_ending() => return Ok(stopped_early(&terminal, &signals)),
        Err(error) => return Err(error.into()),
    };
    // Stored once everything is built: arguments that cannot be built are none to come back to.
    if let Some(folder) = folder.as_ref().filter(|_| is_training) {
        folder.write_args(&raw_arguments)?;
    }
    let outcome = match (is_dry, is_test) {
        (true, _) => train::plan::dry_run(&mut run).map(Some),
        (false, true) => train::validation::test_only(&mut run),
        (false, false) => train::train(&mut run).map(|()| None),
    };
    run.monitor.finish();
    print(&outcome?.unwrap_or_default());
    let exit_code = signals.ending().map_or(0, Ending::exit_code);
    if keeps_alive && !signals.is_ending() {
        terminal.message(Level::Info, "done; kept alive until SIGINT or SIGTERM");
        signals.wait_for_ending();
    }
    Ok(exit_code)
}

/// A signal came before there was anything to save.
fn stopped_early(terminal: &Terminal, signals: &Signals) -> u8 {
    let Some(ending) = signals.ending() else {
        return 0;
    };
    let text = format!(
        "stopped by {} before the first step; type the same command again to go on",
        ending.signal()
    );
    terminal.message(Level::Info, &text);
    ending.exit_code()
}

/// The plugins of the search path that `argv` gives.
fn open_registry(argv: &[String]) -> Registry {
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
fn owners(argv: &[String], registry: &Registry) -> Result<Vec<Owner>, HostError> {
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

/// Resolves the arguments: command line > stored ones of the run or checkpoint > profile > default. Locks the run's
/// folder before anything in it is read or changed; a dry run changes nothing and needs no lock.
fn blueprint(
    argv: &[String],
    owners: &[Owner],
    job: Option<Job>,
    signals: &Arc<Signals>,
) -> Result<(Blueprint, Option<RunFolder>), HostError> {
    // A first reading says which run or checkpoint there is to go on from; then its arguments join in.
    let first = HostConfig::new(&parse(argv, owners, None)?)?;
    let earlier = job.as_ref().map_or(Ok(None), Job::earlier_checkpoints)?;
    // What a job did before it was stopped is not to be removed by the command that it repeats.
    let resets = first.reset && earlier.is_none();
    let wanted = earlier.or_else(|| first.restore.clone());
    let mut folder = match (&first.name, &wanted) {
        (None, None) => return Err(no_name()),
        (None, Some(_)) => None, // The checkpoint knows the name.
        (Some(_), _) => lock(&first)?,
    };
    let restored = match &wanted {
        Some(path) => Some(checkpoint::load(path)?),
        None if resets => None,
        None => checkpoint::load_latest(&run_path(&first)?.join("checkpoint"))?,
    };
    let stored = match &restored {
        Some(loaded) => Some(loaded.snapshot.args.clone()),
        None if resets => None,
        None => read_args(&run_path(&first)?)?,
    };
    let mut arguments = parse(argv, owners, stored.as_ref())?;
    let config = HostConfig::new(&arguments)?;
    let path = run_path(&config)?;
    if folder.as_ref().is_none_or(|folder| folder.path() != path) {
        folder = lock(&config)?;
    }
    if let Some(folder) = folder.as_ref().filter(|_| resets && !config.test_only) {
        check_reset(restored.as_ref(), &path)?;
        folder.reset()?;
    }
    let warnings = restored.iter().flat_map(|loaded| loaded.warnings.clone());
    arguments.warnings.extend(warnings);
    let blueprint = Blueprint {
        arguments,
        config,
        folder: path,
        restored,
        job,
        signals: Arc::clone(signals),
    };
    Ok((blueprint, folder))
}

fn run_path(config: &HostConfig) -> Result<PathBuf, HostError> {
    let name = config.name.as_ref().ok_or_else(no_name)?;
    Ok(config.save_dir.join(name))
}

fn lock(config: &HostConfig) -> Result<Option<RunFolder>, HostError> {
    if config.dry_run {
        return Ok(None);
    }
    RunFolder::lock(&run_path(config)?).map(Some)
}

fn no_name() -> HostError {
    HostError::new(
        "the run has no name",
        "its checkpoints and logs go to `save/<name>`, and `-name` is missing",
        "add `-name`, for instance `-name first`",
    )
}

/// Refuses to remove the checkpoint that the run starts from.
fn check_reset(restored: Option<&Loaded>, folder: &Path) -> Result<(), HostError> {
    let (Some(loaded), Ok(folder)) = (restored, folder.canonicalize()) else {
        return Ok(());
    };
    if loaded
        .path
        .canonicalize()
        .is_ok_and(|path| path.starts_with(&folder))
    {
        return Err(HostError::new(
            "`-reset 1` and `-restore` contradict each other",
            format!(
                "`{}` would be removed, and the run starts from it",
                loaded.path.display()
            ),
            "leave out `-reset`, or choose another `-name`",
        ));
    }
    Ok(())
}

/// A closed pipe on the other side is no error: `moeut-host --help | head`.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn write_err(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
