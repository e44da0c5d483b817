//! Everything that must survive a restart, besides the tensors.

use super::batches::Position;
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
    /// Averages since the last time they were logged.
    pub window: Window,
}

/// A best value and when it was reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The value.
    pub loss: f64,
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
        let step = self.step;
        let best = self
            .best
            .entry(stream.to_owned())
            .or_insert(Best { loss, step });
        if loss < best.loss {
            *best = Best { loss, step };
        }
        step - best.step
    }
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
    }
}
