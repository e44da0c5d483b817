//! Builds a [`Run`] from the arguments: device, task, data, model, optimizer, logs; in this order, so that errors
//! that a user can cause come early.

use super::TrainError;
use super::agreement;
use super::batches::{BatchShape, Batches};
use super::border::check_parameters;
use super::device::{Placement, place};
use super::dumps::Dumps;
use super::evaluate::EvalStream;
use super::generate::Sampling;
use super::graphs::Graphs;
use super::labels::Follower;
use super::logs::sinks;
use super::loss::Loss;
use super::monitor::{Monitor, Watch};
use super::non_finite::{Guard, Inspector};
use super::optimizer::Optimizer;
use super::pretrained;
use super::regularizers::Regularizers;
use super::reporting::{Intervals, weight_counts};
use super::restore::{self, check_nothing_left, load_tensors};
use super::run::{Named, Run, Samples};
use super::sampler::Sampler;
use super::sampling::Choice;
use super::scaler::Scaler;
use super::schedule::Schedule;
use super::segments::Segments;
use super::state::{Rows, TrainState};
use super::stream::Stream;
use super::throughput::{self, Throughput};
use crate::args::{Arguments, GpuChoice, HostConfig, SampleConfig, Source, Speedtest};
use crate::checkpoint::{Checkpoints, Loaded};
use crate::distributed::Group;
use crate::eval::{self, EvalSet, Setting};
use crate::gpu;
use crate::job::Job;
use crate::log::{Sinks, Terminal};
use crate::plan;
use crate::plugins::{Component, Registry};
use crate::profile::Profile;
use crate::services::Services;
use crate::signals::Signals;
use moeut_plugin_api::abi::client::{
    ChoiceDatasetClient, HostServices, ModelClient, TokenDatasetClient,
};
use moeut_plugin_api::{
    ComponentKind, DType, EvaluationRequest, LogLevel, ModelSetup, PluginError, StreamInfo,
    StreamRequest, TaskPlan,
};
use moeut_torch::{IntoTensor, OrPluginError, rng};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// One checkpoint of this period stays for good, as in the reference.
const KEEP_EVERY: Duration = Duration::from_hours(4);

/// What [`build`] needs from the command line.
pub struct Blueprint {
    /// All arguments.
    pub arguments: Arguments,
    /// The host's own.
    pub config: HostConfig,
    /// Folder of this run.
    pub folder: PathBuf,
    /// A checkpoint to go on from, which the first process has.
    pub restored: Option<Loaded>,
    /// The processes that train together.
    pub group: Group,
    /// The SLURM job that this start is part of.
    pub job: Option<Job>,
    /// What signals ask for.
    pub signals: Arc<Signals>,
}

impl Blueprint {
    /// Whether the run trains, and so saves and logs.
    pub fn is_training(&self) -> bool {
        !self.config.dry_run && !self.config.test_only
    }
}

/// Builds everything.
///
/// # Errors
/// If a component is missing or refuses its arguments, or the checkpoint does not fit.
pub fn build(
    mut blueprint: Blueprint,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Run, TrainError> {
    let clock = Instant::now();
    let group = blueprint.group.clone();
    let placement = machine(&mut blueprint.config, &group, terminal)?;
    let n_steps = blueprint.config.n_steps.filter(|&n_steps| n_steps > 0);
    let schedule = Schedule::new(
        &blueprint.config.schedule,
        // Without steps no learning rate is asked for, so that a curve without an end is no mistake.
        n_steps.or(blueprint.config.test_only.then_some(1)),
        d_model(&blueprint.arguments),
    )?;
    let regularizers = Regularizers::new(&blueprint.config, n_steps)?;
    let Blueprint {
        config, signals, ..
    } = &blueprint;
    let services = Services::in_group(registry, terminal, config, signals, &group);
    let for_plugins: Arc<dyn HostServices> = services.clone();
    let site = Site {
        blueprint: &blueprint,
        registry,
        services: &for_plugins,
    };
    let plan = site.plan()?;
    let data = site.data(&plan)?;
    let data_time = clock.elapsed();

    let clock = Instant::now();
    let mut state: TrainState = group.share("state", || site.state())?;
    rng::seed(state.seed).or_plugin_error("the random generator cannot be seeded")?;
    let shape = batch_shape(&blueprint.config, plan.train.seq_len, &group)?;
    let mut subject = site.subject(&plan.model, &data, placement)?;
    let device = moeut_torch::device(placement.device);
    site.recall(&mut subject, &mut state, shape, device)?;
    let sampler = sampler(&blueprint.config, &data.train, state.seed, terminal);
    let batches = Batches::start(data.train.clone(), sampler, shape, state.position)?;
    state.position = batches.position();

    let n_steps = n_steps.unwrap_or(u64::MAX);
    let watch = watch(
        &blueprint.config,
        &subject,
        placement,
        plan.train.seq_len,
        n_steps,
    )?;
    let mut monitor = monitor(&blueprint, watch, &data, &mut state, terminal)?;
    announce(&mut monitor, &state, &subject, placement, &data.info);
    monitor.message(&format!(
        "ready: data {:.2} s, model {:.2} s",
        data_time.as_secs_f64(),
        clock.elapsed().as_secs_f64()
    ));

    let is_training = blueprint.is_training();
    let Blueprint {
        arguments,
        config,
        folder,
        restored,
        job,
        signals,
        ..
    } = blueprint;
    let eval_batch_size = eval_batch_size(&config, shape.n_microbatches, &group);
    let checkpoint_dir = folder.join("checkpoint");
    let is_pretrained = config.pretrained.is_some() && !subject.is_restored;
    let last_saved = || Ok::<_, PluginError>(restore::last_saved(restored, &checkpoint_dir));
    let last_saved = group.share("last saved", last_saved)?;
    let checkpoints = (is_training && group.is_first())
        .then(|| Checkpoints::new(&checkpoint_dir, config.n_kept).keep_every(KEEP_EVERY));
    Ok(Run {
        guard: Guard::new(config.non_finite.budget(), state.n_skipped, device),
        n_steps,
        state,
        group,
        model: subject.model,
        model_name: subject.name,
        loss: Loss::of_model(&services, placement)?,
        segments: subject.segments,
        device,
        autocast: (placement.compute_dtype != placement.dtype)
            .then(|| moeut_torch::kind(placement.compute_dtype)),
        batches,
        validation: data.validation,
        evaluations: data.evaluations,
        eval_batch_size,
        optimizer: subject.optimizer,
        scaler: subject.scaler,
        inspector: Inspector::new(config.non_finite.is_traced),
        schedule,
        regularizers,
        monitor,
        signals,
        job,
        saves: is_training,
        checkpoints,
        is_pretrained,
        parameters: subject.parameters,
        args: arguments.raw_map(),
        samples: samples(plan.prompts, data.tokenizer, &config, shape.seq_len),
        last_saved,
        checkpoint_dir,
        graphs: Graphs::new(config.cuda_graphs),
        config,
    })
}

/// Starts the logs, in the first process, and what observes the run for them.
fn monitor(
    blueprint: &Blueprint,
    watch: Watch,
    data: &Data,
    state: &mut TrainState,
    terminal: &Arc<Terminal>,
) -> Result<Monitor, PluginError> {
    let sinks = if blueprint.group.is_first() {
        sinks(blueprint, state, terminal)
    } else {
        Vec::new()
    };
    let follower = follower(&data.tokenizer, watch.intervals);
    let files = (follower, Dumps::new(&blueprint.folder));
    let device = watch.device;
    let monitor = Monitor::new(
        Sinks::start(sinks),
        Arc::clone(terminal),
        watch,
        files,
        state,
    )
    .with_profile(profile(blueprint, device, terminal))
    .with_signals(&blueprint.signals);
    if blueprint.config.non_finite.is_traced {
        moeut_torch::anomaly::detect(true).or_plugin_error("`-nan_detect 1` is refused")?;
        monitor
            .warn("`-nan_detect 1` looks at every tensor of every step: training is much slower");
    }
    Ok(monitor)
}

/// Chooses device and precision, and sets what holds for the whole process.
pub(crate) fn machine(
    config: &mut HostConfig,
    group: &Group,
    terminal: &Terminal,
) -> Result<Placement, PluginError> {
    if config.deterministic {
        moeut_torch::determinism::set(true).or_plugin_error("`-deterministic 1` is refused")?;
    }
    if let Some(n_threads) = config.threads {
        tch::set_num_threads(i32::try_from(n_threads).unwrap_or(i32::MAX));
    }
    let n_gpus = n_gpus();
    config.gpu = match config.gpu {
        // Of several processes each sees one GPU only.
        GpuChoice::Auto if !group.is_single() && n_gpus > 0 => GpuChoice::Index(0),
        GpuChoice::Index(index) if !group.is_single() => return Err(one_gpu(index, group)),
        gpu => gpu::take(gpu, n_gpus, terminal),
    };
    let placement = place(config, n_gpus)?;
    agreement::on_device(group, placement)?;
    group.connect(moeut_torch::device(placement.device))?;
    Ok(placement)
}

fn one_gpu(index: u32, group: &Group) -> PluginError {
    PluginError::new(format!(
        "`-gpu {index}` names one GPU for {} processes",
        group.n_ranks()
    ))
    .why("each process takes the GPU of its number on its host")
    .fix("leave out `-gpu`; `CUDA_VISIBLE_DEVICES` says which GPUs there are")
}

/// What `-profile_steps` asks for; only steps of a training are recorded.
fn profile(blueprint: &Blueprint, device: Device, terminal: &Terminal) -> Option<Profile> {
    let steps = blueprint.config.profile?;
    if !blueprint.is_training() {
        let text = "`-profile_steps` has no effect: nothing is trained";
        terminal.message(crate::log::Level::Warning, text);
        return None;
    }
    Some(Profile::new(steps, device, &blueprint.folder))
}

/// Reads along where attention maps will name tokens.
fn follower(tokenizer: &Arc<TokenDatasetClient>, intervals: Intervals) -> Follower {
    let tokenizer = Arc::clone(tokenizer);
    let text = move |id| tokenizer.decode(&[id]).unwrap_or_default();
    Follower::new(text, intervals.has_maps())
}

/// What the logs need to know.
fn watch(
    config: &HostConfig,
    subject: &Subject,
    placement: Placement,
    seq_len: u64,
    n_steps: u64,
) -> Result<Watch, PluginError> {
    let device = moeut_torch::device(placement.device);
    let summary = subject.model.summary(seq_len)?;
    let flops_per_token = throughput::flops_per_token(&summary, seq_len, subject.n_trained);
    let is_16_bit = matches!(placement.compute_dtype, DType::Bf16 | DType::F16);
    Ok(Watch {
        intervals: Intervals::new(config),
        n_steps,
        eval_interval: config.eval_interval,
        device,
        throughput: Throughput::new(flops_per_token, config.peak_tflops, device, is_16_bit),
        nan_budget: config.non_finite.budget(),
        is_speedtest: config.speedtest == Speedtest::Iter,
        logs_grad_norms: config.logs_grad_norms,
    })
}

/// As the reference: a batch of the validation is a microbatch of the training, unless told otherwise.
pub(crate) fn eval_batch_size(config: &HostConfig, n_microbatches: usize, group: &Group) -> usize {
    let n_rows = config.batch_size.div_ceil(group.n_ranks());
    let size = config.eval_batch_size;
    size.unwrap_or(n_rows / n_microbatches).max(1)
}

/// What every part of the building needs.
pub(crate) struct Site<'a> {
    pub(crate) blueprint: &'a Blueprint,
    pub(crate) registry: &'a Registry,
    pub(crate) services: &'a Arc<dyn HostServices>,
}

/// The opened streams.
struct Data {
    tokenizer: Arc<TokenDatasetClient>,
    train: Stream,
    info: StreamInfo,
    validation: Vec<EvalStream>,
    evaluations: Vec<EvalSet>,
}

/// The model and what trains it.
struct Subject {
    name: String,
    model: ModelClient,
    parameters: Named,
    n_trained: usize,
    /// The layers' numbers, by kind.
    weight_counts: Vec<(String, f64)>,
    optimizer: Optimizer,
    scaler: Scaler,
    segments: Segments,
    /// Whether a checkpoint was there to go on from.
    is_restored: bool,
}

impl Site<'_> {
    /// Asks the task what to build.
    pub(crate) fn plan(&self) -> Result<TaskPlan, PluginError> {
        let config = &self.blueprint.config;
        let name = config.task.as_deref().ok_or_else(no_task)?;
        let task = self.registry.find(ComponentKind::Task, name)?;
        plan::ask(task, &self.blueprint.arguments, config, self.services)
    }

    fn data(&self, plan: &TaskPlan) -> Result<Data, PluginError> {
        // Before hours of downloading: a missing model is found out now.
        self.registry.find(ComponentKind::Model, &plan.model)?;
        let tokenizer = self.stream(&plan.train)?;
        let info = tokenizer.info()?;
        let train = Stream::new(
            &plan.train.dataset,
            Arc::clone(&tokenizer),
            size(plan.train.seq_len)?,
            &info,
        )?;
        let validation = plan
            .validation
            .iter()
            .map(|request| eval_stream(self.stream(request)?, request))
            .collect::<Result<_, PluginError>>()?;
        let config = &self.blueprint.config;
        let setting = Setting {
            tokenizer: &tokenizer,
            vocab_size: info.vocab_size,
            batch_size: eval_batch_size(
                config,
                n_microbatches(config, &self.blueprint.group),
                &self.blueprint.group,
            ),
            seq_len: size(plan.train.seq_len)?,
            compat: config.compat,
            limit: None,
            warn: &|text| self.services.log(LogLevel::Warning, text),
        };
        let evaluations = self.evaluations(plan, setting)?;
        Ok(Data {
            tokenizer,
            train,
            info,
            validation,
            evaluations,
        })
    }

    /// Opens the evaluation sets of the plan before the first step, so that a missing file is not found out by the last
    /// one. A set that nobody typed an argument for is left out if its plugin is not there, or its files are not in the
    /// folder of the user's data.
    fn evaluations(
        &self,
        plan: &TaskPlan,
        setting: Setting<'_>,
    ) -> Result<Vec<EvalSet>, PluginError> {
        let is_typed = self
            .blueprint
            .arguments
            .raw
            .iter()
            .any(|(name, (_, source))| {
                name.starts_with("lm.eval.")
                    && matches!(source, Source::CommandLine | Source::Profile(_))
            });
        let mut sets = Vec::new();
        for request in &plan.evaluations {
            let opened = self
                .choices(&request.dataset)
                .and_then(|set| EvalSet::open(&set, request, setting));
            match opened {
                Ok(set) => sets.push(set),
                Err(error) if !is_typed && self.is_absent(request, &error) => {
                    (setting.warn)(&format!(
                        "`{}` is not evaluated: {}; {}",
                        request.dataset, error.why, error.fix
                    ));
                }
                Err(error) => return Err(or_without_evaluation(error)),
            }
        }
        Ok(sets)
    }

    fn is_absent(&self, request: &EvaluationRequest, error: &PluginError) -> bool {
        let plugin = self
            .registry
            .find(ComponentKind::ChoiceDataset, &request.dataset);
        plugin.is_err() || eval::is_missing(error)
    }

    /// Opens a choice dataset.
    fn choices(&self, name: &str) -> Result<ChoiceDatasetClient, PluginError> {
        let set = self.registry.find(ComponentKind::ChoiceDataset, name)?;
        let arguments = self.arguments_of(set)?;
        let client = set.client();
        client.new_choice_dataset(&set.info.name, &arguments, self.services)
    }

    /// Opens a stream.
    pub(crate) fn stream(
        &self,
        request: &StreamRequest,
    ) -> Result<Arc<TokenDatasetClient>, PluginError> {
        let dataset = self
            .registry
            .find(ComponentKind::Dataset, &request.dataset)?;
        let arguments = self.arguments_of(dataset)?;
        let name = &dataset.info.name;
        let client = dataset.client();
        let opened = client.new_token_dataset(name, &arguments, request, self.services)?;
        Ok(Arc::new(opened))
    }

    /// The state to start from: a checkpoint's, or a fresh one.
    fn state(&self) -> Result<TrainState, PluginError> {
        match &self.blueprint.restored {
            Some(loaded) => restore::state(loaded),
            None => Ok(TrainState {
                seed: seed(&self.blueprint.config),
                ..TrainState::default()
            }),
        }
    }

    /// Builds a model with fresh parameters.
    pub(crate) fn model(
        &self,
        component: Component<'_>,
        vocab_size: u64,
        placement: Placement,
    ) -> Result<ModelClient, PluginError> {
        let setup = ModelSetup {
            vocab_size,
            device: placement.device,
            dtype: placement.dtype,
            compute_dtype: placement.compute_dtype,
            compat: self.blueprint.config.compat,
            is_shape_only: false,
        };
        let arguments = self.arguments_of(component)?;
        let client = component.client();
        client.new_model(&component.info.name, &arguments, &setup, self.services)
    }

    /// Builds model and optimizer, and puts a checkpoint's tensors into them. The first process has the checkpoint, or
    /// the first parameters; all others get what it has.
    fn subject(
        &self,
        name: &str,
        data: &Data,
        placement: Placement,
    ) -> Result<Subject, PluginError> {
        let Blueprint {
            config,
            restored,
            group,
            ..
        } = self.blueprint;
        let component = self.registry.find(ComponentKind::Model, name)?;
        let model = self.model(component, data.info.vocab_size, placement)?;
        let (parameters, trained) = parameters(&model)?;
        let (train, vocab_size) = (&data.train, data.info.vocab_size);
        agreement::on_data(
            group,
            train,
            vocab_size,
            &data.validation,
            &data.evaluations,
        )?;
        agreement::on_parameters(group, &parameters)?;
        let device = moeut_torch::device(placement.device);
        let has_memory = model.abilities()?.has_memory;
        let weight_counts = weight_counts(&trained);
        let n_trained = trained.iter().map(|(_, tensor)| tensor.numel()).sum();
        let optimizer = Optimizer::new(config.optimizer.clone(), trained, group)?;
        let scaler = Scaler::new(placement.compute_dtype == DType::F16, device);

        let is_restored =
            group.share("is restored", || Ok::<_, PluginError>(restored.is_some()))?;
        if let Some(loaded) = restored {
            load_tensors("model", &parameters, &loaded.snapshot.model)?;
            check_nothing_left(&parameters, &loaded.snapshot.model)?;
        } else if let Some(path) = config
            .pretrained
            .as_ref()
            .filter(|_| group.is_first() && !is_restored)
        {
            let stored = pretrained::read(path, config.sweep_id)?;
            load_tensors("model", &parameters, &stored)?;
        }
        let tensors: Vec<&Tensor> = parameters.iter().map(|(_, tensor)| tensor).collect();
        group.broadcast(&tensors, 0)?;
        if is_restored {
            let stored = restored
                .as_ref()
                .map_or(&[][..], |loaded| &loaded.snapshot.optimizer);
            optimizer.restore(|state| load_tensors("optimizer", state, stored))?;
            // A run in another precision had no scaler; this one starts afresh then.
            if stored.iter().any(|(name, _)| name.starts_with("scaler/")) {
                load_tensors("loss scaler", &scaler.tensors(), stored)?;
            }
            let tensors = scaler.tensors();
            group.broadcast(
                &tensors.iter().map(|(_, tensor)| tensor).collect::<Vec<_>>(),
                0,
            )?;
        }
        Ok(Subject {
            is_restored,
            name: component.info.name.clone(),
            model,
            parameters,
            weight_counts,
            n_trained,
            optimizer,
            scaler,
            segments: Segments::new(has_memory, config.memory_drop_probability),
        })
    }

    /// Puts back what a checkpoint has of each process: random generators, and segment memory, unless it is of other
    /// rows of the text. A process that the earlier start did not have gets random numbers of its own.
    fn recall(
        &self,
        subject: &mut Subject,
        state: &mut TrainState,
        shape: BatchShape,
        device: Device,
    ) -> Result<(), PluginError> {
        let Blueprint {
            config,
            restored,
            group,
            ..
        } = self.blueprint;
        let (rank, n_ranks) = (group.rank(), group.n_ranks());
        let of_first = BatchShape {
            n_rows: config.batch_size.div_ceil(n_ranks),
            ..shape
        };
        let rows = Rows {
            microbatch_sizes: of_first.microbatch_sizes(),
            seq_len: shape.seq_len,
            n_ranks,
        };
        let earlier = state.rows.replace(rows);
        if rank > 0 {
            let seed = state.seed ^ (rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            rng::seed(seed).or_plugin_error("the random generator cannot be seeded")?;
        }
        if !subject.is_restored {
            return Ok(());
        }
        let stored = restored
            .as_ref()
            .map_or(&[][..], |loaded| &loaded.snapshot.optimizer);
        let own = restore::of_this_rank(group, stored)?;
        restore::rng(&own, device)?;
        if earlier == state.rows {
            subject.segments.restore(&mut subject.model, &own)?;
        }
        Ok(())
    }

    /// The arguments of a component, as its configuration.
    fn arguments_of(&self, component: Component<'_>) -> Result<serde_json::Value, PluginError> {
        let arguments = &self.blueprint.arguments;
        Ok(arguments.config_for(&component.info.args)?)
    }
}

fn samples(
    prompts: Vec<String>,
    tokenizer: Arc<TokenDatasetClient>,
    config: &HostConfig,
    seq_len: usize,
) -> Samples {
    let prompts = match &config.prompt {
        Some(prompt) => vec![prompt.clone()],
        None => prompts,
    };
    Samples {
        tokenizer,
        prompts: prompts
            .into_iter()
            .cycle()
            .take(config.sample.n_prompts)
            .collect(),
        sampling: sampling(&config.sample, seq_len),
    }
}

/// How the user wants texts to be continued; `seq_len` is the model's.
pub(crate) fn sampling(config: &SampleConfig, seq_len: usize) -> Sampling {
    Sampling {
        length: config.length,
        choice: Choice {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
        },
        seq_len,
    }
}

fn no_task() -> PluginError {
    PluginError::new("no task is named")
        .why("`-task` is missing")
        .fix("type `moeut-host -task moeut_c4 -name <name>`; `moeut-host plugins list` shows all tasks")
}

/// CUDA devices that libtorch sees.
pub(crate) fn n_gpus() -> u32 {
    u32::try_from(tch::Cuda::device_count()).unwrap_or(0)
}

/// Width of the model, which the `noam` schedule needs.
fn d_model(arguments: &Arguments) -> Option<u64> {
    arguments.values.get("state_size")?.as_u64()
}

/// A run without `-seed` gets one from the clock; it is stored, so the run can be repeated.
fn seed(config: &HostConfig) -> u64 {
    config
        .seed
        .map_or_else(seed_of_the_clock, i64::cast_unsigned)
}

/// Another one each time.
pub(crate) fn seed_of_the_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs() ^ u64::from(since.subsec_nanos()))
}

/// What else to do about an evaluation set that does not open.
fn or_without_evaluation(error: PluginError) -> PluginError {
    let fix = [
        error.fix.as_str(),
        "train without evaluation: `-lm.eval.enabled 0`",
    ];
    let fix: Vec<&str> = fix.into_iter().filter(|fix| !fix.is_empty()).collect();
    PluginError {
        fix: fix.join("; or "),
        ..error
    }
}

pub(crate) fn eval_stream(
    dataset: Arc<TokenDatasetClient>,
    request: &StreamRequest,
) -> Result<EvalStream, PluginError> {
    let info = dataset.info()?;
    Ok(EvalStream {
        name: request.name.clone(),
        stream: Stream::new(&request.dataset, dataset, size(request.seq_len)?, &info)?,
        utf8_bytes_per_token: info.utf8_bytes_per_token,
    })
}

/// Which windows make a batch.
pub(crate) fn sampler(
    config: &HostConfig,
    stream: &Stream,
    seed: u64,
    terminal: &Terminal,
) -> Sampler {
    let batch_size = config.batch_size;
    if let Some(lengths) = stream.lengths() {
        return Sampler::documents(Arc::clone(lengths), batch_size, seed, config.is_bucketed);
    }
    if config.is_bucketed {
        let text = "`-length_bucketed_sampling 1` has no effect: all sequences of this stream have one length";
        terminal.message(crate::log::Level::Warning, text);
    }
    Sampler::lanes(stream.n_windows(), batch_size)
}

pub(crate) fn batch_shape(
    config: &HostConfig,
    seq_len: u64,
    group: &Group,
) -> Result<BatchShape, PluginError> {
    let rows = group.share_of(config.batch_size);
    if rows.is_empty() || config.batch_size < group.n_ranks() {
        return Err(
            PluginError::new(format!("`-batch_size {}` is too small", config.batch_size))
                .why(format!(
                    "each of {} processes takes at least one sequence of a batch",
                    group.n_ranks()
                ))
                .fix("raise `-batch_size`, or start fewer processes"),
        );
    }
    Ok(BatchShape {
        batch_size: config.batch_size,
        first_row: rows.start,
        n_rows: rows.len(),
        n_microbatches: n_microbatches(config, group),
        seq_len: size(seq_len)?,
        n_batches: config.n_batches,
    })
}

/// Parts in which each process computes its share of a batch.
pub(crate) fn n_microbatches(config: &HostConfig, group: &Group) -> usize {
    let n_rows = config.batch_size.div_ceil(group.n_ranks());
    config
        .n_microbatches
        .or_else(|| Some(n_rows.div_ceil(config.per_device_batch_size?)))
        .unwrap_or(1)
}

pub(crate) fn size(number: u64) -> Result<usize, PluginError> {
    usize::try_from(number)
        .map_err(|_| PluginError::new(format!("a sequence of {number} tokens is too long")))
}

/// All tensors of a model, and those that are trained.
pub(crate) fn parameters(model: &ModelClient) -> Result<(Named, Named), PluginError> {
    let (mut all, mut trainable) = (Vec::new(), Vec::new());
    let mut trained = Vec::new();
    for parameter in model.parameters()? {
        let tensor = parameter.tensor.into_tensor();
        if parameter.is_trainable {
            trainable.push((parameter.name.clone(), tensor.shallow_clone()));
        }
        trained.push(parameter.is_trainable);
        all.push((parameter.name, tensor));
    }
    let described = all.iter().zip(&trained);
    check_parameters(
        described.map(|((name, tensor), is_trained)| (name.as_str(), tensor, *is_trained)),
    )?;
    Ok((all, trainable))
}

fn announce(
    monitor: &mut Monitor,
    state: &TrainState,
    subject: &Subject,
    placement: Placement,
    info: &StreamInfo,
) {
    let n_params = subject.n_trained;
    // Once a run, so that the record of one that goes on is that of one that was never interrupted.
    if state.step == 0 {
        let mut counts = subject.weight_counts.clone();
        counts.push(("n_params".into(), n_params as f64));
        monitor.once(state.step, counts);
    }
    monitor.message(&format!(
        "model `{}`: {n_params} parameters on {} ({} parameters, {} products); {} training tokens, vocabulary {}",
        subject.name, placement.device, placement.dtype, placement.compute_dtype, info.n_tokens, info.vocab_size
    ));
    if state.step > 0 {
        monitor.message(&format!("going on from step {}", state.step));
    }
}
