//! One run: what it was, what it reached, and where that stands.
//!
//! A run is a folder in the form that `moeut-host` leaves behind. Other sources are brought into this form first:
//! [`crate::wandb`] writes such folders, [`crate::run_tests`] completes those of bare checkpoints.
//!
//! ```text
//! args.json                      the arguments as typed
//! metrics.jsonl                  one record a line; may be absent if there are results
//! startup_log.txt                each start, with the machine
//! eval.json, result.json, …      scores of evaluation sets, as `moeut-host eval` writes them
//! ```
//! A run counts only if it is whole: nothing is averaged over, guessed, or taken from an earlier validation.

use crate::files;
use crate::model::{Catalog, Model};
use moeut_host::eval_cli::LIMIT;
use moeut_host::run_folder::read_args;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Files with scores of evaluation sets, those of the reference's scripts included; later ones win.
const RESULTS: [&str; 4] = ["eval.json", "result.json", "result2.json", "result3.json"];
/// Where scores are in a record, as in the reference's dashboards.
const VALIDATION: &str = "validation/";
/// Durations of a step, the more exact one first.
const STEP_TIMES: [&str; 2] = ["timing/exact_ms_per_iter", "timing/ms_per_iter"];
/// What every table and figure shows.
pub(crate) const PERPLEXITY: &str = "validation/val/perplexity";

/// A run that is whole.
#[derive(Debug)]
pub(crate) struct Run {
    /// Name of its folder.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) folder: PathBuf,
    /// Its model and the arguments behind it.
    pub(crate) model: Model,
    /// The last value of each number; NaN for what was no number.
    metrics: BTreeMap<String, f64>,
    /// Each record's [`STEP_TIMES`].
    step_times: [Vec<f64>; 2],
    /// Seconds since 1970 of each start, and of the last record.
    times: (Vec<u64>, Vec<f64>),
    /// Of evaluation sets of which a sample was scored: the number of questions of each group.
    samples: BTreeMap<String, f64>,
    /// The text of all starts.
    starts: String,
}

/// Why a run is left out, in one line.
pub(crate) type Reason = String;

impl Run {
    /// Reads a folder.
    ///
    /// # Errors
    /// If it is not there, damaged, or of a run that has not reached its end.
    pub(crate) fn read(folder: &Path, catalog: &Catalog) -> Result<Self, Reason> {
        let shown = folder.display();
        if !folder.is_dir() {
            return Err(format!("there is no folder `{shown}`"));
        }
        let args = read_args(folder)
            .map_err(|error| one_line(&error))?
            .ok_or_else(|| format!("`{shown}` has no `args.json`: it was never trained"))?;
        let model = catalog.model(&args).map_err(|error| one_line(&error))?;
        let mut records = Records::default();
        let path = folder.join("metrics.jsonl");
        if path.is_file() {
            records.read(&path)?;
            let end = model
                .integer("stop_after")
                .ok_or_else(|| format!("`{shown}` has no `stop_after`, and so no end"))?;
            if records.validated < Some(end) {
                let reached = records.validated.map_or_else(
                    || "never".to_owned(),
                    |step| format!("last at step {step} of {end}"),
                );
                return Err(format!("`{shown}` is half-finished: validated {reached}"));
            }
        }
        let samples = merge_results(folder, &mut records.last)?;
        if !path.is_file() && samples.is_none() {
            return Err(format!(
                "`{shown}` has neither `metrics.jsonl` nor `result.json`"
            ));
        }
        let starts = std::fs::read_to_string(folder.join("startup_log.txt")).unwrap_or_default();
        Ok(Self {
            name: name_of(folder),
            folder: folder.to_owned(),
            model,
            metrics: records.last,
            step_times: records.step_times,
            times: (start_times(&starts), records.times),
            samples: samples.unwrap_or_default(),
            starts,
        })
    }

    /// The last value of a number.
    ///
    /// # Errors
    /// If it was never logged, or is NaN or infinite.
    pub(crate) fn metric(&self, name: &str) -> Result<f64, Reason> {
        match self.metrics.get(name) {
            Some(value) if value.is_finite() => Ok(*value),
            Some(_) => Err(format!("`{name}` is not finite")),
            None => Err(format!("it has no `{name}`")),
        }
    }

    /// Of how many questions of each group an evaluation set's scores are, if not of all.
    pub(crate) fn sample(&self, set: &str) -> Option<f64> {
        self.samples.get(set).copied()
    }

    /// Metrics whose names are `beginning` and a number, by number.
    ///
    /// # Errors
    /// If one of them is NaN or infinite.
    pub(crate) fn numbered(&self, beginning: &str) -> Result<Vec<(u64, f64)>, Reason> {
        let names = self.metrics.keys().filter_map(|name| {
            let number = name.strip_prefix(beginning)?.parse().ok()?;
            Some((number, name))
        });
        let mut found = names
            .map(|(number, name)| Ok((number, self.metric(name)?)))
            .collect::<Result<Vec<(u64, f64)>, Reason>>()?;
        found.sort_by_key(|(number, _)| *number);
        Ok(found)
    }

    /// Seconds of work: from each start to the last record before the next one. None if nothing tells.
    pub(crate) fn seconds(&self) -> Option<f64> {
        let (starts, records) = &self.times;
        let mut sum = 0.0;
        for (index, &start) in starts.iter().enumerate() {
            let end = starts
                .get(index + 1)
                .map_or(f64::INFINITY, |&next| next as f64);
            let start = start as f64;
            let of_start = records.iter().filter(|&&time| (start..end).contains(&time));
            sum += of_start.fold(0.0, |longest, time| f64::max(longest, time - start));
        }
        (sum > 0.0).then_some(sum)
    }

    /// How long a step takes: the median of all records but the first, whose steps come before everything is warm.
    pub(crate) fn ms_per_step(&self) -> Option<f64> {
        let times = self.step_times.iter().find(|times| !times.is_empty())?;
        let mut warm = times[usize::from(times.len() > 1)..].to_vec();
        warm.sort_by(f64::total_cmp);
        let middle = warm.len() / 2;
        Some(if warm.len().is_multiple_of(2) {
            f64::midpoint(warm[middle - 1], warm[middle])
        } else {
            warm[middle]
        })
    }

    /// The GPUs of the machine, unless it was trained without.
    pub(crate) fn gpu(&self) -> Option<&str> {
        self.machine("GPU").filter(|_| !self.model.is_for_cpu())
    }

    /// The processor.
    pub(crate) fn cpu(&self) -> Option<&str> {
        self.machine("CPU")
    }

    /// What follows a word at the beginning of a line about the last start.
    fn machine(&self, word: &str) -> Option<&str> {
        let lines = self.starts.lines().rev();
        let mut found = lines.filter_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
        found.next().map(str::trim)
    }
}

/// The files that a run is read from, whether they are there or not.
pub(crate) fn sources(folder: &Path) -> Vec<PathBuf> {
    let own = ["args.json", "metrics.jsonl", "startup_log.txt"];
    own.iter()
        .chain(&RESULTS)
        .map(|name| folder.join(name))
        .collect()
}

pub(crate) fn name_of(folder: &Path) -> String {
    folder
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// An error of the host as part of a sentence.
pub(crate) fn one_line(error: &moeut_host::error::HostError) -> Reason {
    let why = std::error::Error::source(error).map(|why| format!(": {why}"));
    format!("{error}{}", why.unwrap_or_default())
}

#[derive(Default)]
struct Records {
    last: BTreeMap<String, f64>,
    /// Step of the last validation.
    validated: Option<u64>,
    /// Of each record.
    times: Vec<f64>,
    step_times: [Vec<f64>; 2],
}

impl Records {
    fn read(&mut self, path: &Path) -> Result<(), Reason> {
        let shown = path.display();
        let file = File::open(path).map_err(|error| format!("`{shown}`: {error}"))?;
        for (index, line) in BufReader::new(file).split(b'\n').enumerate() {
            let line = line.map_err(|error| format!("`{shown}`: {error}"))?;
            let Ok(Value::Object(record)) = serde_json::from_slice::<Value>(&line) else {
                return Err(format!("line {} of `{shown}` is damaged", index + 1));
            };
            let step = record.get("step").and_then(Value::as_u64);
            self.times
                .extend(record.get("time").and_then(Value::as_f64));
            for (times, name) in self.step_times.iter_mut().zip(STEP_TIMES) {
                times.extend(record.get(name).and_then(Value::as_f64));
            }
            for (name, value) in record {
                if name.starts_with(VALIDATION) && step.is_some() {
                    self.validated = step;
                }
                match value {
                    Value::Number(number) => {
                        self.last.insert(name, number.as_f64().unwrap_or(f64::NAN));
                    }
                    // JSON has no NaN and no infinity.
                    Value::Null => {
                        self.last.insert(name, f64::NAN);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Adds the scores of result files, and returns of which sets they are those of a sample; none if there is no file.
fn merge_results(
    folder: &Path,
    metrics: &mut BTreeMap<String, f64>,
) -> Result<Option<BTreeMap<String, f64>>, Reason> {
    let mut samples: Option<BTreeMap<String, f64>> = None;
    for path in RESULTS.map(|name| folder.join(name)) {
        let Some(text) = files::read_if_there(&path)? else {
            continue;
        };
        let mut results: BTreeMap<String, Option<f64>> = serde_json::from_str(&text)
            .map_err(|error| format!("`{}` is damaged: {error}", path.display()))?;
        let samples = samples.get_or_insert_default();
        let limit = results.remove(LIMIT).flatten();
        for (name, value) in results {
            let set = name.split('/').next().unwrap_or_default();
            match limit {
                Some(limit) => samples.insert(set.to_owned(), limit),
                None => samples.remove(set),
            };
            metrics.insert(format!("{VALIDATION}{name}"), value.unwrap_or(f64::NAN));
        }
    }
    Ok(samples)
}

/// `start        1700000000 s after 1970, …` of each start.
fn start_times(log: &str) -> Vec<u64> {
    let lines = log.lines().filter_map(|line| line.strip_prefix("start "));
    lines
        .filter_map(|line| line.trim_start().split(' ').next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_or_foreign_line_is_damage_and_the_last_value_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let whole = "{\"step\":10,\"time\":5.5,\"validation/val/loss\":3.0}\n\
                     {\"step\":20,\"time\":7.5,\"validation/val/loss\":null,\"train/loss\":2}\n";
        std::fs::write(&path, whole).unwrap();
        let mut records = Records::default();
        records.read(&path).unwrap();
        assert_eq!(records.validated, Some(20));
        assert_eq!(records.times, [5.5, 7.5]);
        assert!(records.last["validation/val/loss"].is_nan());
        assert!((records.last["train/loss"] - 2.0).abs() < f64::EPSILON);
        std::fs::write(&path, format!("{whole}{{\"step\":30,\"vali")).unwrap();
        let reason = Records::default().read(&path).unwrap_err();
        assert!(reason.starts_with("line 3 of `"), "{reason}");
    }

    #[test]
    fn later_scores_win_and_bring_what_they_are_scores_of() {
        let dir = tempfile::tempdir().unwrap();
        let merge = || {
            let mut metrics = BTreeMap::new();
            let samples = merge_results(dir.path(), &mut metrics).unwrap();
            (metrics, samples)
        };
        assert_eq!(merge(), (BTreeMap::new(), None));
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("eval.json", "{\"a/x\":0.1,\"b/x\":0.2,\"limit\":5.0}");
        write("result.json", "{\"a/x\":0.3}");
        let (metrics, samples) = merge();
        let named = |name: &str, value| (name.to_owned(), value);
        let expected = [named("validation/a/x", 0.3), named("validation/b/x", 0.2)];
        assert_eq!(metrics, BTreeMap::from(expected));
        assert_eq!(samples, Some(BTreeMap::from([named("b", 5.0)])));
    }

    #[test]
    fn starts_are_read_from_the_start_up_log() {
        let log = "start        1700000000 s after 1970, host, process 3, in /x\ncommand a\n\nstart  5 s\n";
        assert_eq!(start_times(log), [1_700_000_000, 5]);
    }
}
