//! One run: everything that [`super::train`] works with, built from the arguments.

use super::batches::{BatchShape, Batches};
use super::device::{Placement, place};
use super::evaluate::EvalStream;
use super::generate::{Sampling, Uniform, generate};
use super::monitor::Monitor;
use super::optimizer::Optimizer;
use super::schedule::Schedule;
use super::state::TrainState;
use super::TrainError;
use crate::args::{Arguments, HostConfig, LogSink};
use crate::checkpoint::{Checkpoints, Loaded, Snapshot};
use crate::log::{Jsonl, Sink, Sinks, Terminal, TensorBoard};
use crate::plugins::{Component, Registry};
use crate::services::Services;
use moeut_plugin_api::abi::client::{HostServices, ModelClient, TokenDatasetClient};
use moeut_plugin_api::{ComponentKind, ModelSetup, PluginError, RunFacts, StreamRequest};
use moeut_torch::{IntoTensor, OrPluginError, rng};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// Name of the CPU generator's state among the checkpoint's optimizer tensors.
const RNG_CPU: &str = "rng/cpu";
/// Name of the CUDA generator's state.
const RNG_CUDA: &str = "rng/cuda";
/// One checkpoint of this period stays for good, as in the reference.
const KEEP_EVERY: Duration = Duration::from_hours(4);

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
    checkpoints: Checkpoints,
    parameters: Vec<(String, Tensor)>,
    args: BTreeMap<String, String>,
    samples: Samples,
    tokens_per_step: u64,
    last_saved: Option<u64>,
}

/// Texts to show at the end.
struct Samples {
    tokenizer: Arc<TokenDatasetClient>,
    prompts: Vec<String>,
    sampling: Sampling,
}

/// Weights of single regularizers.
#[derive(Debug, Clone, Default)]
pub struct Regularizers {
    scales: BTreeMap<String, f64>,
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

/// What [`Run::build`] needs from the command line.
pub struct Blueprint {
    /// All arguments.
    pub arguments: Arguments,
    /// The host's own.
    pub config: HostConfig,
    /// Folder of this run.
    pub folder: PathBuf,
    /// A checkpoint to go on from.
    pub restored: Option<Loaded>,
}

impl Run {
    /// Builds everything: data, model, optimizer, logs; in this order, so that user errors come early.
    ///
    /// # Errors
    /// If a component is missing or refuses its arguments, or the checkpoint does not fit.
    pub fn build(blueprint: Blueprint, registry: &Arc<Registry>, terminal: &Arc<Terminal>) -> Result<Self, TrainError> {
        let Blueprint { arguments, config, folder, restored } = blueprint;
        let clock = Instant::now();
        let placement = place(&config, n_gpus())?;
        if let Some(n_threads) = config.threads {
            tch::set_num_threads(i32::try_from(n_threads).unwrap_or(i32::MAX));
        }
        let n_steps = config.n_steps.filter(|&n_steps| n_steps > 0);
        let services: Arc<dyn HostServices> = Services::new(registry, terminal, &config);
        let task_name = config.task.clone().ok_or_else(no_task)?;
        let schedule = Schedule::new(&config.schedule, n_steps, d_model(&arguments))?;
        let task = registry.find(ComponentKind::Task, &task_name)?;
        let facts = RunFacts { batch_size: config.batch_size as u64, n_steps };
        let plan = task
            .client()
            .new_task(&task.info.name, &component_config(&arguments, task)?, &services)?
            .plan(&facts)?;
        let model_component = registry.find(ComponentKind::Model, &plan.model)?;

        let open = |request: &StreamRequest| open_stream(registry, &arguments, request, &services);
        let train_stream = open(&plan.train)?;
        let info = train_stream.info()?;
        let validation = plan
            .validation
            .iter()
            .map(|request| eval_stream(open(request)?, request))
            .collect::<Result<Vec<_>, PluginError>>()?;
        let data_s = clock.elapsed();

        let mut state = match &restored {
            Some(loaded) => read_state(loaded)?,
            None => TrainState { seed: seed(&config), ..TrainState::default() },
        };
        rng::seed(state.seed).or_plugin_error("the random generator cannot be seeded")?;
        let model = model_component.client().new_model(
            &model_component.info.name,
            &component_config(&arguments, model_component)?,
            &ModelSetup {
                vocab_size: info.vocab_size,
                device: placement.device,
                dtype: placement.dtype,
                compute_dtype: placement.compute_dtype,
                compat: config.compat,
            },
            &services,
        )?;
        let (parameters, trainable) = parameters(&model)?;
        let optimizer = Optimizer::new(config.optimizer.clone(), &trainable);
        let device = moeut_torch::device(placement.device);
        if let Some(loaded) = &restored {
            load_tensors("model", &parameters, &loaded.snapshot.model)?;
            load_tensors("optimizer", &optimizer.tensors(), &loaded.snapshot.optimizer)?;
            restore_rng(&loaded.snapshot.optimizer, device)?;
        }
        let shape = batch_shape(&config, plan.train.seq_len)?;
        let batches = Batches::start(Arc::clone(&train_stream), info.n_windows, shape, state.position)?;
        state.position = batches.position();

        let sinks = Sinks::start(sinks(&config, &folder, restored.as_ref().map(|_| state.step), terminal));
        let n_steps = n_steps.unwrap_or(u64::MAX);
        let mut monitor = Monitor::new(sinks, Arc::clone(terminal), config.log_interval, n_steps, &state);
        announce(&mut monitor, &state, &trainable, placement, &info, &plan.model);
        monitor.message(&format!(
            "ready: data {:.2} s, model {:.2} s",
            data_s.as_secs_f64(),
            (clock.elapsed() - data_s).as_secs_f64()
        ));
        Ok(Self {
            n_steps,
            model,
            device,
            autocast: (placement.compute_dtype != placement.dtype)
                .then(|| moeut_torch::kind(placement.compute_dtype)),
            batches,
            validation,
            eval_batch_size: config.eval_batch_size.unwrap_or(config.batch_size / shape.n_microbatches).max(1),
            optimizer,
            schedule,
            regularizers: Regularizers { scales: config.reg_scales.clone() },
            monitor,
            checkpoints: Checkpoints::new(folder.join("checkpoint"), config.n_kept).keep_every(KEEP_EVERY),
            parameters,
            args: arguments.raw_map(),
            samples: Samples {
                tokenizer: train_stream,
                prompts: plan.prompts.into_iter().cycle().take(config.sample.n_prompts).collect(),
                sampling: Sampling {
                    length: config.sample.length,
                    temperature: config.sample.temperature,
                    seq_len: shape.seq_len,
                },
            },
            tokens_per_step: (shape.batch_size * shape.seq_len) as u64,
            last_saved: restored.map(|loaded| loaded.snapshot.step),
            state,
            config,
        })
    }

    /// Notes that a step is done.
    pub fn advance(&mut self) {
        self.state.step += 1;
        self.state.n_tokens += self.tokens_per_step;
        self.state.position = self.batches.position();
    }

    /// Whether something that happens every `interval` steps, and at the end, happens now.
    pub fn is_due(&self, interval: Option<u64>) -> bool {
        let step = self.state.step;
        step == self.n_steps || interval.is_some_and(|interval| interval > 0 && step.is_multiple_of(interval))
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
        for warning in self.checkpoints.take_warnings() {
            self.monitor.warn(&warning);
        }
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
        let Samples { tokenizer, prompts, sampling } = &self.samples;
        for (index, prompt) in prompts.iter().enumerate() {
            let text = generate(&mut self.model, tokenizer, prompt, sampling, self.device, &mut uniform)?;
            self.monitor.sample(self.state.step, index, &text);
        }
        let saved = self.checkpoints.wait();
        for warning in self.checkpoints.take_warnings() {
            self.monitor.warn(&warning);
        }
        Ok(saved?)
    }
}

fn no_task() -> PluginError {
    PluginError::new("no task is named")
        .why("`-task` is missing")
        .fix("type `moeut-host -task moeut_c4 -name <name>`; `moeut-host plugins list` shows all tasks")
}

fn n_gpus() -> u32 {
    u32::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// The arguments of a component, as its configuration.
fn component_config(arguments: &Arguments, component: Component<'_>) -> Result<serde_json::Value, PluginError> {
    arguments.config_for(&component.info.args).map_err(|error| {
        PluginError::new(error.what()).why(error.why()).fix(error.fix())
    })
}

/// Width of the model, which the `noam` schedule needs.
fn d_model(arguments: &Arguments) -> Option<u64> {
    arguments.values.get("state_size")?.as_u64()
}

/// A run without `-seed` gets one from the clock; it is stored, so the run can be repeated.
fn seed(config: &HostConfig) -> u64 {
    config.seed.map_or_else(
        || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(0, |since| since.as_secs() ^ u64::from(since.subsec_nanos()))
        },
        i64::cast_unsigned,
    )
}

fn open_stream(
    registry: &Registry,
    arguments: &Arguments,
    request: &StreamRequest,
    services: &Arc<dyn HostServices>,
) -> Result<Arc<TokenDatasetClient>, PluginError> {
    let component = registry.find(ComponentKind::Dataset, &request.dataset)?;
    let config = component_config(arguments, component)?;
    let dataset = component.client().new_token_dataset(&component.info.name, &config, request, services)?;
    Ok(Arc::new(dataset))
}

fn eval_stream(dataset: Arc<TokenDatasetClient>, request: &StreamRequest) -> Result<EvalStream, PluginError> {
    let info = dataset.info()?;
    Ok(EvalStream {
        name: request.name.clone(),
        dataset,
        n_windows: info.n_windows,
        seq_len: size(request.seq_len)?,
        utf8_bytes_per_token: info.utf8_bytes_per_token,
    })
}

fn batch_shape(config: &HostConfig, seq_len: u64) -> Result<BatchShape, PluginError> {
    let n_microbatches = config
        .n_microbatches
        .or_else(|| Some(config.batch_size.div_ceil(config.per_device_batch_size?)))
        .unwrap_or(1);
    Ok(BatchShape { batch_size: config.batch_size, n_microbatches, seq_len: size(seq_len)? })
}

fn size(number: u64) -> Result<usize, PluginError> {
    usize::try_from(number).map_err(|_| PluginError::new(format!("a sequence of {number} tokens is too long")))
}

type Named = Vec<(String, Tensor)>;

/// All tensors of a model, and those that are trained.
fn parameters(model: &ModelClient) -> Result<(Named, Named), PluginError> {
    let (mut all, mut trainable) = (Vec::new(), Vec::new());
    for parameter in model.parameters()? {
        let tensor = parameter.tensor.into_tensor();
        if parameter.is_trainable {
            trainable.push((parameter.name.clone(), tensor.shallow_clone()));
        }
        all.push((parameter.name, tensor));
    }
    Ok((all, trainable))
}

fn read_state(loaded: &Loaded) -> Result<TrainState, PluginError> {
    serde_json::from_value(loaded.snapshot.state.clone()).map_err(|error| {
        PluginError::new(format!("the state in `{}` cannot be used", loaded.path.display()))
            .why(error.to_string())
            .fix("restore another checkpoint")
    })
}

/// Copies a checkpoint's tensors into the run's.
fn load_tensors(what: &str, into: &[(String, Tensor)], from: &[(String, Tensor)]) -> Result<(), PluginError> {
    let _no_grad = tch::no_grad_guard();
    let stored: BTreeMap<&str, &Tensor> = from.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mismatch = |why: String| {
        PluginError::new(format!("the checkpoint does not fit the {what}"))
            .why(why)
            .fix("use the arguments that the checkpoint was made with; they are in its `args.json`")
    };
    for (name, tensor) in into {
        let Some(source) = stored.get(name.as_str()) else {
            return Err(mismatch(format!("it has no `{name}`")));
        };
        if source.size() != tensor.size() {
            return Err(mismatch(format!("`{name}` is {:?}, and {:?} is needed", source.size(), tensor.size())));
        }
        tensor.shallow_clone().f_copy_(source).or_plugin_error("a tensor cannot be restored")?;
    }
    Ok(())
}

fn rng_states(device: Device) -> Result<Named, PluginError> {
    let state = |device| rng::state(device).or_plugin_error("the random generator cannot be read");
    let mut states = vec![(RNG_CPU.to_owned(), state(Device::Cpu)?)];
    if device.is_cuda() {
        states.push((RNG_CUDA.to_owned(), state(device)?));
    }
    Ok(states)
}

/// A checkpoint made on another kind of device has no state for this one; its generator stays as seeded.
fn restore_rng(stored: &[(String, Tensor)], device: Device) -> Result<(), PluginError> {
    for (wanted, place) in [(RNG_CPU, Device::Cpu), (RNG_CUDA, device)] {
        if let Some((_, state)) = stored.iter().find(|(name, _)| name == wanted) {
            rng::set_state(place, state).or_plugin_error("the random generator cannot be restored")?;
        }
    }
    Ok(())
}

/// The sinks of a run; one that cannot be opened is reported and left out.
fn sinks(config: &HostConfig, folder: &Path, resume_at: Option<u64>, terminal: &Terminal) -> Vec<Box<dyn Sink>> {
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    let mut add = |sink: Result<Box<dyn Sink>, crate::log::SinkError>| match sink {
        Ok(sink) => sinks.push(sink),
        Err(error) => terminal.message(crate::log::Level::Warning, &format!("{error}; {}", error.help())),
    };
    add(Jsonl::open(&folder.join("metrics.jsonl"), resume_at).map(|sink| Box::new(sink) as _));
    if config.log == LogSink::Tb {
        add(TensorBoard::open(&folder.join("tensorboard"), resume_at).map(|sink| Box::new(sink) as _));
    }
    sinks
}

fn announce(
    monitor: &mut Monitor,
    state: &TrainState,
    trainable: &[(String, Tensor)],
    placement: Placement,
    info: &moeut_plugin_api::StreamInfo,
    model: &str,
) {
    let n_params: usize = trainable.iter().map(|(_, tensor)| tensor.numel()).sum();
    monitor.once(state.step, vec![("n_params".into(), n_params as f64)]);
    monitor.message(&format!(
        "model `{model}`: {n_params} parameters on {} ({} parameters, {} products); {} training tokens, vocabulary {}",
        placement.device, placement.dtype, placement.compute_dtype, info.n_tokens, info.vocab_size
    ));
    if state.step > 0 {
        monitor.message(&format!("going on from step {}", state.step));
    }
}

