//! What a model is: named parameters, and a forward pass from token ids to logits.

use crate::{ArgSpec, DType, Device, Host, PluginError, TensorHandle};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A language model. The host owns the loss, backward and the optimizer; the parameters are the model's own tensors,
/// shared with the host.
pub trait Model: Sized + 'static {
    /// The name that tasks use; `snake_case`.
    const NAME: &'static str;
    /// One line for lists.
    const SUMMARY: &'static str;
    /// The arguments that fill [`Model::Config`].
    const ARGS: &'static [ArgSpec] = &[];
    /// The typed arguments.
    type Config: DeserializeOwned;

    /// Builds and initialises the model; random numbers come from libtorch's generator, which the host has seeded.
    ///
    /// # Errors
    /// If the arguments contradict each other, or a kernel is missing.
    fn build(config: Self::Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError>;

    /// All parameters and buffers, in a fixed order, under the reference's names.
    fn parameters(&self) -> Vec<Parameter>;

    /// Runs the model.
    ///
    /// # Errors
    /// If libtorch refuses an operation, for instance for want of memory.
    fn forward(&mut self, input: ForwardInput) -> Result<ForwardOutput, PluginError>;

    /// Whether a step may be captured as a CUDA graph: no host sync, no shape that depends on data.
    fn graph_safe(&self) -> bool {
        false
    }
}

/// What the host tells a model when it builds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelSetup {
    /// Number of distinct token ids.
    pub vocab_size: u64,
    /// Where the parameters live.
    pub device: Device,
    /// Element type of the parameters.
    pub dtype: DType,
    /// Element type of matrix products; differs from `dtype` under mixed precision.
    pub compute_dtype: DType,
    /// Whether to behave like the reference where the reference is wrong.
    pub compat: bool,
}

/// One tensor of a model.
#[derive(Debug)]
pub struct Parameter {
    /// The reference's name: `unique_layers.0.pkm.keys`.
    pub name: String,
    /// The model's own tensor, shared.
    pub tensor: TensorHandle,
    /// Whether the optimizer trains it; buffers are only saved.
    pub is_trainable: bool,
}

/// One batch for a model.
#[derive(Debug)]
pub struct ForwardInput {
    /// Token ids, int64 `[seq_len, batch]` (time-major, as the reference).
    pub tokens_tb: TensorHandle,
    /// Dropout and regularizers are on.
    pub is_training: bool,
    /// Whether the statistics of this pass will be logged; they cost time.
    pub wants_stats: bool,
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct ForwardOutput {
    /// `[seq_len, batch, vocab_size]`, before the softmax.
    pub logits_tbv: TensorHandle,
    /// Scalars to add to the loss, already weighted; contributions of one name are summed. Nats.
    pub regularizers: Vec<NamedTensor>,
    /// Scalars to log.
    pub stats: Vec<NamedTensor>,
}

/// A tensor with a name.
#[derive(Debug)]
pub struct NamedTensor {
    /// What it is.
    pub name: String,
    /// The value, on the model's device.
    pub tensor: TensorHandle,
}
