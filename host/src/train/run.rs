//! One run: everything that [`super::train`] works with. [`super::build`] makes it.

use super::TrainError;
use super::batches::Batches;
use super::evaluate::EvalStream;
use super::generate::{Sampling, Uniform, generate};
use super::graphs::Graphs;
use super::loss::Loss;
use super::monitor::Monitor;
use super::non_finite::{Guard, Inspector};
use super::optimizer::Optimizer;
use super::regularizers::Regularizers;
use super::restore;
use super::scaler::Scaler;
use super::schedule::Schedule;
use super::segments::Segments;
use super::state::TrainState;
use super::timing::Phase;
use super::validation::{validate, validate_pretrained};
use crate::args::HostConfig;
use crate::checkpoint::{Checkpoints, Snapshot};
use crate::distributed::Group;
use crate::eval::EvalSet;
use crate::job::Job;
use crate::signals::{Ending, Signals};
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use moeut_torch::{OrPluginError, rng};
use std::collections::BTreeMap;
use std::path::PathBuf;
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
    /// The processes that train it.
    pub group: Group,
    /// The model.
    pub model: ModelClient,
    pub(super) model_name: String,
    /// Where it lives.
    pub device: Device,
    /// Element type of mixed precision, if it is on.
    pub autocast: Option<Kind>,
    /// The loss of its predictions.
    pub loss: Loss,
    /// Which of the model's memories a batch goes on from.
    pub segments: Segments,
    /// Training data.
    pub batches: Batches,
    /// Validation data.
    pub validation: Vec<EvalStream>,
    /// Evaluation sets.
    pub evaluations: Vec<EvalSet>,
    /// Sequences per batch of the validation.
    pub eval_batch_size: usize,
    /// Captured passes, if wished for.
    pub(super) graphs: Graphs,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// Keeps small float16 gradients from vanishing.
    pub scaler: Scaler,
    /// Drops updates that are not finite.
    pub guard: Guard,
    /// Looks for tensors that are not finite, if asked to.
    pub inspector: Inspector,
    /// The learning rate.
    pub schedule: Schedule,
    /// Weights of the regularizers.
    pub regularizers: Regularizers,
    /// Logs.
    pub monitor: Monitor,
    /// What signals ask for.
    pub signals: Arc<Signals>,
    /// The SLURM job, if it is one.
    pub(super) job: Option<Job>,
    /// Whether checkpoints are saved: not if the run only validates or is tried out.
    pub(super) saves: bool,
    /// Where to save, in the first process.
    pub(super) checkpoints: Option<Checkpoints>,
    /// Their folder.
    pub(super) checkpoint_dir: PathBuf,
    /// Whether the weights are those of `-load_pretrained_model`.
    pub(super) is_pretrained: bool,
    pub(super) parameters: Vec<(String, Tensor)>,
    pub(super) args: BTreeMap<String, String>,
    pub(super) samples: Samples,
    pub(super) last_saved: Option<u64>,
}

/// Texts to show at the end.
pub(super) struct Samples {
    pub(super) tokenizer: Arc<TokenDatasetClient>,
    pub(super) prompts: Vec<String>,
    pub(super) sampling: Sampling,
}

impl Run {
    /// What comes before the first step: a job that may be stopped saves at once, so that its next start finds its
    /// arguments; a validation that a signal ended is made up for; weights from elsewhere show what they can.
    ///
    /// # Errors
    /// If a save or a validation fails.
    pub fn begin(&mut self) -> Result<(), TrainError> {
        if self.state.step == 0 {
            self.log_epoch();
        }
        if self.job.is_some() {
            self.save()?;
            self.wait_for_save()?;
        }
        if let Some(job) = &self.job {
            job.record(&self.checkpoint_dir)?;
        }
        if self.is_pretrained && self.config.test_pretrained {
            validate_pretrained(self)?;
        }
        if self.state.owes_validation {
            validate(self)?;
        }
        Ok(())
    }

    /// Whether there is a step to do and no signal forbids it.
    pub fn goes_on(&self) -> bool {
        self.state.step < self.n_steps && !self.signals.is_ending()
    }

    /// Where to write what is wrong with a step; nowhere if the run saves nothing.
    pub(super) fn dump_folder(&self, step: u64) -> Option<PathBuf> {
        self.checkpoints.as_ref()?;
        let folder = self.checkpoint_dir.parent()?;
        Some(folder.join(format!("non_finite-{step}")))
    }

    /// Notes that a step is done.
    pub fn advance(&mut self) {
        self.state.step += 1;
        self.state.n_tokens += self.batches.n_targets() as u64;
        let epoch = self.state.position.epoch;
        self.state.position = self.batches.position();
        if self.state.position.epoch != epoch {
            self.log_epoch();
        }
        for warning in self
            .checkpoints
            .iter_mut()
            .flat_map(Checkpoints::take_warnings)
        {
            self.monitor.warn(&warning);
        }
    }

    fn log_epoch(&mut self) {
        let epoch = self.state.position.epoch as f64;
        self.monitor
            .once(self.state.step, vec![("epoch".into(), epoch)]);
    }

    /// Whether something that happens every `interval` steps, and at the end, happens now.
    pub fn is_due(&self, interval: Option<u64>) -> bool {
        let step = self.state.step;
        step == self.n_steps
            || interval.is_some_and(|interval| interval > 0 && step.is_multiple_of(interval))
    }

    /// Whether a checkpoint is due, or SIGUSR1 asks for one.
    pub fn wants_save(&self) -> bool {
        let is_asked = self.signals.take_save_request();
        if is_asked {
            self.monitor
                .message(&format!("SIGUSR1: saving step {}", self.state.step));
        }
        is_asked || self.is_due(self.config.save_interval)
    }

    /// Saves a checkpoint in the background, unless this step has one.
    ///
    /// # Errors
    /// If the last step was not finite, or a tensor cannot be copied.
    pub fn save(&mut self) -> Result<(), TrainError> {
        self.monitor.settle(&mut self.state)?;
        if !self.saves || self.last_saved == Some(self.state.step) {
            return Ok(());
        }
        self.last_saved = Some(self.state.step);
        self.monitor.enter(Phase::Save);
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.make_room(); // One copy of the tensors at a time.
            if let Some(took) = checkpoints.take_save_time() {
                let scalar = ("timing/s_per_save".into(), took.as_secs_f64());
                self.monitor.once(self.state.step, vec![scalar]);
            }
        }
        let mut optimizer = self.optimizer.tensors()?;
        optimizer.extend(self.scaler.tensors());
        optimizer.extend(self.tensors_of_ranks()?);
        let Some(checkpoints) = &mut self.checkpoints else {
            self.monitor.enter(Phase::Log);
            return Ok(());
        };
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
        // The copy has waited for the device: what an exchange that failed has left is not saved.
        self.group.check()?;
        checkpoints.save_in_background(snapshot);
        self.monitor.enter(Phase::Log);
        Ok(())
    }

    /// What each process has of its own: random generators, and what the model remembers of its rows.
    fn tensors_of_ranks(&self) -> Result<Named, PluginError> {
        let mut own = rng_states(self.device)?;
        own.extend(self.segments.tensors(&self.model)?);
        let all = self
            .group
            .gather(&format!("step {}", self.state.step), &own)?;
        let of_rank = |(rank, named): (usize, Named)| {
            let under = move |(name, tensor): (String, Tensor)| {
                (restore::name_of_rank(rank, &name), tensor)
            };
            named.into_iter().map(under)
        };
        Ok(all.into_iter().enumerate().flat_map(of_rank).collect())
    }

    /// Saves, waits for everything that is still being written, and shows samples or how to go on.
    ///
    /// # Errors
    /// If the last checkpoint cannot be written, or SLURM does not queue the job again.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        self.save()?;
        match self.early_ending() {
            None if self.group.is_first() => self.show_samples()?,
            None => {}
            Some(ending) => self.monitor.message(&self.farewell(ending)),
        }
        self.wait_for_save()?;
        match (&self.job, self.early_ending()) {
            (Some(job), Some(Ending::Requeue)) => Ok(job.requeue()?),
            _ => Ok(()),
        }
    }

    /// The signal that kept the run from its last step or validation.
    pub fn early_ending(&self) -> Option<Ending> {
        let is_done = self.state.step >= self.n_steps && !self.state.owes_validation;
        self.signals.ending().filter(|_| !is_done)
    }

    fn farewell(&self, ending: Ending) -> String {
        let next = match ending {
            Ending::Terminated | Ending::Interrupted => "type the same command again to go on",
            Ending::Requeue => "the job is queued again and goes on from there",
        };
        format!(
            "stopped by {} after step {}, which is being saved; {next}",
            ending.signal(),
            self.state.step
        )
    }

    fn show_samples(&mut self) -> Result<(), TrainError> {
        let mut uniform = Uniform::new(self.state.seed);
        let Samples {
            tokenizer,
            prompts,
            sampling,
        } = &self.samples;
        let mut rows = Vec::new();
        for (index, prompt) in prompts.iter().enumerate() {
            if self.signals.is_ending() {
                break;
            }
            let text = generate(
                &mut self.model,
                tokenizer,
                prompt,
                sampling,
                self.device,
                &mut uniform,
            )?;
            self.monitor.sample(self.state.step, index, &text);
            rows.push(vec![prompt.clone(), text]);
        }
        if !rows.is_empty() {
            let table = moeut_plot::Table {
                header: ["prompt", "text"].map(str::to_owned).to_vec(),
                rows,
            };
            let plots = vec![("examples/all".to_owned(), table.into())];
            self.monitor.record(self.state.step, Vec::new(), plots);
        }
        Ok(())
    }

    fn wait_for_save(&mut self) -> Result<(), TrainError> {
        let Some(checkpoints) = &mut self.checkpoints else {
            return Ok(());
        };
        let saved = checkpoints.wait();
        for warning in checkpoints.take_warnings() {
            self.monitor.warn(&warning);
        }
        Ok(saved?)
    }
}

/// The states of libtorch's random generators.
///
/// # Errors
/// If one cannot be read.
pub(super) fn rng_states(device: Device) -> Result<Named, PluginError> {
    let state = |device| rng::state(device).or_plugin_error("the random generator cannot be read");
    let mut states = vec![(RNG_CPU.to_owned(), state(Device::Cpu)?)];
    if device.is_cuda() {
        states.push((RNG_CUDA.to_owned(), state(device)?));
    }
    Ok(states)
}
