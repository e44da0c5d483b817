//! The gate: which experts a token uses, and how much of each.
//!
//! Shape letters: `N` tokens, `D` `d_model`, or as wide as [`Context::aligned`] makes it, `E` experts, `K` experts per
//! token.

use crate::losses::{Decision, Tally};
use crate::scorer::{Scorer, ScorerPass};
use moeut_nn::{Context, Cost, Init, Params, Routing, Sequence};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// Added to probabilities of which some are drawn, so that experts without any can be drawn, too.
const DRAW_FLOOR: f64 = 1e-6;
/// Added to the sum that gates are divided by: that of a halted token is 0.
const SUM_FLOOR: f64 = 1e-6;

/// Sizes and random parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GateConfig {
    /// `E`.
    pub(crate) n_experts: i64,
    /// `K`, at most `E`.
    pub(crate) top_k: i64,
    /// How many of the `K` are drawn by their probabilities while training, instead of the best.
    pub(crate) n_drawn: i64,
    /// Dropout of the hidden layer.
    pub(crate) dropout: f64,
}

impl GateConfig {
    /// Of one application: `T·D·D + T·D·E`. The backward pass reads the hidden layer, and logits, probabilities and
    /// gates of all experts in at least single precision.
    pub(crate) fn cost(&self, part: &'static str, d_model: u64, of: Sequence) -> Cost {
        const EXPERT_BYTES: u64 = 3 * 4;
        let (n, n_experts) = (of.n_tokens, self.n_experts.unsigned_abs());
        Cost::default()
            .macs(part, n * d_model * (d_model + n_experts))
            .kept(
                part,
                n * (d_model * of.product_bytes + n_experts * EXPERT_BYTES),
            )
    }

    /// `3 of 7`.
    pub(crate) fn describe(&self) -> String {
        format!("{} of {}", self.top_k, self.n_experts)
    }
}

/// A two-layer router.
///
/// ```text
/// p    = softmax(W₃ · drop(tanh(W₀ x + b₀)))       0 for halted tokens
/// e    = the K best of p; while training perhaps K − m of them, and m drawn from the others
/// g_j  = p[e_j] / (Σ_i p[e_i] + 1e-6)
/// ```
///
/// A halted token keeps its place in the products and is multiplied by 0, so that no shape depends on data; the
/// reference leaves it out, which gives the same numbers.
///
/// # Source
/// Tan et al., arXiv:2310.07096; reference `sut/parallel_linear/moe.py`, `top_k_gating`.
#[derive(Debug)]
pub(crate) struct Gate {
    config: GateConfig,
    scorer: Scorer,
}

/// Weights, and what all applications of a forward pass gather.
pub(crate) struct GatePass {
    scorer: ScorerPass,
    pub(crate) tally: Tally,
}

/// Where the tokens go.
pub(crate) struct Route {
    /// For the kernel.
    pub(crate) routing: Routing,
    /// Experts, int64 `[N, K]`.
    pub(crate) ids_nk: Tensor,
    /// Their shares, `[N, K]`; they sum to 1, or to 0 for a halted token.
    pub(crate) gate_nk: Tensor,
    n_experts: i64,
}

impl Route {
    /// The shares, with 0 for all other experts, `[N, E]`.
    pub(crate) fn gate_ne(&self) -> Tensor {
        let size = [self.gate_nk.size()[0], self.n_experts];
        let options = (self.gate_nk.kind(), self.gate_nk.device());
        Tensor::zeros(size, options).scatter(1, &self.ids_nk, &self.gate_nk)
    }
}

impl Gate {
    /// Adds `w_gate.0.weight`, `w_gate.0.bias` and `w_gate.3.weight`.
    pub(crate) fn new(params: &Params, d_model: i64, config: GateConfig) -> Self {
        let (params, out) = (params.sub("w_gate"), Init::linear_weight(d_model));
        Self {
            config,
            scorer: Scorer::new(&params, d_model, config.n_experts, out),
        }
    }

    pub(crate) fn begin(&self, tally: Tally, ctx: &Context) -> GatePass {
        GatePass {
            scorer: self.scorer.begin(ctx),
            tally,
        }
    }

    /// Routes tokens `[N, D]`; `alive_n1` `[N, 1]` is 0 for those that have halted.
    ///
    /// # Errors
    /// If autocast cannot be suspended.
    pub(crate) fn forward(
        &self,
        x_nd: &Tensor,
        alive_n1: Option<&Tensor>,
        pass: &mut GatePass,
        ctx: &Context,
    ) -> Result<Route, PluginError> {
        let GatePass { scorer, tally } = pass;
        let logits_ne = scorer.forward(x_nd, |x| x.tanh(), self.config.dropout, ctx)?;
        let needs_log = ctx.is_training && tally.reads_logarithms();
        let log_p_ne = needs_log.then(|| logits_ne.log_softmax(-1, None));
        let p_ne = match &log_p_ne {
            Some(log_p_ne) => log_p_ne.exp(),
            None => logits_ne.softmax(-1, None),
        };

        let ids_nk = tch::no_grad(|| self.select(&p_ne, ctx.is_training));
        let mut picked_nk = p_ne.gather(1, &ids_nk, false);
        if let Some(alive_n1) = alive_n1 {
            picked_nk = picked_nk.masked_fill(&alive_n1.eq(0.0), 0.0);
        }
        let sum_n1 = picked_nk.sum_dim_intlist(1i64, true, None);
        let route = Route {
            routing: Routing::new(&ids_nk, self.config.n_experts),
            ids_nk,
            gate_nk: picked_nk / (sum_n1 + SUM_FLOOR),
            n_experts: self.config.n_experts,
        };
        if ctx.is_training {
            tally.add(&Decision {
                logits_ne: &logits_ne,
                p_ne: &p_ne,
                log_p_ne: log_p_ne.as_ref(),
                gate_ne: &|| route.gate_ne(),
                alive_n1,
            });
        }
        Ok(route)
    }

    /// Expert ids, int64 `[N, K]`.
    fn select(&self, p_ne: &Tensor, is_training: bool) -> Tensor {
        let GateConfig { top_k, n_drawn, .. } = self.config;
        if !is_training || n_drawn == 0 {
            return best(p_ne, top_k);
        }
        let best_nk = best(p_ne, top_k - n_drawn);
        let weights_ne = (p_ne + DRAW_FLOOR).scatter_value(1, &best_nk, 0.0);
        Tensor::cat(&[best_nk, draw(&weights_ne, n_drawn)], 1)
    }
}

/// `n` different columns of each row, drawn one after the other with probabilities proportional to the weights left.
///
/// A race: column `e` finishes after an exponential time of rate `weight_e`, and the first `n` win. Unlike libtorch's
/// `multinomial` it does not wait for the device.
fn draw(weights_ne: &Tensor, n: i64) -> Tensor {
    let times = weights_ne.empty_like().exponential_(1.0);
    best(&(weights_ne / times), n)
}

/// Columns of the `k` largest of each row, the best first.
///
/// One or two are found by as many searches, which libtorch does faster than a `topk`.
fn best(scores_ne: &Tensor, k: i64) -> Tensor {
    let first_n1 = match k {
        1 | 2 => scores_ne.argmax(1, true),
        _ => return scores_ne.topk(k, 1, true, true).1,
    };
    if k == 1 {
        return first_n1;
    }
    let others_ne = scores_ne.scatter_value(1, &first_n1, f64::NEG_INFINITY);
    Tensor::cat(&[first_n1, others_ne.argmax(1, true)], 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use tch::{Device, Kind};

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn gate(n_drawn: i64) -> (Gate, Params) {
        let config = GateConfig {
            n_experts: 5,
            top_k: 3,
            n_drawn,
            dropout: 0.0,
        };
        let params = Params::new(Kind::Double, Device::Cpu);
        (Gate::new(&params, 4, config), params)
    }

    /// Few are searched for one by one, many are sorted.
    #[test]
    fn the_best_are_the_first_of_a_sorted_row() {
        let scores = Tensor::randn([50, 6], DOUBLE);
        let (_, sorted) = scores.sort(1, true);
        for k in 0..=6 {
            assert!(best(&scores, k).equal(&sorted.narrow(1, 0, k)), "{k}");
        }
    }

    fn route(gate: &Gate, x: &Tensor, alive: Option<&Tensor>, is_training: bool) -> Route {
        let ctx = testing::context(is_training);
        let mut pass = gate.begin(testing::tally(), &ctx);
        gate.forward(x, alive, &mut pass, &ctx).unwrap()
    }

    /// The route as dense numbers, from the formula.
    #[test]
    fn gates_are_the_renormalized_best_probabilities() {
        let (gate, params) = gate(0);
        let x = Tensor::randn([7, 4], DOUBLE);
        let route = route(&gate, &x, None, true);
        let parameter = |name: &str| testing::parameter(&params, &format!("w_gate.{name}"));
        let hidden = x
            .linear(&parameter("0.weight"), Some(&parameter("0.bias")))
            .tanh();
        let p = hidden.matmul(&parameter("3.weight").tr()).softmax(-1, None);
        for token in 0..7 {
            let row = Vec::<f64>::try_from(p.get(token)).unwrap();
            let mut best = row.clone();
            best.sort_by(|a, b| b.total_cmp(a));
            let sum: f64 = best[..3].iter().sum::<f64>() + 1e-6;
            for (expert, p) in (0..).zip(&row) {
                let expected = if *p >= best[2] { p / sum } else { 0.0 };
                let got = route.gate_ne().double_value(&[token, expert]);
                assert!((got - expected).abs() < 1e-12, "{got} {expected}");
            }
        }
        let gathered = route.gate_ne().gather(1, &route.ids_nk, false);
        assert!(gathered.allclose(&route.gate_nk, 0.0, 0.0, false));
    }

    #[test]
    fn a_halted_token_has_gates_of_zero_and_no_gradient() {
        let x = Tensor::randn([2, 4], DOUBLE).set_requires_grad(true);
        let alive = Tensor::from_slice(&[0.0, 0.7]).view([2, 1]);
        let route = route(&gate(0).0, &x, Some(&alive), true);
        let sums = route.gate_nk.sum_dim_intlist(1i64, false, None);
        assert!(sums.double_value(&[0]).abs() < f64::EPSILON);
        assert!((sums.double_value(&[1]) - 1.0).abs() < 1e-5);
        (route.gate_nk * Tensor::randn([2, 3], DOUBLE))
            .sum(None)
            .backward();
        let moved = x.grad().abs().sum_dim_intlist(1i64, false, None);
        assert!(moved.double_value(&[0]).abs() < f64::EPSILON);
        assert!(moved.double_value(&[1]) > 0.0);
    }

    /// Drawing only happens while training, and never the same expert twice.
    #[test]
    fn drawn_experts_are_different_from_the_best() {
        let (gate, _) = gate(2);
        let x = Tensor::randn([200, 4], DOUBLE);
        let route = |is_training| route(&gate, &x, None, is_training);
        let (drawn, fixed) = (route(true), route(false));
        let (sorted, _) = drawn.ids_nk.sort(1, false);
        let steps = sorted.diff(1, 1, None::<&Tensor>, None::<&Tensor>);
        assert!(steps.min().int64_value(&[]) > 0);
        let best = |route: &Route| route.gate_ne().argmax(1, false);
        assert!(drawn.ids_nk.select(1, 0).equal(&best(&fixed)));
        assert!(
            !drawn
                .ids_nk
                .sort(1, false)
                .0
                .equal(&fixed.ids_nk.sort(1, false).0)
        );
        assert!(fixed.ids_nk.equal(&route(false).ids_nk));
    }

    /// Of weights (0, 1, 2, 5): P(first is `e`) = `w_e / 8`; a weight of zero is never drawn while there are others.
    #[test]
    fn columns_are_drawn_by_weight_without_replacement() {
        const N: i64 = 40_000;
        tch::manual_seed(3);
        let weights = Tensor::from_slice(&[0.0, 1.0, 2.0, 5.0]).expand([N, 4], false);
        let drawn = draw(&weights.contiguous(), 2);
        let share = |column: i64, expert: i64| {
            let hits = drawn.narrow(1, column, 1).eq(expert).sum(Kind::Double);
            hits.double_value(&[]) / N as f64
        };
        // Four standard deviations are at most 4 · √(1/4 / N) = 0.01.
        for (expert, expected) in [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.625)] {
            assert!(
                (share(0, expert) - expected).abs() < 0.01,
                "expert {expert}"
            );
        }
        // P(second is 3) = 1/8 · 5/7 + 2/8 · 5/6.
        assert!((share(1, 3) - (5.0 / 56.0 + 10.0 / 48.0)).abs() < 0.01);
    }
}
