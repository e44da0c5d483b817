//! Softmax attention, and the multi-head layer without experts around it.

use crate::cost::{Cost, Sequence, count};
use crate::norm::normed;
use crate::past::Mask;
use crate::{
    AttentionMaps, Context, Init, LayerNorm, LayerPast, Params, Reading, Rope, RopeConfig,
};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// `softmax(q·kᵀ/√d + mask) · v` per head; `[B, T, H, d]` for queries, `[B, S, H, d]` for keys and values; v may have its
/// own width, and zeros may follow the `d_head` channels of queries and keys.
///
/// The reference multiplies q and k by `d^(-1/4)` each and attends with scale 1, which is the same product; leaving the
/// scale to the fused kernel saves two passes over memory and their rounding.
pub fn attention(
    q_bthd: &Tensor,
    k_bshd: &Tensor,
    v_bshd: &Tensor,
    d_head: i64,
    mask: &Mask,
) -> Tensor {
    let heads_first = |x: &Tensor| x.transpose(1, 2);
    let (visible_ts, is_causal) = match mask {
        Mask::Causal => (None, true),
        Mask::Everything => (None, false),
        Mask::Explicit(visible_ts) => (Some(visible_ts), false),
    };
    Tensor::scaled_dot_product_attention(
        &heads_first(q_bthd),
        &heads_first(k_bshd),
        &heads_first(v_bshd),
        visible_ts,
        0.0,
        is_causal,
        Some((d_head as f64).sqrt().recip()),
        false,
    )
    .transpose(1, 2)
}

/// Widths of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Number of heads.
    pub n_heads: i64,
    /// Width of queries and keys.
    pub d_head: i64,
}

/// How the weights of a block without experts start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearInit {
    /// Truncated normal with std √(2 / (L · `fan_in`)): blocks on a pre-layernorm path of this many layers.
    Depth(i64),
    /// Glorot's for what reads the residual stream, PyTorch's default for what writes it: post-layernorm blocks.
    Xavier,
}

impl LinearInit {
    /// For a weight with `fan_in` inputs on a pre-layernorm path; `None` on the other.
    pub fn depth_scaled(self, fan_in: i64) -> Option<Init> {
        match self {
            Self::Depth(n_layers) => {
                let std = (2.0 / (n_layers * fan_in) as f64).sqrt();
                Some(Init::TruncatedNormal(std))
            }
            Self::Xavier => None,
        }
    }
}

/// The layer's arguments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DenseAttentionConfig {
    /// Width of the residual stream, `D`.
    pub d_model: i64,
    /// Number and width of the heads.
    pub heads: Heads,
    /// Positions.
    pub rope: RopeConfig,
    /// Whether q and k read `LN(x)`.
    pub has_norm: bool,
    /// Dropout of the queries.
    pub dropout: f64,
    /// Initial values.
    pub init: LinearInit,
}

/// Multi-head attention with partial rotary positions; k and v come from one joint projection, no biases.
///
/// With a peri-layernorm (`self_attn.norm`) q and k read `LN(x)` and v reads `x`. The reference cannot run this
/// combination; the rule follows its SwitchHead layer.
///
/// # Source
/// Reference `fast_rope_attention.py`.
#[derive(Debug)]
pub struct DenseAttention {
    heads: Heads,
    rope: Rope,
    dropout: f64,
    norm: Option<LayerNorm>,
    kv: Tensor,
    q: Tensor,
    out: Tensor,
}

impl DenseAttention {
    /// Adds `data_to_kv`, `data_to_q`, `out_proj` and, with a peri-layernorm, `norm`.
    pub fn new(params: &Params, config: DenseAttentionConfig) -> Self {
        let DenseAttentionConfig {
            d_model,
            heads,
            init,
            ..
        } = config;
        let width = heads.n_heads * heads.d_head;
        let input = |name: &str, n_rows| {
            let shape = [n_rows, d_model];
            let xavier = || Init::xavier_uniform(shape);
            let init = init.depth_scaled(d_model).unwrap_or_else(xavier);
            params.sub(name).parameter("weight", &shape, init)
        };
        let default = || Init::linear_weight(width);
        let out_init = init.depth_scaled(width).unwrap_or_else(default);
        let out = params.sub("out_proj");
        Self {
            heads,
            rope: Rope::new(config.rope, heads.d_head),
            dropout: config.dropout,
            kv: input("data_to_kv", 2 * width),
            q: input("data_to_q", width),
            out: out.parameter("weight", &[d_model, width], out_init),
            norm: config
                .has_norm
                .then(|| LayerNorm::new(&params.sub("norm"), d_model)),
        }
    }

    /// What q and k read the stream through.
    pub fn norm(&self) -> Option<&LayerNorm> {
        self.norm.as_ref()
    }

    /// `[B, T, D]` → `[B, T, D]`; keys and values are made from `attended_bsd`, if given, else from what is read.
    ///
    /// # Errors
    /// Whatever the kernel says, and if an attention map is wished for and cannot be made.
    pub fn forward(
        &self,
        reading: &Reading,
        attended_bsd: Option<&Tensor>,
        past: &mut LayerPast,
        maps: &mut AttentionMaps,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let Heads { n_heads, d_head } = self.heads;
        let width = n_heads * d_head;
        let d_inside = ctx.aligned(d_head);
        let split = |x: &Tensor, weight: &Tensor| {
            // As autocast would, so that what is kept of `x` is what the product keeps.
            let x = x.to_kind(ctx.compute);
            let product = move |[x, weight]: [&Tensor; 2], ctx: &Context| {
                Ok(linear(x, &into_heads(weight, n_heads, x, ctx)))
            };
            let y = ctx.cheap([&x, weight], product)?;
            let size = y.size();
            Ok::<_, PluginError>(y.view([size[0], size[1], n_heads, d_inside]))
        };
        let q_in = &reading.normed;
        let k_in = match attended_bsd {
            Some(attended_bsd) => normed(self.norm.as_ref(), attended_bsd),
            None => q_in.shallow_clone(),
        };
        let v_in = attended_bsd.unwrap_or(&reading.plain);

        let q = ctx.dropout(split(q_in, &self.q)?, self.dropout);
        let k = split(&k_in, &self.kv.narrow(0, 0, width))?;
        let v = split(v_in, &self.kv.narrow(0, width, width))?;
        let q = self.rope.forward(&q, past.query_offset(), ctx)?;
        let k = self.rope.forward(&k, past.key_offset(), ctx)?;
        let (k, v) = past.joined(k, v);
        maps.add(&q, &k, d_head, past.mask(), &[], ctx)?;
        let mixed = attention(&q, &k, &v, d_head, past.mask());
        let size = reading.stream.size();
        let mixed = mixed.reshape([size[0], size[1], n_heads * d_inside]);
        Ok(linear(
            &mixed,
            &out_of_heads(&self.out, n_heads, size[2], ctx),
        ))
    }

    /// Of one application: `2·H·d·T·S` for scores and values, `4·D·H·d·T` for projections.
    pub fn cost(&self, of: Sequence) -> Cost {
        let width = count(self.heads.n_heads * self.heads.d_head);
        let (d_model, n) = (count(self.out.size()[0]), of.n_tokens);
        // Values are products of the input and need not be kept, queries and keys are turned behind theirs.
        let n_kept = if of.is_frugal { 3 } else { 4 };
        Cost::default()
            .macs(SCORES, 2 * width * n * of.n_attended())
            .macs(PROJECTIONS, 4 * d_model * width * n)
            .kept(KEPT, kept_bytes(of, d_model, n_kept * width))
    }
}

/// Names of the parts of an attention layer's [`Cost`].
pub(crate) const SCORES: &str = "attention: scores and values";
pub(crate) const PROJECTIONS: &str = "attention: projections";
pub(crate) const KEPT: &str = "attention";

/// The layer's input, and `width` channels of queries, keys, values and their mixture.
pub(crate) fn kept_bytes(of: Sequence, d_model: u64, width: u64) -> u64 {
    of.n_tokens * (d_model * of.input_bytes() + width * of.product_bytes)
}

/// A weight `[H·d, D]` for products with `x`, which give heads as wide as [`Context::aligned`] makes them.
pub(crate) fn into_heads(weight: &Tensor, n_heads: i64, x: &Tensor, ctx: &Context) -> Tensor {
    let (size, d_model) = (weight.size(), x.size()[2]);
    let d_head = size[0] / n_heads;
    let last = [ctx.aligned(d_head), d_model];
    if last == [d_head, size[1]] {
        return weight.shallow_clone();
    }
    let weight_hdm = ctx.operand_of(&weight.view([n_heads, d_head, size[1]]), &last);
    weight_hdm.view([-1, d_model])
}

/// A weight `[D, H·d]` for products with such heads, which give a stream `d_model` wide.
pub(crate) fn out_of_heads(weight: &Tensor, n_heads: i64, d_model: i64, ctx: &Context) -> Tensor {
    let size = weight.size();
    let d_head = size[1] / n_heads;
    let last = [d_model, n_heads, ctx.aligned(d_head)];
    if last == [size[0], n_heads, d_head] {
        return weight.shallow_clone();
    }
    let weight_mhd = ctx.operand_of(&weight.view([size[0], n_heads, d_head]), &last);
    weight_mhd.view([d_model, -1])
}

pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    x.linear(weight, None::<&Tensor>)
}
