//! What a step leaves behind for the logs, as tensors that nobody has waited for.

use super::Output;
use super::charts::Sketch;
use super::optimizer::GradNorms;
use super::reporting::accumulate;
use std::collections::BTreeMap;
use tch::Tensor;

/// Results of a step, still on the device: nobody has waited for them.
#[derive(Debug, Default)]
pub struct StepStats {
    /// Weighted sums over the microbatches, by metric; to be averaged over steps.
    pub averaged: BTreeMap<String, Tensor>,
    /// The same of metrics that are logged as they are.
    pub single: BTreeMap<String, Tensor>,
    /// Charts of one of the microbatches.
    pub charts: Vec<(Sketch, Tensor)>,
    /// Counts, sums over the microbatches.
    pub selections: BTreeMap<String, Tensor>,
    /// Loss and regularizers of the whole batch.
    pub objective: Option<Tensor>,
    /// Norm of all gradients before clipping.
    pub grad_norm: Option<Tensor>,
    /// Norm of each gradient after clipping, by metric, if asked for.
    pub grad_norms: Option<(Vec<String>, Tensor)>,
    /// One float, 1 if the step is not finite.
    pub is_bad: Option<Tensor>,
}

impl StepStats {
    /// Adds what a microbatch gave: `share` is its part of the objective, `loss` its mean.
    pub(super) fn add(&mut self, weight: f64, share: &Tensor, loss: &Tensor, output: Output) {
        let regularizers = output
            .regularizers
            .into_iter()
            .map(|(name, value)| (format!("train/reg_loss/{name}"), value));
        let loss = ("train/loss".to_owned(), loss.shallow_clone());
        for (name, value) in std::iter::once(loss).chain(regularizers) {
            accumulate(&mut self.averaged, name, value.detach() * weight);
        }
        for (name, value) in output.stats {
            accumulate(&mut self.single, name, value.detach() * weight);
        }
        for (name, value) in output.selections {
            accumulate(&mut self.selections, name, value);
        }
        self.charts.extend(output.charts);
        let share = share.detach();
        self.objective = Some(match self.objective.take() {
            Some(sum) => sum + share,
            None => share,
        });
    }

    /// Adds the norms of the gradients.
    pub(super) fn note_grads(&mut self, norms: GradNorms, loss_scale: Option<Tensor>) {
        self.grad_norm = Some(norms.total);
        self.grad_norms = norms.by_parameter.map(|(parameters, norms)| {
            let names = parameters
                .iter()
                .map(|name| format!("model/grad_norms/{name}"));
            (names.collect(), norms)
        });
        let loss_scale = loss_scale.map(|scale| ("amp/loss_scale".to_owned(), scale));
        self.single.extend(loss_scale);
    }
}
