//! `moeut_c4`: train MoEUT to predict the next token of C4, the paper's main experiment.

use moeut_plugin_api::{
    ArgSpec, Host, PluginError, Profile, RunFacts, Split, StreamRequest, Task, TaskPlan,
};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_task!(MoeutC4);

/// Tokens in C4's validation split under the paper's tokenizer; `lmds.valid_ratio` is a share of these.
const VALIDATION_TOKENS: u64 = 206_453_965;

/// Steps of data to have in stock beyond the last one, as the reference.
const SPARE_STEPS: u64 = 100;

/// The variants of the paper's code, by the model that has them.
const VARIANTS: &[(&str, &[&str])] = &[
    (
        "moeut",
        &[
            "moe",
            "preln_moe",
            "moe_universal",
            "preln_moe_universal",
            "preln_moe_parallel",
        ],
    ),
    (
        "dense",
        &[
            "rope",
            "preln_rope",
            "preln_rope_parallel",
            "rope_universal",
            "preln_rope_universal",
        ],
    ),
    (
        "sut",
        &[
            "sut_universal",
            "preln_sut_universal",
            "actsut_universal",
            "preln_actsut_universal",
        ],
    ),
];

/// Language modelling on the dataset `c4`, with the model that has the variant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MoeutC4 {
    /// A variant of the paper's code, or the name of a model.
    variant: String,
    /// Tokens that the model sees per sequence.
    seq_len: u64,
    /// Share of the canonical validation set to evaluate, 0 to 1.
    valid_ratio: f64,
}

impl Task for MoeutC4 {
    const NAME: &'static str = "moeut_c4";
    const ALIASES: &'static [&'static str] = &["c4_transformer"];
    const SUMMARY: &'static str = "Language modelling with MoEUT on C4";
    const ARGS: &'static [ArgSpec] = &[
        ArgSpec::text("transformer.variant", "preln_moe_universal")
            .field("variant")
            .help(
                "The model: `[preln_]moe[_universal]`, `[preln_]rope[_universal]`, `preln_{moe,rope}_parallel`, \
                 `[preln_][act]sut_universal`, or the name of any other model plugin",
            ),
        ArgSpec::int("lm.unroll", "100")
            .field("seq_len")
            .unit("tokens")
            .help("Context length"),
        ArgSpec::float("lmds.valid_ratio", "1.0")
            .field("valid_ratio")
            .unit("fraction")
            .help("Share of the canonical validation set to evaluate"),
    ];
    const PROFILES: &'static [Profile] = &[Profile {
        name: "demo",
        help: "A small MoEUT that learns from the embedded corpus within minutes on two CPU cores",
        args: DEMO,
    }];
    type Config = Self;

    fn new(config: Self, _host: &Host) -> Result<Self, PluginError> {
        if config.seq_len == 0 {
            return Err(PluginError::new("`lm.unroll` is 0")
                .why("a sequence needs at least one token")
                .fix("set `-lm.unroll` to 1 or more; the paper uses 1024"));
        }
        if !(0.0..=1.0).contains(&config.valid_ratio) {
            return Err(
                PluginError::new(format!("`lmds.valid_ratio` is {}", config.valid_ratio))
                    .why("it is a share of the validation set")
                    .fix("set `-lmds.valid_ratio` between 0 and 1; the paper uses 0.005"),
            );
        }
        config.model()?;
        Ok(config)
    }

    fn plan(&self, facts: &RunFacts) -> Result<TaskPlan, PluginError> {
        let stream = |name: &str, split, token_limit| StreamRequest {
            name: name.into(),
            dataset: "c4".into(),
            split,
            seq_len: self.seq_len,
            token_limit,
        };
        let train_limit = facts
            .n_steps
            .map(|n_steps| self.seq_len * facts.batch_size * (n_steps + SPARE_STEPS));
        Ok(TaskPlan {
            model: self.model()?.into(),
            train: stream("train", Split::Train, train_limit),
            validation: vec![stream(
                "val",
                Split::Validation,
                Some(self.validation_limit()),
            )],
            prompts: ["The", "In order to", "If you"].map(String::from).into(),
            evaluations: Vec::new(),
        })
    }
}

impl MoeutC4 {
    /// The model of the variant.
    ///
    /// A name that has nothing of the paper's variants is that of a model, so that a new one needs no edit here. One
    /// that does have something of them is a misspelled variant, unless it says `name@plugin`.
    fn model(&self) -> Result<&str, PluginError> {
        let variant = self.variant.as_str();
        let of_paper = VARIANTS
            .iter()
            .find(|(_, variants)| variants.contains(&variant));
        let resembles = |part: &&str| variant.contains(part) && !variant.contains('@');
        match (
            of_paper,
            ["sut", "rope", "moe"].iter().find(|part| resembles(part)),
        ) {
            (Some((model, _)), _) => Ok(model),
            (None, None) => Ok(variant),
            (None, Some(_)) => {
                let known: Vec<String> = VARIANTS
                    .iter()
                    .flat_map(|(_, variants)| *variants)
                    .map(|known| format!("`{known}`"))
                    .collect();
                let error = PluginError::new(format!("unknown variant `{variant}`"))
                    .why(format!("the variants are {}", known.join(", ")))
                    .fix("set `-transformer.variant` to one of these, or to the name of a model plugin");
                Err(error)
            }
        }
    }

    /// Whole windows in the wished share of the validation set, in tokens.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the reference rounds down, and the ratio is checked to be within 0 and 1"
    )]
    fn validation_limit(&self) -> u64 {
        let windows = (VALIDATION_TOKENS / self.seq_len) as f64 * self.valid_ratio;
        (windows as u64).max(1) * self.seq_len
    }
}

/// Reaches 1.86 bits per UTF-8 byte after 100 steps and 1.51 after 400, in under three minutes on two CPU cores. A
/// vocabulary of 8000 cuts the training text into 0.81M tokens, one of 2000 into 1.01M; few wide experts keep matrix
/// products large. Neither choice was compared in runs of otherwise equal settings.
const DEMO: &[(&str, &str)] = &[
    ("data.source", "embedded"),
    ("sentencepiece.n_pieces", "8000"),
    ("lm.unroll", "128"),
    ("lm.trafo.context_blocks", "0"),
    ("batch_size", "16"),
    ("stop_after", "400"),
    ("test_interval", "100"),
    ("save_interval", "100"),
    ("log_interval", "10"),
    ("lr", "0.003"),
    ("lr_sched.type", "cos"),
    ("lr_warmup", "50"),
    ("min_lr_multiplier", "0.05"),
    ("wd", "0.01"),
    ("grad_clip", "0.5"),
    ("state_size", "128"),
    ("transformer.variant", "preln_moe_universal"),
    ("transformer.encoder_n_layers", "4"),
    ("transformer.universal.group_size", "2"),
    ("transformer.n_heads", "4"),
    ("transformer.head_projection_size", "32"),
    ("moe.nonorm", "1"),
    ("moe.n_experts", "16"),
    ("moe.expert_size", "128"),
    ("pkm.n_heads", "2"),
    ("moe.perplexity_reg", "0.01"),
    ("moe.perplexity_reg_mode", "layers_time"),
    ("moe.att.enable", "1"),
    ("moe.att.n_experts", "4"),
    ("moe.att.k", "2"),
    ("moe.att.q_expert", "0"),
    ("moe.att.k_expert", "0"),
    ("moe.att.perplexity_reg", "0.001"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn task(seq_len: u64, valid_ratio: f64) -> MoeutC4 {
        MoeutC4 {
            variant: "preln_moe_universal".into(),
            seq_len,
            valid_ratio,
        }
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<MoeutC4>(MoeutC4::ARGS, MoeutC4::PROFILES);
    }

    /// Golden values of the reference: context 1024, batch 64, 100,000 steps, ratio 0.005.
    #[test]
    fn token_limits_of_the_paper() {
        let facts = RunFacts {
            batch_size: 64,
            n_steps: Some(100_000),
        };
        let plan = task(1024, 0.005).plan(&facts).unwrap();
        assert_eq!(plan.train.token_limit, Some(6_560_153_600));
        assert_eq!(plan.validation[0].token_limit, Some(1_032_192));
    }

    #[test]
    fn variants_lead_to_models() {
        let model = |variant: &str| {
            let variant = variant.to_owned();
            let task = MoeutC4 {
                variant,
                ..task(1024, 1.0)
            };
            task.model().map(str::to_owned)
        };
        for (variant, expected) in [
            ("preln_moe_universal", "moeut"),
            ("moe", "moeut"),
            ("preln_rope", "dense"),
            ("rope_universal", "dense"),
            ("actsut_universal", "sut"),
            ("gpt", "gpt"),
            ("dense", "dense"),
            ("moe_plus@somebodys-model", "moe_plus@somebodys-model"),
        ] {
            assert_eq!(model(variant), Ok(expected.into()));
        }
        let error = model("prelm_rope").unwrap_err();
        assert_eq!(error.what, "unknown variant `prelm_rope`");
        for (_, variants) in VARIANTS {
            assert!(
                variants
                    .iter()
                    .all(|one| error.why.contains(&format!("`{one}`")))
            );
        }
    }
}
