//! The host's configuration: what its arguments mean, typed and checked.

use super::arguments::Arguments;
use super::error::ArgsError;
use super::host_table::{MINIMUM, host_args};
use crate::profile::{self, Steps};
use moeut_plugin_api::DType;
use moeut_plugin_api::args::ArgDef;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// Everything that the host itself takes from the command line.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent yes/no flags of the reference's command line"
)]
pub struct HostConfig {
    /// The task to train.
    pub task: Option<String>,
    /// The run's name, which is that of its folder.
    pub name: Option<String>,
    /// More folders with plugins.
    #[serde(deserialize_with = "none_is_default")]
    pub plugin_dirs: Vec<PathBuf>,
    /// A checkpoint, or a folder with checkpoints, to start from.
    #[serde(deserialize_with = "empty_is_none")]
    pub restore: Option<PathBuf>,
    /// Whether to remove what an earlier run of this name left.
    pub reset: bool,
    /// Weights to start from.
    #[serde(deserialize_with = "empty_is_none")]
    pub pretrained: Option<PathBuf>,
    /// Whether to validate with these weights before training.
    pub test_pretrained: bool,
    /// Whether to validate and end.
    pub test_only: bool,
    /// Whether to make one step, report, and save nothing.
    pub dry_run: bool,
    /// Whether the process stays after the end until a signal.
    pub keep_alive: bool,
    /// Axis of a grid that repeats a run; names a folder below `pretrained`.
    pub sweep_id: i64,
    /// Folder of all runs.
    pub save_dir: PathBuf,
    /// Folder of tokenizers and tokenized data.
    pub cache_dir: PathBuf,
    /// Fixes all random numbers.
    pub seed: Option<i64>,
    /// Whether every operation must give the same bits each time.
    pub deterministic: bool,
    /// Whether passes of a step are captured as CUDA graphs.
    pub cuda_graphs: bool,
    /// Whether to repeat the reference's quirks.
    pub compat: bool,
    /// The device.
    pub gpu: GpuChoice,
    /// CPU threads of a tensor operation; libtorch's choice if absent.
    pub threads: Option<usize>,
    /// Type of the parameters, `f32` or `f64`.
    pub dtype: DType,
    /// Whether to compute in 16 bits where that is safe.
    pub amp: bool,
    /// Whether these 16 bits are bfloat16 if the GPU has it.
    pub bfloat16: bool,
    /// Where metrics go.
    pub log: LogSink,
    /// Whether to start a TensorBoard server.
    pub tb_server: ServerChoice,
    /// Whether other machines may look at it.
    pub tb_bind_all: bool,
    /// Project in Weights & Biases; that of the environment if absent.
    pub wandb_project: Option<String>,
    /// Whether tables are not sent there.
    pub wandb_drops_tables: bool,
    /// Seconds that each of several processes waits for the others.
    pub distributed_timeout: f64,
    /// Seconds after which a call into a plugin that does not return is named; never if 0.
    pub watchdog: f64,
    /// Steps over which metrics are averaged.
    pub log_interval: u64,
    /// What the model tells about itself.
    pub reports: ReportConfig,
    /// Steps between checkpoints; only at the end if absent.
    pub save_interval: Option<u64>,
    /// Checkpoints that stay.
    pub n_kept: usize,
    /// Steps between validations.
    pub eval_interval: u64,
    /// How texts are continued.
    pub sample: SampleConfig,
    /// Text to continue, instead of the task's prompts.
    #[serde(deserialize_with = "blank_is_none")]
    pub prompt: Option<String>,
    /// Steps of the training; until interrupted if absent.
    pub n_steps: Option<u64>,
    /// Sequences in one step, over all devices.
    pub batch_size: usize,
    /// Parts of a batch, one after the other; excludes `per_device_batch_size`.
    pub n_microbatches: Option<usize>,
    /// Most sequences that a device takes at once; excludes `n_microbatches`.
    pub per_device_batch_size: Option<usize>,
    /// Sequences in a batch of the validation; derived from `batch_size` if absent.
    pub eval_batch_size: Option<usize>,
    /// Share of microbatches that start with an empty segment memory, 0 to 1.
    pub memory_drop_probability: f64,
    /// Length of the training data, batches; all of it if absent.
    pub n_batches: Option<u64>,
    /// Whether documents of about the same length come together.
    pub is_bucketed: bool,
    /// Learning rate over time.
    pub schedule: ScheduleConfig,
    /// How gradients become updates.
    pub optimizer: OptimizerConfig,
    /// What happens when a step is not finite.
    pub non_finite: NonFiniteConfig,
    /// Whether to wait for the device around each step, for exact times.
    pub speedtest: Speedtest,
    /// Steps to record for a trace viewer.
    pub profile: Option<Steps>,
    /// Whether to log the norm of each parameter's gradient.
    pub logs_grad_norms: bool,
    /// What the device can do at most, 10¹² operations per second; known for some cards if absent.
    pub peak_tflops: Option<f64>,
    /// Weight of all regularizers together.
    pub reg_weight: f64,
    /// Weights of single regularizers, by name; 1 for the others.
    #[serde(deserialize_with = "none_is_default")]
    pub reg_scales: BTreeMap<String, f64>,
    /// Regularizers that fall linearly to 0 over the training.
    #[serde(deserialize_with = "none_is_default")]
    pub reg_lin_decay: Vec<String>,
}

/// What the model tells about itself, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportConfig {
    /// Steps between charts and costly numbers; never if absent.
    pub details_interval: Option<u64>,
    /// Steps between attention maps; never if absent.
    pub map_interval: Option<u64>,
    /// Positions of an attention map: the last so many if negative, the first if positive, all if 0.
    pub n_map_steps: i64,
    /// Whether each head has a map of its own.
    pub has_head_maps: bool,
    /// Whether validations report, too.
    pub logs_validation: bool,
    /// Whether the counts of each step go to a file.
    pub dumps: bool,
}

/// What happens when the loss or the gradient of a step is not finite.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NonFiniteConfig {
    /// Whether training goes on.
    pub policy: NanPolicy,
    /// `skip`: steps that may be dropped in the whole run.
    pub n_skips: u64,
    /// Whether to look at every tensor of every step.
    pub is_traced: bool,
}

impl NonFiniteConfig {
    /// Steps that may be dropped in the whole run.
    pub fn budget(&self) -> u64 {
        match self.policy {
            NanPolicy::Abort => 0,
            NanPolicy::Skip => self.n_skips,
        }
    }
}

/// Whether training goes on behind a step that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NanPolicy {
    /// It ends.
    Abort,
    /// The step's update is dropped.
    Skip,
}

/// How exactly time is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speedtest {
    /// As the host sees it, without waiting.
    None,
    /// Each step, waiting for the device before and behind it.
    Iter,
}

/// How texts are continued, at the end of training and by `moeut-host generate`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleConfig {
    /// How many prompts at the end of training; 0 for no continuations.
    pub n_prompts: usize,
    /// Tokens per continuation.
    pub length: usize,
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f64,
    /// Likeliest tokens to choose from; all of them if absent.
    pub top_k: Option<usize>,
    /// Share of the probability that the tokens to choose from have, in `(0, 1]`.
    pub top_p: f64,
}

/// Learning rate over time; [`crate::train::schedule::Schedule`] has the equations.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Shape of the curve.
    pub kind: ScheduleKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// `cos`: last learning rate as a fraction of `lr`.
    pub min_lr_multiplier: f64,
    /// `step`: steps after which the learning rate falls.
    #[serde(deserialize_with = "none_is_default")]
    pub boundaries: Vec<u64>,
    /// `step`: factor by which it falls.
    pub gamma: f64,
}

/// Shape of the learning rate's curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Piecewise constant.
    Step,
    /// Inverse square root with its own warm-up.
    Noam,
    /// Half a cosine.
    Cos,
}

/// How gradients become updates.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The update rule.
    pub kind: OptimizerKind,
    /// Decay of all parameters; decoupled from the gradient for `adamw` only.
    pub weight_decay: f64,
    /// Largest norm of the gradient of all parameters together; not clipped if absent.
    pub max_grad_norm: Option<f64>,
    /// Constants of Adam.
    pub adam: AdamConfig,
    /// Whether each of several processes holds a part of the state only.
    pub is_sharded: bool,
}

/// The update rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay.
    #[serde(rename = "adamw")]
    AdamW,
    /// Adam with weight decay in the gradient.
    Adam,
    /// Gradient descent with a momentum of 0.9 and weight decay in the gradient.
    Sgd,
    /// Adagrad with weight decay in the gradient.
    Adagrad,
}

/// Constants of Adam.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamConfig {
    /// Decay of the averages of gradient and squared gradient, per step.
    pub betas: [f64; 2],
    /// Added to the root of the squared gradient.
    pub eps: f64,
}

/// Where metrics go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogSink {
    /// TensorBoard event files.
    Tb,
    /// Weights & Biases.
    Wandb,
    /// Both.
    All,
    /// Nowhere.
    None,
}

/// Whether to start a TensorBoard server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum ServerChoice {
    /// If somebody sits in front of a terminal.
    #[serde(rename = "auto")]
    Auto,
    /// Yes.
    #[serde(rename = "1")]
    On,
    /// No.
    #[serde(rename = "0")]
    Off,
}

/// Which device the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum GpuChoice {
    /// A free GPU, or the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this index.
    Index(u32),
}

impl TryFrom<String> for GpuChoice {
    type Error = String;

    fn try_from(raw: String) -> Result<Self, String> {
        match raw.to_ascii_lowercase().as_str() {
            "" | "auto" => Ok(Self::Auto),
            "none" => Ok(Self::Cpu),
            index => index
                .parse()
                .map(Self::Index)
                .map_err(|_| GPU_EXPECTATION.to_owned()),
        }
    }
}

const GPU_EXPECTATION: &str = "auto, none or the index of a GPU";

impl HostConfig {
    /// The host's part of the arguments.
    ///
    /// # Errors
    /// If a value is out of range, or `-n_microbatch` and `-per_device_batch_size` are both given.
    pub fn new(arguments: &Arguments) -> Result<Self, ArgsError> {
        check(arguments)?;
        let defs: Vec<ArgDef> = host_args().iter().map(ArgDef::from).collect();
        serde_json::from_value(arguments.config_for(&defs)?).map_err(|error| {
            ArgsError::HostConfig {
                reason: error.to_string(),
            }
        })
    }
}

/// What the types of arguments alone do not rule out.
fn check(arguments: &Arguments) -> Result<(), ArgsError> {
    let value = |name: &str| arguments.values.get(name).unwrap_or(&Value::Null);
    for &(name, minimum) in MINIMUM {
        if value(name).as_f64().is_some_and(|number| number < minimum) {
            return Err(mismatch(arguments, name, &format!("{minimum} or more")));
        }
    }
    for &(name, expected, is_fine) in RULES {
        if !value(name).is_null() && !is_fine(value(name)) {
            return Err(mismatch(arguments, name, expected));
        }
    }
    let is_given = |name: &str| !value(name).is_null();
    if is_given("n_microbatch") && is_given("per_device_batch_size") {
        return Err(ArgsError::Exclusive {
            first: "n_microbatch".into(),
            second: "per_device_batch_size".into(),
        });
    }
    if let (Some(n_microbatches), Some(batch_size)) =
        (value("n_microbatch").as_i64(), value("batch_size").as_i64())
        && n_microbatches > batch_size
    {
        let expected = format!("at most {batch_size}, the `-batch_size`");
        return Err(mismatch(arguments, "n_microbatch", &expected));
    }
    Ok(())
}

/// Flag, what it takes, and whether a value is that; no value is always fine.
type Rule = (&'static str, &'static str, fn(&Value) -> bool);

/// What a smallest value does not say.
const RULES: &[Rule] = &[
    (
        "adam.betas",
        "two numbers from 0 to below 1, as in `0.9,0.999`",
        are_betas,
    ),
    ("gpu", GPU_EXPECTATION, is_gpu),
    (
        "lr_sched.steps",
        "a list of numbers of 0 or more",
        are_steps,
    ),
    (
        "lm.state_drop_probability",
        "a number between 0 and 1",
        is_share,
    ),
    ("min_lr_multiplier", "a number between 0 and 1", is_share),
    (
        "name",
        "a plain folder name, without `/` and neither `.` nor `..`",
        is_folder_name,
    ),
    ("peak_tflops", "a number above 0", is_positive),
    ("profile_steps", profile::EXPECTATION, is_profile),
    ("sample_top_p", "a number above 0 and at most 1", |value| {
        is_positive(value) && is_share(value)
    }),
];

fn is_share(value: &Value) -> bool {
    value
        .as_f64()
        .is_some_and(|share| (0.0..=1.0).contains(&share))
}

fn is_positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number > 0.0)
}

fn are_betas(value: &Value) -> bool {
    // At 1 an average never takes anything in, and its correction divides by 0.
    let is_beta = |beta: &Value| beta.as_f64().is_some_and(|beta| (0.0..1.0).contains(&beta));
    value
        .as_array()
        .is_some_and(|betas| betas.len() == 2 && betas.iter().all(is_beta))
}

fn are_steps(value: &Value) -> bool {
    let is_step = |step: &Value| step.as_u64().is_some();
    value
        .as_array()
        .is_some_and(|steps| steps.iter().all(is_step))
}

fn is_gpu(value: &Value) -> bool {
    let raw = value.as_str().unwrap_or_default();
    GpuChoice::try_from(raw.to_owned()).is_ok()
}

fn is_profile(value: &Value) -> bool {
    let raw = value.as_str().unwrap_or_default();
    Steps::try_from(raw.to_owned()).is_ok()
}

/// Whether joining it to a folder leads one level down: not up, not elsewhere, not deeper.
fn is_folder_name(value: &Value) -> bool {
    let name = value.as_str().unwrap_or_default();
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == name)
}

fn mismatch(arguments: &Arguments, name: &str, expected: &str) -> ArgsError {
    let (raw, from) = arguments.raw_and_source(name);
    ArgsError::Value {
        name: name.to_owned(),
        from,
        raw: raw.to_owned(),
        expected: expected.to_owned(),
    }
}

/// `none` for a list means the empty one.
fn none_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    source: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(source).map(Option::unwrap_or_default)
}

/// A text of spaces has nothing to continue.
fn blank_is_none<'de, D: Deserializer<'de>>(source: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(source).map(|text| text.filter(|text| !text.trim().is_empty()))
}

/// The reference's default for a missing path is the empty text.
fn empty_is_none<'de, D: Deserializer<'de>>(source: D) -> Result<Option<PathBuf>, D::Error> {
    Option::<PathBuf>::deserialize(source)
        .map(|path| path.filter(|path| !path.as_os_str().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::super::{Owner, parse};
    use super::*;
    use moeut_plugin_api::testing::check_args;

    fn config(line: &str) -> Result<HostConfig, ArgsError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        HostConfig::new(&parse(&argv, &[Owner::host()], None)?)
    }

    #[test]
    fn the_table_fills_the_configuration() {
        check_args::<HostConfig>(host_args(), &[]);
        let checked = MINIMUM.iter().map(|&(name, _)| name);
        for name in checked.chain(RULES.iter().map(|&(name, _, _)| name)) {
            let is_there = |spec| ArgDef::from(spec).name == name;
            assert!(host_args().iter().any(is_there), "{name}");
        }
    }

    #[test]
    fn a_sweep_of_the_paper_reaches_the_fields() {
        let config = config(
            "-task c4_transformer -amp 1 -batch_size 64 -grad_clip 0.25 -lr 0.00025 -lr_sched.type cos -lr_warmup 4000 \
             -min_lr_multiplier 0.1 -n_microbatch 2 -optimizer adamw -save_interval 10000 -stop_after 100000 \
             -test_interval 2000 -wd 0.01 -gpu 1",
        )
        .unwrap();
        assert_eq!(config.schedule.kind, ScheduleKind::Cos);
        assert_eq!(config.schedule.warmup_steps, 4000);
        assert_eq!(config.n_microbatches, Some(2));
        assert_eq!(config.n_steps, Some(100_000));
        assert_eq!(config.optimizer.max_grad_norm, Some(0.25));
        let adam = AdamConfig {
            betas: [0.9, 0.999],
            eps: 1e-8,
        };
        assert_eq!(config.optimizer.adam, adam);
        assert_eq!(config.gpu, GpuChoice::Index(1));
        assert_eq!(config.restore, None);
        assert_eq!(config.dtype, DType::F32);
    }

    #[test]
    fn none_is_understood_everywhere() {
        let config =
            config("--log=None -gpu None -grad_clip none -lr_sched.steps none -save_interval none")
                .unwrap();
        assert_eq!(config.log, LogSink::None);
        assert_eq!(config.gpu, GpuChoice::Cpu);
        assert_eq!(config.optimizer.max_grad_norm, None);
        assert_eq!(config.schedule.boundaries, Vec::<u64>::new());
        assert_eq!(config.save_interval, None);
        assert_eq!(config.sample.top_k, None);
    }

    #[test]
    fn a_name_is_one_folder() {
        for name in ["a", "it's a", "a.b", "..."] {
            assert!(is_folder_name(&name.into()), "{name}");
        }
        for name in ["", ".", "..", "../x", "x/..", "a/b", "a/", "./a", "/a"] {
            assert!(!is_folder_name(&name.into()), "{name}");
        }
    }

    #[test]
    fn a_blank_prompt_is_none() {
        let prompt = |text: &str| {
            let argv = [format!("-prompt={text}")];
            HostConfig::new(&parse(&argv, &[Owner::host()], None).unwrap())
                .unwrap()
                .prompt
        };
        assert_eq!(prompt(""), None);
        assert_eq!(prompt(" \n"), None);
        assert_eq!(prompt("-x "), Some("-x ".to_owned()));
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (line, why) in [
            ("-batch_size 0", "`0` is not 1 or more (from: command line)"),
            ("-lr -1", "`-1` is not 0 or more (from: command line)"),
            (
                "-gpu first",
                "`first` is not auto, none or the index of a GPU (from: command line)",
            ),
            (
                "-adam.betas 0.9",
                "`0.9` is not two numbers from 0 to below 1, as in `0.9,0.999` (from: command line)",
            ),
            (
                "-adam.betas 0.9,1",
                "`0.9,1` is not two numbers from 0 to below 1, as in `0.9,0.999` (from: command line)",
            ),
            (
                "-min_lr_multiplier 2",
                "`2` is not a number between 0 and 1 (from: command line)",
            ),
            (
                "-peak_tflops 0",
                "`0` is not a number above 0 (from: command line)",
            ),
            (
                "-n_microbatch 9 -batch_size 4",
                "`9` is not at most 4, the `-batch_size` (from: command line)",
            ),
            (
                "-sample_top_k 0",
                "`0` is not 1 or more (from: command line)",
            ),
            (
                "-sample_top_p 0",
                "`0` is not a number above 0 and at most 1 (from: command line)",
            ),
            (
                "-sample_top_p 1.5",
                "`1.5` is not a number above 0 and at most 1 (from: command line)",
            ),
            (
                "-lm.state_drop_probability 2",
                "`2` is not a number between 0 and 1 (from: command line)",
            ),
            (
                "-lr_sched.steps 1,-2",
                "`1,-2` is not a list of numbers of 0 or more (from: command line)",
            ),
            (
                "-n_microbatch 2 -per_device_batch_size 8",
                "each determines the other",
            ),
        ] {
            assert_eq!(config(line).unwrap_err().why(), why, "{line}");
        }
    }
}
