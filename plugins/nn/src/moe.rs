//! σ-MoE: a feed-forward layer whose hidden units are split into experts, a few of which each token uses.

use crate::balance::Applications;
use crate::context::Choice;
use crate::cost::{Cost, Sequence, count};
use crate::moe_stats::{MoeStats, MoeWatch};
use crate::padding::padded;
use crate::routing::top_k;
use crate::{
    Activation, Balance, BalanceConfig, Context, Init, LayerNorm, Params, Reading, Routing,
    Scoring, usage,
};
use moeut_plugin_api::PluginError;
use serde::Deserialize;
use tch::{Kind, Tensor};

/// The layer's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct MoeConfig {
    /// Experts, `E`.
    pub n_experts: i64,
    /// Hidden units of an expert, `S`.
    pub d_expert: i64,
    /// Experts that a token uses, `K`.
    pub top_k: i64,
    /// How router logits become gates.
    pub scoring: Scoring,
    /// Whether the gates' non-linearity sees only the `K` selected logits.
    pub scores_after_top_k: bool,
    /// Whether hidden units and output have biases.
    pub has_bias: bool,
    /// Whether the router has a bias.
    pub has_router_bias: bool,
    /// Probability that an expert is not eligible for a token, while training.
    pub expert_dropout: f64,
    /// Dropout of the router's input.
    pub router_dropout: f64,
    /// Initial deviations are multiplied by its root.
    pub init_scale: f64,
    /// `c` of the initial deviation √(c / L) on a pre-layernorm path.
    pub layer_std_constant: f64,
    /// Regularizer.
    pub balance: BalanceConfig,
}

/// What the layer needs to know about its model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoePlace {
    /// Width of the residual stream, `D`.
    pub d_model: i64,
    /// Layers of the unrolled stack; a number on pre-layernorm paths, where initial deviations shrink with depth.
    pub depth_init: Option<i64>,
    /// Whether the router reads `LN(x)`.
    pub has_norm: bool,
    /// Between the two products.
    pub activation: Activation,
    /// The reference's regularizer sees only the selected logits if `scores_after_top_k`.
    pub balances_selected: bool,
}

/// The layer.
///
/// ```text
/// z = r · W_routerᵀ (+ b_r)          r = LN(x) with a peri-layernorm, else x
/// (e, g) = top_k(σ(z))                not renormalized
/// y = Σ_j g_j · act(x · W₁[e_j] (+ b₁[e_j])) · W₂[e_j] (+ b₂)
/// ```
///
/// Sigmoid scores are selected by their logits: the order is the same, and saturated scores do not tie.
///
/// # Source
/// Csordás et al., arXiv:2310.10837; reference `layers/moe_layer.py`.
#[derive(Debug)]
pub struct SigmaMoe {
    config: MoeConfig,
    activation: Activation,
    balances_selected: bool,
    norm: Option<LayerNorm>,
    keys_eds: Tensor,
    values_esd: Tensor,
    router_ed: Tensor,
    router_bias_e: Option<Tensor>,
    hidden_bias_es: Option<Tensor>,
    out_bias_d: Option<Tensor>,
}

/// What one layer gathers over its applications in one forward pass.
#[derive(Debug)]
pub struct MoePass {
    keys_eds: Tensor,
    values_esd: Tensor,
    balance: Balance,
    watch: MoeWatch,
}

/// What a pass leaves.
#[derive(Debug)]
pub struct MoeReport {
    /// The weighted regularizer, a scalar.
    pub balance: Option<Tensor>,
    /// What was wished for.
    pub stats: MoeStats,
}

impl SigmaMoe {
    /// Adds `keys`, `values`, `expert_sel`, the biases, and the two buffers of the reference's checkpoints.
    pub fn new(params: &Params, place: MoePlace, config: MoeConfig) -> Self {
        let MoePlace {
            d_model,
            depth_init,
            ..
        } = place;
        let MoeConfig {
            n_experts,
            d_expert,
            ..
        } = config;
        let depth = depth_init.map_or(1.0, |n_layers| config.layer_std_constant / n_layers as f64);
        let scale = (depth * config.init_scale).sqrt();
        let (std_in, std_out) = (
            scale / (d_model as f64).sqrt(),
            scale / ((n_experts * d_expert) as f64).sqrt(),
        );
        let zeros = |name, shape: &[i64]| params.parameter(name, shape, Init::Zeros);
        let normal = |name, shape: &[i64], std| params.parameter(name, shape, Init::Normal(std));

        let layer = Self {
            config,
            activation: place.activation,
            balances_selected: place.balances_selected && config.scores_after_top_k,
            keys_eds: normal("keys", &[n_experts, d_model, d_expert], std_in),
            values_esd: normal("values", &[n_experts, d_expert, d_model], std_out),
            router_ed: params.parameter("expert_sel", &[n_experts, d_model], Init::Router(std_in)),
            hidden_bias_es: config
                .has_bias
                .then(|| zeros("bias", &[n_experts, d_expert])),
            out_bias_d: config.has_bias.then(|| zeros("o_bias", &[d_model])),
            router_bias_e: config
                .has_router_bias
                .then(|| zeros("sel_bias", &[n_experts])),
            norm: place
                .has_norm
                .then(|| LayerNorm::new(&params.sub("norm"), d_model)),
        };
        // The reference saves these and reads neither; they keep checkpoints interchangeable.
        let (kind, _) = params.options();
        let _ = params.buffer("iter", &[], Kind::Int64);
        let _ = params.buffer("kv_sel_counts_100", &[n_experts, d_expert], kind);
        layer
    }

    /// Begins a forward pass; weights are cast once for all applications.
    pub fn begin(&self, ctx: &Context) -> MoePass {
        let d_model = ctx.aligned(self.router_ed.size()[1]);
        let d_expert = self.config.d_expert;
        MoePass {
            keys_eds: ctx.operand_of(&self.keys_eds, &[d_model, d_expert]),
            values_esd: ctx.operand_of(&self.values_esd, &[d_expert, d_model]),
            balance: Balance::new(self.config.balance, Applications::Summed, ctx),
            watch: MoeWatch::new(ctx),
        }
    }

    /// What the router reads the stream through.
    pub fn norm(&self) -> Option<&LayerNorm> {
        self.norm.as_ref()
    }

    /// One application: `[B, T, D]` → `[B, T, D]`.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn forward(
        &self,
        reading: &Reading,
        pass: &mut MoePass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let x_btd = &reading.plain;
        let d_model = x_btd.size()[2];
        let n_experts = self.config.n_experts;
        let fused = self.fused_route(&reading.normed, pass, ctx)?;
        let (ids_nk, gate_nk, routing) = if let Some(choice) = fused {
            let ids_nk = choice.ids.to_kind(Kind::Int64);
            (ids_nk, choice.gate, choice.routing)
        } else {
            let (ids_nk, gate_nk) = self.route(&reading.normed, pass, ctx)?;
            let routing = Routing::new(&ids_nk, n_experts);
            (ids_nk, gate_nk, routing)
        };
        let x_nd = x_btd.reshape([-1, d_model]);
        if pass.watch.is_detailed() {
            tch::no_grad(|| self.look(&x_nd, &ids_nk, pass, ctx))?;
        }
        pass.watch
            .selected(&ids_nk, &gate_nk, &routing, (n_experts, ctx))?;
        let y_nd = match self.fused(&x_nd, &gate_nk, &routing, pass, ctx)? {
            Some(y_nd) => y_nd,
            None => self.composed(&x_nd, (&ids_nk, &gate_nk), &routing, pass, ctx)?,
        };
        let y_btd = y_nd.view_as(x_btd);
        Ok(match &self.out_bias_d {
            Some(bias_d) => y_btd + padded(bias_d, &[d_model]),
            None => y_btd,
        })
    }

    /// Of one application: `2·T·D·S·K` for experts, `T·D·E` for the router.
    pub fn cost(&self, of: Sequence) -> Cost {
        let MoeConfig {
            n_experts,
            d_expert,
            top_k,
            ..
        } = self.config;
        let d_model = count(self.router_ed.size()[1]);
        let [n_experts, d_hidden] = [n_experts, d_expert * top_k].map(count);
        let n = of.n_tokens;
        Cost::default()
            .macs("feed-forward: experts", 2 * n * d_model * d_hidden)
            .macs("feed-forward: router", n * d_model * n_experts)
            .kept(
                "feed-forward: experts",
                n * (d_model * of.input_bytes()
                    + self.activation.n_kept() * d_hidden * of.hidden_bytes()),
            )
            .kept("feed-forward: router", n * n_experts * of.router_bytes())
    }

    /// `σ-MoE (8 of 128, width 128)`.
    pub fn describe(&self) -> String {
        let MoeConfig {
            n_experts,
            d_expert,
            top_k,
            scoring,
            ..
        } = self.config;
        let name = match scoring {
            Scoring::Sigmoid => "σ-MoE",
            Scoring::Softmax => "softmax MoE",
        };
        format!("{name} ({top_k} of {n_experts}, width {d_expert})")
    }

    /// Ends a forward pass; `places` are those of the applications in the stack.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn finish(pass: MoePass, places: &[usize]) -> Result<MoeReport, PluginError> {
        Ok(MoeReport {
            balance: pass.balance.finish()?,
            stats: pass.watch.finish(places),
        })
    }

    /// Notes what only the layer itself can measure: the share of hidden units above zero, and how alike the weights are,
    /// which is the same for all applications.
    fn look(
        &self,
        x_nd: &Tensor,
        ids_nk: &Tensor,
        pass: &mut MoePass,
        ctx: &Context,
    ) -> Result<(), PluginError> {
        /// Tokens are alike enough that more of them would change nothing but the cost.
        const SAMPLE: i64 = 4096;
        let n = x_nd.size()[0].min(SAMPLE);
        let (x_nd, ids_nk) = (x_nd.narrow(0, 0, n), ids_nk.narrow(0, 0, n));
        let routing = Routing::new(&ids_nk, self.config.n_experts);
        let hidden_ms = self.hidden(&x_nd, &ids_nk, &routing, pass, ctx)?;
        let pass_rate = hidden_ms.gt(0).to_kind(Kind::Float).mean(None);
        pass.watch.detail("relu_pass_rate", pass_rate);
        if !pass.watch.is_first() {
            return Ok(());
        }
        let _exact = ctx.full_precision(x_nd.device())?;
        let router = self.router_ed.unsqueeze(0);
        // The reference compares the router's columns, one for each channel, which says little about experts.
        let router_axis = if ctx.is_compat { 1 } else { 2 };
        for (name, weights, axis) in [
            ("ani/keys", &self.keys_eds, 1),
            ("ani/values", &self.values_esd, 2),
            ("ani/expert_sel", &router, router_axis),
        ] {
            pass.watch.detail(name, usage::mean_cosine(weights, axis));
        }
        if let Some(bias_e) = &self.router_bias_e {
            pass.watch.detail("sel_bias_min", bias_e.min());
            pass.watch.detail("sel_bias_max", bias_e.max());
        }
        Ok(())
    }

    /// The experts' output `[N, D]` in one call, if the kernel has it.
    fn fused(
        &self,
        x_nd: &Tensor,
        gate_nk: &Tensor,
        routing: &Routing,
        pass: &MoePass,
        ctx: &Context,
    ) -> Result<Option<Tensor>, PluginError> {
        let Some(activation) = self.activation.of_kernels() else {
            return Ok(None);
        };
        let weights = [&pass.keys_eds, &pass.values_esd];
        let bias_es = self.hidden_bias_es.as_ref();
        ctx.moe_mlp(activation, x_nd, weights, bias_es, gate_nk, routing)
    }

    /// The same from two grouped products.
    fn composed(
        &self,
        x_nd: &Tensor,
        (ids_nk, gate_nk): (&Tensor, &Tensor),
        routing: &Routing,
        pass: &MoePass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let hidden_ms = self.hidden(x_nd, ids_nk, routing, pass, ctx)?;
        ctx.grouped_matmul(&hidden_ms, &pass.values_esd, routing, Some(gate_nk))
    }

    /// `act(x · W₁[e] + b₁[e])` of all selections, `[M, S]`.
    fn hidden(
        &self,
        x_nd: &Tensor,
        ids_nk: &Tensor,
        routing: &Routing,
        pass: &MoePass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let bias = self
            .hidden_bias_es
            .as_ref()
            .map(|bias_es| (bias_es, ids_nk));
        hidden(x_nd, &pass.keys_eds, bias, self.activation, (routing, ctx))
    }

    /// The route in one call, if the kernel has it and the call covers the layer's arguments.
    fn fused_route(
        &self,
        normed_btd: &Tensor,
        pass: &mut MoePass,
        ctx: &Context,
    ) -> Result<Option<Choice>, PluginError> {
        let config = &self.config;
        let covers = config.scoring == Scoring::Sigmoid
            && !(ctx.is_training && config.expert_dropout > 0.0)
            && !self.balances_selected
            && pass.balance.takes_log_means()
            && !config.has_router_bias;
        if !covers {
            return Ok(None);
        }
        let router_in = ctx.dropout(normed_btd.shallow_clone(), config.router_dropout);
        let choice = ctx.select(&router_in, &self.router_ed, 1, config.top_k)?;
        if let (true, Some(choice)) = (ctx.is_training, &choice) {
            pass.balance.add_log_means(&choice.log_means.squeeze_dim(1));
        }
        Ok(choice)
    }

    /// Ids int64 `[N, K]` and gates `[N, K]`.
    fn route(
        &self,
        normed_btd: &Tensor,
        pass: &mut MoePass,
        ctx: &Context,
    ) -> Result<(Tensor, Tensor), PluginError> {
        let MoeConfig {
            top_k: k,
            scoring,
            scores_after_top_k,
            ..
        } = self.config;
        let router_in = ctx.dropout(normed_btd.shallow_clone(), self.config.router_dropout);
        let logits = ctx.router_logits(&router_in, &self.router_ed, self.router_bias_e.as_ref())?;

        let scores = match scoring {
            Scoring::Softmax if !scores_after_top_k => logits.softmax(-1, None),
            // Rounding of the scores is part of what the reference does.
            Scoring::Sigmoid if ctx.is_router_rounded() && !scores_after_top_k => logits.sigmoid(),
            Scoring::Sigmoid | Scoring::Softmax => logits.shallow_clone(),
        };
        let drop = if ctx.is_training {
            self.config.expert_dropout
        } else {
            0.0
        };
        let ids_btk = top_k(&scores, k, drop);
        let picked_btk = scores.gather(-1, &ids_btk, false);
        if scoring == Scoring::Softmax && !scores_after_top_k {
            pass.watch.competed(&scores);
        }
        if ctx.is_training {
            let balanced = if self.balances_selected {
                &picked_btk
            } else {
                &logits
            };
            pass.balance.add(balanced);
        }
        let gate_btk = match scoring {
            Scoring::Sigmoid if ctx.is_router_rounded() && !scores_after_top_k => picked_btk,
            Scoring::Sigmoid => picked_btk.sigmoid(),
            Scoring::Softmax if scores_after_top_k => {
                let gate_btk = picked_btk.softmax(-1, None);
                pass.watch.competed(&gate_btk);
                gate_btk
            }
            Scoring::Softmax => picked_btk,
        };
        Ok((ids_btk.reshape([-1, k]), gate_btk.reshape([-1, k])))
    }
}

/// `act(x · W₁[e] (+ b₁[e]))` of all selections, `[M, S]`, by steps that a frugal pass repeats; with a bias `[E, S]` the
/// ids `[N, K]`.
///
/// # Errors
/// Whatever the kernel says.
pub fn hidden(
    x_nd: &Tensor,
    keys_eds: &Tensor,
    bias: Option<(&Tensor, &Tensor)>,
    activation: Activation,
    (routing, ctx): (&Routing, &Context),
) -> Result<Tensor, PluginError> {
    // What is kept of `x` is what the product keeps.
    let x_nd = &x_nd.to_kind(ctx.compute);
    let routing = routing.share();
    let product = move |[x_nd, keys_eds]: [&Tensor; 2], ctx: &Context| {
        ctx.grouped_matmul(x_nd, keys_eds, &routing, None)
    };
    let mut hidden_ms = ctx.cheap([x_nd, keys_eds], product)?;
    if let Some((bias_es, ids_nk)) = bias {
        let ids_m = ids_nk.reshape([-1]);
        let sum = move |[product_ms, bias_es]: [&Tensor; 2], ctx: &Context| {
            let of_selection = bias_es.index_select(0, &ids_m);
            Ok(product_ms + of_selection.to_kind(ctx.compute))
        };
        hidden_ms = ctx.cheap([&hidden_ms, bias_es], sum)?;
    }
    let act = move |[x]: [&Tensor; 1], _: &Context| Ok(activation.forward(x.shallow_clone()));
    ctx.cheap([&hidden_ms], act)
}
