//! A model in its plugin, with its parameters by name.

use crate::Result;
use crate::fixture::Fixture;
use crate::placement::Placement;
use crate::plugins::{self, KernelPlugin};
use moeut_plugin_api::abi::client::{ModelClient, PluginClient};
use moeut_plugin_api::{
    ArgDef, ComponentKind, DType, ForwardInput, ModelSetup, Past, Wishes, args,
};
use moeut_torch::{IntoHandle, IntoTensor};
use serde_json::Value;
use std::collections::BTreeMap;
use tch::Tensor;

/// The flag that chooses the model, and its default.
const VARIANT: (&str, &str) = ("transformer.variant", "preln_moe_universal");

/// Recorded arguments that belong to host, task or dataset. Those of the optimizer are read by [`crate::replay`].
const NOT_OF_MODELS: [&str; 24] = [
    "adam.betas",
    "adam.eps",
    "amp",
    "batch_size",
    "details_log_interval",
    "grad_clip",
    "lm.eval.enabled",
    "lm.unroll",
    "lmds.valid_ratio",
    "log",
    "lr",
    "lr_sched.type",
    "lr_warmup",
    "min_lr_multiplier",
    "n_microbatch",
    "name",
    "optimizer",
    "reg",
    "save_interval",
    "stop_after",
    "task",
    "test_interval",
    "thestack.languages",
    "wd",
];

/// A model under test.
pub struct Subject {
    /// The model.
    pub model: ModelClient,
    /// What the optimizer trains.
    pub trainable: BTreeMap<String, Tensor>,
    /// What is only saved.
    pub buffers: BTreeMap<String, Tensor>,
}

impl Subject {
    /// Builds the model that has the variant, with these flags (values as a user types them); the rest are defaults.
    ///
    /// # Errors
    /// If a flag is unknown or its value malformed, and whatever the model says.
    pub fn build(
        flags: &BTreeMap<String, String>,
        setup: &ModelSetup,
        kernel: &KernelPlugin,
    ) -> Result<Self> {
        let variant = flags.get(VARIANT.0).map_or(VARIANT.1, String::as_str);
        let plugin = plugins::open(plugins::model_package(variant)?)?;
        let (name, defs) = component(plugin)?;
        let mut values = BTreeMap::new();
        for (flag, raw) in flags {
            match defs.iter().find(|def| def.name == *flag) {
                Some(def) => {
                    values.insert(flag.clone(), def.parse(raw)?);
                }
                None if is_of_another_model(flag) => {}
                None => return Err(format!("model `{name}` has no argument `{flag}`").into()),
            }
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
    pub fn of(fixture: &Fixture, placement: Placement, kernel: &KernelPlugin) -> Result<Self> {
        let setup = placement.setup(fixture.meta.vocab);
        let subject = Self::build(&flags(&fixture.meta.args_effective), &setup, kernel)?;
        let mut missing: Vec<&str> = subject.named().map(|(name, _)| name).collect();
        for (name, value) in fixture.below("param") {
            let own = subject.named().find(|(own, _)| *own == name);
            let (_, own) = own.ok_or_else(|| format!("the model has no parameter `{name}`"))?;
            if own.size() != value.size() {
                let (own, recorded) = (own.size(), value.size());
                return Err(format!("`{name}` is {own:?}, recorded {recorded:?}").into());
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

    /// All tensors, trained and saved.
    fn named(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        let all = self.trainable.iter().chain(&self.buffers);
        all.map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Numbers that the optimizer trains, in tensors whose names begin so.
    pub fn n_params(&self, prefix: &str) -> u64 {
        let meant = self
            .trainable
            .iter()
            .filter(|(name, _)| name.starts_with(prefix));
        meant.map(|(_, tensor)| tensor.numel() as u64).sum()
    }

    /// Logits and regularizers by name, in training mode.
    ///
    /// # Errors
    /// Whatever the model says, and if a statistic is not finite.
    pub fn forward(
        &mut self,
        tokens_tb: &Tensor,
        past: Past,
    ) -> Result<(Tensor, BTreeMap<String, Tensor>)> {
        let output = self.model.forward(ForwardInput {
            tokens_tb: tokens_tb.share(),
            is_training: true,
            wishes: Wishes {
                stats: true,
                ..Wishes::default()
            },
            past,
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
    Placement::on_cpu(dtype).setup(vocab_size)
}

/// The recorded arguments that are a model's, as a user types them.
pub fn flags(recorded: &BTreeMap<String, Value>) -> BTreeMap<String, String> {
    let raw = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "none".to_owned(),
        other => other.to_string(),
    };
    let of_model = recorded
        .iter()
        .filter(|(flag, _)| !NOT_OF_MODELS.contains(&flag.as_str()));
    of_model
        .map(|(flag, value)| (flag.clone(), raw(value)))
        .collect()
}

/// The reference has one table of arguments, so that a recorded run may set what its own model does not have.
fn is_of_another_model(flag: &str) -> bool {
    let defs = plugins::model_components().into_iter();
    defs.flat_map(|model| model.args)
        .any(|def| def.name == flag)
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
