//! What a step leaves behind for the logs, as tensors that nobody has waited for.

use super::charts::Sketch;
use super::optimizer::GradNorms;
use super::reporting::accumulate;
use super::{Pass, TrainError};
use crate::distributed::Group;
use crate::signals::Signals;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

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
    /// Of several processes: what signals ask all of them for.
    pub wishes: Option<Tensor>,
}

impl StepStats {
    /// Adds what a microbatch of this weight gave.
    pub(super) fn add(&mut self, weight: f64, pass: Pass) {
        let Pass {
            share,
            loss,
            output,
        } = pass;
        let regularizers = output
            .regularizers
            .into_iter()
            .map(|(name, value)| (format!("train/reg_loss/{name}"), value));
        let loss = ("train/loss".to_owned(), loss);
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

    /// Replaces numbers of this process' microbatches by those of the whole batch; charts stay its own. What signals
    /// ask for goes with them, so that all processes learn of it in the same step.
    ///
    /// # Errors
    /// If another process has ended.
    pub(super) fn sum(&mut self, group: &Group, signals: &Signals) -> Result<(), TrainError> {
        let (Some(wishes), Some(objective)) = (signals.wishes(), &mut self.objective) else {
            return Ok(());
        };
        let device = objective.device();
        let wishes = Tensor::from_slice(&wishes).to_device(device);
        let mut numbers: Vec<&mut Tensor> = vec![objective];
        numbers.extend(self.averaged.values_mut());
        numbers.extend(self.single.values_mut());
        let wide: Vec<Tensor> = numbers
            .iter()
            .map(|number| number.to_kind(Kind::Double).view([1]))
            .collect();
        let sums = Tensor::cat(&wide.iter().chain([&wishes]).collect::<Vec<_>>(), 0);
        group.sum(&[&sums])?;
        for (number, index) in numbers.into_iter().zip(0..) {
            *number = sums.get(index).to_kind(number.kind());
        }
        let n_wishes = wishes.numel();
        self.wishes = Some(sums.slice(0, -i64::try_from(n_wishes).unwrap_or_default(), None, 1));
        for counts in self.selections.values_mut() {
            group.sum(&[counts])?;
        }
        Ok(())
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
