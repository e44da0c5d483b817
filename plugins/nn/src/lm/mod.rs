//! The language model around a stack of blocks: embedding, shared layers, memory, logits.
//!
//! A model plugin brings a [`Block`] and its own arguments; everything else about a language model is here. What a
//! block is made of, and which variants there are, this module does not know.

pub mod args;
mod memory;
mod recompute;
mod report;
mod stack_stats;

pub use args::{
    Recompute, SHELL_ARGS, Shell, ShellConfig, Variant, check_positive, check_probabilities,
};

use crate::cost::{Cost, Sequence, element_bytes};
use crate::padding::{self, padded};
use crate::params::InitStyle;
use crate::usage::Optimist;
use crate::{Context, Embedding, LayerNorm, LayerPast, LmHead, Params, RouterDtype, Stream, Tally};
use memory::{Batch, Memory};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{
    Chart, DType, Device, ForwardInput, ForwardOutput, Host, LayerSummary, ModelAbilities,
    ModelSetup, ModelSummary, NamedTensor, Parameter, PluginError,
};
use moeut_torch::frugal::frugally;
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError};
use report::{Report, Tallies};
use stack_stats::{Features, update_stats};
use std::rc::Rc;
use tch::{Kind, Tensor};

/// The calls of [`moeut_plugin_api::Model`], but `build`, for a model whose field `lm` is a [`LanguageModel`]; stands in its
/// `impl Model`.
#[macro_export]
macro_rules! hand_on_to_language_model {
    () => {
        fn parameters(&self) -> ::std::vec::Vec<::moeut_plugin_api::Parameter> {
            self.lm.parameters()
        }

        fn forward(
            &mut self,
            input: ::moeut_plugin_api::ForwardInput,
        ) -> ::std::result::Result<::moeut_plugin_api::ForwardOutput, ::moeut_plugin_api::PluginError>
        {
            self.lm.forward(input)
        }

        fn graph_safe(&self) -> bool {
            self.lm.graph_safe()
        }

        fn abilities(&self) -> ::moeut_plugin_api::ModelAbilities {
            self.lm.abilities()
        }

        fn memory(&self) -> ::std::vec::Vec<::moeut_plugin_api::NamedTensor> {
            self.lm.memory()
        }

        fn set_memory(
            &mut self,
            memory: ::std::vec::Vec<::moeut_plugin_api::NamedTensor>,
        ) -> ::std::result::Result<(), ::moeut_plugin_api::PluginError> {
            self.lm.set_memory(memory)
        }

        fn summary(&self, seq_len: u64) -> ::moeut_plugin_api::ModelSummary {
            self.lm.summary(seq_len)
        }
    };
}

/// One distinct layer, which may run at several places of the stack.
pub trait Block: 'static {
    /// What one forward pass keeps of a distinct layer between its applications: router logits for the regularizer,
    /// weights cast once.
    type Pass;
    /// What travels from layer to layer beside `x`; `()` for most.
    type Carry: Carry;
    /// Whether it can attend to the states of earlier segments.
    const HAS_MEMORY: bool = true;
    /// Whether it can keep keys and values for generation.
    const HAS_CACHE: bool = true;
    /// Whether it takes a residual stream as wide as [`Context::aligned`] makes it, with zeros behind the `D` channels.
    const TAKES_WIDE_STREAM: bool = true;

    /// Begins a forward pass. A layer that runs again in the backward pass begins one of its own, so that operations
    /// which save something for their backward belong to [`Self::forward`]; casts and padding do not.
    fn begin(&self, ctx: &Context) -> Self::Pass;

    /// One application: `[B, T, D]` → `[B, T, D]`, or both as wide as [`Self::TAKES_WIDE_STREAM`] says.
    ///
    /// # Errors
    /// Whatever the kernel says.
    fn forward(&self, x: &Stream, at: At<'_, Self>, ctx: &Context) -> Result<Stream, PluginError>;

    /// Ends a forward pass.
    ///
    /// # Errors
    /// If a term is about all processes, and another one has ended.
    fn finish(&self, pass: Self::Pass) -> Result<BlockReport, PluginError>;

    /// Charts of what was counted since the last time, below the names that [`BlockReport::counts`] and
    /// [`BlockReport::pairs`] have.
    fn usage(&self, counted: Counted, tally: &Tally, optimist: Optimist) -> Vec<Chart> {
        let _ = (counted, tally, optimist);
        Vec::new()
    }

    /// What it is made of, in a few words.
    fn describe(&self) -> String {
        String::new()
    }

    /// Tensors `[B, T, D]` that [`Self::Carry`] holds behind a layer.
    fn n_carried(&self) -> u64 {
        0
    }

    /// What one application costs.
    fn cost(&self, of: Sequence) -> Cost {
        let _ = of;
        Cost::default()
    }
}

/// What travels from layer to layer beside the residual stream; the default stands before the first layer.
pub trait Carry: Default + 'static {
    /// The same once more, sharing its tensors.
    #[must_use]
    fn share(&self) -> Self;
}

impl Carry for () {
    fn share(&self) {}
}

/// Where an application of a block happens, and what it shares with others.
#[derive(Debug)]
pub struct At<'a, B: Block + ?Sized> {
    /// Index in the unrolled stack.
    pub place: usize,
    /// Of this distinct layer, in this forward pass.
    pub pass: &'a mut B::Pass,
    /// From the layer before.
    pub carry: &'a mut B::Carry,
    /// What this place sees of earlier tokens.
    pub past: &'a mut LayerPast,
}

/// Names and values that a pass leaves.
#[derive(Debug, Default)]
pub struct BlockReport {
    /// Weighted scalars for the loss; those of equal names are summed over distinct layers.
    pub regularizers: Vec<(String, Tensor)>,
    /// Scalars to log, below `unique_layers.<index>.` as everything that follows.
    pub stats: Vec<(String, Tensor)>,
    /// Selections of this pass, to be added up, for instance int64 `[L, E]`; `L` applications.
    pub counts: Vec<(String, Tensor)>,
    /// Counts of what is selected together.
    pub pairs: Vec<(String, Tensor)>,
    /// Costly numbers and charts of this pass.
    pub charts: Vec<Chart>,
    /// Attention maps, below `activations/`, too.
    pub maps: Vec<Chart>,
}

/// What a tally holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// [`BlockReport::counts`] of training.
    InTraining,
    /// [`BlockReport::counts`] of evaluation.
    InEvaluation,
    /// [`BlockReport::pairs`] of evaluation.
    Together,
}

/// Which kernel a model with experts wants, and how its routers compute.
#[derive(Debug, Clone, Copy)]
pub struct ExpertNeeds<'a> {
    /// Name of the kernel, or `auto`.
    pub kernel: &'a str,
    /// In which type routers compute.
    pub router_dtype: RouterDtype,
}

/// Parameters, the order in which they run, and the kernels.
pub struct LanguageModel<B: Block> {
    params: Params,
    embedding: Embedding,
    input_norm: Option<LayerNorm>,
    /// Shared with second runs of their applications, which a backward pass may still want.
    blocks: Rc<[B]>,
    /// For each place of the stack its block.
    order: Vec<usize>,
    head: LmHead,
    training: Precision,
    evaluation: Precision,
    router_dtype: RouterDtype,
    memory: Memory,
    tallies: Tallies,
    is_compat: bool,
    everyone: Option<Host>,
    shell: Shell,
}

/// Training may be in mixed precision; evaluation always is in the parameters' own type, as in the reference.
#[derive(Clone)]
struct Precision {
    kernel: Option<Rc<KernelClient>>,
    compute: Kind,
    is_mixed: bool,
}

impl<B: Block> LanguageModel<B> {
    /// Builds the model; `block` makes one distinct layer below the given names. A model without experts needs
    /// nothing.
    ///
    /// # Errors
    /// If a kernel is missing or arguments contradict each other.
    pub fn build(
        shell: Shell,
        experts: Option<ExpertNeeds<'_>>,
        setup: &ModelSetup,
        host: &Host,
        mut block: impl FnMut(&Params) -> Result<B, PluginError>,
    ) -> Result<Self, PluginError> {
        let vocab_size = i64::try_from(setup.vocab_size).map_err(|error| {
            PluginError::new("the vocabulary is too large").why(error.to_string())
        })?;
        if shell.config.memory.is_on() && !B::HAS_MEMORY {
            return Err(
                PluginError::new("the model cannot attend to earlier segments")
                    .why(format!(
                        "`lm.trafo.context_blocks` is {}, `transformer.variant` is `{}`",
                        shell.config.memory.n_segments, shell.variant.name
                    ))
                    .fix("set `-lm.trafo.context_blocks 0`"),
            );
        }
        let order = shell.order()?;
        let n_blocks = order.iter().max().map_or(0, |last| last + 1);

        let named_kernel = experts.map(|experts| experts.kernel);
        let precision = |dtype: DType, named_kernel: Option<&str>| {
            let kernel = named_kernel
                .filter(|_| !setup.is_shape_only)
                .map(|name| host.kernel(name, setup.device, dtype).map(Rc::new))
                .transpose()?;
            Ok::<_, PluginError>(Precision {
                kernel,
                compute: moeut_torch::kind(dtype),
                is_mixed: dtype != setup.dtype,
            })
        };
        let mut training = precision(setup.compute_dtype, named_kernel)?;
        if named_kernel.is_none() && training.is_mixed && setup.device != Device::Cpu {
            // Without experts a kernel is welcome for what it fuses, and not needed.
            training.kernel = precision(setup.compute_dtype, Some("auto"))
                .ok()
                .and_then(|precision| precision.kernel);
        }
        let evaluation = if setup.compute_dtype == setup.dtype {
            training.clone()
        } else {
            // A kernel for half types only still serves the training that it was named for.
            precision(setup.dtype, named_kernel)
                .or_else(|_| precision(setup.dtype, named_kernel.and(Some("auto"))))?
        };

        let style = match (setup.is_shape_only, shell.config.has_xl_init) {
            (true, _) => InitStyle::ShapeOnly,
            (false, true) => InitStyle::TransformerXl,
            (false, false) => InitStyle::Own,
        };
        let device = moeut_torch::device(setup.device);
        let params = Params::new(moeut_torch::kind(setup.dtype), device).with_style(style);
        let ShellConfig {
            d_model,
            d_embedding,
            dropout,
            ..
        } = shell.config;
        let scale = shell.embedding_scale();
        let embedding = Embedding::new(&params, vocab_size, d_model, d_embedding, scale);
        let unique_layers = params.sub("unique_layers");
        let blocks = (0..n_blocks)
            .map(|index| block(&unique_layers.sub(&index.to_string())))
            .collect::<Result<_, _>>()?;
        let has_norm = shell.has_out_norm();
        Ok(Self {
            embedding,
            input_norm: shell.config.norms_input.then(|| LayerNorm::plain(d_model)),
            blocks,
            head: LmHead::new(&params, vocab_size, d_model, d_embedding, has_norm, dropout),
            training,
            evaluation,
            router_dtype: experts.map_or(RouterDtype::F32, |experts| experts.router_dtype),
            memory: Memory::new(shell.config.memory, order.len(), d_model),
            tallies: Tallies::new(n_blocks),
            is_compat: setup.compat,
            everyone: (host.info().n_ranks > 1).then(|| host.clone()),
            order,
            params,
            shell,
        })
    }

    /// See [`moeut_plugin_api::Model::forward`].
    ///
    /// # Errors
    /// Whatever the kernel says, or if the past is one that the blocks cannot see.
    pub fn forward(&mut self, input: ForwardInput) -> Result<ForwardOutput, PluginError> {
        let ctx = self.context(&input);
        let tokens_bt = input.tokens_tb.into_tensor().transpose(0, 1).contiguous();
        let batch = Batch {
            size: tokens_bt.size()[0],
            seq_len: tokens_bt.size()[1],
            device: tokens_bt.device(),
        };
        let mut past = self.memory.open(input.past, ctx.is_training, batch)?;
        if past.is_cache() && !B::HAS_CACHE {
            return Err(PluginError::new("the model cannot continue from a cache")
                .why(format!(
                    "`transformer.variant` is `{}`",
                    self.shell.variant.name
                ))
                .fix("give it the whole text each time"));
        }

        let mut x = ctx.dropout(
            self.embedding.forward(&tokens_bt),
            self.shell.config.dropout,
        );
        x = self.embedding.adapted(x);
        if let Some(norm) = &self.input_norm {
            x = norm.forward(&x);
        }
        if B::TAKES_WIDE_STREAM {
            x = padded(&x, &[ctx.aligned(self.shell.config.d_model)]);
        }
        let mut x = Stream::from(x);

        let mut stats = Vec::new();
        let mut features = Features::new(&x, &ctx);
        let mut carry = B::Carry::default();
        let mut passes: Vec<_> = self.blocks.iter().map(|block| block.begin(&ctx)).collect();
        for (place, &index) in self.order.iter().enumerate() {
            let mut layer_past = past.enter(place, &x);
            let at = At {
                place,
                pass: &mut passes[index],
                carry: &mut carry,
                past: &mut layer_past,
            };
            let y = match self.shell.config.recompute {
                Recompute::Layers if ctx.is_training => {
                    recompute::application(&self.blocks, index, &x, at, &ctx)?
                }
                Recompute::Cheap if ctx.is_training => {
                    frugally(|| self.blocks[index].forward(&x, at, &ctx))
                        .or_plugin_error("a layer cannot keep less")??
                }
                _ => self.blocks[index].forward(&x, at, &ctx)?,
            };
            past.leave(place, layer_past);
            features.add(&y);
            if ctx.wishes.stats {
                stats.extend(update_stats(place, x.whole(), y.whole(), &ctx)?);
            }
            x = self.drop_layer(&x, y, &ctx);
        }
        self.memory.close(past, &x);
        let logits_tbv = self.head.forward(&x, &ctx)?;

        let finish = |(block, pass): (_, B::Pass)| Ok((block, B::finish(block, pass)?));
        let of_blocks = self.blocks.iter().zip(passes).map(finish);
        let of_blocks = of_blocks.collect::<Result<_, PluginError>>()?;
        let mut report = self.tallies.report(of_blocks, &ctx);
        report.stats.splice(0..0, stats);
        report.charts.extend(features.charts(&self.head, &ctx)?);
        let Report {
            regularizers,
            stats,
            charts,
            selections,
        } = report;
        Ok(ForwardOutput {
            logits_tbv: logits_tbv.into_handle(),
            regularizers: regularizers.into_iter().map(named).collect(),
            stats: stats.into_iter().map(named).collect(),
            charts,
            selections: selections.into_iter().map(named).collect(),
        })
    }

    /// See [`moeut_plugin_api::Model::parameters`].
    pub fn parameters(&self) -> Vec<Parameter> {
        self.params.parameters()
    }

    /// See [`moeut_plugin_api::Model::memory`].
    pub fn memory(&self) -> Vec<NamedTensor> {
        self.memory.named()
    }

    /// See [`moeut_plugin_api::Model::set_memory`].
    ///
    /// # Errors
    /// If a name or shape is not one of this model's.
    pub fn set_memory(&mut self, memory: Vec<NamedTensor>) -> Result<(), PluginError> {
        let (_, device) = self.params.options();
        self.memory.restore(memory, device)
    }

    /// See [`moeut_plugin_api::Model::abilities`].
    pub fn abilities(&self) -> ModelAbilities {
        ModelAbilities {
            has_memory: B::HAS_MEMORY && self.shell.config.memory.is_on(),
            has_cache: B::HAS_CACHE,
            can_fork: B::HAS_CACHE,
        }
    }

    /// See [`moeut_plugin_api::Model::graph_safe`]. Routing has fixed shapes and waits for nothing, so only the kernel
    /// decides; a memory that fills up changes shapes, and whole layers that run again read the random generator's state.
    pub fn graph_safe(&self) -> bool {
        let kernel = self.training.kernel.as_ref();
        let is_kernel_safe = kernel.is_none_or(|kernel| {
            let capabilities = kernel.capabilities();
            capabilities.is_ok_and(|capabilities| capabilities.is_graph_safe)
        });
        let ShellConfig {
            memory, recompute, ..
        } = &self.shell.config;
        is_kernel_safe && !memory.is_on() && *recompute != Recompute::Layers
    }

    /// See [`moeut_plugin_api::Model::summary`]. Bytes are those of training.
    pub fn summary(&self, seq_len: u64) -> ModelSummary {
        let (kind, _) = self.params.options();
        let of = Sequence {
            n_tokens: seq_len,
            n_segments: self.shell.config.memory.n_kept(true) as u64,
            stream_bytes: element_bytes(kind),
            product_bytes: element_bytes(self.training.compute),
            is_frugal: self.shell.config.recompute == Recompute::Cheap,
        };
        let per_block: Vec<Cost> = self.blocks.iter().map(|block| block.cost(of)).collect();
        let what: Vec<String> = self.blocks.iter().map(Block::describe).collect();
        let cost = self
            .order
            .iter()
            .fold(Cost::default(), |sum, &index| sum.plus(&per_block[index]));
        let kept_bytes = match self.shell.config.recompute {
            Recompute::Layers => self.kept_when_recomputing(&per_block, of),
            Recompute::Nothing | Recompute::Cheap => cost.kept_bytes,
        };
        let layer = |&index: &usize| LayerSummary {
            unique_index: index as u64,
            what: what[index].clone(),
        };
        let owned = |parts: Vec<(&str, u64)>| {
            let owned = parts.into_iter().map(|(part, n)| (part.to_owned(), n));
            owned.collect()
        };
        ModelSummary {
            layers: self.order.iter().map(layer).collect(),
            macs: owned(cost.macs),
            activation_bytes: owned(kept_bytes),
        }
    }

    /// The inputs of all layers, and what the costliest one keeps while it runs again.
    fn kept_when_recomputing(&self, per_block: &[Cost], of: Sequence) -> Vec<(&'static str, u64)> {
        let sum = |cost: &&Cost| cost.kept_bytes.iter().map(|(_, n)| n).sum::<u64>();
        let costliest = per_block.iter().max_by_key(sum).cloned();
        let d_model = self.shell.config.d_model;
        let width = if self.training.is_mixed && B::TAKES_WIDE_STREAM {
            padding::aligned(d_model)
        } else {
            d_model
        };
        let stream = of.n_tokens * width.unsigned_abs() * of.stream_bytes;
        let n_inputs = |&index: &usize| 1 + self.blocks[index].n_carried();
        let n_inputs: u64 = self.order.iter().map(n_inputs).sum();
        let inputs = Cost::default().kept("inputs of layers", n_inputs * stream);
        inputs.plus(&costliest.unwrap_or_default()).kept_bytes
    }

    /// For each place of the stack the index of its distinct layer.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    fn context(&self, input: &ForwardInput) -> Context {
        let precision = if input.is_training {
            &self.training
        } else {
            &self.evaluation
        };
        Context {
            kernel: precision.kernel.clone(),
            compute: precision.compute,
            is_mixed: precision.is_mixed,
            router_dtype: self.router_dtype,
            is_training: input.is_training,
            wishes: input.wishes,
            everyone: self.everyone.clone(),
            is_compat: self.is_compat,
            is_frugal: input.is_training && self.shell.config.recompute == Recompute::Cheap,
        }
    }

    /// While training, each token keeps its input with probability `layer_drop`.
    fn drop_layer(&self, x: &Stream, y: Stream, ctx: &Context) -> Stream {
        let p = self.shell.config.layer_drop;
        if p <= 0.0 || !ctx.is_training {
            return y;
        }
        let skips_bt1 = y.whole().narrow(2, 0, 1).rand_like().lt(p);
        x.whole().where_self(&skips_bt1, y.whole()).into()
    }
}

fn named((name, tensor): (String, Tensor)) -> NamedTensor {
    NamedTensor {
        name,
        tensor: tensor.into_handle(),
    }
}
