//! What a run of a sweep has reached, read from its folder: the newest checkpoint and the last validation.
//!
//! The folder alone decides whether a run is done, so that no file about the runs can disagree with them.

use super::runs::SweepRun;
use crate::error::HostError;
use crate::run_folder::read_args;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Parameters that may differ between two starts of one run: what a start does not leave to the next, where things are
/// and go, and the length, which may grow.
const MAY_DIFFER: &[&str] = &[
    "data.cache_dir",
    "gpu",
    "keep_last",
    "log",
    "name",
    "plugin_dir",
    "stop_after",
    "threads",
];

/// What a run has reached.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// Step of the newest checkpoint.
    pub saved: Option<u64>,
    /// Step of the last validation.
    pub validated: Option<u64>,
    /// Its metrics, `val/loss` and the like.
    pub metrics: BTreeMap<String, f64>,
}

impl Record {
    /// Reads a run's folder; one that is not there has reached nothing.
    pub fn read(folder: &Path) -> Self {
        let mut record = Self {
            saved: newest_checkpoint(&folder.join("checkpoint")),
            ..Self::default()
        };
        let Ok(file) = File::open(folder.join("metrics.jsonl")) else {
            return record;
        };
        for line in BufReader::new(file).lines().map_while(Result::ok) {
            // A torn line is one that the run writes again.
            let Ok(Value::Object(object)) = serde_json::from_str(&line) else {
                continue;
            };
            let metrics: BTreeMap<String, f64> = object
                .iter()
                .filter_map(|(name, value)| {
                    Some((
                        name.strip_prefix("validation/")?.to_owned(),
                        value.as_f64()?,
                    ))
                })
                .collect();
            if !metrics.is_empty() {
                record.validated = object.get("step").and_then(Value::as_u64);
                record.metrics = metrics;
            }
        }
        record
    }

    /// Whether there is nothing left to do.
    pub fn is_done(&self, run: &SweepRun) -> bool {
        let reaches_end = |step: Option<u64>| {
            step.is_some_and(|step| run.config.n_steps.is_some_and(|end| step >= end))
        };
        reaches_end(self.saved) && (run.validation.is_none() || reaches_end(self.validated))
    }

    /// A metric of the first validation stream.
    pub fn score(&self, run: &SweepRun, metric: &str) -> Option<f64> {
        let stream = run.validation.as_ref()?;
        self.metrics.get(&format!("{stream}/{metric}")).copied()
    }
}

/// Where a run is.
pub fn folder(run: &SweepRun) -> PathBuf {
    run.config.save_dir.join(&run.name)
}

/// Refuses to go on with a run that was started with other arguments: its numbers would be those of neither.
///
/// # Errors
/// If an argument differs from the one that the run's folder has.
pub fn check_arguments(run: &SweepRun) -> Result<(), HostError> {
    if run.config.reset {
        return Ok(());
    }
    let folder = folder(run);
    let stored = read_args(&folder)?.unwrap_or_default();
    for (name, value) in &run.parameters {
        let Some(earlier) = stored
            .get(name)
            .filter(|_| !MAY_DIFFER.contains(&name.as_str()))
        else {
            continue;
        };
        let number = |text: &str| text.parse::<f64>().ok();
        let is_same = earlier == value
            || number(earlier).is_some_and(|earlier| number(value) == Some(earlier));
        if !is_same {
            return Err(HostError::new(
                format!("the run `{}` was trained with another `-{name}`", run.name),
                format!(
                    "`{}` was started with `{earlier}`, and the sweep says `{value}`",
                    folder.display()
                ),
                "give the sweep another `-name`, or start its runs anew with `-reset 1`",
            ));
        }
    }
    Ok(())
}

/// The step of the newest folder `model-<step>`.
fn newest_checkpoint(dir: &Path) -> Option<u64> {
    let names = std::fs::read_dir(dir)
        .ok()?
        .filter_map(Result::ok)
        .map(|entry| entry.file_name());
    names
        .filter_map(|name| name.to_str()?.strip_prefix("model-")?.parse().ok())
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_checkpoint_and_the_last_validation_count() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()), Record::default());
        for name in [
            "model-5",
            "model-20",
            "model-100.bad",
            ".tmp-model-300",
            "model-x",
        ] {
            std::fs::create_dir_all(dir.path().join("checkpoint").join(name)).unwrap();
        }
        let lines = [
            r#"{"step":10,"time":1.0,"validation/val/loss":3.5,"validation/val/accuracy":0.25}"#,
            r#"{"step":20,"time":2.0,"train/loss":1.0}"#,
            r#"{"step":20,"time":2.0,"validation/val/loss":2.5,"validation/val/perplexity":null}"#,
            r#"{"step":30,"validation/val/lo"#,
        ];
        std::fs::write(dir.path().join("metrics.jsonl"), lines.join("\n")).unwrap();
        let expected = Record {
            saved: Some(20),
            validated: Some(20),
            metrics: BTreeMap::from([("val/loss".to_owned(), 2.5)]),
        };
        assert_eq!(Record::read(dir.path()), expected);
    }
}
