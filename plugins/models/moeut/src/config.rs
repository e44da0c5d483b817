//! Typed arguments, their checks, and what they mean for the layers.

use moeut_nn::attention::Heads;
use moeut_nn::balance::{BalanceConfig, BalanceMode};
use moeut_nn::switchhead::ExpertSides;
use moeut_nn::{Activation, MoeConfig, Norm, RopeConfig, Scoring, Sharing, SwitchHeadConfig};
use moeut_plugin_api::PluginError;
use serde::Deserialize;

/// All arguments; see the table in `args.rs`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) d_model: i64,
    pub(crate) n_layers: i64,
    variant: Variant,
    pub(crate) group_size: i64,
    group_type: Sharing,
    is_peri: bool,
    pub(crate) dropout: f64,
    pub(crate) layer_drop: f64,
    embedding_scale: Option<f64>,
    pub(crate) norms_input: bool,
    forces_out_norm: bool,
    context_blocks: i64,
    pub(crate) kernel: String,
    n_heads: i64,
    d_head: Option<i64>,
    pub(crate) rope: RopeConfig,
    pub(crate) activation: Activation,
    pub(crate) moe: MoeConfig,
    attention: AttentionConfig,
}

/// `transformer.variant`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Variant {
    Moe,
    #[serde(rename = "preln_moe")]
    PreLnMoe,
    MoeUniversal,
    #[serde(rename = "preln_moe_universal")]
    PreLnMoeUniversal,
}

/// `moe.att.*`, where `None` means "as in the feed-forward layer".
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an argument of the reference"
)]
struct AttentionConfig {
    has_experts: bool,
    n_experts: i64,
    top_k: i64,
    q: bool,
    k: bool,
    v: bool,
    o: bool,
    d_value: Option<i64>,
    same_sel: bool,
    separate_kq_sel: bool,
    scoring: Scoring,
    has_norm_init: bool,
    dropout: f64,
    router_dropout: f64,
    expert_dropout: Option<f64>,
    balance_weight: Option<f64>,
    balance_mode: Option<BalanceMode>,
}

impl Config {
    /// Refuses what contradicts itself or is not implemented.
    ///
    /// # Errors
    /// For the first such argument.
    pub(crate) fn check(&self) -> Result<(), PluginError> {
        for (flag, value) in [
            ("state_size", self.d_model),
            ("transformer.encoder_n_layers", self.n_layers),
            ("transformer.n_heads", self.n_heads),
            ("transformer.head_projection_size", self.d_head.unwrap_or(1)),
            ("transformer.universal.group_size", self.group_size),
            ("moe.n_experts", self.moe.n_experts),
            ("moe.expert_size", self.moe.d_expert),
            ("pkm.n_heads", self.moe.top_k),
            ("moe.att.n_experts", self.attention.n_experts),
            ("moe.att.k", self.attention.top_k),
            ("moe.att.v_size", self.attention.d_value.unwrap_or(1)),
        ] {
            if value < 1 {
                return Err(PluginError::new("the model cannot be built")
                    .why(format!("`{flag}` is {value}, it must be at least 1"))
                    .fix(format!("set `-{flag} 1` or more")));
            }
        }
        for (flag, value) in [
            ("dropout", self.dropout),
            ("transformer.p_drop_layer", self.layer_drop),
            ("moe.drop_expert", self.moe.expert_dropout),
            ("moe.selection_dropout", self.moe.router_dropout),
            ("moe.att.dropout", self.attention.dropout),
            ("moe.att.selection_dropout", self.attention.router_dropout),
            (
                "moe.att.drop_expert",
                self.attention.expert_dropout.unwrap_or(0.0),
            ),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(PluginError::new("the model cannot be built")
                    .why(format!(
                        "`{flag}` is {value}, it must be a probability below 1"
                    ))
                    .fix(format!("set `-{flag} 0`")));
            }
        }
        if !(0.0..=1.0).contains(&self.rope.fraction) || self.rope.base <= 0.0 {
            return Err(PluginError::new("rotary positions cannot be made")
                .why(format!(
                    "`rope.rotate_fraction` is {}, `rope.base` is {}",
                    self.rope.fraction, self.rope.base
                ))
                .fix("set `-rope.rotate_fraction 0.5 -rope.base 10000`"));
        }
        check_top_k(
            "pkm.n_heads",
            self.moe.top_k,
            "moe.n_experts",
            self.moe.n_experts,
        )?;
        if self.attention.has_experts {
            let AttentionConfig {
                top_k, n_experts, ..
            } = self.attention;
            check_top_k("moe.att.k", top_k, "moe.att.n_experts", n_experts)?;
        }
        if self.d_head.is_none() && self.d_model % self.n_heads != 0 {
            return Err(PluginError::new("the width of a head is unknown")
                .why(format!(
                    "`state_size` {} is no multiple of `transformer.n_heads` {}",
                    self.d_model, self.n_heads
                ))
                .fix("set `-transformer.head_projection_size`"));
        }
        if self.context_blocks != 0 {
            return Err(
                PluginError::new("attention to earlier segments is not implemented")
                    .why(format!(
                        "`lm.trafo.context_blocks` is {}",
                        self.context_blocks
                    ))
                    .fix("set `-lm.trafo.context_blocks 0`, as all of the paper's runs do"),
            );
        }
        Ok(())
    }

    /// Whether shell and initial values are those of pre-layernorm models.
    pub(crate) fn is_pre_ln(&self) -> bool {
        matches!(self.variant, Variant::PreLnMoe | Variant::PreLnMoeUniversal)
    }

    /// Where blocks normalize.
    pub(crate) fn norm(&self) -> Norm {
        if self.is_peri {
            Norm::Peri
        } else if self.is_pre_ln() {
            Norm::Pre
        } else {
            Norm::Post
        }
    }

    /// How layers are shared.
    pub(crate) fn sharing(&self) -> Sharing {
        match self.variant {
            Variant::Moe | Variant::PreLnMoe => Sharing::Unshared,
            Variant::MoeUniversal | Variant::PreLnMoeUniversal => self.group_type,
        }
    }

    /// Whether there is a norm before the output.
    pub(crate) fn has_out_norm(&self) -> bool {
        self.is_pre_ln() || self.forces_out_norm
    }

    /// What the embedding is multiplied by.
    pub(crate) fn embedding_scale(&self) -> f64 {
        let default = if self.is_pre_ln() {
            1.0
        } else {
            (self.d_model as f64).sqrt()
        };
        self.embedding_scale.unwrap_or(default)
    }

    /// For initial deviations that shrink with depth.
    pub(crate) fn depth_init(&self) -> Option<i64> {
        self.is_pre_ln().then_some(self.n_layers)
    }

    pub(crate) fn heads(&self) -> Heads {
        Heads {
            n_heads: self.n_heads,
            d_head: self.d_head.unwrap_or(self.d_model / self.n_heads),
        }
    }

    /// The attention with experts, if it is on.
    ///
    /// With `compat` four arguments mean what the reference's positional call makes of them, one place off:
    /// `norm_init` separates the selections of q and k, `separate_kq_sel` shares v's with o, `same_sel` makes value
    /// heads one wide, and `v_size` and the renormalized init do nothing. The published models were trained so.
    pub(crate) fn switchhead(&self, compat: bool) -> Option<SwitchHeadConfig> {
        let att = self.attention;
        let heads = self.heads();
        let (separate_kq_sel, same_sel, d_value, has_norm_init) = if compat {
            let d_value = if att.same_sel { Some(1) } else { None };
            (att.has_norm_init, att.separate_kq_sel, d_value, false)
        } else {
            (
                att.separate_kq_sel,
                att.same_sel,
                att.d_value,
                att.has_norm_init,
            )
        };
        att.has_experts.then(|| SwitchHeadConfig {
            heads,
            d_value: d_value.unwrap_or(heads.d_head),
            n_experts: att.n_experts,
            top_k: att.top_k,
            sides: ExpertSides {
                q: att.q,
                k: att.k,
                v: att.v,
                o: att.o,
                same_sel,
                separate_kq_sel,
            },
            scoring: att.scoring,
            dropout: att.dropout,
            expert_dropout: att.expert_dropout.unwrap_or(self.moe.expert_dropout),
            router_dropout: att.router_dropout,
            has_norm_init,
            balance: BalanceConfig {
                weight: att.balance_weight.unwrap_or(self.moe.balance.weight),
                mode: att.balance_mode.unwrap_or(self.moe.balance.mode),
            },
            rope: self.rope,
        })
    }
}

fn check_top_k(k_flag: &str, k: i64, n_flag: &str, n: i64) -> Result<(), PluginError> {
    if k <= n {
        return Ok(());
    }
    Err(
        PluginError::new("a token cannot use more experts than there are")
            .why(format!("`{k_flag}` is {k}, but `{n_flag}` is {n}"))
            .fix(format!("set `-{k_flag} {n}` or less, or raise `-{n_flag}`")),
    )
}
