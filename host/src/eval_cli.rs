//! `moeut-host eval`: scores a trained model on evaluation sets and validation streams; or only counts what is in them.
//!
//! Arguments are those of the checkpoint unless the command line says otherwise, except for `-data.dir`: here it is the
//! folder of the evaluation sets, and the streams of the training stay where they were. Nothing but the JSON file is
//! written, and nothing locked. How sets are scored is in [`crate::eval`].

mod count;
mod table;

pub use table::COLUMNS;

use crate::args::{Arguments, HostConfig, Role, asks_for_help, nearest, parse, peek};
use crate::cli::{open_registry, print, warn_about_plugins};
use crate::error::HostError;
use crate::eval::{self, EvalSet, Setting};
use crate::log::{Level, Terminal};
use crate::plan::{candidates, owners};
use crate::plugins::{Component, Registry};
use crate::signals::{Ending, Signals};
use crate::train::TrainError;
use crate::train::build::{Blueprint, Site, eval_batch_size, eval_stream, n_microbatches, size};
use crate::train::evaluate::{Watcher, evaluate};
use crate::train::reporting::Observer;
use crate::train::segments::Segments;
use crate::train::validation::{AllScores, as_json, named};
use crate::trained::{self, Trained};
use crate::whole_file::{self, folder_of};
use moeut_plugin_api::{ComponentKind, EvaluationRequest, PluginError, StreamRequest};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const USAGE: &str = "\
usage: moeut-host eval -restore <checkpoint or run folder> [-sets <names>] [-<argument> <value> …]
       moeut-host eval -name <name> [-sets <names>] [-<argument> <value> …]
       moeut-host eval --count-only [-sets <names>] [-<argument> <value> …]

  -sets <names>                       Evaluation sets and validation streams with commas between them; all, the
                                      default, leaves out those whose files are missing
  -data.dir <folder>                  Where the files of the evaluation sets are, instead of downloads
  -limit <n>                          Of each group of questions the first n only: scores of a sample, sooner
  -json <file>                        Where the scores go, too; else `eval.json` in the run's folder
  --count-only                        No model: a line `name read skipped` for each set, or for token datasets by name

Other arguments are those of the checkpoint. The table goes to stdout, everything else to stderr.
";

/// The value of `-limit` in a file of scores; absent if all questions were scored.
pub const LIMIT: &str = "limit";
/// The argument that is the sets' alone here.
const DATA_DIR: &str = "data.dir";

/// Words of this command that are no argument of host or components.
struct Words {
    sets: Option<Vec<String>>,
    json: Option<PathBuf>,
    /// Questions of each group that are scored, if not all.
    limit: Option<usize>,
    is_count_only: bool,
    /// Everything else.
    argv: Vec<String>,
}

impl Words {
    fn new(argv: &[String]) -> Result<Self, HostError> {
        let is_count_only = |word: &String| matches!(word.as_str(), "--count-only" | "-count-only");
        let rest: Vec<String> = argv
            .iter()
            .filter(|word| !is_count_only(word))
            .cloned()
            .collect();
        let value = |name: &str, example: &str| match peek(argv, name).pop() {
            Some(value) if value.chars().any(|c| !",; ".contains(c)) => Ok(Some(value)),
            None if without(argv, name).len() == argv.len() => Ok(None),
            _ => Err(HostError::new(
                format!("no value for `-{name}`"),
                format!("it takes {example}"),
                format!("write `-{name} <value>`"),
            )),
        };
        let sets = value("sets", "names with commas between them, or `all`")?;
        let json = value("json", "the path of a file")?;
        let limit = value("limit", "a number of questions")?;
        let limit = limit.map(|text| limit_of(&text)).transpose()?;
        let names = |sets: String| -> Vec<String> {
            let names = sets.split(',').map(str::trim);
            names
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect()
        };
        Ok(Self {
            sets: sets.map(names).filter(|names| names != &["all"]),
            json: json.map(PathBuf::from),
            limit,
            is_count_only: argv.iter().any(is_count_only),
            argv: without(&without(&without(&rest, "sets"), "json"), "limit"),
        })
    }
}

/// The value of `-limit`.
fn limit_of(text: &str) -> Result<usize, HostError> {
    let limit = text.parse().ok().filter(|&limit| limit > 0);
    limit.ok_or_else(|| {
        HostError::new(
            format!("`-limit {text}` cannot be used"),
            "it is how many questions of each group are scored, a whole number above 0",
            "set `-limit` to 100, say, or leave it out to score all",
        )
    })
}

/// `argv` without a flag and its value.
fn without(argv: &[String], name: &str) -> Vec<String> {
    let mut rest = Vec::new();
    let mut words = argv.iter().peekable();
    while let Some(word) = words.next() {
        let flag = word
            .strip_prefix('-')
            .map(|word| word.strip_prefix('-').unwrap_or(word));
        match flag.and_then(|flag| flag.strip_prefix(name)) {
            Some("") => {
                words.next_if(|next| !next.starts_with('-'));
            }
            Some(value) if value.starts_with('=') => {}
            _ => rest.push(word.clone()),
        }
    }
    rest
}

/// Runs the command; `argv` is what follows `eval`. Returns the exit code.
///
/// # Errors
/// If there is no checkpoint, a set that is named is not there, or the checkpoint does not fit the plugins.
pub fn command(argv: &[String], terminal: &Arc<Terminal>) -> Result<u8, HostError> {
    if asks_for_help(argv) {
        print(USAGE);
        return Ok(0);
    }
    let signals = Arc::new(Signals::listen(false)?);
    let words = Words::new(argv)?;
    let registry = Arc::new(open_registry(argv)?);
    warn_about_plugins(&registry, terminal);
    let outcome = if words.is_count_only {
        count::count(&words, &registry, terminal, &signals)
    } else {
        score(&words, &registry, terminal, &signals)
    };
    terminal.finish();
    match (signals.ending(), outcome) {
        // Whoever was at work has stopped because of the signal, and may say so in words of its own.
        (Some(ending), _) => {
            terminal.message(Level::Info, &format!("stopped by {}", ending.signal()));
            Ok(Ending::exit_code(ending))
        }
        (None, outcome) => outcome.map(|()| 0),
    }
}

/// Scores, prints the table and writes the file; nothing if a signal comes.
fn score(
    words: &Words,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
    signals: &Arc<Signals>,
) -> Result<(), HostError> {
    // A first reading says which checkpoint; then its arguments join in.
    let first = parse(&words.argv, &candidates(&words.argv, registry)?, None)?;
    let folder = trained::checkpoint_folder(&HostConfig::new(&first)?)?;
    let json = match &words.json {
        Some(path) => path.clone(),
        None => beside_checkpoints(&folder).join("eval.json"),
    };
    let given = words.sets.iter().flatten();
    let given = given.filter(|name| registry.find(ComponentKind::ChoiceDataset, name).is_ok());
    let sets: Vec<String> = match &words.sets {
        Some(_) => given.cloned().collect(),
        None => choice_sets(registry),
    };
    let argv = without(&words.argv, DATA_DIR);
    let blueprint = trained::blueprint(&argv, folder, &sets, registry, terminal)?;
    for warning in &blueprint.arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    check_folder_of(&json)?;
    let mut stored = blueprint
        .restored
        .as_ref()
        .map(|loaded| loaded.snapshot.args.clone())
        .unwrap_or_default();
    stored.remove(DATA_DIR);
    let of_sets = arguments_of_sets(&words.argv, &sets, Some(&stored), registry)?;
    let trained = Trained::open(&blueprint, registry, terminal, signals)?;
    let mut evaluator = Evaluator {
        trained,
        blueprint: &blueprint,
        of_sets: &of_sets,
        limit: words.limit,
        registry,
        terminal,
        signals,
    };
    let Some(all) = evaluator.score(words.sets.as_deref())? else {
        return Ok(());
    };
    terminal.finish();
    print(&table::render(&all, words.limit));
    let mut scores = named("", &all);
    // Whoever reads the file has to know that these are not the scores of the whole sets.
    scores.extend(words.limit.map(|limit| (LIMIT.to_owned(), limit as f64)));
    write(&json, &as_json(&scores)?)?;
    terminal.message(Level::Info, &format!("scores are in `{}`", json.display()));
    Ok(())
}

/// The arguments as the sets see them; other components have no part in it.
fn arguments_of_sets(
    argv: &[String],
    sets: &[String],
    stored: Option<&BTreeMap<String, String>>,
    registry: &Registry,
) -> Result<Arguments, HostError> {
    let certain = sets
        .iter()
        .map(|name| registry.find(ComponentKind::ChoiceDataset, name))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(parse(
        argv,
        &owners(&certain, Role::Idle, registry),
        stored,
    )?)
}

/// Names of all choice datasets, sorted.
fn choice_sets(registry: &Registry) -> Vec<String> {
    let of_kind = |component: &Component<'_>| component.info.kind == ComponentKind::ChoiceDataset;
    let mut names: Vec<String> = registry
        .components()
        .filter(of_kind)
        .map(|component| component.info.name.clone())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// A name that is none of `known`.
fn unknown(name: &str, known: &[String]) -> HostError {
    let quoted = |names: &[String]| {
        let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
        names.join(", ")
    };
    let near = nearest(name, known.iter().map(String::as_str));
    let fix = if near.is_empty() {
        "type `-sets all`, or some of these names with commas between them".to_owned()
    } else {
        format!("did you mean {}?", quoted(&near).replace(", ", " or "))
    };
    let why = if known.is_empty() {
        "there are no sets at all; they come with plugins".to_owned()
    } else {
        format!("there are {}", quoted(known))
    };
    HostError::new(format!("unknown evaluation set `{name}`"), why, fix)
}

/// Whether an error says that data is not there, rather than what is wrong with it; by its words, as [`eval::is_missing`].
fn is_absent(error: &PluginError) -> bool {
    eval::is_missing(error)
        || error.what.ends_with(" has no text")
        || error.what.ends_with(" cannot be downloaded")
}

/// The folder of the run that a checkpoint, or a folder of checkpoints, is of; or the folder that it is in.
fn beside_checkpoints(checkpoint: &Path) -> &Path {
    let is_checkpoints = |path: &&Path| path.file_name().is_some_and(|name| name == "checkpoint");
    let mut folders = checkpoint.ancestors().take(2);
    let below = folders.find(is_checkpoints).unwrap_or(checkpoint);
    match below.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => below,
    }
}

/// Before hours of scoring.
fn check_folder_of(path: &Path) -> Result<(), HostError> {
    let folder = folder_of(path);
    if folder.is_dir() {
        return Ok(());
    }
    Err(HostError::new(
        format!("the scores cannot be written to `{}`", path.display()),
        format!("`{}` is no folder", folder.display()),
        format!(
            "make it with `mkdir -p {}`, or set `-json` to another file",
            folder.display()
        ),
    ))
}

fn write(path: &Path, text: &str) -> Result<(), HostError> {
    whole_file::write(path, format!("{text}\n").as_bytes()).map_err(|error| {
        HostError::new(
            format!("the scores cannot be written to `{}`", path.display()),
            error.to_string(),
            "check permissions and free space, or set `-json` to another file",
        )
    })
}

/// What scoring needs.
struct Evaluator<'a> {
    trained: Trained,
    blueprint: &'a Blueprint,
    of_sets: &'a Arguments,
    limit: Option<usize>,
    registry: &'a Arc<Registry>,
    terminal: &'a Arc<Terminal>,
    signals: &'a Arc<Signals>,
}

/// Something to score.
enum Subject {
    Stream(StreamRequest),
    Set(EvalSet),
}

impl Evaluator<'_> {
    /// Scores what is named, or all that is there; nothing if a signal comes.
    fn score(&mut self, names: Option<&[String]>) -> Result<Option<AllScores>, HostError> {
        // All are opened first: what is missing is not found out after hours.
        let subjects = self.subjects(names)?;
        let mut all = AllScores::default();
        for subject in &subjects {
            match subject {
                Subject::Stream(request) => {
                    let Some(scores) = self.stream(request)? else {
                        return Ok(None);
                    };
                    all.streams.push((request.name.clone(), scores));
                }
                Subject::Set(set) => {
                    let Some(scores) = self.set(set)? else {
                        return Ok(None);
                    };
                    all.sets.push(scores);
                }
            }
        }
        Ok(Some(all))
    }

    fn subjects(&self, names: Option<&[String]>) -> Result<Vec<Subject>, HostError> {
        let streams = &self.trained.plan.validation;
        let sets = choice_sets(self.registry);
        let stream_names = streams.iter().map(|request| request.name.clone());
        let known: Vec<String> = stream_names.chain(sets).collect();
        let mut subjects = Vec::new();
        for name in names.unwrap_or(&known) {
            if let Some(request) = streams.iter().find(|request| request.name == *name) {
                subjects.push(Subject::Stream(request.clone()));
            } else if known.contains(name) {
                match self.open(name) {
                    Ok(set) => subjects.push(Subject::Set(set)),
                    Err(error) if names.is_none() && is_absent(&error) => {
                        let text = format!("`{name}` is left out: {}, {}", error.what, error.why);
                        self.terminal.message(Level::Warning, &text);
                    }
                    Err(error) => return Err(error.into()),
                }
            } else {
                return Err(unknown(name, &known));
            }
        }
        Ok(subjects)
    }

    fn open(&self, name: &str) -> Result<EvalSet, PluginError> {
        let component = self.registry.find(ComponentKind::ChoiceDataset, name)?;
        let arguments = self.of_sets.config_for(&component.info.args)?;
        let services = &self.trained.services;
        let dataset =
            component
                .client()
                .new_choice_dataset(&component.info.name, &arguments, services)?;
        let planned = self.trained.plan.evaluations.iter();
        let planned = planned.clone().find(|request| request.dataset == name);
        let request = planned.cloned().unwrap_or_else(|| EvaluationRequest {
            dataset: name.to_owned(),
            batch_multiplier: 1,
            is_end_only: false,
        });
        let setting = Setting {
            tokenizer: &self.trained.tokenizer,
            vocab_size: self.trained.vocab_size,
            batch_size: self.batch_size(),
            seq_len: size(self.trained.plan.train.seq_len)?,
            compat: self.blueprint.config.compat,
            limit: self.limit,
            warn: &|text| self.terminal.message(Level::Warning, text),
        };
        EvalSet::open(&dataset, &request, setting)
    }

    fn batch_size(&self) -> usize {
        let Blueprint { config, group, .. } = self.blueprint;
        eval_batch_size(config, n_microbatches(config, group), group)
    }

    fn stream(
        &mut self,
        request: &StreamRequest,
    ) -> Result<Option<crate::train::evaluate::Scores>, HostError> {
        let batch_size = self.batch_size();
        let site = Site {
            blueprint: self.blueprint,
            registry: self.registry,
            services: &self.trained.services,
        };
        let stream = eval_stream(site.stream(request)?, request)?;
        let Trained { model, device, .. } = &mut self.trained;
        let segments = Segments::new(model.abilities()?.has_memory, 0.0);
        let label = format!("scoring `{}`", request.name);
        let watcher = Watcher {
            group: &self.blueprint.group,
            signals: self.signals,
            observer: &mut Observer::default(),
            progress: &|done, all| self.terminal.work(&label, done, all),
        };
        let scores = evaluate(model, segments, &stream, batch_size, *device, watcher);
        scores.map_err(HostError::from)
    }

    fn set(&mut self, set: &EvalSet) -> Result<Option<crate::eval::metrics::SetScores>, HostError> {
        let label = format!("scoring `{}`", set.name);
        let Trained {
            model,
            tokenizer,
            device,
            ..
        } = &mut self.trained;
        let terminal = self.terminal;
        let alone = (&**self.signals, &self.blueprint.group);
        let scored = set.score(model, tokenizer, *device, alone, |done, all| {
            terminal.work(&label, done, all);
        });
        let scored = scored.map_err(|error: TrainError| HostError::from(error))?;
        let sample = self.limit.map_or_else(String::new, |limit| {
            format!(", the first {limit} of each group")
        });
        Ok(scored.map(|(scores, effort)| {
            terminal.message(
                Level::Info,
                &format!(
                    "{}: {} questions{sample}; {} tokens computed, {} without shared prefixes and padding",
                    set.name,
                    set.len(),
                    effort.n_computed,
                    effort.n_whole
                ),
            );
            scores
        }))
    }
}
