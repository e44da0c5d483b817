//! What a task is: the names of a model and of token streams, tied together for training and validation.

use crate::{ArgSpec, Host, PluginError, Profile, StreamRequest};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A training job. It names its datasets and its model; the host builds and runs them.
pub trait Task: Sized + Send + 'static {
    /// What a user types after `-task`; `snake_case`.
    const NAME: &'static str;
    /// Other names, for instance the reference's.
    const ALIASES: &'static [&'static str] = &[];
    /// One line for lists.
    const SUMMARY: &'static str;
    /// The arguments that fill [`Task::Config`].
    const ARGS: &'static [ArgSpec] = &[];
    /// Named bundles of arguments.
    const PROFILES: &'static [Profile] = &[];
    /// The typed arguments.
    type Config: DeserializeOwned;

    /// Makes the task from its arguments.
    ///
    /// # Errors
    /// If the arguments contradict each other.
    fn new(config: Self::Config, host: &Host) -> Result<Self, PluginError>;

    /// Says what to build.
    ///
    /// # Errors
    /// If the task cannot run under the host's arguments.
    fn plan(&self, facts: &RunFacts) -> Result<TaskPlan, PluginError>;
}

/// The host's arguments that a task may need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Sequences per optimizer step, over all devices.
    pub batch_size: u64,
    /// Optimizer steps of the whole run; `None` means without end.
    pub n_steps: Option<u64>,
}

/// What the host builds for a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskPlan {
    /// Name of the model component.
    pub model: String,
    /// The stream to train on.
    pub train: StreamRequest,
    /// The streams to validate on; each is reported under its name.
    pub validation: Vec<StreamRequest>,
    /// Beginnings of text to continue when training ends, to show what was learned.
    pub prompts: Vec<String>,
    /// Choice datasets to score with each validation.
    #[serde(default)]
    pub evaluations: Vec<EvaluationRequest>,
}

/// A task's wish for a downstream evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationRequest {
    /// Name of the choice dataset, under which results are reported.
    pub dataset: String,
    /// Batch size, as a multiple of that of the validation.
    pub batch_multiplier: u64,
    /// Only after the last step, because it takes long.
    pub is_end_only: bool,
}
