//! The training loop: read [`train`] and [`train_step`] first, they are the table of contents.

pub mod batches;
pub mod build;
pub mod device;
pub mod evaluate;
pub mod generate;
pub mod memory;
pub mod monitor;
pub mod non_finite;
pub mod optimizer;
pub mod plan;
mod post_mortem;
pub mod pretrained;
pub mod regularizers;
pub mod run;
pub mod sampling;
pub mod scaler;
pub mod schedule;
pub mod state;
pub mod throughput;
pub mod timing;
pub mod validation;

use crate::checkpoint::CheckpointError;
use batches::Microbatch;
use moeut_plugin_api::abi::client::ModelClient;
use moeut_plugin_api::{ForwardInput, NamedTensor, Past, PluginError};
use moeut_torch::autocast::Autocast;
use moeut_torch::error::OrPluginError;
use moeut_torch::handle::{IntoHandle, IntoTensor};
use non_finite::NonFinite;
use optimizer::GradNorms;
use run::Run;
use std::collections::BTreeMap;
use tch::{Kind, Reduction, Tensor};
use timing::Phase;
use validation::validate;

/// Why training ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A component, libtorch or the data.
    #[error(transparent)]
    Component(#[from] PluginError),
    /// The final checkpoint could not be written, or none could be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Loss or gradient is not a number any more.
    #[error("step {} is not finite: {}", .0.step, .0.why)]
    NonFinite(Box<NonFinite>),
}

/// Trains until the last step or a signal, validating and saving on the way.
///
/// # Errors
/// If a component fails, the loss is not finite, or the last checkpoint cannot be written.
pub fn train(run: &mut Run) -> Result<(), TrainError> {
    all_steps(run).map_err(|error| post_mortem::explain(error, run))
}

fn all_steps(run: &mut Run) -> Result<(), TrainError> {
    run.begin()?;
    while run.goes_on() {
        let lr = run.schedule.lr_at(run.state.step);
        let stats = train_step(run, lr)?;
        run.advance();
        run.monitor.observe(&mut run.state, lr, stats)?;

        if run.is_due(Some(run.config.eval_interval)) {
            validate(run)?;
        }
        if run.wants_save() {
            run.save()?;
        }
    }
    run.finish()
}

/// One optimizer step over all microbatches, whose gradients add up to those of the whole batch.
fn train_step(run: &mut Run, lr: f64) -> Result<StepStats, TrainError> {
    run.monitor.begin_step();
    let batch = run.batches.next_batch()?;
    run.guard.remember(run.state.step, lr, &batch, run.device)?;

    run.monitor.enter(Phase::ForwardBackward);
    let mut stats = forward_backward(run, &batch)?;

    run.monitor.enter(Phase::Optimizer);
    let overflow = run.scaler.unscale(&run.optimizer.grads())?;
    non_finite::inspect(run)?;
    let norms = run
        .optimizer
        .clip_grads(run.monitor.wants_grad_norms(&run.state))?;
    stats.note_grads(norms, run.scaler.current());
    let skip = run.guard.judge(&mut stats, overflow);
    run.optimizer.step(lr, &skip)?;
    run.scaler.update()?;
    Ok(stats)
}

/// Fresh gradients of a batch, and what it takes to log it.
fn forward_backward(run: &mut Run, batch: &[Microbatch]) -> Result<StepStats, TrainError> {
    let mut stats = StepStats::default();
    run.optimizer.zero_grads()?;
    for (index, microbatch) in batch.iter().enumerate() {
        let tokens = microbatch.tokens.to_device(run.device);
        let (inputs, targets) = inputs_and_targets(&tokens);
        let output = {
            let _mixed =
                Autocast::new(run.device, run.autocast).or_plugin_error("mixed precision")?;
            let wants_stats = run.monitor.wants_stats(&run.state);
            forward(&mut run.model, &inputs, true, wants_stats)?
        };
        let loss = mean_loss(&output.logits, &targets)?;
        run.inspector.output(index, &output, &loss);
        let regularizers = run
            .regularizers
            .total(&output.regularizers, run.state.step)?;
        let share = (&loss + regularizers) * microbatch.weight;
        run.scaler
            .scale(share.shallow_clone())
            .f_backward()
            .or_plugin_error("the backward pass failed")?;
        stats.add(microbatch.weight, &share, &loss, output);
    }
    Ok(stats)
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
///
/// # Errors
/// If memory does not suffice: it is the largest tensor of a step.
pub fn token_losses(logits_tbv: &Tensor, targets_tb: &Tensor) -> Result<Tensor, PluginError> {
    let kind = Kind::Float.max(logits_tbv.kind());
    let vocab_size = logits_tbv.size()[2];
    logits_tbv
        .f_reshape([-1, vocab_size])
        .and_then(|logits| logits.f_to_kind(kind))
        .and_then(|logits| {
            logits.f_cross_entropy_loss(
                &targets_tb.f_reshape([-1])?,
                None::<&Tensor>,
                Reduction::None,
                -100,
                0.0,
            )
        })
        .or_plugin_error("the loss cannot be computed")
}

/// The mean of [`token_losses`], a scalar.
fn mean_loss(logits_tbv: &Tensor, targets_tb: &Tensor) -> Result<Tensor, PluginError> {
    let losses = token_losses(logits_tbv, targets_tb)?;
    Ok(losses.mean(losses.kind()))
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
    /// Weighted sums over the microbatches, by metric; to be averaged over steps.
    pub averaged: BTreeMap<String, Tensor>,
    /// The same of metrics that are logged as they are.
    pub single: BTreeMap<String, Tensor>,
    /// Loss and regularizers of the whole batch.
    pub objective: Option<Tensor>,
    /// Norm of all gradients before clipping.
    pub grad_norm: Option<Tensor>,
    /// One float, 1 if the step is not finite.
    pub is_bad: Option<Tensor>,
}

impl StepStats {
    fn add(&mut self, weight: f64, share: &Tensor, loss: &Tensor, output: Output) {
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
        let share = share.detach();
        self.objective = Some(match self.objective.take() {
            Some(sum) => sum + share,
            None => share,
        });
    }

    fn note_grads(&mut self, norms: GradNorms, loss_scale: Option<Tensor>) {
        self.grad_norm = Some(norms.total);
        let by_parameter = norms
            .by_parameter
            .into_iter()
            .map(|(name, norm)| (format!("model/grad_norms/{name}"), norm));
        self.single.extend(by_parameter);
        let loss_scale = loss_scale.map(|scale| ("amp/loss_scale".to_owned(), scale));
        self.single.extend(loss_scale);
    }
}

fn accumulate(sums: &mut BTreeMap<String, Tensor>, name: String, share: Tensor) {
    let sum = match sums.remove(&name) {
        Some(sum) => sum + share,
        None => share,
    };
    sums.insert(name, sum);
}

/// A size as libtorch wants it.
fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
