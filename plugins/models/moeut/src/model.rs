//! The language model: embedding, the stack of shared blocks, logits.

use crate::args::ARGS;
use crate::block::{Block, BlockReport};
use crate::config::Config;
use moeut_nn::{Context, Embedding, LayerNorm, LmHead, Params};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{
    ArgSpec, ForwardInput, ForwardOutput, Host, Model, ModelSetup, NamedTensor, Parameter,
    PluginError,
};
use moeut_torch::{IntoHandle, IntoTensor};
use std::collections::BTreeMap;
use std::rc::Rc;
use tch::{Kind, Tensor};

/// Parameters, the order in which they run, and the kernels.
pub(crate) struct Moeut {
    params: Params,
    embedding: Embedding,
    input_norm: Option<LayerNorm>,
    blocks: Vec<Block>,
    /// For each place of the stack its block.
    order: Vec<usize>,
    head: LmHead,
    training: Precision,
    evaluation: Precision,
    dropout: f64,
    layer_drop: f64,
}

/// Training may be in mixed precision; evaluation always is in the parameters' own type, as in the reference.
#[derive(Clone)]
struct Precision {
    kernel: Rc<KernelClient>,
    compute: Kind,
    is_mixed: bool,
}

impl Model for Moeut {
    const NAME: &'static str = "moeut";
    const SUMMARY: &'static str =
        "Mixture-of-experts Transformer with shared layers (MoEUT) and its ablations";
    const ARGS: &'static [ArgSpec] = ARGS;
    type Config = Config;

    fn build(config: Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError> {
        config.check()?;
        let vocab_size = i64::try_from(setup.vocab_size).map_err(|error| {
            PluginError::new("the vocabulary is too large").why(error.to_string())
        })?;
        let order = config
            .sharing()
            .order(to_usize(config.n_layers), to_usize(config.group_size))?;
        let n_blocks = order.iter().max().map_or(0, |last| last + 1);

        let precision = |dtype| {
            let kernel = host.kernel(&config.kernel, setup.device, dtype)?;
            Ok::<_, PluginError>(Precision {
                kernel: Rc::new(kernel),
                compute: moeut_torch::kind(dtype),
                is_mixed: dtype != setup.dtype,
            })
        };
        let evaluation = precision(setup.dtype)?;
        let training = if setup.compute_dtype == setup.dtype {
            evaluation.clone()
        } else {
            precision(setup.compute_dtype)?
        };

        let device = moeut_torch::device(setup.device);
        let params = Params::new(moeut_torch::kind(setup.dtype), device);
        let scale = config.embedding_scale();
        let embedding = Embedding::new(&params.sub("embedding"), vocab_size, config.d_model, scale);
        let unique_layers = params.sub("unique_layers");
        let blocks = (0..n_blocks)
            .map(|index| {
                Block::new(
                    &unique_layers.sub(&index.to_string()),
                    &config,
                    setup.compat,
                )
            })
            .collect();
        let has_norm = config.has_out_norm();
        Ok(Self {
            embedding,
            input_norm: config.norms_input.then(|| LayerNorm::plain(config.d_model)),
            blocks,
            order,
            head: LmHead::new(
                &params,
                vocab_size,
                config.d_model,
                has_norm,
                config.dropout,
            ),
            training,
            evaluation,
            dropout: config.dropout,
            layer_drop: config.layer_drop,
            params,
        })
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.params.parameters()
    }

    fn forward(&mut self, input: ForwardInput) -> Result<ForwardOutput, PluginError> {
        let precision = if input.is_training {
            &self.training
        } else {
            &self.evaluation
        };
        let ctx = Context {
            kernel: Rc::clone(&precision.kernel),
            compute: precision.compute,
            is_mixed: precision.is_mixed,
            is_training: input.is_training,
            wants_stats: input.wants_stats,
        };
        let tokens_bt = input.tokens_tb.into_tensor().transpose(0, 1).contiguous();
        let mut x = ctx.dropout(self.embedding.forward(&tokens_bt), self.dropout);
        x = self.embedding.scaled(x);
        if let Some(norm) = &self.input_norm {
            x = norm.forward(&x);
        }

        let mut stats = Vec::new();
        let mut passes: Vec<_> = self.blocks.iter().map(|block| block.begin(&ctx)).collect();
        for (place, &index) in self.order.iter().enumerate() {
            let y = self.blocks[index].forward(&x, &mut passes[index], &ctx)?;
            let y = self.drop_layer(&x, y, &ctx);
            if ctx.wants_stats {
                stats.extend(update_stats(place, &x, &y));
            }
            x = y;
        }
        let logits_tbv = self.head.forward(&x, &ctx);

        let mut regularizers: BTreeMap<String, Tensor> = BTreeMap::new();
        for (index, (block, pass)) in self.blocks.iter().zip(passes).enumerate() {
            let BlockReport {
                regularizers: terms,
                stats: of_block,
            } = block.finish(pass);
            for (name, term) in terms {
                let sum = match regularizers.remove(&name) {
                    Some(sum) => sum + term,
                    None => term,
                };
                regularizers.insert(name, sum);
            }
            let prefix = format!("unique_layers.{index}");
            stats.extend(
                of_block
                    .into_iter()
                    .map(|(name, value)| (format!("{prefix}.{name}"), value)),
            );
        }
        Ok(ForwardOutput {
            logits_tbv: logits_tbv.into_handle(),
            regularizers: regularizers.into_iter().map(named).collect(),
            stats: stats.into_iter().map(named).collect(),
        })
    }

    /// Routing has fixed shapes and waits for nothing, so only the kernel decides.
    fn graph_safe(&self) -> bool {
        let capabilities = self.training.kernel.capabilities();
        capabilities.is_ok_and(|capabilities| capabilities.is_graph_safe)
    }
}

impl Moeut {
    /// While training, each token keeps its input with probability `layer_drop`.
    fn drop_layer(&self, x_btd: &Tensor, y_btd: Tensor, ctx: &Context) -> Tensor {
        if self.layer_drop <= 0.0 || !ctx.is_training {
            return y_btd;
        }
        let skips_bt1 = y_btd.narrow(2, 0, 1).rand_like().lt(self.layer_drop);
        x_btd.where_self(&skips_bt1, &y_btd)
    }
}

/// How much a layer changes the residual stream: mean norms of update and input, their ratio, and the mean absolute
/// cosine of input and output at the same position.
///
/// The reference takes the cosine over all pairs of positions, a T×T product per layer for one number.
fn update_stats(place: usize, x_btd: &Tensor, y_btd: &Tensor) -> [(String, Tensor); 4] {
    tch::no_grad(|| {
        let norm = |x: &Tensor| x.norm_scalaropt_dim(2, -1, false).mean(Kind::Float);
        let (update, input) = (norm(&(y_btd - x_btd)), norm(x_btd));
        let cosine = Tensor::cosine_similarity(x_btd, y_btd, -1, 1e-8)
            .abs()
            .mean(Kind::Float);
        let name = |what: &str| format!("activation_norm/{what}_{place}");
        [
            (name("rel_update_layer"), &update / &input),
            (name("abs_update_layer"), update),
            (name("in_layer"), input),
            (name("io_cossim"), cosine),
        ]
    })
}

fn named((name, tensor): (String, Tensor)) -> NamedTensor {
    NamedTensor {
        name,
        tensor: tensor.into_handle(),
    }
}

/// Counts were checked to be positive.
fn to_usize(count: i64) -> usize {
    usize::try_from(count).unwrap_or(0)
}
