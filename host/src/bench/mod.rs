//! `moeut-host bench`: how fast training steps, layers and data are on this machine, beside what the machine can do.
//!
//! ```text
//! step        a run as its arguments describe it, in the training loop itself
//! moe         the σ-MoE layer and SwitchHead's projections of every kernel
//! attention   softmax attention as the models call it
//! data        reading batches
//! ```
//! Nothing is saved, logged or locked. Times are wall time between two moments at which the device has nothing left to
//! do, divided by the calls between them; a median of several. Ceilings are measured in the same run.

mod attention;
mod ceilings;
mod data;
mod layer;
mod moe;
mod options;
mod report;
mod shapes;
mod step;
mod timer;

use crate::args::{HostConfig, Owner, Source, asks_for_help, parse};
use crate::cli::{open_registry, print, warn_about_plugins};
use crate::distributed::Group;
use crate::error::HostError;
use crate::log::{Level, Terminal};
use crate::plan::{Resolved, resolve};
use crate::plugins::Registry;
use crate::train::build::{self, Blueprint};
use crate::train::device::Placement;
use crate::whole_file;
use options::Options;
use std::sync::Arc;

const USAGE: &str = "\
usage: moeut-host bench step -task <task> [-<argument> <value> …]   whole training steps of the run so described
       moeut-host bench data -task <task> [-<argument> <value> …]   reading its batches
       moeut-host bench moe [-shape <shapes>] [-kernel <kernels>]   σ-MoE and SwitchHead's projections, each kernel
       moeut-host bench attention [-shape <shapes>]                 softmax attention

  -shape <list>       44M, 244M, 1B, tiny, or numbers: tokens x d_model x experts x top_k x width of an expert for
                      `moe`, sequences x tokens x heads x width of a head for `attention`; without it the paper's three
                      on a GPU, tiny on the CPU
  -kernel <list>      Kernels; without it all that support the device
  -warmup <int>       Steps or calls before anything is timed (3)
  -rounds <int>       Times that are taken; their median counts (7)
  -calls <int>        Steps or calls in each of them (4)
  --json              Print JSON instead of a table
  -out <file>         Write the JSON to a file, too

`moe` and `attention` take -gpu, -threads, -amp (1 here), -bfloat16, -dtype, -deterministic and -seed besides.
";

/// What of the host's arguments a layer by itself obeys.
const OF_MACHINE: &[&str] = &[
    "amp",
    "bfloat16",
    "data.cache_dir",
    "deterministic",
    "dtype",
    "gpu",
    "plugin_dir",
    "plugin_verify",
    "seed",
    "threads",
];

/// Runs a command line without its first word.
///
/// # Errors
/// For mistakes in the arguments, if what is to be measured fails, or the file cannot be written.
pub fn command(argv: &[String], terminal: &Arc<Terminal>) -> Result<(), HostError> {
    if asks_for_help(argv) {
        print(USAGE);
        return Ok(());
    }
    let Some(what) = argv.first().map(String::as_str) else {
        return Err(misuse("it does not say what to time".to_owned()));
    };
    let (options, rest) = Options::take(argv.get(1..).unwrap_or_default())?;
    let bench = match what {
        "step" => step::bench,
        "data" => data::bench,
        "moe" => moe::bench,
        "attention" => attention::bench,
        _ => {
            return Err(misuse(format!(
                "`{what}` is none of `step`, `moe`, `attention` and `data`"
            )));
        }
    };
    let registry = Arc::new(open_registry(&rest)?);
    warn_about_plugins(&registry, terminal);
    let report = bench(&rest, &options, &registry, terminal)?;
    terminal.finish();
    let json = report.json()?;
    // Before a file that cannot be written: minutes of measuring are not to be lost.
    if options.is_json {
        print(&json);
    } else {
        print(&report.to_string());
    }
    match &options.out {
        Some(out) => whole_file::write_or_explain(out, json.as_bytes()),
        None => Ok(()),
    }
}

fn misuse(why: String) -> HostError {
    HostError::new(
        "the bench command cannot be read",
        why,
        "type `moeut-host bench moe`, or `moeut-host bench --help`",
    )
}

/// The run that the arguments describe, which is to leave nothing behind.
fn blueprint(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Blueprint, HostError> {
    let quiet = ["-dry_run=1", "-n_samples=0"].map(str::to_owned);
    let argv = [argv, &quiet].concat();
    let Resolved { arguments, .. } = resolve(&argv, None, registry, terminal)?;
    for warning in &arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    let config = HostConfig::new(&arguments)?;
    if config.restore.is_some() {
        return Err(HostError::new(
            "`-restore` has no place in a bench",
            "steps are timed from the first one on, and a checkpoint's arguments are not looked up",
            "give the arguments of the run; weights can come from `-load_pretrained_model`",
        ));
    }
    Ok(Blueprint {
        folder: config.save_dir.join("bench"),
        arguments,
        config,
        restored: None,
        group: Group::single(),
        job: None,
        signals: Arc::default(),
    })
}

/// Device and precision of a layer by itself, and the host's arguments. Mixed precision is on unless somebody says
/// otherwise, because it is what models train in.
fn machine(argv: &[String], terminal: &Terminal) -> Result<(HostConfig, Placement), HostError> {
    let argv = [&["-amp=1".to_owned()], argv].concat();
    let arguments = parse(&argv, &[Owner::host()], None)?;
    let useless = arguments.raw.iter().find(|(name, (_, source))| {
        *source == Source::CommandLine && !OF_MACHINE.contains(&name.as_str())
    });
    if let Some((name, _)) = useless {
        return Err(misuse(format!(
            "`-{name}` means nothing to a layer by itself"
        )));
    }
    let mut config = HostConfig::new(&arguments)?;
    let placement = build::machine(&mut config, &Group::single(), terminal)?;
    Ok((config, placement))
}
