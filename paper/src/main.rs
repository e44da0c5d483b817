//! `moeut-paper`: the tables and figures of the MoEUT paper, from runs.
//!
//! ```text
//! run folders, W&B (wandb), checkpoints (run_tests)
//!     → run        one run: arguments, numbers; whole or left out by name
//!     → roster     which runs a table or figure is made of
//!     → products   a file for each table and figure
//!     → table, form   LaTeX, Markdown, CSV; PDF, SVG, PNG
//! ```
//! [`make`] goes this way, and [`stamp`] remembers what is done. [`reproduce`] trains small models first.

mod child;
mod code;
mod configurations;
mod files;
mod form;
mod make;
mod model;
mod product;
mod products;
mod reproduce;
mod roster;
mod run;
mod run_tests;
mod selections;
mod stamp;
mod table;
mod trace;
mod wandb;
mod words;

use moeut_host::error::{EXIT_USER_ERROR, HostError};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use words::{Words, misuse};

const USAGE: &str = "\
usage: moeut-paper all | <name> …                         makes every table and figure, or those named
       moeut-paper list                                   their names
       moeut-paper configurations <sweep file, folder> …  sizes and cost of the models of sweep files
       moeut-paper fetch [-config config.json]            finished runs of Weights & Biases, into paper/wandb
       moeut-paper run-tests [<run> …]                    scores trained models, as result.json in their folders
       moeut-paper trace <run> …                          which experts a model selects for each token, for figures
       moeut-paper reproduce [-scale small|gpu|smoke]     trains small models, then makes everything from them

  -out <folder>         Where the files go; default paper_out, of reproduce reproduction
  -save_dir <folders>   Where runs are, with commas between; default
                        save,paper/moe_universal/checkpoints,paper/wandb
  -runs <file>          Which runs a table or figure is made of, as JSON; default: the paper's
  -plugin_dir <folders> Further plugins, with commas between
  -sets, -limit, -data.dir, -data.cache_dir, -gpu, -threads, -test_batch_size
                        Of run-tests: as for `moeut-host eval`
  -n_tokens <number>    Of trace: tokens of the held-out text; default 4096

Of reproduce:
  -code <folder>        Source files (.rs .py .c .h .cpp .java .js .go) for the figure on code, at any depth: a clone of
                        this project, the default being the current folder, ~/.cargo/registry/src or /usr; small needs
                        1.5 MB, gpu 60 MB
  -text <folder>        Files of text that everything else is trained on, as for -task moeut_text_files; default: small
                        the embedded corpus, gpu C4 from the hub
  -data.dir <folder>    The evaluation sets; without it the result tables have no scores. Small scores the first 50
                        questions of each group
  -jobs <n>             Runs at once
";

fn main() -> ExitCode {
    let argv: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&argv) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let in_color =
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            make::say(error.render(in_color).trim_end());
            ExitCode::from(EXIT_USER_ERROR)
        }
    }
}

/// Does what is asked for; returns the exit code.
fn dispatch(argv: &[String]) -> Result<u8, HostError> {
    let is_help = |word: &String| matches!(word.trim_start_matches('-'), "h" | "help");
    let command = argv
        .iter()
        .find(|word| !word.starts_with('-'))
        .map(String::as_str);
    if argv.iter().any(is_help) {
        print(USAGE);
        return Ok(0);
    }
    match command {
        None => Err(misuse("no table or figure is named")),
        Some("list") => {
            for product in products::ALL {
                print(&format!("{:22}{}\n", product.name, product.summary));
            }
            Ok(0)
        }
        Some(name) => {
            let found = COMMANDS.iter().find(|(command, ..)| *command == name);
            let Some((_, flags, run)) = found else {
                return make::command(&Words::read(argv, &make::FLAGS)?);
            };
            run(&Words::read(&without(argv, name), flags)?)
        }
    }
}

type Command = fn(&Words) -> Result<u8, HostError>;

/// Commands that are no name of a table or figure, and their flags.
const COMMANDS: &[(&str, &[&str], Command)] = &[
    (
        "configurations",
        &configurations::FLAGS,
        configurations::command,
    ),
    ("fetch", &wandb::FLAGS, wandb::command),
    ("run-tests", &run_tests::FLAGS, run_tests::command),
    ("trace", &trace::FLAGS, trace::command),
    ("reproduce", &reproduce::FLAGS, reproduce::command),
];

/// The words without the command.
fn without(argv: &[String], command: &str) -> Vec<String> {
    let mut rest = argv.to_vec();
    if let Some(index) = rest.iter().position(|word| word == command) {
        rest.remove(index);
    }
    rest
}

/// Prints to where other programs may read.
pub(crate) fn print(text: &str) {
    // A reader that has gone away is no error.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
