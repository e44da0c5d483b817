//! `moeut-host sweep show|run|slurm|results|convert`: reads their words and prints what they did. The work is in [`crate::sweep`].

use crate::args::{Token, asks_for_help, tokens};
use crate::cli::{open_registry, print, warn_about_plugins};
use crate::error::HostError;
use crate::log::{Level, Terminal};
use crate::sweep::convert::convert;
use crate::sweep::file::SweepFile;
use crate::sweep::runs::{Sweep, Wish};
use crate::sweep::{queue, slurm, table};
use crate::whole_file::write_or_explain;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const USAGE: &str = "\
usage: moeut-host sweep show <file> [-<argument> <value> …] [--json]      the runs, as command lines
       moeut-host sweep run <file> [-jobs <n>] [-<argument> <value> …]    train them: one on each free GPU, or n on the CPU
       moeut-host sweep slurm <file> [-jobs <n>] [-<argument> <value> …]  a script for `sbatch`: an array of jobs
       moeut-host sweep results <file> [-<argument> <value> …]            what they have reached so far, however trained
       moeut-host sweep convert <file> [-o <file>]                        the same sweep for `wandb agent`

A file is a sweep of W&B with `method: grid` or `random`; for the latter `-n <n>` says how many runs, and
`-draw_seed <n>` (0) which. Arguments replace what the file says about them; `-name` is the name of the sweep, by
default that of the file. Started again, `run` goes on where it was.
";

/// What the words say.
#[derive(Debug, Default, PartialEq)]
struct Words {
    places: Vec<String>,
    wish: Wish,
    n_jobs: Option<usize>,
    out: Option<PathBuf>,
    is_json: bool,
}

/// Runs a command line without its first word, and returns the exit code.
///
/// # Errors
/// For words that are no such command, and whatever the command says.
pub fn run(argv: &[String], terminal: &Arc<Terminal>) -> Result<u8, HostError> {
    if asks_for_help(argv) || argv.is_empty() {
        print(USAGE);
        return Ok(0);
    }
    let words = Words::read(argv)?;
    let places: Vec<&str> = words.places.iter().map(String::as_str).collect();
    let (command, path) = match places[..] {
        [
            command @ ("show" | "run" | "slurm" | "results" | "convert"),
            path,
        ] => (command, Path::new(path)),
        ["show" | "run" | "slurm" | "results" | "convert"] => {
            return Err(misuse("the sweep file is missing"));
        }
        _ => {
            return Err(misuse(format!(
                "`sweep {}` is no such command",
                words.places.join(" ")
            )));
        }
    };
    words.check(command)?;
    let file = SweepFile::read(path)?;
    if command == "convert" {
        convert_command(&file, words.out.as_deref())?;
        return Ok(0);
    }
    let registry = Arc::new(open_registry(argv)?);
    warn_about_plugins(&registry, terminal);
    let sweep = Sweep::new(&file, &words.wish, &registry, terminal)?;
    for warning in &sweep.warnings {
        terminal.message(Level::Warning, &format!("{}: {warning}", path.display()));
    }
    match command {
        "show" => print(&show(&sweep, words.is_json)),
        "results" => print(&queue::results(&sweep)),
        "slurm" => print(&slurm::script(&sweep, &program()?, words.n_jobs)),
        _ => {
            let (exit_code, table) = queue::run(&sweep, words.n_jobs, terminal)?;
            print(&table);
            return Ok(exit_code);
        }
    }
    Ok(0)
}

fn program() -> Result<PathBuf, HostError> {
    queue::program().map_err(|error| {
        HostError::new(
            "this program's file is not known",
            error.to_string(),
            "start it by its full path",
        )
    })
}

/// Command lines, or a list of objects.
fn show(sweep: &Sweep, is_json: bool) -> String {
    if !is_json {
        let line = |arguments: Vec<String>| {
            let words: Vec<String> = arguments.iter().map(|word| slurm::quote(word)).collect();
            format!("moeut-host {}\n", words.join(" "))
        };
        return sweep.runs.iter().map(|run| line(run.arguments())).collect();
    }
    let runs: Vec<Value> = sweep
        .runs
        .iter()
        .map(|run| {
            json!({
                "name": run.name,
                "parameters": table::pairs(&run.parameters),
                "arguments": run.arguments(),
            })
        })
        .collect();
    format!("{:#}\n", Value::from(runs))
}

/// Prints the converted file, or writes it where nothing is.
fn convert_command(file: &SweepFile, out: Option<&Path>) -> Result<(), HostError> {
    let text = convert(file).map_err(|mistake| mistake.in_file(&file.path))?;
    let Some(out) = out else {
        print(&text);
        return Ok(());
    };
    if out.exists() {
        return Err(HostError::new(
            format!("`{}` exists", out.display()),
            "it would be lost",
            "choose another `-o`, or remove it",
        ));
    }
    write_or_explain(out, text.as_bytes())?;
    print(&format!(
        "wrote `{}`: start it with `wandb sweep {}`\n",
        out.display(),
        out.display()
    ));
    Ok(())
}

impl Words {
    fn read(argv: &[String]) -> Result<Self, HostError> {
        // The only flag without a value.
        let is_json = |word: &&String| matches!(word.as_str(), "-json" | "--json");
        let rest: Vec<String> = argv.iter().filter(|word| !is_json(word)).cloned().collect();
        let mut words = Self {
            is_json: argv.iter().any(|word| is_json(&word)),
            ..Self::default()
        };
        for token in tokens(&rest) {
            match token {
                Token::Positional(text) => words.places.push(text.to_owned()),
                Token::Flag { name, value: None } => {
                    return Err(misuse(format!("`-{name}` has no value")));
                }
                Token::Flag {
                    name: "jobs",
                    value: Some(value),
                } => words.n_jobs = Some(count("jobs", value)?),
                Token::Flag {
                    name: "n",
                    value: Some(value),
                } => words.wish.n_draws = Some(count("n", value)?),
                Token::Flag {
                    name: "draw_seed",
                    value: Some(value),
                } => {
                    words.wish.seed = value
                        .parse()
                        .map_err(|_| misuse(format!("`-draw_seed {value}` is no whole number")))?;
                }
                Token::Flag {
                    name: "o",
                    value: Some(value),
                } => words.out = Some(value.into()),
                Token::Flag {
                    name,
                    value: Some(value),
                } => {
                    words
                        .wish
                        .arguments
                        .push((name.to_owned(), value.to_owned()));
                }
            }
        }
        Ok(words)
    }

    /// Refuses what the command would not look at.
    fn check(&self, command: &str) -> Result<(), HostError> {
        let is_draw = self.wish.n_draws.is_some() || self.wish.seed != 0;
        for (flag, is_given, commands) in [
            ("jobs", self.n_jobs.is_some(), &["run", "slurm"][..]),
            ("o", self.out.is_some(), &["convert"]),
            ("json", self.is_json, &["show"]),
            (
                "n` or `-draw_seed",
                is_draw,
                &["show", "run", "slurm", "results"],
            ),
        ] {
            if is_given && !commands.contains(&command) {
                return Err(misuse(format!("`sweep {command}` has no `-{flag}`")));
            }
        }
        match self.wish.arguments.first() {
            Some((name, _)) if command == "convert" => {
                Err(misuse(format!("`sweep convert` has no `-{name}`")))
            }
            _ => Ok(()),
        }
    }
}

fn count(flag: &str, value: &str) -> Result<usize, HostError> {
    let number = value.parse::<usize>().ok().filter(|&number| number > 0);
    number.ok_or_else(|| misuse(format!("`-{flag} {value}` is no whole number above 0")))
}

fn misuse(why: impl Into<String>) -> HostError {
    HostError::new(
        "the sweep command cannot be read",
        why,
        "type `moeut-host sweep --help`",
    )
}
