//! `model show`: what the model of a run is made of and costs, without data and without storage for its parameters.

use crate::args::{Arguments, HostConfig};
use crate::error::HostError;
use crate::log::Terminal;
use crate::plan::{Resolved, resolve};
use crate::plugins::{Component, Registry};
use crate::services::Services;
use moeut_plugin_api::abi::client::HostServices;
use moeut_plugin_api::{
    ComponentKind, DType, Device, LayerSummary, ModelSetup, ModelSummary, PluginError,
};
use moeut_torch::IntoTensor;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::Arc;

/// Parts of a model, and what the names of their parameters contain: the reference's names, which checkpoints have.
/// The first part that fits counts.
const PARTS: &[(&str, &[&str])] = &[
    (
        "routers",
        &["selections.", "expert_sel", "sel_bias", "w_gate"],
    ),
    ("norms", &["norm"]),
    ("attention", &["attn"]),
    ("feed-forward", &["pkm.", "linear1.", "linear2.", "moe."]),
    ("embedding", &["embedding"]),
    ("output", &["output"]),
    ("other", &[""]),
];
/// What the names of parameters of the stack begin with.
const LAYERS: &str = "unique_layers.";
/// The dataset's argument with the size of the vocabulary.
const VOCABULARY: &str = "sentencepiece.n_pieces";
/// Numbers kept per parameter while training: itself, its gradient and AdamW's two averages.
const COPIES_IN_TRAINING: u64 = 4;

/// A model in numbers.
#[derive(Debug, Serialize)]
pub struct Overview {
    /// Name of the model component.
    pub model: String,
    /// Tokens per sequence.
    pub seq_len: u64,
    /// Distinct tokens.
    pub vocab_size: u64,
    /// Trained numbers by part, as far as there are any.
    pub parameters: Vec<(String, u64)>,
    /// All trained numbers.
    pub n_params: u64,
    /// Those of the distinct layers.
    pub n_model_weights: u64,
    /// Those of attention.
    pub n_attention_weights: u64,
    /// Bytes of a training's parameters, gradients and optimizer.
    pub training_state_bytes: u64,
    /// What the model says about its layers and their cost.
    pub summary: ModelSummary,
}

/// Builds the model that the arguments describe, in shape only, and looks at it.
///
/// # Errors
/// For mistakes in the arguments, and if task or model refuses them.
pub fn overview(
    argv: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Overview, HostError> {
    let Resolved {
        arguments, plan, ..
    } = resolve(argv, None, registry, terminal)?;
    let Some(plan) = plan else {
        return Err(HostError::new(
            "no task is named",
            "`-task` is missing, and a task says which model and which data",
            "type `moeut-host model show -task moeut_c4`",
        ));
    };
    let config = HostConfig::new(&arguments)?;
    let dataset = registry.find(ComponentKind::Dataset, &plan.train.dataset)?;
    let component = registry.find(ComponentKind::Model, &plan.model)?;
    let setup = ModelSetup {
        vocab_size: vocab_size(dataset, &arguments)?,
        device: Device::Cpu,
        dtype: config.dtype,
        compute_dtype: if config.amp {
            DType::Bf16
        } else {
            config.dtype
        },
        compat: config.compat,
        is_shape_only: true,
    };
    let services: Arc<dyn HostServices> =
        Services::new(registry, terminal, &config, &Arc::default());
    let own = arguments.config_for(&component.info.args)?;
    let name = &component.info.name;
    let model = component
        .client()
        .new_model(name, &own, &setup, &services)?;
    let mut sizes = Vec::new();
    for parameter in model.parameters()? {
        if parameter.is_trainable {
            sizes.push((
                parameter.name,
                parameter.tensor.into_tensor().numel() as u64,
            ));
        }
    }
    let seq_len = plan.train.seq_len;
    Ok(Overview::new(
        name,
        seq_len,
        &setup,
        &sizes,
        model.summary(seq_len)?,
    ))
}

/// The dataset would say, but opening it may mean to train a tokenizer.
fn vocab_size(dataset: Component<'_>, arguments: &Arguments) -> Result<u64, HostError> {
    let def = dataset.info.args.iter().find(|def| def.name == VOCABULARY);
    let value = def.map(|def| arguments.value_for(def)).transpose()?;
    value.and_then(|value| value.as_u64()).ok_or_else(|| {
        let name = &dataset.info.name;
        HostError::from(
            PluginError::new("the size of the vocabulary is unknown")
                .why(format!("dataset `{name}` has no number in `-{VOCABULARY}`"))
                .fix(format!(
                    "set `-{VOCABULARY}`, or train: that opens the dataset"
                )),
        )
    })
}

impl Overview {
    fn new(
        model: &str,
        seq_len: u64,
        setup: &ModelSetup,
        sizes: &[(String, u64)],
        summary: ModelSummary,
    ) -> Self {
        let sum = |is_meant: &dyn Fn(&str) -> bool| -> u64 {
            let meant = sizes.iter().filter(|(name, _)| is_meant(name));
            meant.map(|(_, size)| size).sum()
        };
        let parts = PARTS.iter().map(|&(part, _)| {
            let n_params = sum(&|name| part_of(name) == part);
            (part.to_owned(), n_params)
        });
        let n_params = sum(&|_| true);
        Self {
            model: model.to_owned(),
            seq_len,
            vocab_size: setup.vocab_size,
            parameters: parts.filter(|(_, n_params)| *n_params > 0).collect(),
            n_params,
            n_model_weights: sum(&|name| name.starts_with(LAYERS)),
            n_attention_weights: sum(&|name| name.contains("attention") || name.contains("attn")),
            training_state_bytes: n_params * COPIES_IN_TRAINING * bytes_of(setup.dtype),
            summary,
        }
    }
}

/// Which of [`PARTS`] a parameter belongs to.
fn part_of(name: &str) -> &'static str {
    let is_meant = |keys: &[&str]| keys.iter().any(|key| name.contains(key));
    let part = PARTS.iter().find(|(_, keys)| is_meant(keys));
    part.map_or("other", |(part, _)| part)
}

fn bytes_of(dtype: DType) -> u64 {
    match dtype {
        DType::F64 => 8,
        DType::F32 => 4,
        DType::F16 | DType::Bf16 => 2,
    }
}

impl fmt::Display for Overview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            model,
            seq_len,
            vocab_size,
            ..
        } = self;
        writeln!(
            f,
            "model `{model}`, {seq_len} tokens per sequence, vocabulary {vocab_size}\n"
        )?;
        let plain = |n: u64| n.to_string();
        f.write_str(&table("parameters (n_params)", &self.parameters, plain))?;
        f.write_str(&line(
            "in distinct layers (n_model_weights)",
            &plain(self.n_model_weights),
        ))?;
        f.write_str(&line(
            "in attention (n_attention_weights)",
            &plain(self.n_attention_weights),
        ))?;
        let state = megabytes(self.training_state_bytes);
        f.write_str(&line("with gradients and AdamW's averages", &state))?;
        let ModelSummary {
            layers,
            macs,
            activation_bytes,
        } = &self.summary;
        if layers.is_empty() {
            return writeln!(f, "\nits plugin says nothing about layers and their cost");
        }
        f.write_char('\n')?;
        let giga = |n: u64| format!("{:.3} G", n as f64 / 1e9);
        f.write_str(&table(
            "forward multiply-accumulates per sequence",
            macs,
            giga,
        ))?;
        f.write_char('\n')?;
        let title = "activations kept per sequence (estimate)";
        f.write_str(&table(title, activation_bytes, megabytes))?;
        f.write_char('\n')?;
        f.write_str(&stack(layers))
    }
}

/// The sum of a list, and below it the list.
fn table(title: &str, rows: &[(String, u64)], show: impl Fn(u64) -> String) -> String {
    let sum = rows.iter().map(|(_, number)| number).sum();
    let rows = rows
        .iter()
        .map(|(name, number)| line(&format!("  {name}"), &show(*number)));
    line(title, &show(sum)) + &rows.collect::<String>()
}

fn line(name: &str, value: &str) -> String {
    format!("{name:42}{value:>14}\n")
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// The order of the distinct layers, and what each of them is.
fn stack(layers: &[LayerSummary]) -> String {
    let order: Vec<String> = layers
        .iter()
        .map(|layer| layer.unique_index.to_string())
        .collect();
    let distinct: BTreeMap<u64, &str> = layers
        .iter()
        .map(|layer| (layer.unique_index, layer.what.as_str()))
        .collect();
    let mut text = format!(
        "{} layers, {} distinct, in the order {}\n",
        layers.len(),
        distinct.len(),
        order.join(" ")
    );
    for (index, what) in distinct {
        let _ = writeln!(text, "  {index}: {what}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(summary: ModelSummary) -> Overview {
        let setup = ModelSetup {
            vocab_size: 10,
            device: Device::Cpu,
            dtype: DType::F32,
            compute_dtype: DType::F32,
            compat: false,
            is_shape_only: true,
        };
        let sizes = [
            ("embedding.weight", 40),
            ("unique_layers.0.self_attn.projections.v", 64),
            ("unique_layers.0.self_attn.selections.v", 16),
            ("unique_layers.0.self_attn.norm.weight", 4),
            ("unique_layers.0.pkm.keys", 128),
            ("unique_layers.0.pkm.expert_sel", 8),
            ("out_norm.weight", 4),
            ("output.weight", 40),
        ]
        .map(|(name, size)| (name.to_owned(), size));
        Overview::new("toy", 16, &setup, &sizes, summary)
    }

    #[test]
    fn parameters_are_counted_by_part() {
        let overview = small(ModelSummary::default());
        assert_eq!(
            overview.to_string(),
            "\
model `toy`, 16 tokens per sequence, vocabulary 10

parameters (n_params)                                304
  routers                                             24
  norms                                                8
  attention                                           64
  feed-forward                                       128
  embedding                                           40
  output                                              40
in distinct layers (n_model_weights)                 220
in attention (n_attention_weights)                    84
with gradients and AdamW's averages               0.0 MB

its plugin says nothing about layers and their cost
"
        );
    }

    #[test]
    fn cost_and_layers_are_what_the_model_says() {
        let layer = |unique_index| LayerSummary {
            unique_index,
            what: format!("block {unique_index}"),
        };
        let overview = small(ModelSummary {
            layers: [0, 1, 0, 1].map(layer).into(),
            macs: vec![
                ("attention".into(), 1_500_000_000),
                ("feed-forward".into(), 500_000_000),
            ],
            activation_bytes: vec![("attention".into(), 2_000_000)],
        });
        let text = overview.to_string();
        let (_, cost) = text
            .split_once("averages               0.0 MB\n\n")
            .unwrap();
        assert_eq!(
            cost,
            "\
forward multiply-accumulates per sequence        2.000 G
  attention                                      1.500 G
  feed-forward                                   0.500 G

activations kept per sequence (estimate)          2.0 MB
  attention                                       2.0 MB

4 layers, 2 distinct, in the order 0 1 0 1
  0: block 0
  1: block 1
"
        );
    }

    #[test]
    fn names_of_every_model_have_their_part() {
        for (name, part) in [
            ("unique_layers.0.self_attn.data_to_kv.weight", "attention"),
            ("unique_layers.0.linear1.bias", "feed-forward"),
            (
                "unique_layers.0.mod.self_attn.q_proj.w_gate.3.weight",
                "routers",
            ),
            (
                "unique_layers.0.mod.self_attn.q_proj.output_experts.w",
                "attention",
            ),
            ("unique_layers.0.mod.moe.output_experts.b", "feed-forward"),
            ("unique_layers.0.mod.final_layer_norm.weight", "norms"),
            ("unique_layers.0._gate.0.weight", "other"),
            ("unique_layers.0.norm1.weight", "norms"),
        ] {
            assert_eq!(part_of(name), part, "{name}");
        }
    }
}
