//! Entry point: which job is asked for, and the way from `argv` to a run.

use crate::args::{HostConfig, Owner, asks_for_help, help_text, parse, peek, render_resolved};
use crate::bench;
use crate::checkpoint::{self, Loaded};
use crate::checkpoint_cli;
use crate::distributed::{Group, World, launch};
use crate::doctor;
use crate::error::{EXIT_USER_ERROR, HostError};
use crate::eval_cli;
use crate::generate;
use crate::job::Job;
use crate::log::{
    self, End, Level, Server, Terminal, Verbosity, WITH_PARENT, become_child, run_name,
};
use crate::model_show;
use crate::plan::{Resolved, candidates, resolve};
use crate::plugins::{Folder, Gate, Registry, search_path};
use crate::plugins_cli;
use crate::report;
use crate::run_folder::{RunFolder, read_args};
use crate::signals::{Ending, Signals};
use crate::spinning;
use crate::startup_log;
use crate::sweep_cli;
use crate::train;
use crate::train::build::{Blueprint, build};
use crate::watchdog;
use moeut_plugin_api::PluginError;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: moeut-host -task <task> -name <name> [-<argument> <value> …]   train
       moeut-host launch -n <processes> -task … -name … […]           train with several processes on this machine
       moeut-host plugins list|show|verify|lock|new|pack|install|…    what is found, and where; files to trust; a start
       moeut-host config show -task <task> [-<argument> <value> …]    every argument and where its value is from
       moeut-host checkpoint info|convert|export                      what one holds; from and to Python
       moeut-host generate -name <name> -prompt <text>                a trained model continues a text
       moeut-host eval -name <name> -sets all -data.dir <folder>      how well it finds the right one of several texts
       moeut-host model show -task <task> [-<argument> <value> …]     size, cost and layers of the model; --json
       moeut-host sweep show|run|slurm|results|convert <file>         the runs of a sweep file: looked at, or trained
       moeut-host report <run folder> … [-out <file>]                 one HTML page of runs: curves, charts, differences
       moeut-host bench step|moe|attention|data                       how fast training, layers and data are here; --json
       moeut-host doctor                                              what is wrong with this machine, and the fix
       moeut-host --help [-task <task>]                               every argument
       moeut-host --version                                           of the program, the plugin ABI and libtorch

Everywhere: -q (--quiet) warnings, errors and results only; -v (--verbose) what plugins say to find a fault, too.
";

/// Runs the program.
pub fn main() -> ExitCode {
    let start = Instant::now();
    let mut argv: Vec<String> = std::env::args().skip(1).collect();
    spinning::shorten(&argv);
    // Another program in a moment, which has no use for libtorch.
    let is_child = argv.first().is_some_and(|word| word == WITH_PARENT);
    let cuda = if is_child {
        Ok(false)
    } else {
        start_libtorch()
    };
    let terminal = Arc::new(Terminal::new(Verbosity::take(&mut argv)));
    let done = if is_child {
        become_child(&argv[1..]).map(|()| 0)
    } else {
        dispatch(&argv, &cuda, &terminal, start)
    };
    let code = done.unwrap_or_else(|error| {
        terminal.finish(); // Bars would stand between the messages and the error.
        terminal.report(&error.render(log::is_colored()));
        EXIT_USER_ERROR
    });
    terminal.finish();
    let _ = std::io::stdout().flush();
    // Everything is written. Threads of plugins and of libtorch's engines may still be at work, and must not see libtorch
    // taken down around them, as the ordinary end of a program would.
    signal_hook::low_level::exit(code.into())
}

/// What must come before any other use of libtorch, and before there are threads. Says whether there is a GPU.
fn start_libtorch() -> Result<bool, PluginError> {
    // Without it training is slower, and that is all: another C library need not know the options.
    let _ = moeut_torch::memory::keep_freed_blocks();
    watchdog::name_uncaught();
    // Before any other call of libtorch: a question about CUDA caches the answer "none" for good.
    moeut_torch::determinism::order_devices_by_bus();
    let _ = moeut_c10d::prepare_environment();
    // What is wrong with its variables is said where processes meet.
    if let Ok(Some(world)) = World::find(variable) {
        moeut_torch::determinism::see_only(world.local_rank);
    }
    let cuda = moeut_torch::cuda::load();
    if !matches!(cuda, Ok(true)) {
        moeut_torch::profiler::expect_no_gpu();
    }
    cuda
}

/// Does what is asked for; returns the exit code.
fn dispatch(
    argv: &[String],
    cuda: &Result<bool, PluginError>,
    terminal: &Arc<Terminal>,
    start: Instant,
) -> Result<u8, HostError> {
    let words: Vec<&str> = argv
        .iter()
        .map(String::as_str)
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let rest = &argv[words.len()..];
    match words[..] {
        [] if argv.is_empty() => print(USAGE),
        [] if asks_for_help(argv) => help(argv, terminal)?,
        [] if argv == ["--version"] => print(&doctor::versions()),
        [] => return train_command(argv, cuda, terminal, start),
        ["launch"] => return launch::command(rest, terminal),
        ["plugins", ..] => return plugins_cli::command(&argv[1..]),
        ["config", "show"] => {
            let resolved = resolve(rest, None, &Arc::new(open_registry(rest)?), terminal)?;
            for warning in &resolved.arguments.warnings {
                terminal.message(Level::Warning, warning);
            }
            print(&render_resolved(&resolved.arguments, &resolved.owners));
        }
        ["checkpoint", ..] => print(&checkpoint_cli::run(&argv[1..])?),
        ["sweep", ..] => return sweep_cli::run(&argv[1..], terminal),
        ["generate"] => generate::command(rest, terminal)?,
        ["eval"] => return eval_cli::command(rest, terminal),
        ["model", "show"] => model_show(rest, terminal)?,
        ["report", ..] => report::command(&argv[1..], terminal)?,
        ["bench", ..] => bench::command(&argv[1..], terminal)?,
        ["doctor"] => print(&doctor::report(&open_registry(rest)?, cuda)),
        _ => {
            return Err(HostError::new(
                format!("unknown command `{}`", words.join(" ")),
                "commands are `launch`, `plugins`, `config show`, `model show`, `checkpoint`, `generate`, `eval`, `sweep`, `report`, `bench` and `doctor`; without one it trains",
                "type `moeut-host --help`",
            ));
        }
    }
    Ok(0)
}

fn help(argv: &[String], terminal: &Arc<Terminal>) -> Result<(), HostError> {
    const WIDTH: usize = 110;
    let registry = Arc::new(open_registry(argv)?);
    let is_question = |word: &&String| matches!(word.trim_start_matches('-'), "h" | "help");
    let rest: Vec<String> = argv
        .iter()
        .filter(|word| !is_question(word))
        .cloned()
        .collect();
    // Help is wanted most when something is wrong: then it is about everything that may be meant.
    let owners = match resolve(&rest, None, &registry, terminal) {
        Ok(resolved) => resolved.owners,
        Err(_) => candidates(&rest, &registry)?,
    };
    print(USAGE);
    print("\n");
    print(&help_text(&owners, WIDTH));
    Ok(())
}

/// Shows the model that would be trained.
fn model_show(argv: &[String], terminal: &Arc<Terminal>) -> Result<(), HostError> {
    let (json, rest): (Vec<String>, Vec<String>) = argv
        .iter()
        .cloned()
        .partition(|word| word.trim_start_matches('-') == "json");
    let registry = Arc::new(open_registry(&rest)?);
    let overview = model_show::overview(&rest, &registry, terminal)?;
    let text = if json.is_empty() {
        overview.to_string()
    } else {
        serde_json::json!(overview).to_string() + "\n"
    };
    print(&text);
    Ok(())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Trains, together with other processes if the environment says so. Returns the exit code.
fn train_command(
    argv: &[String],
    cuda: &Result<bool, PluginError>,
    terminal: &Arc<Terminal>,
    start: Instant,
) -> Result<u8, HostError> {
    let Some(world) = World::find(variable)? else {
        return train_in(&Group::single(), argv, cuda, terminal, start);
    };
    let rank = world.rank;
    let terminal = &if rank == 0 {
        Arc::clone(terminal)
    } else {
        Arc::new(Terminal::new(Verbosity::Silent))
    };
    terminal.message(Level::Info, &world.to_string());
    let group = Group::join(world, patience(argv)?, terminal)?;
    let trained = train_in(&group, argv, cuda, terminal, start)
        .and_then(|code| group.leave().map(|()| code).map_err(HostError::from));
    let code = trained.unwrap_or_else(|error| {
        if group.fail(&PluginError::from(&error)) {
            let error = error.at(&format!("rank {rank}: "));
            terminal.finish(); // Bars would stand between the messages and the error.
            terminal.report(&error.render(log::is_colored()));
        }
        EXIT_USER_ERROR
    });
    // To drop it is to wait for what the engine has begun, perhaps with a process that is gone.
    std::mem::forget(group);
    Ok(code)
}

/// How long processes wait for each other: needed before all arguments are known.
fn patience(argv: &[String]) -> Result<Duration, HostError> {
    let typed = peek(argv, "distributed_timeout");
    let words: Vec<String> = typed
        .last()
        .map(|value| format!("-distributed_timeout={value}"))
        .into_iter()
        .collect();
    let config = HostConfig::new(&parse(&words, &[Owner::host()], None)?)?;
    Ok(Duration::from_secs_f64(config.distributed_timeout))
}

/// Trains; or validates once, or tries one step out. Returns the exit code.
fn train_in(
    group: &Group,
    argv: &[String],
    cuda: &Result<bool, PluginError>,
    terminal: &Arc<Terminal>,
    start: Instant,
) -> Result<u8, HostError> {
    let argv = &named(argv);
    let job = Job::find(variable);
    let mut signals = Signals::listen(job.is_some())?;
    if !group.is_single() {
        signals = signals.with_others();
    }
    let signals = Arc::new(signals);
    let registry = Arc::new(open_registry(argv)?);
    let plugins_time = start.elapsed();
    warn_about_plugins(&registry, terminal);
    train::agreement::on_program(group, &registry)?;
    let (blueprint, folder) = if group.is_first() {
        let (blueprint, folder) = blueprint(argv, &registry, terminal, job, &signals, group)?;
        let stored = || Ok::<_, HostError>(blueprint.arguments.raw_map());
        group.share("arguments", stored)?;
        (blueprint, folder)
    } else {
        (follow(argv, &registry, terminal, &signals, group)?, None)
    };
    train::agreement::on_arguments(group, &blueprint.arguments)?;
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
    let patience = Duration::try_from_secs_f64(blueprint.config.watchdog);
    if let Some(patience) = patience.ok().filter(|patience| !patience.is_zero())
        && let Err(error) = watchdog::start(terminal, patience)
    {
        terminal.message(Level::Warning, &format!("no call is watched: {error}"));
    }
    let (is_dry, is_test) = (blueprint.config.dry_run, blueprint.config.test_only);
    let keeps_alive = blueprint.config.keep_alive;
    let server_settings = blueprint.tensorboard_server();
    let is_training = blueprint.is_training();
    let raw_arguments = blueprint.arguments.raw_map();
    let mut run = match build(blueprint, &registry, terminal) {
        Ok(run) => run,
        // Whoever prepared data has stopped because of the signal, and says so in words of its own.
        Err(_) if signals.asked().is_some() => {
            group.fail(&PluginError::new("was stopped by a signal").fix(GO_ON));
            return Ok(stopped_early(terminal, &signals));
        }
        Err(error) => return Err(error.into()),
    };
    // Stored once everything is built: arguments that cannot be built are none to come back to.
    if let Some(folder) = folder.as_ref().filter(|_| is_training) {
        folder.write_args(&raw_arguments)?;
    }
    // Ends where this function does.
    let settings = server_settings.filter(|_| group.is_first());
    let _server = settings.and_then(|settings| Server::start(settings, terminal));
    let outcome = match (is_dry, is_test) {
        (true, _) => train::dry_run::dry_run(&mut run).map(Some),
        (false, true) => train::validation::test_only(&mut run),
        (false, false) => train::train(&mut run).map(|()| None),
    };
    let outcome = outcome.map_err(|error| train::explain(error, &mut run));
    let end = match (&outcome, run.early_ending()) {
        (Err(_), _) => End::Failed,
        (Ok(_), Some(ending)) => End::Stopped(ending),
        (Ok(_), None) => End::Finished,
    };
    run.monitor.finish(end);
    let result = outcome?.unwrap_or_default();
    if group.is_first() {
        print(&result);
    }
    let exit_code = signals.ending().map_or(0, Ending::exit_code);
    if keeps_alive && group.is_single() && !signals.is_ending() {
        terminal.message(Level::Info, "done; kept alive until SIGINT or SIGTERM");
        signals.wait_for_ending();
    }
    Ok(exit_code)
}

/// The arguments with the name that the variables of Weights & Biases give to the run. A checkpoint's run has its name
/// already.
fn named(argv: &[String]) -> Vec<String> {
    let is_given = |value: &String| !value.is_empty() && !value.eq_ignore_ascii_case("none");
    let given = |name| peek(argv, name).pop().filter(is_given);
    let name = run_name(given("name").as_deref(), given("restore").is_some());
    let name = name.map(|name| format!("-name={name}"));
    argv.iter().cloned().chain(name).collect()
}

/// What a start that was stopped needs.
const GO_ON: &str = "type the same command again to go on";

/// A signal came before there was anything to save.
fn stopped_early(terminal: &Terminal, signals: &Signals) -> u8 {
    let Some(ending) = signals.asked() else {
        return 0;
    };
    let text = format!(
        "stopped by {} before the first step; {GO_ON}",
        ending.signal()
    );
    terminal.message(Level::Info, &text);
    ending.exit_code()
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
///
/// # Errors
/// If the search path or what verifies its files is misspelled.
pub(crate) fn open_registry(argv: &[String]) -> Result<Registry, HostError> {
    let gate = Gate::from_args(argv)?;
    Ok(Registry::open(plugin_folders(argv)?, gate))
}

/// The search path that `argv` gives.
///
/// # Errors
/// If `-plugin_dir` names what is no folder: what was meant to be found there would be missing for no visible reason.
pub(crate) fn plugin_folders(argv: &[String]) -> Result<Vec<Folder>, HostError> {
    let dirs: Vec<String> = peek(argv, "plugin_dir")
        .iter()
        .flat_map(|dirs| dirs.split(',').map(str::to_owned).collect::<Vec<_>>())
        .filter(|dir| !dir.is_empty() && !dir.eq_ignore_ascii_case("none"))
        .collect();
    if let Some(dir) = dirs.iter().find(|dir| !Path::new(dir).is_dir()) {
        return Err(HostError::new(
            "invalid value for `-plugin_dir`",
            format!("`{dir}` is no folder"),
            "set `-plugin_dir` to folders with plugins, or leave it out",
        ));
    }
    Ok(search_path(&dirs))
}

/// Resolves the arguments: command line > stored ones of the run or checkpoint > profile > default. Locks the run's
/// folder before anything in it is read or changed; a dry run changes nothing and needs no lock.
fn blueprint(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
    job: Option<Job>,
    signals: &Arc<Signals>,
    group: &Group,
) -> Result<(Blueprint, Option<RunFolder>), HostError> {
    // A first reading says which run or checkpoint there is to go on from; then its arguments join in.
    let first = HostConfig::new(&parse(argv, &candidates(argv, registry)?, None)?)?;
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
    let Resolved { mut arguments, .. } = resolve(argv, stored.as_ref(), registry, terminal)?;
    let config = HostConfig::new(&arguments)?;
    if config.test_only && restored.is_none() && config.pretrained.is_none() {
        return Err(nothing_to_test(&run_path(&config)?));
    }
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
        group: group.clone(),
        job,
        signals: Arc::clone(signals),
    };
    Ok((blueprint, folder))
}

/// What a process other than the first one trains: whatever the first one found out about the run.
fn follow(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
    signals: &Arc<Signals>,
    group: &Group,
) -> Result<Blueprint, HostError> {
    let stored = || Ok::<_, HostError>(BTreeMap::new());
    let stored: BTreeMap<String, String> = group.share("arguments", stored)?;
    let Resolved { arguments, .. } = resolve(argv, Some(&stored), registry, terminal)?;
    let config = HostConfig::new(&arguments)?;
    Ok(Blueprint {
        folder: run_path(&config)?,
        arguments,
        config,
        restored: None,
        group: group.clone(),
        job: None,
        signals: Arc::clone(signals),
    })
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

/// A score of fresh random numbers is never what was asked for; a misspelled name is a likelier cause.
fn nothing_to_test(folder: &Path) -> HostError {
    HostError::new(
        "there is no trained model to validate",
        format!("`{}` has no checkpoint", folder.display()),
        "name a run that has one with `-name`, or weights with `-restore` or `-load_pretrained_model`",
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
pub(crate) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
