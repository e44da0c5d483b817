//! Typed arguments, their checks, and what they mean for the layers.

use crate::attention::AttentionConfig;
use crate::feed_forward::FeedForwardConfig;
use crate::gate::GateConfig;
use crate::losses::{LossWeights, MiFormula};
use moeut_nn::RouterDtype;
use moeut_nn::lm::{Shell, ShellConfig, check_positive, check_probabilities};
use moeut_plugin_api::PluginError;
use serde::Deserialize;

/// All arguments; see the table in `args.rs`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    shell: ShellConfig,
    pub(crate) kernel: String,
    pub(crate) router_dtype: RouterDtype,
    moe: MoeArgs,
    attention: AttentionArgs,
    router_dropout: f64,
    losses: LossWeights,
    act_loss: f64,
}

/// Feed-forward experts.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct MoeArgs {
    n_experts: i64,
    d_expert: i64,
    top_k: i64,
}

/// Attention experts.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttentionArgs {
    n_experts: i64,
    d_expert: i64,
    top_k: i64,
    dropout: f64,
    max_distance: i64,
    n_drawn: i64,
}

/// The accepted values of `transformer.variant`.
const VARIANTS: &[&str] = &[
    "sut_universal",
    "preln_sut_universal",
    "actsut_universal",
    "preln_actsut_universal",
];

/// What a block is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layers {
    pub(crate) d_model: i64,
    pub(crate) is_pre_ln: bool,
    /// Whether tokens halt.
    pub(crate) can_halt: bool,
    pub(crate) attention: AttentionConfig,
    pub(crate) feed_forward: FeedForwardConfig,
    /// Of attention and feed-forward outputs.
    pub(crate) dropout: f64,
    pub(crate) losses: LossWeights,
    pub(crate) formula: MiFormula,
    /// Weight of the mean depth.
    pub(crate) act_loss: f64,
}

impl Config {
    /// Checks the arguments and says what they mean. With `compat` the auxiliary losses are the reference's.
    ///
    /// # Errors
    /// For the first argument that contradicts another.
    pub(crate) fn resolve(&self, compat: bool) -> Result<(Shell, Layers), PluginError> {
        let shell = Shell::new(self.shell.clone(), VARIANTS)?;
        check_positive(&[
            ("moe.n_experts", self.moe.n_experts),
            ("moe.expert_size", self.moe.d_expert),
            ("pkm.n_heads", self.moe.top_k),
            ("moe.att.n_experts", self.attention.n_experts),
            ("moe.att.expert_size", self.attention.d_expert),
            ("moe.att.k", self.attention.top_k),
            ("sut.max_relative_positions", self.attention.max_distance),
        ])?;
        check_probabilities(&[
            ("moe.att.dropout", self.attention.dropout),
            ("sut.drop_gate", self.router_dropout),
        ])?;
        let formula = if compat {
            MiFormula::Reference
        } else {
            MiFormula::MutualInformation
        };
        let layers = Layers {
            d_model: shell.config.d_model,
            is_pre_ln: shell.variant.is_pre_ln,
            can_halt: can_halt(&shell),
            attention: self.attention()?,
            feed_forward: FeedForwardConfig {
                gate: self.gate(self.moe.n_experts, self.moe.top_k, 0),
                d_expert: self.moe.d_expert,
                activation: shell.activation(self.moe.d_expert, compat)?,
                dropout: shell.config.dropout,
            },
            dropout: shell.config.dropout,
            losses: LossWeights {
                // The reference never passes it on.
                z: if compat { 0.0 } else { self.losses.z },
                ..self.losses
            },
            formula,
            act_loss: self.act_loss,
        };
        Ok((shell, layers))
    }

    /// What a user should know of these arguments although they are valid.
    pub(crate) fn remarks(&self, layers: &Layers) -> Vec<String> {
        let mut remarks = Vec::new();
        let (moe, attention) = (self.moe, self.attention);
        for (k_flag, k, n_flag, n) in [
            ("pkm.n_heads", moe.top_k, "moe.n_experts", moe.n_experts),
            (
                "moe.att.k",
                attention.top_k,
                "moe.att.n_experts",
                attention.n_experts,
            ),
        ] {
            if k > n {
                remarks.push(format!(
                    "`{k_flag}` is {k}, but `{n_flag}` is {n}: a token uses {n} experts"
                ));
            }
        }
        let is_reference = layers.formula == MiFormula::Reference;
        if self.losses.mi > 0.0 && !is_reference {
            remarks.push(
                "`moa.miloss` weighs minus the mutual information of tokens and experts; the reference adds the two \
                 entropies instead, which `-compat 1` repeats"
                    .to_owned(),
            );
        }
        if self.losses.z > 0.0 && is_reference {
            remarks.push("`moa.zloss` has no effect with `-compat 1`".to_owned());
        }
        if self.act_loss > 0.0 && !layers.can_halt {
            remarks.push("`transformer.act_loss` has no effect: tokens do not halt".to_owned());
        }
        remarks
    }

    /// `top_k` is at most the number of experts, as in the reference.
    fn gate(&self, n_experts: i64, top_k: i64, n_drawn: i64) -> GateConfig {
        GateConfig {
            n_experts,
            top_k: top_k.min(n_experts),
            n_drawn,
            dropout: self.router_dropout,
        }
    }

    /// An expert must be a whole number of heads, and no more experts drawn than used.
    fn attention(&self) -> Result<AttentionConfig, PluginError> {
        let AttentionArgs {
            n_experts,
            d_expert,
            top_k,
            dropout,
            max_distance,
            n_drawn,
        } = self.attention;
        let Some(d_head) = self.shell.d_head else {
            return Err(PluginError::new("the width of a head is unknown")
                .why("a SUT cannot derive it, and `transformer.head_projection_size` is none")
                .fix(format!("set `-transformer.head_projection_size {d_expert}`, the width of an attention expert, or a divisor of it")));
        };
        if d_expert % d_head != 0 {
            return Err(
                PluginError::new("attention experts cannot be divided into heads")
                    .why(format!(
                        "`moe.att.expert_size` is {d_expert}, which is no multiple of \
                         `transformer.head_projection_size` {d_head}"
                    ))
                    .fix(format!(
                        "set `-moe.att.expert_size {}`",
                        (d_expert / d_head + 1) * d_head
                    )),
            );
        }
        let gate = self.gate(n_experts, top_k, n_drawn);
        if !(0..=gate.top_k).contains(&n_drawn) {
            return Err(PluginError::new("more experts are drawn than a token uses")
                .why(format!(
                    "`sut.sample_topk` is {n_drawn}, a token uses {} attention experts",
                    gate.top_k
                ))
                .fix(format!(
                    "set `-sut.sample_topk {}` or less, or raise `-moe.att.k`",
                    gate.top_k
                )));
        }
        Ok(AttentionConfig {
            gate,
            n_heads: d_expert / d_head,
            d_head,
            max_distance,
            dropout,
        })
    }
}

fn can_halt(shell: &Shell) -> bool {
    ["actsut_universal", "preln_actsut_universal"].contains(&shell.variant.name)
}

#[cfg(test)]
mod tests {
    use crate::testing;

    const TINY: [(&str, &str); 3] = [
        ("transformer.variant", "actsut_universal"),
        ("transformer.head_projection_size", "32"),
        ("lm.trafo.context_blocks", "0"),
    ];

    fn refusal(flag: &str, raw: &str) -> String {
        let config = testing::config(&[&TINY[..], &[(flag, raw)]].concat());
        let error = config.resolve(false).unwrap_err();
        assert!(error.fix.starts_with("set `-"), "{error:?}");
        format!("{}: {}", error, error.fix)
    }

    #[test]
    fn contradictory_arguments_are_refused_with_a_way_out() {
        assert_eq!(
            refusal("transformer.head_projection_size", "none"),
            "the width of a head is unknown: a SUT cannot derive it, and `transformer.head_projection_size` is none: \
             set `-transformer.head_projection_size 256`, the width of an attention expert, or a divisor of it"
        );
        assert_eq!(
            refusal("moe.att.expert_size", "100"),
            "attention experts cannot be divided into heads: `moe.att.expert_size` is 100, which is no multiple of \
             `transformer.head_projection_size` 32: set `-moe.att.expert_size 128`"
        );
        assert_eq!(
            refusal("sut.sample_topk", "3"),
            "more experts are drawn than a token uses: `sut.sample_topk` is 3, a token uses 2 attention experts: \
             set `-sut.sample_topk 2` or less, or raise `-moe.att.k`"
        );
        for (flag, raw) in [
            ("transformer.variant", "preln_moe_universal"),
            ("transformer.variant", "actsut"),
            ("sut.max_relative_positions", "0"),
            ("sut.drop_gate", "1"),
            ("moe.att.dropout", "-0.1"),
        ] {
            assert!(refusal(flag, raw).contains(flag), "{flag} {raw}");
        }
    }

    #[test]
    fn what_has_another_effect_than_one_may_think_is_said() {
        let remarks = |flags: &[(&str, &str)], compat| {
            let config = testing::config(&[&TINY[..], flags].concat());
            let (_, layers) = config.resolve(compat).unwrap();
            config.remarks(&layers)
        };
        assert!(remarks(&[], false).is_empty());
        let mi = [("moa.miloss", "0.001")];
        assert!(remarks(&mi, true).is_empty());
        assert!(remarks(&mi, false)[0].contains("`-compat 1`"));
        assert_eq!(remarks(&[("moa.zloss", "1")], false).len(), 0);
        assert_eq!(remarks(&[("moa.zloss", "1")], true).len(), 1);
        let no_halting = [
            ("transformer.variant", "sut_universal"),
            ("transformer.act_loss", "0.01"),
        ];
        assert_eq!(remarks(&no_halting, true).len(), 1);
        let many = [("moe.att.k", "5"), ("pkm.n_heads", "200")];
        assert_eq!(
            remarks(&many, true),
            [
                "`pkm.n_heads` is 200, but `moe.n_experts` is 128: a token uses 128 experts",
                "`moe.att.k` is 5, but `moe.att.n_experts` is 4: a token uses 4 experts"
            ]
        );
    }
}
