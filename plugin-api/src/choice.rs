//! What a choice dataset is: questions with a few possible continuations, of which one is right.
//!
//! It hands out text. The host tokenizes it with the tokenizer of the model at hand and scores it, so that a dataset
//! knows neither tokens nor models.

use crate::{ArgSpec, Host, PluginError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Questions of a downstream evaluation.
pub trait ChoiceDataset: Sized + Send + Sync + 'static {
    /// The name that tasks and `moeut-host eval -sets` use, and under which results are reported; `snake_case`.
    const NAME: &'static str;
    /// One line for lists.
    const SUMMARY: &'static str;
    /// The arguments that fill [`ChoiceDataset::Config`].
    const ARGS: &'static [ArgSpec] = &[];
    /// The typed arguments.
    type Config: DeserializeOwned;

    /// Finds the files, or downloads them, and reads all questions.
    ///
    /// # Errors
    /// If a file is missing, there twice, or malformed.
    fn open(config: Self::Config, host: &Host) -> Result<Self, PluginError>;

    /// Sizes of the opened set, and how it is scored.
    fn info(&self) -> ChoiceInfo;

    /// Questions `first..first + n`, in the order of the files.
    ///
    /// # Errors
    /// If one of them does not exist.
    fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError>;
}

/// A context and its possible continuations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Accuracy is reported by group, and as the mean over groups.
    pub group: String,
    /// What comes before each option; tokenized on its own. May be empty.
    pub prefix: String,
    /// The continuations; each tokenized on its own, so that it starts with a dummy prefix piece.
    pub options: Vec<String>,
    /// Index of the right one.
    pub answer: u32,
}

/// How a set is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoringRule {
    /// The right option must have the strictly greatest score.
    ///
    /// ```text
    /// score = Σ log p(token | all tokens before)   over the tokens after the first
    /// ```
    Choice {
        /// Only the option's tokens count, and the sum is divided by their number.
        is_normalized: bool,
    },
    /// LAMBADA: the only option is a whole text, whose last word the model must say.
    LastWord,
}

/// Sizes of a choice dataset, and how it is scored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChoiceInfo {
    /// Questions that can be read.
    pub n_questions: u64,
    /// Questions of the files that the set's rules leave out.
    pub n_skipped: u64,
    /// How answers are judged.
    pub rule: ScoringRule,
}
