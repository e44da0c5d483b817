//! `run-tests`: scores trained models on the evaluation sets, one after the other.
//!
//! The scores of a run are in its folder as `result.json`, under the reference's names (`lambada/accuracy/total`).
//! Started again, it goes on with the first run that lacks them, or those of a set that is asked for, or has those of
//! another sample (`-limit`). A folder with a bare checkpoint of the reference, `model.ckpt`, gets its `args.json` from
//! there, and is a run like any other then.

use crate::child::{self, Program};
use crate::files;
use crate::make::{self, PLACES, say};
use crate::roster::Roster;
use crate::words::Words;
use moeut_host::checkpoint;
use moeut_host::error::HostError;
use moeut_host::eval_cli::LIMIT;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Flags of the command; those from `sets` on are the host's.
pub(crate) const FLAGS: [&str; 10] = [
    "save_dir",
    "runs",
    "sets",
    LIMIT,
    "data.dir",
    "data.cache_dir",
    "gpu",
    "threads",
    "test_batch_size",
    "plugin_dir",
];
/// Products whose runs are scored unless some are named.
const TABLES: [&str; 2] = ["main_result_table", "sut_result_table"];
/// Checkpoints of the reference.
const BARE: [&str; 2] = ["model.ckpt", "model.pth"];

/// Scores the runs that are named, or those of the result tables. Returns 1 if one of them failed.
///
/// # Errors
/// If the list of runs cannot be read, the limit is none, or `moeut-host` cannot be started.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    let limit = words.positive(LIMIT)?;
    let sets = words.list("sets", "");
    let names = if words.names.is_empty() {
        let roster = Roster::open(words.get("runs").map(Path::new))?;
        let mut names: Vec<String> = Vec::new();
        for name in TABLES.iter().flat_map(|table| roster.of(table)) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    } else {
        words.names.clone()
    };
    let places: Vec<PathBuf> = words
        .list("save_dir", PLACES)
        .into_iter()
        .map(PathBuf::from)
        .collect();
    let mut n_failed = 0;
    for name in &names {
        let folder = make::folder(&places, name);
        let Some(weights) = weights(&folder) else {
            say(&format!(
                "`{name}` is left out: there is no checkpoint in `{}`",
                folder.display()
            ));
            n_failed += 1;
            continue;
        };
        let result = folder.join("result.json");
        if is_current(&result, &weights, &sets, limit) {
            say(&format!("{}: nothing has changed", result.display()));
            continue;
        }
        if let Err(error) = adopt(&folder, &weights) {
            say(&format!(
                "`{name}` is left out: {}",
                crate::run::one_line(&error)
            ));
            n_failed += 1;
            continue;
        }
        say(&format!("{name}: scoring `{}`", weights.display()));
        if !child::run(
            Program::Host,
            Path::new("."),
            &arguments(words, &weights, &result),
        )? {
            say(&format!("`{name}` has no scores: see above"));
            n_failed += 1;
        }
    }
    Ok(u8::from(n_failed > 0))
}

fn arguments(words: &Words, weights: &Path, result: &Path) -> Vec<String> {
    let mut arguments = vec!["eval".to_owned()];
    let mut add = |name: &str, value: String| arguments.push(format!("-{name}={value}"));
    add("restore", weights.display().to_string());
    add("json", result.display().to_string());
    for name in &FLAGS[2..] {
        if let Some(value) = words.get(name) {
            add(name, value.to_owned());
        }
    }
    arguments
}

/// The checkpoint of a run.
fn weights(folder: &Path) -> Option<PathBuf> {
    let bare = BARE.map(|name| folder.join(name));
    let mut known = [folder.join("checkpoint")].into_iter().chain(bare);
    known.find(|path| path.exists())
}

/// Whether there are scores: whole, of all sets and as many questions as are asked for, and made after the weights.
fn is_current(result: &Path, weights: &Path, sets: &[String], limit: Option<u64>) -> bool {
    let time =
        |path: &Path| -> Option<SystemTime> { std::fs::metadata(path).ok()?.modified().ok() };
    let Some(scores) = files::remembered::<BTreeMap<String, Option<f64>>>(result) else {
        return false;
    };
    // `all` are those whose data is there, which only scoring tells.
    let has_set =
        |set: &String| set == "all" || scores.keys().any(|key| key.starts_with(&format!("{set}/")));
    let limit_of_scores = scores.get(LIMIT).copied().flatten();
    limit_of_scores == limit.map(|limit| limit as f64)
        && sets.iter().all(has_set)
        && time(result)
            .zip(time(weights))
            .is_some_and(|(result, weights)| result > weights)
}

/// Writes the arguments of a bare checkpoint beside it.
fn adopt(folder: &Path, weights: &Path) -> Result<(), HostError> {
    let path = folder.join("args.json");
    if path.is_file() {
        return Ok(());
    }
    let args = checkpoint::load(weights)?.snapshot.args;
    let text = serde_json::to_string_pretty(&args).unwrap_or_default();
    files::write(&path, text.as_bytes())
}
