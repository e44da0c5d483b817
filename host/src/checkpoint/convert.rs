//! From a checkpoint of the reference to one of ours, so that `-restore` goes on with the run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::reference::{Named, Progress, Reference, is_trained, scalar};
use super::{CheckpointError, Snapshot, folder};
use crate::train::batches::Position;
use crate::train::state::{Best, TrainState};

/// What [`convert`] wrote.
#[derive(Debug)]
pub struct Converted {
    /// The folder `model-<step>`.
    pub path: PathBuf,
    /// Optimizer steps done.
    pub step: u64,
    /// Tensors of the model.
    pub n_tensors: usize,
    /// What could not be carried over, in sentences for the user.
    pub notes: Vec<String>,
}

/// Writes the checkpoint `input` of the reference (`.pth`, `.ckpt`) as `<out>/model-<step>`.
///
/// Parameters, arguments, step, best losses and the optimizer's averages come along. The reference saves no random
/// state, and its sampler is ahead of what was consumed: in the first pass over the data the position follows from
/// the step.
///
/// # Errors
/// If `input` cannot be read or `out` cannot be written.
pub fn convert(input: &Path, out: &Path) -> Result<Converted, CheckpointError> {
    let (snapshot, notes) = read(input)?;
    Ok(Converted {
        path: folder::write(out, &snapshot, SystemTime::now())?,
        step: snapshot.step,
        n_tensors: snapshot.model.len(),
        notes,
    })
}

/// A checkpoint of the reference as one of ours, and what could not be carried over.
///
/// # Errors
/// If `input` cannot be read.
pub(super) fn read(input: &Path) -> Result<(Snapshot, Vec<String>), CheckpointError> {
    let reference = Reference::open(input)?;
    let args = reference.args()?;
    let progress = reference.progress();
    let model = reference.model()?;
    let mut notes = Vec::new();
    if args.is_empty() {
        notes.push("it has no arguments: give the run's own beside `-restore`".to_owned());
    }
    let optimizer = match reference.optimizer(&model)? {
        Ok(tensors) => tensors,
        Err(why) => {
            notes.push(format!("the optimizer starts anew: {why}"));
            fresh_adam(&model)
        }
    };
    if reference.has_filled("scaler") {
        notes.push("the scale of float16 losses is found anew".to_owned());
    }
    if reference.has_filled("interface") {
        notes.push("the states of earlier segments are left out".to_owned());
    }
    let state = train_state(&progress, &args, &mut notes);
    let state = serde_json::to_value(&state)
        .map_err(|error| CheckpointError::foreign(input, error.to_string(), "report this"))?;
    let snapshot = Snapshot {
        step: progress.step,
        model,
        optimizer,
        state,
        args,
    };
    Ok((snapshot, notes))
}

/// Zeros for every parameter, as `AdamW` starts.
fn fresh_adam(model: &Named) -> Named {
    let mut tensors = Vec::new();
    for (name, parameter) in model
        .iter()
        .filter(|(name, tensor)| is_trained(name, tensor))
    {
        tensors.push((format!("exp_avg/{name}"), parameter.zeros_like()));
        tensors.push((format!("exp_avg_sq/{name}"), parameter.zeros_like()));
        tensors.push((format!("step/{name}"), scalar(0.0)));
    }
    tensors
}

fn train_state(
    progress: &Progress,
    args: &BTreeMap<String, String>,
    notes: &mut Vec<String>,
) -> TrainState {
    let number = |flag: &str| args.get(flag)?.parse::<u64>().ok();
    let seed = number("seed").unwrap_or(0);
    if progress.step > 0 {
        notes.push(format!(
            "it has no random state: dropout goes on as if started with `-seed {seed}`"
        ));
    }
    let batch = if progress.epoch == 0 {
        progress.step
    } else {
        let position = progress.sampler_position.unwrap_or(0);
        notes.push(format!(
            "the place in pass {} over the data is that of the reference's sampler, batch {position}: some batches ahead",
            progress.epoch
        ));
        position
    };
    let tokens_per_step = number("batch_size")
        .zip(number("lm.unroll"))
        .map_or(0, |(batch_size, seq_len)| {
            batch_size.saturating_mul(seq_len)
        });
    TrainState {
        step: progress.step,
        position: Position {
            epoch: progress.epoch,
            batch,
        },
        n_tokens: progress.step.saturating_mul(tokens_per_step),
        seed,
        best: progress
            .best_losses
            .iter()
            .map(|(name, &(loss, step))| (name.clone(), Best { value: loss, step }))
            .collect(),
        ..TrainState::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference::tests::{assert_digests, run_pth};
    use super::super::{load, read_model_tensors};
    use super::*;

    #[test]
    fn a_run_of_the_reference_becomes_a_checkpoint_to_restore() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("converted");
        let done = convert(&run_pth(), &out).unwrap();
        assert_eq!(done.path, out.join("model-3"));
        assert_eq!(
            done.notes,
            ["it has no random state: dropout goes on as if started with `-seed 0`"]
        );

        let loaded = load(&out).unwrap();
        let snapshot = loaded.snapshot;
        assert_eq!((snapshot.step, snapshot.model.len()), (3, 20));
        assert_digests(&snapshot.model, "model");
        assert_digests(&snapshot.optimizer, "optimizer");
        assert_eq!(snapshot.args["task"], "c4_transformer");
        let state: TrainState = serde_json::from_value(snapshot.state).unwrap();
        assert_eq!(state.step, 3);
        assert_eq!(state.position, Position { epoch: 0, batch: 3 });
        assert_eq!(state.n_tokens, 3 * 4 * 16);
        assert_eq!(
            state.best["val"],
            Best {
                value: 2.375,
                step: 2
            }
        );
    }

    #[test]
    fn the_model_is_the_same_by_every_way() {
        let dir = tempfile::tempdir().unwrap();
        let done = convert(&run_pth(), dir.path()).unwrap();
        for path in [
            run_pth(),
            dir.path().to_owned(),
            done.path.join("model.safetensors"),
            done.path,
        ] {
            assert_digests(&read_model_tensors(&path).unwrap(), "model");
        }
    }

    #[test]
    fn in_a_later_pass_the_sampler_says_where_it_is() {
        let progress = Progress {
            step: 1000,
            epoch: 2,
            sampler_position: Some(77),
            ..Progress::default()
        };
        let mut notes = Vec::new();
        let state = train_state(&progress, &BTreeMap::new(), &mut notes);
        assert_eq!(
            state.position,
            Position {
                epoch: 2,
                batch: 77
            }
        );
        assert!(
            notes[1].contains("batch 77: some batches ahead"),
            "{notes:?}"
        );
    }
}
