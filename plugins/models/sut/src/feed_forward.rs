//! The feed-forward layer: experts with biases.
//!
//! Shape letters: `N` tokens, `D` `d_model`, or as wide as [`Context::aligned`] makes it, `E` experts, `K` experts per
//! token, `S` `d_expert`.

use crate::experts::Experts;
use crate::gate::{Gate, GateConfig, GatePass, Route};
use crate::losses::Tally;
use moeut_nn::moe::hidden;
use moeut_nn::{Activation, Context, Cost, Params, Sequence};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// Arguments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct FeedForwardConfig {
    pub(crate) gate: GateConfig,
    /// `S`.
    pub(crate) d_expert: i64,
    pub(crate) activation: Activation,
    /// Dropout of the hidden units.
    pub(crate) dropout: f64,
}

/// ```text
/// y = Σ_j g_j · (W₂[e_j] · drop(act(W₁[e_j] x + b₁[e_j])) + b₂[e_j])        (e, g) of the gate
/// ```
///
/// # Source
/// Tan et al., arXiv:2310.07096; reference `sut/parallel_linear/moe.py`, `MoE.forward`.
#[derive(Debug)]
pub(crate) struct FeedForward {
    config: FeedForwardConfig,
    gate: Gate,
    hidden: Experts,
    out: Experts,
}

/// Weights in the compute type, cast and padded once for all applications of a forward pass.
pub(crate) struct FeedForwardPass {
    hidden_eds: Tensor,
    out_esd: Tensor,
    out_bias_ed: Option<Tensor>,
    pub(crate) gate: GatePass,
}

impl FeedForward {
    /// Adds `experts.{w,b}`, `output_experts.{w,b}` and the gate's.
    pub(crate) fn new(params: &Params, d_model: i64, config: FeedForwardConfig) -> Self {
        let n_experts = config.gate.n_experts;
        let experts =
            |name, d_in, d_out| Experts::new(&params.sub(name), n_experts, d_in, d_out, true);
        Self {
            config,
            hidden: experts("experts", d_model, config.d_expert),
            out: experts("output_experts", config.d_expert, d_model),
            gate: Gate::new(params, d_model, config.gate),
        }
    }

    pub(crate) fn begin(&self, tally: Tally, ctx: &Context) -> FeedForwardPass {
        let d_model = ctx.aligned(self.hidden.weight.size()[1]);
        let d_expert = self.config.d_expert;
        let out_bias = self.out.bias.as_ref();
        FeedForwardPass {
            hidden_eds: ctx.operand_of(&self.hidden.weight, &[d_model, d_expert]),
            out_esd: ctx.operand_of(&self.out.weight, &[d_expert, d_model]),
            out_bias_ed: out_bias.map(|bias_ed| ctx.operand_of(bias_ed, &[d_model])),
            gate: self.gate.begin(tally, ctx),
        }
    }

    /// One application: `[B, T, D]` → `[B, T, D]`; tokens whose `alive_bt` is 0 get 0.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub(crate) fn forward(
        &self,
        x_btd: &Tensor,
        alive_bt: Option<&Tensor>,
        pass: &mut FeedForwardPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let x_nd = x_btd.flatten(0, 1);
        let alive_n1 = alive_bt.map(|alive| alive.reshape([-1, 1]));
        let route = self
            .gate
            .forward(&x_nd, alive_n1.as_ref(), &mut pass.gate, ctx)?;
        let y_nd = match self.fused(&x_nd, &route, pass, ctx)? {
            Some(y_nd) => y_nd,
            None => self.composed(&x_nd, &route, pass, ctx)?,
        };
        let y_nd = match &pass.out_bias_ed {
            // A token's biases, weighted by its gates, are a product with the dense gates. They are not added in place:
            // what a kernel gives may be a view with a backward pass of its own.
            Some(bias_ed) => y_nd + route.gate_ne().to_kind(ctx.compute).matmul(bias_ed),
            None => y_nd,
        };
        Ok(y_nd.view_as(x_btd))
    }

    /// The experts' output without its biases, `[N, D]`, in one call, if the kernel has it.
    fn fused(
        &self,
        x_nd: &Tensor,
        route: &Route,
        pass: &FeedForwardPass,
        ctx: &Context,
    ) -> Result<Option<Tensor>, PluginError> {
        let drops = ctx.is_training && self.config.dropout > 0.0;
        let Some(activation) = self.config.activation.of_kernels().filter(|_| !drops) else {
            return Ok(None);
        };
        let weights = [&pass.hidden_eds, &pass.out_esd];
        let bias_es = self.hidden.bias.as_ref();
        let (gate, routing) = (&route.gate_nk, &route.routing);
        ctx.moe_mlp(activation, x_nd, weights, bias_es, gate, routing)
    }

    /// The same from two grouped products.
    fn composed(
        &self,
        x_nd: &Tensor,
        route: &Route,
        pass: &FeedForwardPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let bias = self.hidden.bias.as_ref();
        let bias = bias.map(|bias_es| (bias_es, &route.ids_nk));
        let seen = (&route.routing, ctx);
        let hidden_ms = hidden(x_nd, &pass.hidden_eds, bias, self.config.activation, seen)?;
        let hidden_ms = ctx.dropout(hidden_ms, self.config.dropout);
        let gate = Some(&route.gate_nk);
        ctx.grouped_matmul(&hidden_ms, &pass.out_esd, &route.routing, gate)
    }

    /// Of one application: `2·T·D·S·K`, and the router. Halted tokens are computed, too.
    pub(crate) fn cost(&self, d_model: u64, of: Sequence) -> Cost {
        let FeedForwardConfig {
            gate,
            d_expert,
            activation,
            ..
        } = self.config;
        let [d_hidden, top_k] = [d_expert * gate.top_k, gate.top_k].map(i64::unsigned_abs);
        let n = of.n_tokens;
        // Input, hidden units, and the experts' outputs before they are weighted.
        let hidden = activation.n_kept() * d_hidden * of.hidden_bytes();
        let outputs = top_k * d_model * of.product_bytes;
        gate.cost("feed-forward: router", d_model, of)
            .macs("feed-forward: experts", 2 * n * d_model * d_hidden)
            .kept(
                "feed-forward: experts",
                n * (d_model * of.input_bytes() + hidden + outputs),
            )
    }

    /// `experts (3 of 7, width 6)`.
    pub(crate) fn describe(&self) -> String {
        let FeedForwardConfig { gate, d_expert, .. } = self.config;
        format!("experts ({}, width {d_expert})", gate.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use tch::{Device, Kind};

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn layer(top_k: i64) -> FeedForward {
        let config = FeedForwardConfig {
            gate: GateConfig {
                n_experts: 3,
                top_k,
                n_drawn: 0,
                dropout: 0.0,
            },
            d_expert: 5,
            activation: Activation::Gelu,
            dropout: 0.0,
        };
        FeedForward::new(&Params::new(Kind::Double, Device::Cpu), 4, config)
    }

    fn run(layer: &FeedForward, x: &Tensor, alive: Option<&Tensor>) -> (Tensor, Tensor) {
        let ctx = testing::context(true);
        let mut pass = layer.begin(testing::tally(), &ctx);
        let y = layer.forward(x, alive, &mut pass, &ctx).unwrap();
        let terms = pass.gate.tally.finish();
        (y, terms.into_iter().map(|(_, term)| term).sum())
    }

    /// With all experts selected the layer is a dense mixture, computed here expert by expert.
    #[test]
    fn all_experts_selected_is_a_dense_mixture() {
        let layer = layer(3);
        let x = Tensor::randn([2, 3, 4], DOUBLE);
        let ctx = testing::context(true);
        let mut gate = layer.gate.begin(testing::tally(), &ctx);
        let gate_ne = layer
            .gate
            .forward(&x.flatten(0, 1), None, &mut gate, &ctx)
            .unwrap()
            .gate_ne()
            .view([2, 3, 3]);
        let mut expected = x.zeros_like();
        for expert in 0..3 {
            let bias = |experts: &Experts| experts.bias.as_ref().unwrap().get(expert);
            let h = (x.matmul(&layer.hidden.weight.get(expert)) + bias(&layer.hidden)).gelu("none");
            let y = h.matmul(&layer.out.weight.get(expert)) + bias(&layer.out);
            expected += y * gate_ne.narrow(-1, expert, 1);
        }
        let (y, _) = run(&layer, &x, None);
        assert!(y.allclose(&expected, 0.0, 1e-12, false));
    }

    #[test]
    fn gradients_agree_with_differences() {
        let layer = layer(2);
        let x = Tensor::randn([2, 3, 4], DOUBLE).set_requires_grad(true);
        let alive = Tensor::from_slice(&[1.0, 0.5, 0.3, 0.2, 1.0, 0.9])
            .view([2, 3])
            .set_requires_grad(true);
        let cotangent = Tensor::randn([2, 3, 4], DOUBLE);
        testing::check_gradients(
            &[
                ("x", &x),
                ("alive", &alive),
                ("w1", &layer.hidden.weight),
                ("b1", layer.hidden.bias.as_ref().unwrap()),
                ("w2", &layer.out.weight),
                ("b2", layer.out.bias.as_ref().unwrap()),
            ],
            &|| {
                let (y, losses) = run(&layer, &x, Some(&alive));
                (y * &cotangent).sum(None) + losses
            },
        );
    }

    #[test]
    fn a_halted_token_gets_nothing() {
        let layer = layer(2);
        let x = Tensor::randn([1, 2, 4], DOUBLE);
        let alive = Tensor::from_slice(&[0.0, 1e-3]).view([1, 2]);
        let (y, _) = run(&layer, &x, Some(&alive));
        assert!(y.get(0).get(0).abs().max().double_value(&[]).abs() < f64::EPSILON);
        // How much is left of a token does not matter to its experts.
        let (all, _) = run(&layer, &x, None);
        assert!(
            y.get(0)
                .get(1)
                .allclose(&all.get(0).get(1), 0.0, 1e-12, false)
        );
    }
}
