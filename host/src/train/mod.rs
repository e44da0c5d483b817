//! The training loop: read [`train`] and [`train_step`] first, they are the table of contents.

pub mod agreement;
pub mod batches;
pub(crate) mod border;
pub mod build;
pub mod charts;
pub mod device;
pub mod dry_run;
pub mod dumps;
mod eta;
pub mod evaluate;
pub mod generate;
pub(crate) mod graphs;
pub mod labels;
mod logs;
mod loss;
pub mod memory;
pub mod monitor;
pub mod non_finite;
pub mod optimizer;
mod post_mortem;
pub mod pretrained;
pub mod regularizers;
pub mod reporting;
pub(crate) mod restore;
pub mod run;
pub mod sampler;
pub mod sampling;
pub mod scaler;
pub mod schedule;
pub mod segments;
pub mod state;
mod stats;
pub mod stream;
pub mod throughput;
pub mod timing;
pub mod validation;

use crate::checkpoint::CheckpointError;
use crate::watchdog::watch;
use batches::Microbatch;
use charts::Sketch;
use moeut_plugin_api::abi::client::ModelClient;
use moeut_plugin_api::{Chart, ForwardInput, NamedTensor, Past, PluginError, Wishes};
use moeut_torch::autocast::Autocast;
use moeut_torch::error::OrPluginError;
use moeut_torch::handle::{IntoHandle, IntoTensor};
use moeut_torch::profiler::Span;
use non_finite::NonFinite;
use run::Run;
use std::sync::Arc;
use tch::Tensor;
use timing::Phase;
use validation::validate;

pub use loss::Loss;
pub(crate) use loss::{inputs_and_targets, token_losses};
pub use post_mortem::explain;
pub use stats::StepStats;

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

/// Trains until the last step or a signal, validating and saving on the way. [`explain`] tells more about its errors.
///
/// # Errors
/// If a component fails, the loss is not finite, or the last checkpoint cannot be written.
pub fn train(run: &mut Run) -> Result<(), TrainError> {
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

/// One optimizer step over all microbatches of all processes, whose gradients add up to those of the whole batch.
fn train_step(run: &mut Run, lr: f64) -> Result<StepStats, TrainError> {
    run.group.note_step(run.state.step);
    run.monitor.begin_step(run.state.step + 1);
    let batch = run.batches.next_batch()?;
    run.guard.remember(run.state.step, lr, &batch, run.device)?;

    run.monitor.enter(Phase::ForwardBackward);
    let mut stats = forward_backward(run, &batch)?;
    run.optimizer.collect()?;
    stats.sum(&run.group, &run.signals)?;

    run.monitor.enter(Phase::Optimizer);
    let overflow = run.scaler.unscale(&run.optimizer.grads(), &run.group)?;
    non_finite::inspect(run)?;
    let norms = run.optimizer.clip_grads(run.monitor.wants_grad_norms())?;
    stats.note_grads(norms, run.scaler.current());
    let skip = run.guard.judge(&mut stats, overflow);
    run.optimizer.step(lr, &skip)?;
    run.scaler.update()?;
    Ok(stats)
}

/// Fresh gradients of a batch, and what it takes to log it.
fn forward_backward(run: &mut Run, batch: &[Microbatch]) -> Result<StepStats, TrainError> {
    let mut stats = StepStats::default();
    let forgets = std::mem::take(&mut run.state.forgets);
    run.optimizer.zero_grads()?;
    let mut graphs = std::mem::take(&mut run.graphs);
    let is_replayed = graphs.prepare(run, batch)?;
    for (index, microbatch) in batch.iter().enumerate() {
        let _microbatch = Span::begin("microbatch");
        let past = run.segments.training(index, forgets || microbatch.is_start);
        let place = (index, batch.len());
        let wishes = run
            .monitor
            .wishes(&run.state, place, &microbatch.tokens, past);
        let done = if is_replayed {
            graphs.replay(run, (index, microbatch))?
        } else {
            let tokens = microbatch.tokens_on(run.device)?;
            pass(run, (&tokens, microbatch), place, (wishes, past))?
        };
        stats.add(microbatch.weight, done);
    }
    run.graphs = graphs;
    Ok(stats)
}

/// What a pass leaves besides gradients.
struct Pass {
    /// The microbatch's part of the objective.
    share: Tensor,
    /// Its mean loss, nats.
    loss: Tensor,
    output: Output,
}

/// The forward and backward passes of a microbatch, whose tokens are on the device; `place` is its number, and that of
/// all. Queues work and waits for none of it.
fn pass(
    run: &mut Run,
    (tokens, microbatch): (&Tensor, &Microbatch),
    (index, n): (usize, usize),
    (wishes, past): (Wishes, Past),
) -> Result<Pass, TrainError> {
    let (inputs, targets) = inputs_and_targets(tokens);
    let output = {
        let _mixed = Autocast::new(run.device, run.autocast).or_plugin_error("mixed precision")?;
        let input = ForwardInput {
            tokens_tb: inputs.share(),
            is_training: true,
            wishes,
            past,
        };
        forward(&mut run.model, &inputs, input)?
    };
    let loss = run
        .loss
        .mean(&output.logits, &targets, microbatch.n_targets)?;
    run.inspector.output(index, &output, &loss);
    let regularizers = run
        .regularizers
        .total(&output.regularizers, run.state.step)?;
    let share = (&loss + regularizers) * microbatch.weight;
    run.optimizer.expect(index + 1 == n);
    let _backward = Span::begin("backward");
    let _watched = watch("model", run.model.name(), "backward");
    run.scaler
        .scale(share.shallow_clone())
        .f_backward()
        .or_plugin_error("the backward pass failed")?;
    Ok(Pass {
        share,
        loss,
        output,
    })
}

/// What a model returned, as tensors.
pub struct Output {
    /// `[seq_len, batch, vocab_size]`.
    pub logits: Tensor,
    /// Weighted scalars by name, nats.
    pub regularizers: Vec<(String, Tensor)>,
    /// Scalars to log.
    pub stats: Vec<(String, Tensor)>,
    /// Charts to log.
    pub charts: Vec<(Sketch, Tensor)>,
    /// Counts of selections.
    pub selections: Vec<(String, Tensor)>,
}

/// Calls the model.
///
/// # Errors
/// Whatever the model says, and if it returns what it should not.
pub fn forward(
    model: &mut ModelClient,
    tokens_tb: &Tensor,
    input: ForwardInput,
) -> Result<Output, TrainError> {
    let is_training = input.is_training;
    let named = |all: Vec<NamedTensor>| {
        all.into_iter()
            .map(|item| (item.name, item.tensor.into_tensor()))
            .collect()
    };
    let _forward = Span::begin("forward");
    let output = {
        let _watched = watch("model", &Arc::clone(model.name()), "forward");
        model.forward(input)?
    };
    let sketched = |chart: Chart| {
        let values = chart.values.into_tensor();
        let sketch = Sketch {
            name: chart.name,
            kind: chart.kind,
            size: values.size(),
        };
        (sketch, values)
    };
    let output = Output {
        logits: output.logits_tbv.into_tensor(),
        regularizers: named(output.regularizers),
        stats: named(output.stats),
        charts: output.charts.into_iter().map(sketched).collect(),
        selections: named(output.selections),
    };
    border::check_output(&output, tokens_tb, is_training)?;
    Ok(output)
}

/// A size as libtorch wants it.
fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}
