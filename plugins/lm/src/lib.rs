//! What language-modelling tasks share. A library, not a plugin: a task plugin links it statically and adds its name,
//! its dataset and its profiles.
//!
//! [`LmConfig`] is filled by [`ARGS`]; [`LmConfig::plan`] says which streams, model ([`variant`]) and evaluations
//! ([`evaluation`]) a run has. [`profile`] has arguments for small machines.

pub mod evaluation;
pub mod profile;
pub mod variant;

pub use evaluation::Evaluations;
pub use profile::{SMALL, SMALL_PROFILE};

use moeut_plugin_api::{ArgSpec, PluginError, RunFacts, Split, StreamRequest, TaskPlan, joined};
use serde::Deserialize;

/// Steps of data to have in stock beyond the last one, as the reference.
const SPARE_STEPS: u64 = 100;

/// The arguments of a language-modelling task.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LmConfig {
    /// A variant of the paper's code, or the name of a model.
    variant: String,
    /// Tokens that the model sees per sequence.
    seq_len: u64,
    /// Share of the canonical validation set to evaluate, 0 to 1.
    valid_ratio: f64,
    /// Downstream evaluations.
    evaluations: Evaluations,
}

/// The table that fills [`LmConfig`], for the paper's corpora.
pub const ARGS: &[ArgSpec] =
    &joined::<_, { OWN.len() + evaluation::N_ARGS }>(OWN, &evaluation::args("1"));

/// The same for text of a user's own: downstream evaluations, whose files have to be fetched, are only made on request.
pub const OWN_TEXT_ARGS: &[ArgSpec] =
    &joined::<_, { OWN.len() + evaluation::N_ARGS }>(OWN, &evaluation::args("0"));

const OWN: &[ArgSpec] = &[
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

/// The data of a task.
#[derive(Debug, Clone, Copy)]
pub struct Data {
    /// Name of the dataset component.
    pub dataset: &'static str,
    /// Tokens in the corpus's validation split under the paper's tokenizer, of which `lmds.valid_ratio` is a share;
    /// none for text of a user's own, all of which is evaluated.
    pub n_validation_tokens: Option<u64>,
}

impl LmConfig {
    /// Refuses what makes no sense, before anything is opened.
    ///
    /// # Errors
    /// For a context of no tokens, a share outside 0 to 1, and an unknown variant.
    pub fn checked(self, data: Data) -> Result<Self, PluginError> {
        if self.seq_len == 0 {
            return Err(PluginError::new("`lm.unroll` is 0")
                .why("a sequence needs at least one token")
                .fix("set `-lm.unroll` to 1 or more; the paper uses 1024"));
        }
        if !(0.0..=1.0).contains(&self.valid_ratio) {
            return Err(
                PluginError::new(format!("`lmds.valid_ratio` is {}", self.valid_ratio))
                    .why("it is a share of the validation set")
                    .fix("set `-lmds.valid_ratio` between 0 and 1; the paper uses 0.005"),
            );
        }
        #[expect(clippy::float_cmp, reason = "the default is exactly 1")]
        if data.n_validation_tokens.is_none() && self.valid_ratio != 1.0 {
            return Err(
                PluginError::new(format!("`lmds.valid_ratio` is {}", self.valid_ratio))
                    .why(format!(
                        "it is a share of a canonical number of tokens, which `{}` does not have",
                        data.dataset
                    ))
                    .fix("leave out `-lmds.valid_ratio`; the text that is held out is the dataset's choice"),
            );
        }
        variant::model(&self.variant)?;
        Ok(self)
    }

    /// Streams, model and evaluations of a run.
    ///
    /// ```text
    /// training tokens    seq_len · batch_size · (n_steps + 100); all there are without `-stop_after`
    /// validation tokens  ⌊⌊n_validation_tokens / seq_len⌋ · valid_ratio⌋ · seq_len, at least one window
    /// ```
    ///
    /// # Errors
    /// For an unknown variant.
    pub fn plan(&self, data: Data, facts: &RunFacts) -> Result<TaskPlan, PluginError> {
        let stream = |name: &str, split, token_limit| StreamRequest {
            name: name.into(),
            dataset: data.dataset.into(),
            split,
            seq_len: self.seq_len,
            token_limit,
        };
        let train_limit = facts
            .n_steps
            .map(|n_steps| self.seq_len * facts.batch_size * (n_steps + SPARE_STEPS));
        let validation_limit = data
            .n_validation_tokens
            .map(|n_tokens| self.validation_limit(n_tokens));
        Ok(TaskPlan {
            model: variant::model(&self.variant)?.into(),
            train: stream("train", Split::Train, train_limit),
            validation: vec![stream("val", Split::Validation, validation_limit)],
            prompts: ["The", "In order to", "If you"].map(String::from).into(),
            evaluations: self.evaluations.requests(),
        })
    }

    /// Whole windows in the wished share of the validation set, in tokens.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the reference rounds down, and the ratio is checked to be within 0 and 1"
    )]
    fn validation_limit(&self, n_validation_tokens: u64) -> u64 {
        let windows = (n_validation_tokens / self.seq_len) as f64 * self.valid_ratio;
        (windows as u64).max(1) * self.seq_len
    }
}

/// Makes a language-modelling task of a few facts, and a test of its profiles.
///
/// ```
/// moeut_plugin_api::export_plugin!();
/// moeut_lm::lm_task! {
///     /// Language modelling on verses.
///     Poetry {
///         name: "poetry",
///         aliases: [],
///         summary: "Language modelling on verses",
///         data: moeut_lm::Data { dataset: "text_files", n_validation_tokens: None },
///         args: moeut_lm::OWN_TEXT_ARGS,
///         profiles: [],
///     }
/// }
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! lm_task {
    ($(#[$doc:meta])* $task:ident {
        name: $name:literal,
        aliases: [$($alias:literal),*],
        summary: $summary:literal,
        data: $data:expr,
        args: $args:expr,
        profiles: [$($profile:expr),* $(,)?] $(,)?
    }) => {
        moeut_plugin_api::register_task!($task);

        $(#[$doc])*
        struct $task($crate::LmConfig);

        impl moeut_plugin_api::Task for $task {
            const NAME: &'static str = $name;
            const ALIASES: &'static [&'static str] = &[$($alias),*];
            const SUMMARY: &'static str = $summary;
            const ARGS: &'static [moeut_plugin_api::ArgSpec] = $args;
            const PROFILES: &'static [moeut_plugin_api::Profile] = &[$($profile),*];
            type Config = $crate::LmConfig;

            fn new(
                config: Self::Config,
                _host: &moeut_plugin_api::Host,
            ) -> Result<Self, moeut_plugin_api::PluginError> {
                config.checked($data).map(Self)
            }

            fn plan(
                &self,
                facts: &moeut_plugin_api::RunFacts,
            ) -> Result<moeut_plugin_api::TaskPlan, moeut_plugin_api::PluginError> {
                self.0.plan($data, facts)
            }
        }

        #[cfg(test)]
        #[test]
        fn profiles_fit_the_argument_table() {
            moeut_plugin_api::testing::check_args::<$crate::LmConfig>(
                <$task as moeut_plugin_api::Task>::ARGS,
                <$task as moeut_plugin_api::Task>::PROFILES,
            );
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const C4: Data = Data {
        dataset: "c4",
        n_validation_tokens: Some(206_453_965),
    };

    fn config(given: &[(&str, &str)]) -> LmConfig {
        moeut_plugin_api::testing::config(ARGS, given)
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<LmConfig>(ARGS, &[]);
    }

    /// Golden values of the reference: context 1024, batch 64, 100,000 steps, ratio 0.005.
    #[test]
    fn token_limits_of_the_paper() {
        let facts = RunFacts {
            batch_size: 64,
            n_steps: Some(100_000),
        };
        let config = config(&[("lm.unroll", "1024"), ("lmds.valid_ratio", "0.005")]);
        let plan = config.plan(C4, &facts).unwrap();
        assert_eq!(plan.train.token_limit, Some(6_560_153_600));
        assert_eq!(plan.validation[0].token_limit, Some(1_032_192));
        let pes2o = Data {
            n_validation_tokens: Some(842_021_184),
            ..C4
        };
        let plan = config.plan(pes2o, &facts).unwrap();
        assert_eq!(plan.validation[0].token_limit, Some(4_209_664));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let own = Data {
            dataset: "text_files",
            n_validation_tokens: None,
        };
        let what = |given: &[(&str, &str)], data| {
            config(given)
                .checked(data)
                .map(drop)
                .map_err(|error| error.what)
        };
        assert_eq!(what(&[], C4), Ok(()));
        assert_eq!(what(&[("lmds.valid_ratio", "0.5")], C4), Ok(()));
        for (given, data, expected) in [
            (("lm.unroll", "0"), C4, "`lm.unroll` is 0"),
            (("lmds.valid_ratio", "1.5"), C4, "`lmds.valid_ratio` is 1.5"),
            (
                ("lmds.valid_ratio", "0.5"),
                own,
                "`lmds.valid_ratio` is 0.5",
            ),
            (
                ("transformer.variant", "prelm_rope"),
                C4,
                "unknown variant `prelm_rope`",
            ),
        ] {
            assert_eq!(what(&[given], data), Err(expected.to_owned()));
        }
    }
}
