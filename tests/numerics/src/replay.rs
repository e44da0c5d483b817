//! Runs a fixture: the recorded steps with the model in its plugin, and the error of every recorded quantity.

use crate::fixture::Fixture;
use crate::plugins::{self, KernelPlugin};
use crate::{Result, error_of};
use moeut_plugin_api::abi::client::{ModelClient, PluginClient};
use moeut_plugin_api::{ArgDef, ComponentKind, DType, Device, ForwardInput, ModelSetup, args};
use moeut_torch::optim::{AdamConfig, AdamTensors, clip_grad_norm_, fused_adamw_};
use moeut_torch::{IntoHandle, IntoTensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use tch::{Kind, Reduction, Tensor};

/// Recorded arguments that belong to the host.
const HOST_ARGS: [&str; 5] = ["optimizer", "lr", "wd", "grad_clip", "details_log_interval"];

/// Rounding of a single-precision gradient, as a share of the tensor's largest; up to 1.1e-6 was measured.
const GRAD_ROUNDING: f64 = 1e-6;
/// Optimizer steps that a fixture records.
const N_STEPS: f64 = 3.0;

/// The largest error of each quantity, and where it is.
#[derive(Debug, Default)]
pub struct Errors {
    by_quantity: BTreeMap<&'static str, (f64, String)>,
}

impl Errors {
    fn add(&mut self, quantity: &'static str, at: &str, error: f64) {
        let worst = self
            .by_quantity
            .entry(quantity)
            .or_insert((0.0, String::new()));
        if error >= worst.0 {
            *worst = (error, at.to_owned());
        }
    }

    /// The largest of all.
    pub fn max(&self) -> f64 {
        self.by_quantity
            .values()
            .map(|(error, _)| *error)
            .fold(0.0, f64::max)
    }

    /// Where each error above `tolerance` is.
    pub fn above(&self, tolerance: f64) -> Vec<String> {
        let too_large = self
            .by_quantity
            .iter()
            .filter(|(_, (error, _))| *error > tolerance);
        too_large
            .map(|(quantity, (error, at))| format!("{quantity} of {at}: {error:.1e}"))
            .collect()
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (quantity, (error, _)) in &self.by_quantity {
            write!(f, "  {quantity} {error:.1e}")?;
        }
        Ok(())
    }
}

/// A model in its plugin, with its parameters by name.
pub struct Subject {
    /// The model.
    pub model: ModelClient,
    /// What the optimizer trains.
    pub trainable: BTreeMap<String, Tensor>,
    /// What is only saved.
    pub buffers: BTreeMap<String, Tensor>,
}

impl Subject {
    /// Builds the model with these flags (values as a user types them); the rest are defaults.
    ///
    /// # Errors
    /// If a flag is unknown or its value malformed, and whatever the model says.
    pub fn build(
        flags: &BTreeMap<String, String>,
        setup: &ModelSetup,
        kernel: &KernelPlugin,
    ) -> Result<Self> {
        let plugin = plugins::open(plugins::MODEL)?;
        let (name, defs) = component(plugin)?;
        let mut values = BTreeMap::new();
        for (flag, raw) in flags {
            let def = defs.iter().find(|def| def.name == *flag);
            let def = def.ok_or_else(|| format!("model `{name}` has no argument `{flag}`"))?;
            values.insert(flag.clone(), def.parse(raw)?);
        }
        let config = args::configuration(&defs, &values)?;
        let model = plugin.new_model(&name, &config, setup, &plugins::services(kernel))?;
        let (mut trainable, mut buffers) = (BTreeMap::new(), BTreeMap::new());
        for parameter in model.parameters()? {
            let map = if parameter.is_trainable {
                &mut trainable
            } else {
                &mut buffers
            };
            map.insert(parameter.name, parameter.tensor.into_tensor());
        }
        Ok(Self {
            model,
            trainable,
            buffers,
        })
    }

    /// Builds the model of a fixture with its initial parameters.
    ///
    /// # Errors
    /// As [`Subject::build`], and if the recorded parameters are not exactly those of the model.
    pub fn of(fixture: &Fixture, dtype: DType, kernel: &KernelPlugin) -> Result<Self> {
        let raw = |value: &Value| {
            value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned)
        };
        let recorded = fixture.meta.args_effective.iter();
        let flags = recorded
            .filter(|(flag, _)| !HOST_ARGS.contains(&flag.as_str()))
            .map(|(flag, value)| (flag.clone(), raw(value)))
            .collect();
        let subject = Self::build(&flags, &on_cpu(fixture.meta.vocab, dtype), kernel)?;
        let mut missing: Vec<&str> = subject
            .trainable
            .keys()
            .chain(subject.buffers.keys())
            .map(String::as_str)
            .collect();
        for (name, value) in fixture.below("param") {
            let own = subject
                .trainable
                .get(name)
                .or_else(|| subject.buffers.get(name));
            let own = own.ok_or_else(|| format!("the model has no parameter `{name}`"))?;
            if own.size() != value.size() {
                return Err(
                    format!("`{name}` is {:?}, recorded {:?}", own.size(), value.size()).into(),
                );
            }
            tch::no_grad(|| own.shallow_clone().copy_(value));
            missing.retain(|&one| one != name);
        }
        if missing.is_empty() {
            Ok(subject)
        } else {
            Err(format!("not recorded: {missing:?}").into())
        }
    }

    /// Logits and regularizers by name, in training mode.
    ///
    /// # Errors
    /// Whatever the model says.
    pub fn forward(&mut self, tokens_tb: &Tensor) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
        let output = self.model.forward(ForwardInput {
            tokens_tb: tokens_tb.share(),
            is_training: true,
            wants_stats: true,
        })?;
        let regularizers = output.regularizers.into_iter();
        let regularizers = regularizers.map(|named| (named.name, named.tensor.into_tensor()));
        for stat in output.stats {
            let value = stat.tensor.into_tensor().double_value(&[]);
            if !value.is_finite() {
                return Err(format!("statistic `{}` is {value}", stat.name).into());
            }
        }
        Ok((output.logits_tbv.into_tensor(), regularizers.collect()))
    }
}

/// A model on the CPU in one precision, as the reference is.
pub fn on_cpu(vocab_size: u64, dtype: DType) -> ModelSetup {
    ModelSetup {
        vocab_size,
        device: Device::Cpu,
        dtype,
        compute_dtype: dtype,
        compat: true,
    }
}

/// The model component of a plugin and its arguments.
fn component(plugin: PluginClient) -> Result<(String, Vec<ArgDef>)> {
    let components = plugin.components()?.into_iter();
    let model = components
        .into_iter()
        .find(|component| component.kind == ComponentKind::Model);
    let model = model.ok_or("the plugin registers no model")?;
    Ok((model.name, model.args))
}

/// Whether the recorded run is one of this crate's model.
///
/// Segment memory, dense and SUT blocks are others' work.
pub fn is_covered(fixture: &Fixture) -> bool {
    let is_moe = fixture
        .meta
        .args_effective
        .get("transformer.variant")
        .and_then(Value::as_str);
    let has_memory = fixture
        .number("lm.trafo.context_blocks")
        .is_ok_and(|n| n > 0.0);
    is_moe.is_some_and(|variant| variant.contains("moe")) && !has_memory
}

/// Repeats the recorded steps in `dtype` and compares everything with the reference's double-precision run.
///
/// # Errors
/// Whatever model or kernel say.
pub fn replay(fixture: &Fixture, dtype: DType, kernel: &KernelPlugin) -> Result<Errors> {
    let mut subject = Subject::of(fixture, dtype, kernel)?;
    let mut adam = Adam::new(fixture, &subject)?;
    let mut errors = Errors::default();
    for (index, expected) in fixture.meta.fp64.steps.iter().enumerate() {
        let tokens = fixture
            .tensor(&format!("input.tokens.step{index}"))?
            .to_kind(Kind::Int64);
        let seq_len = tokens.size()[0] - 1;
        let (logits, regularizers) = subject.forward(&tokens.narrow(0, 0, seq_len))?;
        let targets = tokens.narrow(0, 1, seq_len).reshape([-1]);
        let loss = logits.reshape([-1, logits.size()[2]]).cross_entropy_loss(
            &targets,
            None::<&Tensor>,
            Reduction::Mean,
            -100,
            0.0,
        );
        let reg_loss: Tensor = regularizers.values().sum();
        let total = &loss + &reg_loss;
        for parameter in subject.trainable.values_mut() {
            parameter.zero_grad();
        }
        total.backward();

        if index == 0 {
            errors.add(
                "logits",
                "step 0",
                error_of::tensor(&logits, fixture.tensor("expected.logits")?),
            );
            if !regularizers.keys().eq(fixture.meta.fp64.reg.keys()) {
                return Err(format!("regularizers are {:?}", regularizers.keys()).into());
            }
            for (name, term) in &regularizers {
                let expected = fixture.meta.fp64.reg[name];
                errors.add(
                    "reg",
                    name,
                    error_of::scalar(term.double_value(&[]), expected),
                );
            }
            for (name, expected) in fixture.below("grad") {
                errors.add(
                    "grad",
                    name,
                    error_of::tensor(&subject.trainable[name].grad(), expected),
                );
            }
        }
        let norm = adam.step(&subject)?;
        let at = format!("step {index}");
        for (quantity, value, expected) in [
            ("loss", &loss, expected.loss),
            ("reg", &reg_loss, expected.reg_loss),
            ("total", &total, expected.total_loss),
            ("norm", &norm, expected.grad_norm_before_clip),
        ] {
            errors.add(
                quantity,
                &at,
                error_of::scalar(value.double_value(&[]), expected),
            );
        }
    }
    for (name, expected) in fixture.below("after3") {
        let parameter = subject.trainable[name].detach();
        let parameter = if dtype == DType::F64 {
            parameter
        } else {
            let first_grad = fixture.tensor(&format!("grad.{name}"))?;
            without_adam_rounding(&parameter, expected, first_grad, adam.config.lr)
        };
        errors.add("after3", name, error_of::tensor(&parameter, expected));
    }
    Ok(errors)
}

/// `parameter`, moved towards `expected` by at most what rounding of the gradient explains.
///
/// ```text
/// slack = n_steps · lr · min(2, GRAD_ROUNDING · max|g| / |g|),   0 where g = 0
/// ```
///
/// Adam's first step is `lr · g / |g|`: an element whose gradient is 1e-6 of its tensor's largest moves as far as all
/// others, in a direction that is mostly rounding (one or two elements in a thousand; without this, the worst of them
/// is off by 6.7e-5). For a gradient of a tenth of the largest the slack is 3e-8. Double precision gets none.
fn without_adam_rounding(
    parameter: &Tensor,
    expected: &Tensor,
    first_grad: &Tensor,
    lr: f64,
) -> Tensor {
    let size = first_grad.abs();
    let noise = (size.max() * GRAD_ROUNDING / &size).clamp_max(2.0);
    let slack = (noise * (N_STEPS * lr)).where_self(&size.gt(0.0), &size);
    let difference = parameter - expected;
    let excess = (difference.abs() - slack).clamp_min(0.0) * difference.sign();
    expected + excess
}

/// The fixture's optimizer.
struct Adam {
    config: AdamConfig,
    max_norm: f64,
    names: Vec<String>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl Adam {
    fn new(fixture: &Fixture, subject: &Subject) -> Result<Self> {
        let betas = fixture.meta.defaults_used.get("adam.betas");
        let beta = |index| {
            betas
                .and_then(|betas| betas[index].as_f64())
                .ok_or("no adam.betas")
        };
        let without_grad = &fixture.meta.fp64.params_without_grad;
        let names = subject
            .trainable
            .keys()
            .filter(|&name| !without_grad.contains(name));
        let names: Vec<String> = names.cloned().collect();
        let zeros = || {
            names
                .iter()
                .map(|name| subject.trainable[name].detach().zeros_like())
        };
        Ok(Self {
            config: AdamConfig {
                lr: fixture.number("lr")?,
                beta1: beta(0)?,
                beta2: beta(1)?,
                eps: fixture.number("adam.eps")?,
                weight_decay: fixture.number("wd")?,
            },
            max_norm: fixture.number("grad_clip")?,
            exp_avg: zeros().collect(),
            exp_avg_sq: zeros().collect(),
            steps: names.iter().map(|_| Tensor::from(0f32)).collect(),
            names,
        })
    }

    /// Clips and steps; gives the norm before clipping.
    fn step(&mut self, subject: &Subject) -> Result<Tensor> {
        let params: Vec<&Tensor> = self
            .names
            .iter()
            .map(|name| &subject.trainable[name])
            .collect();
        let grads: Vec<Tensor> = params.iter().map(|param| param.grad()).collect();
        let grads: Vec<&Tensor> = grads.iter().collect();
        let norm = clip_grad_norm_(&grads, self.max_norm)?.total;
        let tensors = AdamTensors {
            params: &params,
            grads: &grads,
            exp_avg: &self.exp_avg.iter().collect::<Vec<_>>(),
            exp_avg_sq: &self.exp_avg_sq.iter().collect::<Vec<_>>(),
            steps: &self.steps.iter().collect::<Vec<_>>(),
        };
        tch::no_grad(|| fused_adamw_(&tensors, &self.config, None))?;
        Ok(norm)
    }
}
