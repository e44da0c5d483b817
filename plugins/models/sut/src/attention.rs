//! Mixture of attention: query and output projections have experts, keys and values are shared by all of them, and
//! positions are learned, relative and clipped.
//!
//! Shape letters: `B` batch, `T` `seq_len`, `S` keys (`T`, and those of earlier tokens), `N = B·T`, `D` `d_model`, or
//! as wide as [`Context::aligned`] makes it, `E` experts, `K` experts per token, `W` width of an expert, `h` heads of
//! an expert, `d` `d_head`, `M` `max_distance`.

use crate::banded;
use crate::experts::Experts;
use crate::gate::{Gate, GateConfig, GatePass};
use crate::losses::Tally;
use moeut_nn::past::Mask;
use moeut_nn::{Context, Cost, Init, LayerPast, Params, Sequence};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// Arguments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AttentionConfig {
    pub(crate) gate: GateConfig,
    /// `h`.
    pub(crate) n_heads: i64,
    /// `d`.
    pub(crate) d_head: i64,
    /// `M`: keys `M − 1` or more tokens back share a position.
    pub(crate) max_distance: i64,
    /// Dropout of the attention probabilities.
    pub(crate) dropout: f64,
}

/// ```text
/// q_j = W_q[e_j] x                                    per selected expert, h heads
/// k, v = W_k s, W_v s                                 s: what is attended to
/// a_j = softmax(q_j · kᵀ · d^(-1/2) + q_j · R[:, distance] · d^(-1/4))
///                                                     causal; distance = clip(i − j, 0, M − 1)
/// y   = Σ_j g_j · W_o[e_j] · (drop(a_j) · v)
/// ```
///
/// All keys at a distance of `M − 1` and more have the same position, and a softmax does not change with a number that
/// is added to all its logits: less that position's, only the logits of near keys have a bias, see [`banded`]. Where
/// probabilities are dropped and where more keys than queries are seen, all logits are made.
///
/// `R` is `[h, d, 2M + 1]` for checkpoints' sake, of which causal attention reads columns `1..=M`.
///
/// # Source
/// Zhang et al., "Mixture of Attention Heads", arXiv:2210.05144; Shaw et al., arXiv:1803.02155; reference
/// `sut/moa_attention.py`.
#[derive(Debug)]
pub(crate) struct Attention {
    config: AttentionConfig,
    gate: Gate,
    query: Experts,
    out: Experts,
    k_wd: Tensor,
    v_wd: Tensor,
    positions_hdm: Tensor,
}

/// `R` times `d^(-1/4)`, the largest distance first, `[h, d, M]` each.
struct Positions {
    plain_hdm: Tensor,
    /// Less the position of the largest distance.
    near_hdm: Tensor,
}

impl Positions {
    /// What the logits of near keys add, as far as `seq_len` tokens reach. Where all keys are near, nothing is taken
    /// away: a position that no key has must not get a gradient, were it only of rounding, which Adam would enlarge.
    fn near(&self, seq_len: i64) -> Tensor {
        let max_distance = self.plain_hdm.size()[2];
        if seq_len > max_distance {
            return self.near_hdm.shallow_clone();
        }
        self.plain_hdm.narrow(2, max_distance - seq_len, seq_len)
    }
}

/// Weights in the compute type, cast and padded once for all applications of a forward pass.
pub(crate) struct AttentionPass {
    query_edw: Tensor,
    out_ewd: Tensor,
    /// Of keys, then of values.
    kv_wd: Tensor,
    positions: Positions,
    pub(crate) gate: GatePass,
}

impl Attention {
    /// Adds `k_proj.weight`, `v_proj.weight`, `q_proj.*` and `rel_pos_emb`.
    pub(crate) fn new(params: &Params, d_model: i64, config: AttentionConfig) -> Self {
        let AttentionConfig {
            gate,
            n_heads,
            d_head,
            max_distance,
            ..
        } = config;
        let width = n_heads * d_head;
        // Xavier-uniform with gain 1/√2.
        let init = Init::Uniform((3.0 / (d_model + width) as f64).sqrt());
        let linear = |name| {
            let params = params.sub(name);
            params.parameter("weight", &[width, d_model], init)
        };
        let (k_wd, v_wd) = (linear("k_proj"), linear("v_proj"));
        let positions = [n_heads, d_head, 2 * max_distance + 1];
        let q_proj = params.sub("q_proj");
        let experts =
            |name, d_in, d_out| Experts::new(&q_proj.sub(name), gate.n_experts, d_in, d_out, false);
        Self {
            config,
            query: experts("experts", d_model, width),
            out: experts("output_experts", width, d_model),
            gate: Gate::new(&q_proj, d_model, gate),
            k_wd,
            v_wd,
            positions_hdm: params.parameter("rel_pos_emb", &positions, Init::Zeros),
        }
    }

    pub(crate) fn begin(&self, tally: Tally, ctx: &Context) -> AttentionPass {
        let max_distance = self.config.max_distance;
        let plain_hdm = self.positions_hdm.narrow(2, 1, max_distance) * self.scale();
        let near_hdm = &plain_hdm - plain_hdm.narrow(2, 0, 1);
        let size = self.k_wd.size();
        let (width, d_model) = (size[0], ctx.aligned(size[1]));
        let kv_wd = Tensor::cat(&[&self.k_wd, &self.v_wd], 0);
        AttentionPass {
            query_edw: ctx.operand_of(&self.query.weight, &[d_model, width]),
            out_ewd: ctx.operand_of(&self.out.weight, &[width, d_model]),
            kv_wd: ctx.operand_of(&kv_wd, &[d_model]),
            positions: Positions {
                plain_hdm: plain_hdm.to_kind(ctx.compute),
                near_hdm: near_hdm.to_kind(ctx.compute),
            },
            gate: self.gate.begin(tally, ctx),
        }
    }

    /// One application, `[B, T, D]` → `[B, T, D]`: queries of `x_btd` attend to `source_btd`, which ends with the same
    /// tokens, and to what `earlier` caches. Tokens whose `alive_bt` is 0 get 0, but can be attended to.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub(crate) fn forward(
        &self,
        x_btd: &Tensor,
        source_btd: &Tensor,
        alive_bt: Option<&Tensor>,
        (pass, earlier): (&mut AttentionPass, &mut LayerPast),
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let AttentionConfig {
            gate: GateConfig { top_k, .. },
            n_heads,
            d_head,
            ..
        } = self.config;
        let size = x_btd.size();
        let (batch, seq_len) = (size[0], size[1]);

        let x_nd = x_btd.flatten(0, 1);
        let alive_n1 = alive_bt.map(|alive| alive.reshape([-1, 1]));
        let route = self
            .gate
            .forward(&x_nd, alive_n1.as_ref(), &mut pass.gate, ctx)?;
        let q_mw = ctx.grouped_matmul(&x_nd, &pass.query_edw, &route.routing, None)?;
        let q_bhtkd = q_mw
            .view([batch, seq_len, top_k, n_heads, d_head])
            .permute([0, 3, 1, 2, 4]);
        let kv = source_btd.linear(&pass.kv_wd, None::<&Tensor>);
        let mut kv = kv.view([batch, -1, 2, n_heads, d_head]).unbind(2);
        let v_bshd = kv.remove(1);
        let (k_bshd, v_bshd) = earlier.joined(kv.remove(0), v_bshd);
        let (k_bhsd, v_bhsd) = (k_bshd.transpose(1, 2), v_bshd.transpose(1, 2));

        let drops = ctx.is_training && self.config.dropout > 0.0;
        let mixed_bhtkd = match earlier.mask() {
            Mask::Causal if !drops => near_and_far(&q_bhtkd, &k_bhsd, &v_bhsd, &pass.positions)?,
            _ => self.all_at_once(&q_bhtkd, &k_bhsd, &v_bhsd, earlier.mask(), ctx),
        };
        let mixed_mw = mixed_bhtkd
            .permute([0, 2, 3, 1, 4])
            .reshape([-1, n_heads * d_head]);
        let gate = Some(&route.gate_nk);
        let y_nd = ctx.grouped_matmul(&mixed_mw, &pass.out_ewd, &route.routing, gate)?;
        Ok(y_nd.view_as(x_btd))
    }

    /// Of one application, where all products are counted, masked ones too:
    ///
    /// ```text
    /// projections         2·T·D·W·K + 2·S·D·W
    /// scores and values   2·K·W·T·S
    /// positions           K·W·T·min(M, S)
    /// ```
    pub(crate) fn cost(&self, d_model: u64, of: Sequence) -> Cost {
        let AttentionConfig {
            gate,
            n_heads,
            d_head,
            max_distance,
            ..
        } = self.config;
        let [n_heads, width, top_k, max_distance] =
            [n_heads, n_heads * d_head, gate.top_k, max_distance].map(i64::unsigned_abs);
        let (n, n_keys) = (of.n_tokens, of.n_attended());
        let has_all_logits = self.config.dropout > 0.0 || n_keys > n;
        let n_kept_logits = if has_all_logits {
            n_keys
        } else {
            2 * banded::block_len(self.config.max_distance).unsigned_abs()
        };
        // Probabilities or biases; queries, mixtures and outputs of each expert; keys and values.
        let products = n * n_heads * top_k * n_kept_logits
            + n * top_k * (2 * width + d_model)
            + n_keys * 2 * width;
        gate.cost("attention: router", d_model, of)
            .macs(
                "attention: projections",
                2 * d_model * width * (n * top_k + n_keys),
            )
            .macs(
                "attention: scores and values",
                2 * top_k * width * n * n_keys,
            )
            .macs(
                "attention: positions",
                top_k * width * n * max_distance.min(n_keys),
            )
            .kept(
                "attention",
                n * d_model * of.input_bytes() + products * of.product_bytes,
            )
    }

    /// `expert attention (2 of 5, 2 heads of 8)`.
    pub(crate) fn describe(&self) -> String {
        let AttentionConfig {
            gate,
            n_heads,
            d_head,
            ..
        } = self.config;
        let chosen = gate.describe();
        format!("expert attention ({chosen}, {n_heads} heads of {d_head})")
    }

    /// `d^(-1/4)`.
    fn scale(&self) -> f64 {
        (self.config.d_head as f64).powf(-0.25)
    }

    /// From all logits, `[B, h, T, K, d]`.
    fn all_at_once(
        &self,
        q_bhtkd: &Tensor,
        k_bhsd: &Tensor,
        v_bhsd: &Tensor,
        mask: &Mask,
        ctx: &Context,
    ) -> Tensor {
        let (size, n_keys) = (q_bhtkd.size(), k_bhsd.size()[2]);
        let (seq_len, top_k) = (size[2], size[3]);
        // All selected experts share keys and values, so that they are one long sequence of queries.
        let q = q_bhtkd.transpose(2, 3).flatten(2, 3) * self.scale();
        let logits = (&q * self.scale())
            .matmul(&k_bhsd.transpose(2, 3))
            .view([size[0], size[1], top_k, seq_len, n_keys]);
        let is_hidden = mask.tensor(seq_len, n_keys, q.device()).logical_not();
        let a = (logits + self.position_logits(&q, n_keys))
            .masked_fill(&is_hidden, f64::NEG_INFINITY)
            .softmax(-1, None);
        ctx.dropout(a, self.config.dropout)
            .flatten(2, 3)
            .matmul(v_bhsd)
            .view([size[0], size[1], top_k, seq_len, size[4]])
            .transpose(2, 3)
    }

    /// `q_i · R[:, distance(i, j)]` as `[B, h, K, T, S]`, where the queries are the last `T` of the `S` tokens; what
    /// it says of later keys has no meaning.
    ///
    /// Row `i` of `q · R` has one number per distance, oldest first. Filled up to `S + 1` columns with that of the
    /// largest distance, and read on as rows of length `S` from number `T` on, row `i` stands `i` places further left
    /// in its row, which puts each distance below its key.
    fn position_logits(&self, q: &Tensor, n_keys: i64) -> Tensor {
        let (size, max_distance) = (q.size(), self.config.max_distance);
        let (batch, n_heads, top_k) = (size[0], size[1], self.config.gate.top_k);
        let seq_len = size[2] / top_k;
        let n = max_distance.min(n_keys);
        let near_hdn = self.positions_hdm.narrow(2, max_distance - n + 1, n);
        let of_distance = q
            .matmul(&near_hdn)
            .view([batch, n_heads, top_k, seq_len, n]);
        let further = [batch, n_heads, top_k, seq_len, n_keys + 1 - n];
        let further = of_distance.narrow(-1, 0, 1).expand(further, false);
        Tensor::cat(&[further, of_distance], -1)
            .flatten(3, 4)
            .narrow(3, seq_len, seq_len * n_keys)
            .view([batch, n_heads, top_k, seq_len, n_keys])
    }
}

/// The same where each query sees its own key and all earlier ones, without making the logits of far keys.
fn near_and_far(
    q_bhtkd: &Tensor,
    k_bhsd: &Tensor,
    v_bhsd: &Tensor,
    positions: &Positions,
) -> Result<Tensor, PluginError> {
    let size = q_bhtkd.size();
    let [seq_len, top_k, d_head] = [2, 3, 4].map(|axis: usize| size[axis]);
    let near_hdm = positions.near(seq_len);
    let n_near = near_hdm.size()[2];
    let q = q_bhtkd.contiguous();
    let near = q
        .flatten(2, 3)
        .matmul(&near_hdm)
        .view([-1, seq_len, top_k, n_near]);
    let (k, v) = (k_bhsd.flatten(0, 1), v_bhsd.flatten(0, 1));
    let q = q.view([-1, seq_len, top_k, d_head]);
    let y = banded::attention([&q, &k, &v, &near], (d_head as f64).powf(-0.5))?;
    Ok(y.view_as(q_bhtkd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use tch::{Device, Kind};

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
    const BATCH: i64 = 2;
    const D_MODEL: i64 = 6;

    fn layer(max_distance: i64) -> Attention {
        let config = AttentionConfig {
            gate: GateConfig {
                n_experts: 4,
                top_k: 2,
                n_drawn: 0,
                dropout: 0.0,
            },
            n_heads: 2,
            d_head: 3,
            max_distance,
            dropout: 0.0,
        };
        let layer = Attention::new(&Params::new(Kind::Double, Device::Cpu), D_MODEL, config);
        let start = Tensor::randn(layer.positions_hdm.size(), DOUBLE);
        tch::no_grad(|| layer.positions_hdm.shallow_clone().copy_(&start));
        layer
    }

    fn run(layer: &Attention, x: &Tensor, source: &Tensor, alive: Option<&Tensor>) -> Tensor {
        let ctx = testing::context(true);
        let mut pass = layer.begin(testing::tally(), &ctx);
        let seen = (&mut pass, &mut LayerPast::none(false));
        layer.forward(x, source, alive, seen, &ctx).unwrap()
    }

    fn input(seq_len: i64) -> Tensor {
        Tensor::randn([BATCH, seq_len, D_MODEL], DOUBLE)
    }

    /// The formula for each query and key by itself, with `M` below, at and above `T`.
    #[test]
    fn positions_are_the_clipped_distances() {
        const SEQ_LEN: i64 = 5;
        for max_distance in [1, 2, 4, 5, 6, 9] {
            let layer = layer(max_distance);
            let q = Tensor::randn([BATCH, 2, 2 * SEQ_LEN, 3], DOUBLE);
            for n_earlier in [0, 3] {
                let got = layer.position_logits(&q, n_earlier + SEQ_LEN);
                let q = q.view([BATCH, 2, 2, SEQ_LEN, 3]);
                for (i, j) in (0..SEQ_LEN).flat_map(|i| (0..=n_earlier + i).map(move |j| (i, j))) {
                    // The reference's index: clip(key − query, 1 − M, M − 1) + M.
                    let offset = (j - n_earlier - i).clamp(1 - max_distance, max_distance - 1);
                    let column = offset + max_distance;
                    let r_hd = layer.positions_hdm.select(2, column);
                    let expected_bhk =
                        (q.select(3, i) * r_hd.unsqueeze(1)).sum_dim_intlist(-1i64, false, None);
                    let got_bhk = got.select(3, i).select(3, j);
                    assert!(
                        got_bhk.allclose(&expected_bhk, 0.0, 1e-12, false),
                        "M {max_distance}, {n_earlier} earlier, query {i}, key {j}"
                    );
                }
            }
        }
    }

    /// One head at a time in plain products, for the experts that the gate gives.
    #[test]
    fn the_layer_is_its_formula() {
        const SEQ_LEN: i64 = 4;
        let layer = layer(3);
        let (query, source) = (input(SEQ_LEN), input(SEQ_LEN));
        let ctx = testing::context(true);
        let mut gate = layer.gate.begin(testing::tally(), &ctx);
        let gate_ne = layer
            .gate
            .forward(&query.flatten(0, 1), None, &mut gate, &ctx)
            .unwrap()
            .gate_ne()
            .view([BATCH, SEQ_LEN, 4]);
        let is_later = Tensor::ones([SEQ_LEN, SEQ_LEN], (Kind::Bool, Device::Cpu)).triu(1);
        let mut expected = query.zeros_like();
        for expert in 0..4 {
            let mut heads = Vec::new();
            for head in 0..2 {
                let part = |w: &Tensor| w.narrow(0, head * 3, 3).tr();
                let q = query.matmul(&layer.query.weight.get(expert).narrow(1, head * 3, 3));
                let k = source.matmul(&part(&layer.k_wd));
                let v = source.matmul(&part(&layer.v_wd));
                let logits = q.matmul(&k.transpose(1, 2)) / 3f64.sqrt();
                for i in 0..SEQ_LEN {
                    for j in 0..=i {
                        let column = (j - i).max(-2) + 3;
                        let r_d = layer.positions_hdm.get(head).select(1, column);
                        let bias = (q.select(1, i) * r_d).sum_dim_intlist(-1i64, false, None);
                        let mut at = logits.select(1, i).select(1, j);
                        at += bias / 3f64.powf(0.25);
                    }
                }
                let a = logits
                    .masked_fill(&is_later, f64::NEG_INFINITY)
                    .softmax(-1, None);
                heads.push(a.matmul(&v));
            }
            let y = Tensor::cat(&heads, -1).matmul(&layer.out.weight.get(expert));
            expected += y * gate_ne.narrow(-1, expert, 1);
        }
        let got = run(&layer, &query, &source, None);
        assert!(got.allclose(&expected, 0.0, 1e-12, false));
    }

    /// Fewer, as many and more near keys than tokens; results and gradients.
    #[test]
    fn near_and_far_are_all_at_once() {
        const SEQ_LEN: i64 = 20;
        let ctx = testing::context(true);
        for max_distance in [1, 4, 9, 19, 20, 30] {
            let layer = layer(max_distance);
            let input = |shape: &[i64]| Tensor::randn(shape, DOUBLE).set_requires_grad(true);
            let q = input(&[BATCH, 2, SEQ_LEN, 2, 3]);
            let [k, v] = [0, 1].map(|_| input(&[BATCH, 2, SEQ_LEN, 3]));
            let cotangent = Tensor::randn(q.size(), DOUBLE);
            let grads = |y: &Tensor| {
                let loss = (y * &cotangent).sum(None);
                let inputs = [&q, &k, &v, &layer.positions_hdm];
                Tensor::run_backward(&[loss], &inputs, false, false)
            };
            let positions = layer.begin(testing::tally(), &ctx).positions;
            let found = near_and_far(&q, &k, &v, &positions).unwrap();
            let expected = layer.all_at_once(&q, &k, &v, &Mask::Causal, &ctx);
            assert!(
                found.allclose(&expected, 0.0, 1e-12, false),
                "{max_distance}"
            );
            let (found, expected) = (grads(&found), grads(&expected));
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    found.allclose(expected, 1e-10, 1e-11, false),
                    "{max_distance}"
                );
            }
            // Column 0 and those of positive offsets are never read, distances of 20 and more not here.
            let n_beyond = (max_distance - SEQ_LEN).max(0);
            let unread = found[3].narrow(2, 0, 1 + n_beyond);
            assert!(unread.eq(0.0).all().int64_value(&[]) == 1);
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        let layer = layer(3);
        let x = input(5).set_requires_grad(true);
        let source = input(5).set_requires_grad(true);
        let alive = Tensor::from_slice(&[1.0, 0.5, 0.0, 0.2, 0.7]).expand([BATCH, 5], false);
        let cotangent = input(5);
        testing::check_gradients(
            &[
                ("x", &x),
                ("source", &source),
                ("q", &layer.query.weight),
                ("o", &layer.out.weight),
                ("k", &layer.k_wd),
                ("v", &layer.v_wd),
                ("R", &layer.positions_hdm),
            ],
            &|| (run(&layer, &x, &source, Some(&alive)) * &cotangent).sum(None),
        );
    }

    #[test]
    fn a_later_token_never_changes_an_earlier_output() {
        let layer = layer(3);
        let (x, source) = (input(6), input(6));
        let before = run(&layer, &x, &source, None);
        for one in [&x, &source] {
            let _ = one.narrow(1, 4, 2).fill_(0.5);
        }
        let after = run(&layer, &x, &source, None);
        let (a, b) = (before.narrow(1, 0, 4), after.narrow(1, 0, 4));
        assert!(a.allclose(&b, 0.0, 1e-12, false));
        assert!(!before.allclose(&after, 0.0, 1e-3, false));
    }

    #[test]
    fn a_halted_token_gets_nothing_but_is_attended_to() {
        let layer = layer(3);
        let x = input(3);
        let alive = Tensor::from_slice(&[0.0, 1.0, 1.0]).expand([BATCH, 3], false);
        let some = run(&layer, &x, &x, Some(&alive));
        let all = run(&layer, &x, &x, None);
        assert!(some.select(1, 0).abs().max().double_value(&[]).abs() < f64::EPSILON);
        let (a, b) = (some.narrow(1, 1, 2), all.narrow(1, 1, 2));
        assert!(a.allclose(&b, 0.0, 1e-12, false));
    }

    /// The second half of a sequence after its first, remembered or cached, is the second half of the whole.
    #[test]
    fn the_past_is_what_came_before() {
        let layer = layer(4);
        let ctx = testing::context(false);
        let x = input(7);
        let (early, late) = (x.narrow(1, 0, 4), x.narrow(1, 4, 3));
        let forward = |x: &Tensor, past: &mut LayerPast| {
            let mut pass = layer.begin(testing::tally(), &ctx);
            let source = past
                .attended(&x.shallow_clone().into())
                .unwrap_or_else(|| x.shallow_clone());
            layer
                .forward(x, &source, None, (&mut pass, past), &ctx)
                .unwrap()
        };
        let whole = forward(&x, &mut LayerPast::none(false));
        let mask = |n_earlier, n| Mask::after(n_earlier, n, Device::Cpu);
        let remembered = forward(
            &late,
            &mut LayerPast::segments(early.shallow_clone(), &mask(4, 3)),
        );
        let mut past = LayerPast::cache(None, 0, false, &mask(0, 4));
        let first = forward(&early, &mut past);
        let mut past = LayerPast::cache(past.into_cache(), 4, false, &mask(4, 3));
        let cached = forward(&late, &mut past);
        let expected = whole.narrow(1, 4, 3);
        assert!(first.allclose(&whole.narrow(1, 0, 4), 0.0, 1e-12, false));
        assert!(remembered.allclose(&expected, 0.0, 1e-12, false));
        assert!(cached.allclose(&expected, 0.0, 1e-12, false));
    }
}
