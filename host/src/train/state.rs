//! Everything that must survive a restart, besides the tensors.

use super::batches::Position;
use crate::log::WandbRun;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The state of a run after a step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct TrainState {
    /// Optimizer steps done.
    pub step: u64,
    /// Data consumed.
    pub position: Position,
    /// Tokens trained on.
    pub n_tokens: u64,
    /// Seed of the run's random streams.
    pub seed: u64,
    /// Lowest validation loss of each stream, in nats per token, and its step.
    pub best: BTreeMap<String, Best>,
    /// Highest validation accuracy of each stream, 0 to 1, and its step.
    #[serde(default)]
    pub best_accuracy: BTreeMap<String, Best>,
    /// A validation of this step was due, and a signal ended it.
    #[serde(default)]
    pub owes_validation: bool,
    /// Updates that were dropped because the step was not finite.
    #[serde(default)]
    pub n_skipped: u64,
    /// The next step empties segment memory: a dropped step may have left states there that are not finite.
    #[serde(default)]
    pub forgets: bool,
    /// Rows that segment memory belongs to; none in a checkpoint from before there was any.
    #[serde(default)]
    pub rows: Option<Rows>,
    /// The run in Weights & Biases, if there is one.
    #[serde(default)]
    pub wandb: Option<WandbRun>,
    /// Averages since the last time they were logged.
    pub window: Window,
}

/// How batches are cut: under another shape their rows are other places in the text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// Sequences of each microbatch of the first process.
    pub microbatch_sizes: Vec<usize>,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Processes that share a batch.
    #[serde(default = "one")]
    pub n_ranks: usize,
}

fn one() -> usize {
    1
}

/// A best value and when it was reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The value.
    #[serde(alias = "loss")]
    pub value: f64,
    /// The step.
    pub step: u64,
}

/// Sums over the steps since the last log line.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Window {
    /// Steps in the sums.
    pub n_steps: u64,
    /// Sum of each metric.
    pub sums: BTreeMap<String, f64>,
    /// Largest gradient norm before clipping.
    pub max_grad: f64,
}

impl Window {
    /// Adds a step's metrics.
    pub fn add(&mut self, metrics: &[(String, f64)], grad_norm: f64) {
        self.n_steps += 1;
        for (name, value) in metrics {
            *self.sums.entry(name.clone()).or_default() += value;
        }
        self.max_grad = self.max_grad.max(grad_norm);
    }

    /// The averages, and an empty window in their place.
    pub fn take(&mut self) -> Vec<(String, f64)> {
        let window = std::mem::take(self);
        let mut scalars: Vec<(String, f64)> = window
            .sums
            .into_iter()
            .map(|(name, sum)| (name, sum / window.n_steps as f64))
            .collect();
        if window.n_steps > 0 {
            scalars.push(("max_grad".into(), window.max_grad));
        }
        scalars
    }
}

impl TrainState {
    /// Notes a validation loss; returns the steps since the best one.
    pub fn note_loss(&mut self, stream: &str, loss: f64) -> u64 {
        note(&mut self.best, stream, self.step, loss, |new, old| {
            new < old
        })
    }

    /// Notes a validation accuracy; returns the steps since the best one.
    pub fn note_accuracy(&mut self, stream: &str, accuracy: f64) -> u64 {
        let bests = &mut self.best_accuracy;
        note(bests, stream, self.step, accuracy, |new, old| new > old)
    }
}

fn note(
    bests: &mut BTreeMap<String, Best>,
    stream: &str,
    step: u64,
    value: f64,
    is_better: fn(f64, f64) -> bool,
) -> u64 {
    let now = Best { value, step };
    let best = bests.entry(stream.to_owned()).or_insert(now);
    if is_better(value, best.value) {
        *best = now;
    }
    step - best.step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_over_the_window_and_then_it_is_empty() {
        let mut window = Window::default();
        window.add(&[("train/loss".into(), 3.0)], 0.5);
        window.add(&[("train/loss".into(), 1.0)], 0.25);
        assert_eq!(
            window.take(),
            [("train/loss".into(), 2.0), ("max_grad".into(), 0.5)]
        );
        assert_eq!(window.take(), []);
    }

    #[test]
    fn best_losses_remember_their_step() {
        let mut state = TrainState::default();
        for (step, loss, since) in [(10, 3.0, 0), (20, 2.0, 0), (30, 2.5, 10)] {
            state.step = step;
            assert_eq!(state.note_loss("val", loss), since);
        }
        for (step, accuracy, since) in [(40, 0.5, 0), (50, 0.25, 10), (60, 0.75, 0)] {
            state.step = step;
            assert_eq!(state.note_accuracy("val", accuracy), since);
        }
    }
}
