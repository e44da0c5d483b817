//! What a model is: named parameters, and a forward pass from token ids to logits.

use crate::{ArgSpec, Chart, DType, Device, Host, PluginError, TensorHandle};
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

    /// What [`ForwardInput::past`] may ask for.
    fn abilities(&self) -> ModelAbilities {
        ModelAbilities::default()
    }

    /// Tensors that carry over from one batch to the next, in a fixed order under names of their own; saved with a
    /// checkpoint.
    fn memory(&self) -> Vec<NamedTensor> {
        Vec::new()
    }

    /// Puts back what [`Model::memory`] gave; whatever is there is forgotten.
    ///
    /// # Errors
    /// If a name or shape is not one of this model's.
    fn set_memory(&mut self, memory: Vec<NamedTensor>) -> Result<(), PluginError> {
        match memory.first() {
            None => Ok(()),
            Some(first) => Err(PluginError::new("the model keeps nothing between batches")
                .why(format!("it was given `{}` to put back", first.name))
                .fix("restore a checkpoint of this model")),
        }
    }

    /// What the model is made of, and what one sequence of `seq_len` tokens costs.
    fn summary(&self, seq_len: u64) -> ModelSummary {
        let _ = seq_len;
        ModelSummary::default()
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
    /// Parameters have shapes but no storage of their own, for counting: `forward` is not called.
    #[serde(default)]
    pub is_shape_only: bool,
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
    /// What this pass should tell about itself; it costs time.
    pub wishes: Wishes,
    /// What the tokens see of earlier ones.
    pub past: Past,
}

/// What a pass should tell about itself. A model grants what it can. No wish changes any result, nor draws a random
/// number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent wishes, each with an interval of its own"
)]
pub struct Wishes {
    /// Cheap numbers, as [`ForwardOutput::stats`].
    pub stats: bool,
    /// Count what this pass selects, for the charts of a later pass or of this one. Passes of training and of evaluation
    /// are counted apart.
    pub counts: bool,
    /// Count what is selected together, likewise.
    pub pairs: bool,
    /// Costly numbers of this pass, and charts of everything counted since the last such pass, as
    /// [`ForwardOutput::charts`].
    pub details: bool,
    /// Counts of this very pass, as [`ForwardOutput::selections`].
    pub selections: bool,
    /// Attention maps of the batch's first sequence, as [`ForwardOutput::charts`].
    pub maps: Option<MapWish>,
}

impl Wishes {
    /// Whether models of every version know all that is wished for.
    pub fn is_plain(&self) -> bool {
        let Self { stats, .. } = *self;
        *self
            == Self {
                stats,
                ..Self::default()
            }
    }

    /// Whether selections are to be counted, for whatever purpose.
    pub fn needs_counts(&self) -> bool {
        self.stats || self.counts || self.details || self.selections
    }

    /// Whether what is selected together is to be counted.
    pub fn needs_pairs(&self) -> bool {
        self.pairs || self.selections
    }
}

/// Which attention maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapWish {
    /// Positions shown: the last so many if negative, the first so many if positive, all of them if 0.
    pub n_steps: i64,
    /// Also one map for each head, with what its experts are selected for.
    pub has_heads: bool,
}

/// What a pass sees of earlier tokens. Slots are independent of each other; a slot that was never used is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Past {
    /// Nothing: the tokens stand alone.
    None,
    /// Segment memory: the states that this slot's earlier calls left, as many as the model's arguments say. One slot
    /// per microbatch; evaluation uses slots of its own.
    Segments {
        /// Which memory.
        slot: u32,
        /// Empties it first.
        is_reset: bool,
    },
    /// Generation: the keys and values of all of this slot's earlier calls; positions continue.
    Cache {
        /// Which cache.
        slot: u32,
        /// Empties it first.
        is_reset: bool,
    },
    /// Scoring: as [`Past::Cache`], but the cache is left as it is. Each of its rows serves as many rows of the batch,
    /// one after the other: with 2 cached rows and a batch of 6, rows 0 to 2 go on from the first.
    Fork {
        /// Which cache.
        slot: u32,
    },
}

/// What a model can do with [`Past`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelAbilities {
    /// [`Past::Segments`] has an effect.
    pub has_memory: bool,
    /// [`Past::Cache`] is supported.
    pub has_cache: bool,
    /// [`Past::Fork`] is supported.
    #[serde(default)]
    pub can_fork: bool,
}

/// What a model is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSummary {
    /// The unrolled stack, first layer first.
    pub layers: Vec<LayerSummary>,
    /// Multiply-accumulates of one forward pass over one sequence, by part.
    pub macs: Vec<(String, u64)>,
    /// Bytes of activations that one sequence keeps for the backward pass, by part; an estimate.
    pub activation_bytes: Vec<(String, u64)>,
}

/// One place of the stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSummary {
    /// Index of the distinct layer that runs here, as in parameter names.
    pub unique_index: u64,
    /// `SwitchHead (4 heads of 128; v, o: 2 of 4) + σ-MoE (8 of 128, width 128), peri-layernorm`.
    pub what: String,
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct ForwardOutput {
    /// `[seq_len, batch, vocab_size]`, before the softmax.
    pub logits_tbv: TensorHandle,
    /// Scalars to add to the loss, already weighted; contributions of one name are summed. Nats.
    pub regularizers: Vec<NamedTensor>,
    /// Scalars to log, if [`Wishes::stats`]; of a batch in parts they are averaged.
    pub stats: Vec<NamedTensor>,
    /// Charts to log.
    pub charts: Vec<Chart>,
    /// Counts, if [`Wishes::selections`]; of several passes they are added up.
    pub selections: Vec<NamedTensor>,
}

/// A tensor with a name.
#[derive(Debug)]
pub struct NamedTensor {
    /// What it is.
    pub name: String,
    /// The value, on the model's device.
    pub tensor: TensorHandle,
}
