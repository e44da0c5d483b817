//! Typed arguments, their checks, and what they mean for the layers.

use moeut_nn::balance::{BalanceConfig, BalanceMode};
use moeut_nn::lm::{Shell, ShellConfig, check_positive, check_probabilities};
use moeut_nn::switchhead::ExpertSides;
use moeut_nn::{MoeConfig, Norm, RouterDtype, Scoring, SwitchHeadConfig};
use moeut_plugin_api::PluginError;
use serde::Deserialize;

/// What `transformer.variant` may be. The reference's `preln_moe_parallel` is not parallel.
const VARIANTS: &[&str] = &[
    "moe",
    "preln_moe",
    "moe_universal",
    "preln_moe_universal",
    "preln_moe_parallel",
];

/// All arguments; see the table in `args.rs`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    shell: ShellConfig,
    is_peri: bool,
    kernel: String,
    router_dtype: RouterDtype,
    moe: MoeConfig,
    attention: AttentionConfig,
}

/// Checked arguments.
#[derive(Debug, Clone)]
pub(crate) struct Blueprint {
    pub(crate) shell: Shell,
    pub(crate) norm: Norm,
    pub(crate) kernel: String,
    /// In which type routers compute.
    pub(crate) router_dtype: RouterDtype,
    pub(crate) moe: MoeConfig,
    /// `None` is dense attention.
    pub(crate) switchhead: Option<SwitchHeadConfig>,
    /// Dropout of the queries of dense attention.
    pub(crate) dense_dropout: f64,
}

/// `moe.att.selection_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AttentionScoring {
    Sigmoid,
    Softmax,
    GumbelSigmoid,
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
    scoring: AttentionScoring,
    has_norm_init: bool,
    dropout: f64,
    router_dropout: f64,
    expert_dropout: Option<f64>,
    balance_weight: Option<f64>,
    balance_mode: Option<BalanceMode>,
}

impl Config {
    /// Checks the arguments and says what they mean for the layers.
    ///
    /// # Errors
    /// For the first argument that contradicts another or makes no sense.
    pub(crate) fn checked(self, compat: bool) -> Result<Blueprint, PluginError> {
        let (moe, attention) = (self.moe, self.attention);
        let shell = Shell::new(self.shell, VARIANTS)?;
        check_positive(&[
            ("moe.n_experts", moe.n_experts),
            ("moe.expert_size", moe.d_expert),
            ("pkm.n_heads", moe.top_k),
            ("moe.att.n_experts", attention.n_experts),
            ("moe.att.k", attention.top_k),
            ("moe.att.v_size", attention.d_value.unwrap_or(1)),
        ])?;
        check_probabilities(&[
            ("moe.drop_expert", moe.expert_dropout),
            ("moe.selection_dropout", moe.router_dropout),
            ("moe.att.dropout", attention.dropout),
            ("moe.att.selection_dropout", attention.router_dropout),
            (
                "moe.att.drop_expert",
                attention.expert_dropout.unwrap_or(0.0),
            ),
        ])?;
        check_top_k("pkm.n_heads", moe.top_k, "moe.n_experts", moe.n_experts)?;
        let switchhead = if attention.has_experts {
            let AttentionConfig {
                top_k, n_experts, ..
            } = attention;
            check_top_k("moe.att.k", top_k, "moe.att.n_experts", n_experts)?;
            Some(attention.switchhead(&shell, moe, compat)?)
        } else {
            None
        };
        Ok(Blueprint {
            norm: match (self.is_peri, shell.variant.is_pre_ln) {
                (true, _) => Norm::Peri,
                (false, true) => Norm::Pre,
                (false, false) => Norm::Post,
            },
            shell,
            kernel: self.kernel,
            router_dtype: self.router_dtype,
            moe,
            switchhead,
            dense_dropout: attention.dropout,
        })
    }
}

impl AttentionConfig {
    /// The attention with experts.
    ///
    /// With `compat` four arguments mean what the reference's positional call makes of them, one place off:
    /// `norm_init` separates the selections of q and k, `separate_kq_sel` shares v's with o, `same_sel` makes value
    /// heads one wide, and `v_size` and the renormalized init do nothing. The published models were trained so.
    fn switchhead(
        self,
        shell: &Shell,
        moe: MoeConfig,
        compat: bool,
    ) -> Result<SwitchHeadConfig, PluginError> {
        let heads = shell.heads();
        let (separate_kq_sel, same_sel, d_value, has_norm_init) = if compat {
            let d_value = if self.same_sel { Some(1) } else { None };
            (self.has_norm_init, self.separate_kq_sel, d_value, false)
        } else {
            (
                self.separate_kq_sel,
                self.same_sel,
                self.d_value,
                self.has_norm_init,
            )
        };
        Ok(SwitchHeadConfig {
            heads,
            d_value: d_value.unwrap_or(heads.d_head),
            n_experts: self.n_experts,
            top_k: self.top_k,
            sides: ExpertSides {
                q: self.q,
                k: self.k,
                v: self.v,
                o: self.o,
                same_sel,
                separate_kq_sel,
            },
            scoring: match self.scoring {
                AttentionScoring::Sigmoid => Scoring::Sigmoid,
                AttentionScoring::Softmax => Scoring::Softmax,
                AttentionScoring::GumbelSigmoid => {
                    return Err(PluginError::new("attention experts cannot be selected")
                        .why(
                            "`moe.att.selection_mode` is `gumbel_sigmoid`, which the reference accepts and then \
                             fails at; nothing says what it should do",
                        )
                        .fix("set `-moe.att.selection_mode sigmoid`"));
                }
            },
            dropout: self.dropout,
            expert_dropout: self.expert_dropout.unwrap_or(moe.expert_dropout),
            router_dropout: self.router_dropout,
            has_norm_init,
            balance: BalanceConfig {
                weight: self.balance_weight.unwrap_or(moe.balance.weight),
                mode: self.balance_mode.unwrap_or(moe.balance.mode),
                is_everywhere: moe.balance.is_everywhere,
            },
            rope: shell.config.rope,
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
