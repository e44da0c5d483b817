//! One layer of the stack: attention, then a two-layer perceptron, around a residual stream.

use moeut_nn::attention::{DenseAttentionConfig, LinearInit};
use moeut_nn::lm::{self, At, BlockReport, Shell};
use moeut_nn::{
    Activation, AttentionMaps, Context, Cost, DenseAttention, Init, LayerNorm, Linear, Params,
    Reading, Sequence, Stream,
};
use moeut_plugin_api::{Chart, PluginError};
use tch::Tensor;

/// `f(x) = W₂ · act(W₁ · x + b₁) + b₂`, hidden width `int(D · ff_multiplier)`, and one of
///
/// | | attention reads | feed-forward reads | result |
/// |---|---|---|---|
/// | pre | `LN₁(x)` | `LN₂(x)` after attention | `x + f` |
/// | pre, parallel | `LN₁(x)` | `LN₁(x)` as well | `x + attention + f` |
/// | post | `x` | `x` | `LN(x + f)` |
///
/// With segment memory keys and values read `LN₁` of the remembered states and `x` in all three.
///
/// # Source
/// Reference `fast_rope_transformer.py`.
#[derive(Debug)]
pub(crate) struct Block {
    attention: DenseAttention,
    linear1: Linear,
    linear2: Linear,
    activation: Activation,
    norms: Norms,
    dropout: f64,
    d_model: i64,
    d_ff: i64,
}

#[derive(Debug)]
enum Norms {
    Pre([LayerNorm; 2]),
    PreParallel(LayerNorm),
    Post([LayerNorm; 2]),
}

/// `int(D · ff_multiplier)`.
///
/// # Errors
/// If that is no width.
fn d_ff(shell: &Shell) -> Result<i64, PluginError> {
    let (d_model, multiplier) = (shell.config.d_model, shell.config.ff_multiplier);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a multiple of a width is a width; rounded down as the reference does"
    )]
    let d_ff = (d_model as f64 * multiplier) as i64;
    if d_ff >= 1 {
        return Ok(d_ff);
    }
    Err(
        PluginError::new("the feed-forward layers have no hidden units")
            .why(format!(
                "`state_size` {d_model} times `transformer.ff_multiplier` {multiplier} is {d_ff}"
            ))
            .fix("set `-transformer.ff_multiplier 4`"),
    )
}

impl Block {
    /// Adds `self_attn.*`, `linear1`, `linear2`, `norm1` and, unless parallel, `norm2`.
    pub(crate) fn new(
        params: &Params,
        shell: &Shell,
        is_parallel: bool,
        compat: bool,
    ) -> Result<Self, PluginError> {
        let (d_model, d_ff) = (shell.config.d_model, d_ff(shell)?);
        let activation = shell.activation(d_ff, compat)?;
        let init = shell
            .depth_init()
            .map_or(LinearInit::Xavier, LinearInit::Depth);
        let attention = DenseAttention::new(
            &params.sub("self_attn"),
            DenseAttentionConfig {
                d_model,
                heads: shell.heads(),
                rope: shell.config.rope,
                has_norm: false,
                dropout: 0.0,
                init,
            },
        );
        let gain = if activation == Activation::Relu {
            2f64.sqrt()
        } else {
            1.0
        };
        let [shape1, shape2] = [[d_ff, d_model], [d_model, d_ff]];
        let linear = |name: &str, shape: [i64; 2], xavier| {
            let (weight, bias) = match init.depth_scaled(shape[1]) {
                Some(weight) => (weight, Init::Zeros),
                None => (xavier, Init::linear_bias(shape[1])),
            };
            Linear::with_init(&params.sub(name), shape, weight, bias)
        };
        let norm = |name: &str| LayerNorm::new(&params.sub(name), d_model);
        Ok(Self {
            attention,
            linear1: linear("linear1", shape1, Init::xavier_normal(shape1, gain)),
            linear2: linear("linear2", shape2, Init::xavier_uniform(shape2)),
            activation,
            norms: match (shell.variant.is_pre_ln, is_parallel) {
                (true, true) => Norms::PreParallel(norm("norm1")),
                (true, false) => Norms::Pre([norm("norm1"), norm("norm2")]),
                (false, _) => Norms::Post([norm("norm1"), norm("norm2")]),
            },
            dropout: shell.config.dropout,
            d_model,
            d_ff,
        })
    }

    fn feed(&self, x: &Tensor, ctx: &Context) -> Result<Tensor, PluginError> {
        let (linear1, d_ff, activation) = (self.linear1.share(), self.d_ff, self.activation);
        // As autocast would, so that what is kept of `x` is what the product keeps.
        let x = &x.to_kind(ctx.compute);
        let hidden = if activation == Activation::Relu {
            let relu = move |[x]: [&Tensor; 1], ctx: &Context| {
                ctx.relu_linear(x, &linear1, ctx.aligned(d_ff))
            };
            ctx.cheap([x], relu)?
        } else {
            let product = move |[x]: [&Tensor; 1], ctx: &Context| {
                Ok(linear1.forward_to(x, ctx.aligned(d_ff)))
            };
            let product = ctx.cheap([x], product)?;
            let act =
                move |[x]: [&Tensor; 1], _: &Context| Ok(activation.forward(x.shallow_clone()));
            ctx.cheap([&product], act)?
        };
        let hidden = ctx.dropout(hidden, self.dropout);
        let y = self.linear2.forward_to(&hidden, x.size()[2]);
        Ok(ctx.dropout(y, self.dropout))
    }
}

/// What a block gathers over its applications in one forward pass.
pub(crate) struct BlockPass {
    maps: AttentionMaps,
    /// Of the applications, in the stack.
    places: Vec<usize>,
}

impl lm::Block for Block {
    type Pass = BlockPass;
    type Carry = ();

    fn begin(&self, ctx: &Context) -> BlockPass {
        BlockPass {
            maps: AttentionMaps::new(ctx),
            places: Vec::new(),
        }
    }

    fn forward(&self, x: &Stream, at: At<'_, Self>, ctx: &Context) -> Result<Stream, PluginError> {
        let At {
            place, pass, past, ..
        } = at;
        pass.places.push(place);
        let (Norms::Pre([norm1, _]) | Norms::PreParallel(norm1) | Norms::Post([norm1, _])) =
            &self.norms;
        let attended = past.attended(x).map(|attended| norm1.forward(&attended));
        let maps = &mut pass.maps;
        let mut attend = |x: &Tensor| {
            let reading = Reading::plain(x);
            let y = self
                .attention
                .forward(&reading, attended.as_ref(), past, maps, ctx)?;
            Ok::<_, PluginError>(ctx.dropout(y, self.dropout))
        };
        Ok(match &self.norms {
            Norms::Pre([norm1, norm2]) => {
                let first = ctx.reading(x, Some(norm1), false)?;
                let y = attend(&first.normed)?;
                let second = Stream::updated(first.stream, y);
                let second = ctx.reading(&second, Some(norm2), false)?;
                Stream::updated(second.stream, self.feed(&second.normed, ctx)?)
            }
            Norms::PreParallel(norm1) => {
                let Reading { stream, normed, .. } = ctx.reading(x, Some(norm1), false)?;
                Stream::updated(stream + attend(&normed)?, self.feed(&normed, ctx)?)
            }
            Norms::Post([norm1, norm2]) => {
                let x = x.whole();
                let x = norm1.forward(&(x + attend(x)?));
                norm2.forward(&(&x + self.feed(&x, ctx)?)).into()
            }
        })
    }

    fn finish(&self, pass: BlockPass) -> Result<BlockReport, PluginError> {
        let maps = pass.maps.finish(&pass.places).into_iter();
        let below = |map: Chart| Chart {
            name: format!("self_attn/{}", map.name),
            ..map
        };
        Ok(BlockReport {
            maps: maps.map(below).collect(),
            ..BlockReport::default()
        })
    }

    fn describe(&self) -> String {
        let norm = match &self.norms {
            Norms::Pre(_) => "pre-layernorm",
            Norms::PreParallel(_) => "pre-layernorm, parallel",
            Norms::Post(_) => "post-layernorm",
        };
        format!("attention + feed-forward (width {}), {norm}", self.d_ff)
    }

    fn cost(&self, of: Sequence) -> Cost {
        let [d_model, d_ff] = [self.d_model, self.d_ff].map(i64::unsigned_abs);
        let n = of.n_tokens;
        let hidden = self.activation.n_kept() * d_ff * of.hidden_bytes();
        let own = Cost::default()
            .macs("feed-forward", 2 * d_model * d_ff * n)
            .kept("feed-forward", n * (d_model * of.input_bytes() + hidden));
        self.attention.cost(of).plus(&own)
    }
}
