//! What a run has computed, as far as another run of the same arguments must have computed the same.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;

use super::process::{N_STEPS, VALIDATION};

/// Metrics of the run's own that differ from start to start.
fn is_of_the_start(name: &str) -> bool {
    ["timing/", "memory/", "average_num_chunks"]
        .iter()
        .any(|group| name.starts_with(group))
        || ["step", "time", "n_params"].contains(&name)
}

/// Metrics by step and name, and the tensors of the last checkpoint.
#[derive(Debug, PartialEq)]
pub(super) struct Record {
    metrics: BTreeMap<(u64, String), String>,
    tensors: [Vec<u8>; 2],
}

impl Record {
    /// Reads a finished run.
    pub(super) fn read(run: &Path) -> Result<Self, String> {
        let last = run.join(format!("checkpoint/model-{N_STEPS}"));
        let tensors = |name: &str| {
            let path = last.join(name);
            fs::read(&path).map_err(|error| format!("`{}`: {error}", path.display()))
        };
        let mut metrics = BTreeMap::new();
        for (step, name, value) in lines(run) {
            let first = metrics.entry((step, name.clone())).or_insert(value.clone());
            if *first != value {
                return Err(format!(
                    "`{name}` of step {step} is logged as {first} and as {value}"
                ));
            }
        }
        Ok(Self {
            metrics,
            tensors: [
                tensors("model.safetensors")?,
                tensors("optimizer.safetensors")?,
            ],
        })
    }

    /// Nothing, or the first difference.
    pub(super) fn compare(&self, expected: &Self) -> Result<(), String> {
        if self == expected {
            return Ok(());
        }
        let different = |key: &&(u64, String)| self.metrics.get(*key) != expected.metrics.get(*key);
        let keys = self.metrics.keys().chain(expected.metrics.keys());
        Err(match keys.filter(different).min() {
            Some(key) => format!(
                "`{}` of step {} is {:?}, {:?} without the fault",
                key.1,
                key.0,
                self.metrics.get(key),
                expected.metrics.get(key)
            ),
            None => "the metrics are equal, the tensors are not".to_owned(),
        })
    }
}

/// Step, name and value of every metric; the last line may be half written.
fn lines(run: &Path) -> Vec<(u64, String, String)> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|record| Some((record["step"].as_u64()?, record.as_object()?.clone())))
        .flat_map(|(step, record)| {
            record
                .into_iter()
                .map(move |(name, value)| (step, name, value.to_string()))
        })
        .filter(|(_, name, _)| !is_of_the_start(name))
        .collect()
}

/// The last step that is logged.
pub(super) fn step_of(run: &Path) -> u64 {
    lines(run).iter().map(|(step, ..)| *step).max().unwrap_or(0)
}

/// Whether a validation is under way: its step is logged, its scores are not.
pub(super) fn is_validating(run: &Path) -> bool {
    let lines = lines(run);
    let last = lines.last().map_or(0, |(step, ..)| *step);
    let is_scored =
        |(step, name, _): &(u64, String, String)| *step == last && name.starts_with("validation/");
    last > 0 && last.is_multiple_of(VALIDATION) && !lines.iter().any(is_scored)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A finished run whose log is `text`.
    fn run(text: &str) -> tempfile::TempDir {
        let folder = tempfile::TempDir::new().unwrap();
        let last = folder.path().join(format!("checkpoint/model-{N_STEPS}"));
        fs::create_dir_all(&last).unwrap();
        for name in ["model.safetensors", "optimizer.safetensors"] {
            fs::write(last.join(name), "").unwrap();
        }
        fs::write(folder.path().join("metrics.jsonl"), text).unwrap();
        folder
    }

    #[test]
    fn times_do_not_count_and_losses_do() {
        let read = |text| Record::read(run(text).path()).unwrap();
        let expected = read("{\"step\":1,\"time\":1.0,\"train/loss\":2.5}\n");
        let other_time =
            read("{\"step\":1,\"time\":9.0,\"train/loss\":2.5,\"timing/x\":1}\n{\"ste");
        assert_eq!(other_time.compare(&expected), Ok(()));
        let other_loss = read("{\"step\":1,\"time\":1.0,\"train/loss\":2.0}\n");
        let difference = other_loss.compare(&expected).unwrap_err();
        assert!(
            difference.starts_with("`train/loss` of step 1 is "),
            "{difference}"
        );
        assert!(read("").compare(&expected).is_err());
    }

    #[test]
    fn a_step_logged_twice_with_two_values_is_an_error() {
        let folder = run("{\"step\":1,\"a\":1}\n{\"step\":1,\"a\":2}\n");
        assert!(Record::read(folder.path()).is_err());
    }

    #[test]
    fn a_run_validates_between_its_step_and_its_scores() {
        let trained = "{\"step\":9,\"train/loss\":1}\n{\"step\":10,\"train/loss\":1}\n";
        assert!(is_validating(run(trained).path()));
        let scored = format!("{trained}{{\"step\":10,\"validation/val/loss\":1}}\n");
        assert!(!is_validating(run(&scored).path()));
        assert!(!is_validating(run("").path()));
    }
}
