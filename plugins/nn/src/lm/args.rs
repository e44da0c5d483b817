//! The arguments that every language model has, typed, with their checks, and the table that fills them.

use crate::attention::Heads;
use crate::{Activation, RopeConfig, Sharing};
use moeut_plugin_api::{ArgKind, ArgSpec, PluginError};
use serde::Deserialize;

/// The rows of the shared arguments; a model's configuration holds them as the field `shell`.
pub const SHELL_ARGS: &[ArgSpec] = &[
    ArgSpec::int("state_size", "128").field("shell.d_model").help("width of the residual stream"),
    ArgSpec::int("embedding_size", "none").field("shell.d_embedding").optional().help("width of embedding and output, with adapters; none: state_size, without"),
    ArgSpec::int("transformer.encoder_n_layers", "3").field("shell.n_layers").help("layers of the unrolled stack"),
    ArgSpec::text("transformer.variant", "preln_moe_universal").field("shell.variant").help("`preln`: pre-layernorm; `universal`: layers are shared in groups"),
    ArgSpec::int("transformer.universal.group_size", "1").field("shell.group_size").help("distinct layers of a universal variant"),
    ArgSpec::text("transformer.universal.group_type", "abab").field("shell.group_type").choices("abab|aabb").help("how distinct layers make the stack"),
    ArgSpec::float("dropout", "0.0").field("shell.dropout").unit("probability").help("of embedding, block outputs and last state"),
    ArgSpec::float("transformer.p_drop_layer", "0.0").field("shell.layer_drop").unit("probability").help("that a token skips a layer, while training"),
    ArgSpec::text("transformer.recompute", "0")
        .field("shell.recompute")
        .choices("0|cheap|1")
        .help("what the backward pass computes again instead of finding it kept: 0, nothing; `cheap`, layernorms, hidden units and the like, for some percent more time; 1, whole layers but for their inputs, for up to a third"),
    ArgSpec::float("transformer.embedding_scale", "none").field("shell.embedding_scale").optional().help("none: 1 for `preln` variants, else √state_size"),
    ArgSpec::flag("lm.trafo.norm_input", "0").field("shell.norms_input").help("normalize the embedding, without parameters"),
    ArgSpec::flag("lm.trafo.force_out_norm", "0").field("shell.forces_out_norm").help("final layernorm also without `preln`"),
    ArgSpec::flag("lm.trafo.xl_init", "0").field("shell.has_xl_init").help("weights start as N(0, 0.02), norms as N(1, 0.02)"),
    // Segment memory.
    ArgSpec::int("lm.trafo.context_blocks", "1").field("shell.memory.n_segments").help("earlier segments attended to; the paper's runs set 0"),
    ArgSpec::int("lm.trafo.test_context_blocks", "none").field("shell.memory.n_eval_segments").optional().help("the same in evaluation; none or 0: as in training"),
    ArgSpec::flag("lm.trafo.same_length", "0").field("shell.memory.is_window").help("every token sees equally far back into the segments"),
    ArgSpec::flag("lm.trafo.same_length_eval", "0").field("shell.memory.is_eval_window").help("the same, in evaluation only"),
    ArgSpec::flag("lm.trafo.last_layer_context", "0").field("shell.memory.is_last_layer").help("all layers attend to the last layer's earlier states"),
    // Layers.
    ArgSpec::int("transformer.n_heads", "4").field("shell.n_heads").help("attention heads"),
    ArgSpec::int("transformer.head_projection_size", "none").field("shell.d_head").optional().help("width of a head; none: state_size / heads"),
    ArgSpec::float("rope.rotate_fraction", "0.5").field("shell.rope.fraction").help("share of the head's channels that rotary positions turn"),
    ArgSpec::float("rope.base", "10000").field("shell.rope.base").help("base of the rotary wavelengths"),
    ArgSpec::float("transformer.ff_multiplier", "2.0").field("shell.ff_multiplier").help("hidden units of a dense feed-forward layer / state_size; experts have `moe.expert_size`"),
    ArgSpec::text("transformer.activation", "relu")
        .field("shell.activation.function")
        .choices("relu|topk|gelu|identity|sigmoid|softmax")
        .help("of the hidden units"),
    ArgSpec::int("transformer.topk_value", "32").field("shell.activation.n_kept").help("hidden units that the activation `topk` keeps"),
    ArgSpec::retired(ArgKind::Float, "transformer.attention_dropout", "the reference never passes it to a model"),
];

/// What [`SHELL_ARGS`] fill.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShellConfig {
    /// Width of the residual stream, `D`.
    pub d_model: i64,
    /// Width of embedding and output, if they have adapters.
    pub d_embedding: Option<i64>,
    /// Layers of the unrolled stack, `L`.
    pub n_layers: i64,
    /// `transformer.variant`, as typed; see [`Shell::new`].
    pub variant: String,
    /// Distinct layers of a universal variant.
    pub group_size: i64,
    /// How they make the stack.
    pub group_type: Sharing,
    /// Dropout of embedding, block outputs and last state.
    pub dropout: f64,
    /// Probability that a token skips a layer, while training.
    pub layer_drop: f64,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// What the embedding is multiplied by, if not the variant's own number.
    pub embedding_scale: Option<f64>,
    /// A norm without parameters behind the embedding.
    pub norms_input: bool,
    /// A norm before the output whatever the variant.
    pub forces_out_norm: bool,
    /// Initial values of Transformer-XL.
    pub has_xl_init: bool,
    /// Earlier segments.
    pub memory: MemoryConfig,
    /// Attention heads, `H`.
    pub n_heads: i64,
    /// Width of a head, `d`; else `D / H`.
    pub d_head: Option<i64>,
    /// Positions.
    pub rope: RopeConfig,
    /// Hidden units of a dense feed-forward layer / `D`.
    pub ff_multiplier: f64,
    /// Of the hidden units.
    pub activation: ActivationConfig,
}

/// What the backward pass computes again instead of finding it kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Recompute {
    /// Nothing.
    #[serde(rename = "0")]
    Nothing,
    /// What costs little beside what it takes to keep: [`crate::Context::is_frugal`].
    #[serde(rename = "cheap")]
    Cheap,
    /// Layers, of which only inputs are kept.
    #[serde(rename = "1")]
    Layers,
}

/// Which earlier states a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Segments, while training.
    pub n_segments: i64,
    /// Segments in evaluation; nothing or 0 means as many as while training.
    pub n_eval_segments: Option<i64>,
    /// Every token sees equally far.
    pub is_window: bool,
    /// Every token sees equally far in evaluation.
    pub is_eval_window: bool,
    /// All layers attend to the last layer's states.
    pub is_last_layer: bool,
}

impl MemoryConfig {
    /// How many segments are kept.
    pub fn n_kept(&self, is_training: bool) -> usize {
        let in_eval = self.n_eval_segments.filter(|&n| n > 0);
        let n = if is_training { None } else { in_eval };
        usize::try_from(n.unwrap_or(self.n_segments)).unwrap_or(0)
    }

    /// Whether there is any.
    pub fn is_on(&self) -> bool {
        self.n_kept(true) > 0 || self.n_kept(false) > 0
    }
}

/// `transformer.activation` and its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationConfig {
    function: ActivationFunction,
    n_kept: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ActivationFunction {
    Relu,
    #[serde(rename = "topk")]
    TopK,
    Gelu,
    Identity,
    Sigmoid,
    Softmax,
}

/// A value of `transformer.variant` and what its name says: the reference looks for the same parts in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// As a user types it.
    pub name: &'static str,
    /// Embedding scale, final norm and initial values are those of pre-layernorm models.
    pub is_pre_ln: bool,
    /// Layers are shared.
    pub is_universal: bool,
}

impl Variant {
    /// Reads a name.
    pub fn of(name: &'static str) -> Self {
        Self {
            name,
            is_pre_ln: name.contains("preln"),
            is_universal: name.contains("universal"),
        }
    }
}

/// Checked arguments and what follows from them.
#[derive(Debug, Clone)]
pub struct Shell {
    /// The arguments.
    pub config: ShellConfig,
    /// The variant that was asked for.
    pub variant: Variant,
}

impl Shell {
    /// Checks the arguments; `variants` are those that the model has.
    ///
    /// # Errors
    /// For the first argument that makes no sense.
    pub fn new(config: ShellConfig, variants: &[&'static str]) -> Result<Self, PluginError> {
        let found = variants.iter().find(|&&name| name == config.variant);
        let Some(name) = found else {
            return Err(PluginError::new("the model has no such variant")
                .why(format!("`transformer.variant` is `{}`", config.variant))
                .fix(format!(
                    "set `-transformer.variant` to one of {}",
                    variants.join(", ")
                )));
        };
        let (memory, n_kept) = (config.memory, config.activation.n_kept);
        check_positive(&[
            ("state_size", config.d_model),
            ("embedding_size", config.d_embedding.unwrap_or(1)),
            ("transformer.encoder_n_layers", config.n_layers),
            ("transformer.n_heads", config.n_heads),
            (
                "transformer.head_projection_size",
                config.d_head.unwrap_or(1),
            ),
            ("transformer.universal.group_size", config.group_size),
            ("transformer.topk_value", n_kept),
        ])?;
        check_probabilities(&[
            ("dropout", config.dropout),
            ("transformer.p_drop_layer", config.layer_drop),
        ])?;
        for (flag, n) in [
            ("lm.trafo.context_blocks", memory.n_segments),
            (
                "lm.trafo.test_context_blocks",
                memory.n_eval_segments.unwrap_or(0),
            ),
        ] {
            if n < 0 {
                return Err(PluginError::new("the model cannot be built")
                    .why(format!("`{flag}` is {n}, it must be at least 0"))
                    .fix(format!("set `-{flag} 0` or more")));
            }
        }
        if !(0.0..=1.0).contains(&config.rope.fraction) || config.rope.base <= 0.0 {
            return Err(PluginError::new("rotary positions cannot be made")
                .why(format!(
                    "`rope.rotate_fraction` is {}, `rope.base` is {}",
                    config.rope.fraction, config.rope.base
                ))
                .fix("set `-rope.rotate_fraction 0.5 -rope.base 10000`"));
        }
        if config.d_head.is_none() && config.d_model % config.n_heads != 0 {
            return Err(PluginError::new("the width of a head is unknown")
                .why(format!(
                    "`state_size` {} is no multiple of `transformer.n_heads` {}",
                    config.d_model, config.n_heads
                ))
                .fix("set `-transformer.head_projection_size`"));
        }
        let variant = Variant::of(name);
        Ok(Self { config, variant })
    }

    /// For each place of the stack the index of its distinct layer.
    ///
    /// # Errors
    /// If the group does not divide the stack.
    pub fn order(&self) -> Result<Vec<usize>, PluginError> {
        let sharing = if self.variant.is_universal {
            self.config.group_type
        } else {
            Sharing::Unshared
        };
        let count = |n: i64| usize::try_from(n).unwrap_or(0);
        sharing.order(count(self.config.n_layers), count(self.config.group_size))
    }

    /// For initial deviations that shrink with depth: `L` on a pre-layernorm path.
    pub fn depth_init(&self) -> Option<i64> {
        self.variant.is_pre_ln.then_some(self.config.n_layers)
    }

    /// Number and width of the heads.
    pub fn heads(&self) -> Heads {
        let ShellConfig {
            n_heads,
            d_head,
            d_model,
            ..
        } = self.config;
        Heads {
            n_heads,
            d_head: d_head.unwrap_or(d_model / n_heads),
        }
    }

    /// Of `d_hidden` hidden units. With `compat` the activation `topk` zeroes the largest, as the reference's does.
    ///
    /// # Errors
    /// If `topk` would keep more units than there are.
    pub fn activation(&self, d_hidden: i64, compat: bool) -> Result<Activation, PluginError> {
        let ActivationConfig { function, n_kept } = self.config.activation;
        Ok(match function {
            ActivationFunction::Relu => Activation::Relu,
            ActivationFunction::Gelu => Activation::Gelu,
            ActivationFunction::Identity => Activation::Identity,
            ActivationFunction::Sigmoid => Activation::Sigmoid,
            ActivationFunction::Softmax => Activation::Softmax,
            ActivationFunction::TopK if n_kept > d_hidden => {
                return Err(
                    PluginError::new("the activation `topk` has too few hidden units")
                        .why(format!(
                            "`transformer.topk_value` is {n_kept}, the layer is {d_hidden} wide"
                        ))
                        .fix(format!("set `-transformer.topk_value {d_hidden}` or less")),
                );
            }
            ActivationFunction::TopK if compat => Activation::AllButTopK(n_kept),
            ActivationFunction::TopK => Activation::TopK(n_kept),
        })
    }

    pub(super) fn has_out_norm(&self) -> bool {
        self.variant.is_pre_ln || self.config.forces_out_norm
    }

    pub(super) fn embedding_scale(&self) -> f64 {
        let default = if self.variant.is_pre_ln {
            1.0
        } else {
            (self.config.d_model as f64).sqrt()
        };
        self.config.embedding_scale.unwrap_or(default)
    }
}

/// Refuses the first flag whose value is below 1.
///
/// # Errors
/// For that flag.
pub fn check_positive(values: &[(&str, i64)]) -> Result<(), PluginError> {
    match values.iter().find(|(_, value)| *value < 1) {
        None => Ok(()),
        Some((flag, value)) => Err(PluginError::new("the model cannot be built")
            .why(format!("`{flag}` is {value}, it must be at least 1"))
            .fix(format!("set `-{flag} 1` or more"))),
    }
}

/// Refuses the first flag whose value is not in `[0, 1)`.
///
/// # Errors
/// For that flag.
pub fn check_probabilities(values: &[(&str, f64)]) -> Result<(), PluginError> {
    match values.iter().find(|(_, value)| !(0.0..1.0).contains(value)) {
        None => Ok(()),
        Some((flag, value)) => Err(PluginError::new("the model cannot be built")
            .why(format!(
                "`{flag}` is {value}, it must be a probability below 1"
            ))
            .fix(format!("set `-{flag} 0`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VARIANTS: &[&str] = &["preln_moe_universal"];

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        shell: ShellConfig,
    }

    #[test]
    fn the_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<Config>(SHELL_ARGS, &[]);
    }

    #[test]
    fn top_k_is_inverted_only_in_compatibility_mode() {
        let defs: Vec<moeut_plugin_api::ArgDef> = SHELL_ARGS.iter().map(Into::into).collect();
        let values = [("transformer.activation".to_owned(), "topk".into())].into();
        let config = moeut_plugin_api::args::configuration(&defs, &values).unwrap();
        let config: Config = serde_json::from_value(config).unwrap();
        let shell = Shell::new(config.shell, VARIANTS).unwrap();
        assert_eq!(shell.activation(32, false).unwrap(), Activation::TopK(32));
        assert_eq!(
            shell.activation(32, true).unwrap(),
            Activation::AllButTopK(32)
        );
    }

    /// Checkpoints hold what was typed, and other flags take these words.
    #[test]
    fn recomputation_takes_words_for_yes_and_no() {
        let defs: Vec<moeut_plugin_api::ArgDef> = SHELL_ARGS.iter().map(Into::into).collect();
        let def = defs
            .iter()
            .find(|def| def.name == "transformer.recompute")
            .unwrap();
        let read = |raw: &str| serde_json::from_value::<Recompute>(def.parse(raw).unwrap());
        for (raw, recompute) in [
            ("0", Recompute::Nothing),
            ("false", Recompute::Nothing),
            ("cheap", Recompute::Cheap),
            ("1", Recompute::Layers),
            ("True", Recompute::Layers),
        ] {
            assert_eq!(read(raw).unwrap(), recompute, "{raw}");
        }
        insta::assert_snapshot!(def.parse("2").unwrap_err(), @"`2` is not one of 0, cheap, 1");
    }

    #[test]
    fn contradictions_are_refused_with_a_way_out() {
        let defs: Vec<moeut_plugin_api::ArgDef> = SHELL_ARGS.iter().map(Into::into).collect();
        let refusal = |flag: &str, raw: &str| {
            let def = defs.iter().find(|def| def.name == flag).unwrap();
            let values = [(flag.to_owned(), def.parse(raw).unwrap())].into();
            let config = moeut_plugin_api::args::configuration(&defs, &values).unwrap();
            let config: Config = serde_json::from_value(config).unwrap();
            let error = Shell::new(config.shell, VARIANTS)
                .and_then(|shell| shell.activation(8, false))
                .unwrap_err();
            assert!(error.fix.starts_with("set `-"), "{error:?}");
            error.to_string()
        };
        insta::assert_snapshot!(refusal("transformer.variant", "rope"), @"the model has no such variant: `transformer.variant` is `rope`");
        insta::assert_snapshot!(refusal("state_size", "0"), @"the model cannot be built: `state_size` is 0, it must be at least 1");
        insta::assert_snapshot!(refusal("dropout", "1"), @"the model cannot be built: `dropout` is 1, it must be a probability below 1");
        insta::assert_snapshot!(refusal("lm.trafo.context_blocks", "-1"), @"the model cannot be built: `lm.trafo.context_blocks` is -1, it must be at least 0");
        insta::assert_snapshot!(refusal("transformer.n_heads", "3"), @"the width of a head is unknown: `state_size` 128 is no multiple of `transformer.n_heads` 3");
        insta::assert_snapshot!(refusal("rope.rotate_fraction", "1.5"), @"rotary positions cannot be made: `rope.rotate_fraction` is 1.5, `rope.base` is 10000");
        insta::assert_snapshot!(refusal("transformer.activation", "topk"), @"the activation `topk` has too few hidden units: `transformer.topk_value` is 32, the layer is 8 wide");
    }
}
