//! One run: everything that [`super::train`] works with. [`super::build`] makes it.

use super::TrainError;
use super::batches::Batches;
use super::evaluate::EvalStream;
use super::generate::{Sampling, Uniform, generate};
use super::monitor::Monitor;
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::state::TrainState;
use crate::args::HostConfig;
use crate::checkpoint::{Checkpoints, Snapshot};
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use moeut_torch::{OrPluginError, rng};
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Tensors with their names.
pub(super) type Named = Vec<(String, Tensor)>;

/// Name of the CPU generator's state among the checkpoint's optimizer tensors.
pub(super) const RNG_CPU: &str = "rng/cpu";
/// Name of the CUDA generator's state.
pub(super) const RNG_CUDA: &str = "rng/cuda";

/// A run, ready to train.
pub struct Run {
    /// The host's arguments.
    pub config: HostConfig,
    /// Last step.
    pub n_steps: u64,
    /// What survives a restart.
    pub state: TrainState,
    /// The model.
    pub model: ModelClient,
    /// Where it lives.
    pub device: Device,
    /// Element type of mixed precision, if it is on.
    pub autocast: Option<Kind>,
    /// Training data.
    pub batches: Batches,
    /// Validation data.
    pub validation: Vec<EvalStream>,
    /// Sequences per batch of the validation.
    pub eval_batch_size: usize,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The learning rate.
    pub schedule: Schedule,
    /// Weights of the regularizers.
    pub regularizers: Regularizers,
    /// Logs.
    pub monitor: Monitor,
    pub(super) checkpoints: Checkpoints,
    pub(super) parameters: Vec<(String, Tensor)>,
    pub(super) args: BTreeMap<String, String>,
    pub(super) samples: Samples,
    pub(super) tokens_per_step: u64,
    pub(super) last_saved: Option<u64>,
}

/// Texts to show at the end.
pub(super) struct Samples {
    pub(super) tokenizer: Arc<TokenDatasetClient>,
    pub(super) prompts: Vec<String>,
    pub(super) sampling: Sampling,
}

/// Weights of single regularizers.
#[derive(Debug, Clone, Default)]
pub struct Regularizers {
    pub(super) scales: BTreeMap<String, f64>,
}

impl Regularizers {
    /// Sum of the contributions, each times its weight in `-reg_scales` (by default 1).
    pub fn total(&self, contributions: &[(String, Tensor)]) -> Tensor {
        contributions
            .iter()
            .map(|(name, value)| value * self.scales.get(name).copied().unwrap_or(1.0))
            .reduce(|sum, value| sum + value)
            .unwrap_or_else(|| Tensor::from(0.0))
    }
}

impl Run {
    /// Notes that a step is done.
    pub fn advance(&mut self) {
        self.state.step += 1;
        self.state.n_tokens += self.tokens_per_step;
        self.state.position = self.batches.position();
        for warning in self.checkpoints.take_warnings() {
            self.monitor.warn(&warning);
        }
    }

    /// Whether something that happens every `interval` steps, and at the end, happens now.
    pub fn is_due(&self, interval: Option<u64>) -> bool {
        let step = self.state.step;
        step == self.n_steps
            || interval.is_some_and(|interval| interval > 0 && step.is_multiple_of(interval))
    }

    /// Saves a checkpoint in the background, unless this step has one.
    ///
    /// # Errors
    /// If the last step was not finite, or a tensor cannot be copied.
    pub fn save(&mut self) -> Result<(), TrainError> {
        self.monitor.settle(&mut self.state)?;
        if self.last_saved == Some(self.state.step) {
            return Ok(());
        }
        self.checkpoints.make_room(); // One copy of the tensors at a time.
        if let Some(took) = self.checkpoints.take_save_time() {
            let scalar = ("timing/s_per_save".into(), took.as_secs_f64());
            self.monitor.once(self.state.step, vec![scalar]);
        }
        let mut optimizer = self.optimizer.tensors();
        optimizer.extend(rng_states(self.device)?);
        let state = serde_json::to_value(&self.state).map_err(|error| {
            PluginError::new("the training state cannot be written").why(error.to_string())
        })?;
        let snapshot = Snapshot::detached_copy(
            self.state.step,
            &self.parameters,
            &optimizer,
            state,
            self.args.clone(),
        )?;
        self.checkpoints.save_in_background(snapshot);
        self.last_saved = Some(self.state.step);
        Ok(())
    }

    /// Saves, shows samples, and waits for everything that is still being written.
    ///
    /// # Errors
    /// If the last checkpoint cannot be written.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        self.save()?;
        let mut uniform = Uniform::new(self.state.seed);
        let Samples {
            tokenizer,
            prompts,
            sampling,
        } = &self.samples;
        for (index, prompt) in prompts.iter().enumerate() {
            let text = generate(
                &mut self.model,
                tokenizer,
                prompt,
                sampling,
                self.device,
                &mut uniform,
            )?;
            self.monitor.sample(self.state.step, index, &text);
        }
        let saved = self.checkpoints.wait();
        for warning in self.checkpoints.take_warnings() {
            self.monitor.warn(&warning);
        }
        Ok(saved?)
    }
}

fn rng_states(device: Device) -> Result<Named, PluginError> {
    let state = |device| rng::state(device).or_plugin_error("the random generator cannot be read");
    let mut states = vec![(RNG_CPU.to_owned(), state(Device::Cpu)?)];
    if device.is_cuda() {
        states.push((RNG_CUDA.to_owned(), state(device)?));
    }
    Ok(states)
}
