//! The training loop: read [`train`] and [`train_step`] first, they are the table of contents.

pub mod batches;
pub mod build;
pub mod device;
pub mod evaluate;
pub mod generate;
pub mod monitor;
pub mod optimizer;
pub mod run;
pub mod schedule;
pub mod state;

use crate::checkpoint::CheckpointError;
use moeut_plugin_api::abi::client::ModelClient;
use moeut_plugin_api::{ForwardInput, NamedTensor, Past, PluginError};
use moeut_torch::autocast::Autocast;
use moeut_torch::error::OrPluginError;
use moeut_torch::handle::{IntoHandle, IntoTensor};
use run::Run;
use std::collections::BTreeMap;
use tch::{Kind, Reduction, Tensor};

/// Why training ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A component, libtorch or the data.
    #[error(transparent)]
    Component(#[from] PluginError),
    /// The final checkpoint could not be written, or none could be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The loss is not a number any more.
    #[error("the loss is {loss} at step {step}")]
    NonFinite {
        /// The step whose loss it is.
        step: u64,
        /// The loss.
        loss: f64,
    },
}

/// Trains until the last step, validating and saving on the way.
///
/// # Errors
/// If a component fails, the loss is not finite, or the last checkpoint cannot be written.
pub fn train(run: &mut Run) -> Result<(), TrainError> {
    while run.state.step < run.n_steps {
        let lr = run.schedule.lr_at(run.state.step);
        let stats = train_step(run, lr)?;
        run.advance();
        run.monitor
            .observe(&mut run.state, lr, stats, run.batches.take_waited())?;

        if run.is_due(Some(run.config.eval_interval)) {
            validate(run)?;
        }
        if run.is_due(run.config.save_interval) {
            run.save()?;
        }
    }
    run.finish()
}

/// One optimizer step over all microbatches, whose gradients add up to those of the whole batch.
fn train_step(run: &mut Run, lr: f64) -> Result<StepStats, TrainError> {
    let mut stats = StepStats::default();
    run.optimizer.zero_grads();
    for microbatch in run.batches.next_batch()? {
        let tokens = microbatch.tokens.to_device(run.device);
        let (inputs, targets) = inputs_and_targets(&tokens);
        let output = {
            let _mixed =
                Autocast::new(run.device, run.autocast).or_plugin_error("mixed precision")?;
            forward(
                &mut run.model,
                &inputs,
                true,
                run.monitor.wants_stats(&run.state),
            )?
        };
        let loss =
            token_losses(&output.logits, &targets).mean(Kind::Float.max(output.logits.kind()));
        let total = &loss + run.regularizers.total(&output.regularizers) * run.config.reg_weight;
        let share = &total * microbatch.weight;
        share
            .f_backward()
            .or_plugin_error("the backward pass failed")?;
        stats.add(microbatch.weight, &loss, output);
    }
    stats.grad_norm = Some(run.optimizer.clip_grads()?);
    run.optimizer.step(lr)?;
    Ok(stats)
}

/// Validates on every stream of the task and logs the scores.
fn validate(run: &mut Run) -> Result<(), TrainError> {
    run.monitor.settle(&mut run.state)?; // The time until now belongs to training.
    for stream in &run.validation {
        let scores = evaluate::evaluate(&mut run.model, stream, run.eval_batch_size, run.device)?;
        run.monitor.validated(&mut run.state, &stream.name, &scores);
    }
    run.monitor.restart_clock(&run.state);
    Ok(())
}

/// What a model returned, as tensors.
pub struct Output {
    /// `[seq_len, batch, vocab_size]`.
    pub logits: Tensor,
    /// Weighted scalars by name, nats.
    pub regularizers: Vec<(String, Tensor)>,
    /// Scalars to log.
    pub stats: Vec<(String, Tensor)>,
}

/// Calls the model.
///
/// # Errors
/// Whatever the model says.
pub fn forward(
    model: &mut ModelClient,
    tokens_tb: &Tensor,
    is_training: bool,
    wants_stats: bool,
) -> Result<Output, TrainError> {
    let named = |all: Vec<NamedTensor>| {
        all.into_iter()
            .map(|item| (item.name, item.tensor.into_tensor()))
            .collect()
    };
    let output = model.forward(ForwardInput {
        tokens_tb: tokens_tb.share(),
        is_training,
        wants_stats,
        past: Past::None,
    })?;
    Ok(Output {
        logits: output.logits_tbv.into_tensor(),
        regularizers: named(output.regularizers),
        stats: named(output.stats),
    })
}

/// Cross-entropy of each target, in nats, at least in float32; `[seq_len · batch]`.
pub fn token_losses(logits_tbv: &Tensor, targets_tb: &Tensor) -> Tensor {
    let kind = Kind::Float.max(logits_tbv.kind());
    let vocab_size = logits_tbv.size()[2];
    logits_tbv
        .reshape([-1, vocab_size])
        .to_kind(kind)
        .cross_entropy_loss(
            &targets_tb.reshape([-1]),
            None::<&Tensor>,
            Reduction::None,
            -100,
            0.0,
        )
}

/// Cuts `[seq_len + 1, batch]` into what the model sees and what it must say.
fn inputs_and_targets(tokens: &Tensor) -> (Tensor, Tensor) {
    let seq_len = tokens.size()[0] - 1;
    (tokens.narrow(0, 0, seq_len), tokens.narrow(0, 1, seq_len))
}

/// The wider of two floating-point types.
trait Wider {
    fn max(self, other: Self) -> Self;
}

impl Wider for Kind {
    fn max(self, other: Self) -> Self {
        if other == Self::Double { other } else { self }
    }
}

/// Results of a step, still on the device: nobody has waited for them.
#[derive(Debug, Default)]
pub struct StepStats {
    /// Weighted sums over the microbatches, by metric.
    pub scalars: BTreeMap<String, Tensor>,
    /// Norm of all gradients before clipping.
    pub grad_norm: Option<Tensor>,
}

impl StepStats {
    fn add(&mut self, weight: f64, loss: &Tensor, output: Output) {
        let regularizers = output
            .regularizers
            .into_iter()
            .map(|(name, value)| (format!("train/reg_loss/{name}"), value));
        let loss = ("train/loss".to_owned(), loss.shallow_clone());
        for (name, value) in std::iter::once(loss)
            .chain(regularizers)
            .chain(output.stats)
        {
            let share = value.detach() * weight;
            match self.scalars.remove(&name) {
                Some(sum) => self.scalars.insert(name, sum + share),
                None => self.scalars.insert(name, share),
            };
        }
    }
}

/// A size as libtorch wants it.
fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
