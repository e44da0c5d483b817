//! Causal softmax attention, and the multi-head layer without experts around it.

use crate::norm::normed;
use crate::{LayerNorm, Params, Rope, RopeConfig, init};
use tch::Tensor;

/// `softmax(q·kᵀ/√d + causal mask) · v` per head; `[B, T, H, d]` each, v may have its own width.
///
/// The reference multiplies q and k by `d^(-1/4)` each and attends with scale 1, which is the same product; leaving the
/// scale to the fused kernel saves two passes over memory and their rounding.
pub fn causal_attention(q_bthd: &Tensor, k_bthd: &Tensor, v_bthd: &Tensor) -> Tensor {
    let heads_first = |x: &Tensor| x.transpose(1, 2);
    Tensor::scaled_dot_product_attention(
        &heads_first(q_bthd),
        &heads_first(k_bthd),
        &heads_first(v_bthd),
        None::<Tensor>,
        0.0,
        true,
        None,
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
    norm: Option<LayerNorm>,
    kv: Tensor,
    q: Tensor,
    out: Tensor,
}

/// How the weights of a block without experts start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinearInit {
    /// Truncated normal with std √(2 / (L · `fan_in`)): blocks on a pre-layernorm path of this many layers.
    Depth(i64),
    /// Xavier-uniform inputs and PyTorch's default output: post-layernorm blocks.
    Xavier,
}

impl DenseAttention {
    /// Adds `data_to_kv`, `data_to_q`, `out_proj` and, if `has_norm`, `norm`.
    pub fn new(
        params: &Params,
        d_model: i64,
        heads: Heads,
        rope: RopeConfig,
        has_norm: bool,
        linear_init: LinearInit,
    ) -> Self {
        let width = heads.n_heads * heads.d_head;
        let options = params.options();
        let input = |shape: [i64; 2]| match linear_init {
            LinearInit::Depth(n_layers) => depth_scaled(shape, n_layers, options),
            LinearInit::Xavier => init::xavier_uniform(shape, options),
        };
        let output = match linear_init {
            LinearInit::Depth(n_layers) => depth_scaled([d_model, width], n_layers, options),
            LinearInit::Xavier => init::linear_default(&[d_model, width], width, options),
        };
        let linear = |name: &str, weight| params.sub(name).trainable("weight", &weight);
        Self {
            heads,
            rope: Rope::new(rope, heads.d_head),
            kv: linear("data_to_kv", input([2 * width, d_model])),
            q: linear("data_to_q", input([width, d_model])),
            out: linear("out_proj", output),
            norm: has_norm.then(|| LayerNorm::new(&params.sub("norm"), d_model)),
        }
    }

    /// `[B, T, D]` → `[B, T, D]`.
    pub fn forward(&self, x_btd: &Tensor) -> Tensor {
        let Heads { n_heads, d_head } = self.heads;
        let width = n_heads * d_head;
        let size = x_btd.size();
        let (batch, seq_len) = (size[0], size[1]);
        let split = |x: Tensor| x.view([batch, seq_len, n_heads, d_head]);

        let scored_btd = normed(self.norm.as_ref(), x_btd);
        let q = split(linear(&scored_btd, &self.q));
        let k = split(linear(&scored_btd, &self.kv.narrow(0, 0, width)));
        let v = split(linear(x_btd, &self.kv.narrow(0, width, width)));

        let (q, k) = (self.rope.forward(&q, 0), self.rope.forward(&k, 0));
        let mixed = causal_attention(&q, &k, &v).reshape([batch, seq_len, width]);
        linear(&mixed, &self.out)
    }
}

pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Tensor {
    x.linear(weight, None::<&Tensor>)
}

fn depth_scaled(shape: [i64; 2], n_layers: i64, options: (tch::Kind, tch::Device)) -> Tensor {
    let std = (2.0 / (n_layers * shape[1]) as f64).sqrt();
    init::truncated_normal(&shape, std, options)
}
