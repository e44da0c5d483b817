//! SwitchHead: multi-head attention whose projections are mixtures of experts, with rotary positions.

use crate::attention::{
    Heads, KEPT, PROJECTIONS, SCORES, attention, into_heads, kept_bytes, linear, out_of_heads,
};
use crate::attention_maps::Gates;
use crate::balance::Applications;
use crate::context::at_least_f32;
use crate::cost::{Cost, Sequence, count};
use crate::norm::normed;
use crate::routing::top_k;
use crate::switchhead_stats::{SwitchHeadStats, SwitchHeadWatch};
use crate::{
    AttentionMaps, Balance, BalanceConfig, Context, Init, LayerNorm, LayerPast, Params, Reading,
    Rope, RopeConfig, Routing, Scoring,
};
use moeut_plugin_api::PluginError;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use tch::{Kind, Tensor};

/// One of the four projections. The order is that in which shared selections are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Queries.
    Q,
    /// Values.
    V,
    /// Keys.
    K,
    /// Output.
    O,
}

impl Side {
    /// All four.
    pub const ALL: [Self; 4] = [Self::Q, Self::V, Self::K, Self::O];

    /// As in parameter and regularizer names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::V => "v",
            Self::K => "k",
            Self::O => "o",
        }
    }

    /// Whether it reads what is attended to.
    pub(crate) fn is_attended(self) -> bool {
        matches!(self, Self::K | Self::V)
    }
}

/// Which projections have experts, and which of them share a selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an argument of the reference"
)]
pub struct ExpertSides {
    /// `W_q` has experts.
    pub q: bool,
    /// `W_k` has experts.
    pub k: bool,
    /// `W_v` has experts.
    pub v: bool,
    /// `W_o` has experts.
    pub o: bool,
    /// Values share the output's selection.
    pub same_sel: bool,
    /// Queries and keys have selections of their own.
    pub separate_kq_sel: bool,
}

impl ExpertSides {
    /// For each projection with experts the side whose selection matrix it uses.
    pub fn sources(self) -> BTreeMap<Side, Side> {
        let mut sources = BTreeMap::new();
        if self.o {
            sources.insert(Side::O, Side::O);
        }
        if self.q {
            let is_own = self.separate_kq_sel || !self.o;
            sources.insert(Side::Q, if is_own { Side::Q } else { Side::O });
        }
        if self.v {
            let is_shared = self.same_sel && self.o;
            sources.insert(Side::V, if is_shared { Side::O } else { Side::V });
        }
        if self.k {
            let other = match (self.same_sel, self.separate_kq_sel) {
                (true, true) => sources.get(&Side::Q),
                (false, true) => None,
                (_, false) => sources.get(&Side::V),
            };
            sources.insert(Side::K, other.copied().unwrap_or(Side::K));
        }
        sources
    }
}

/// The layer's arguments, all of them resolved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SwitchHeadConfig {
    /// Number and width of the heads.
    pub heads: Heads,
    /// Width of a value head.
    pub d_value: i64,
    /// Experts per head, `A`.
    pub n_experts: i64,
    /// Experts that a token uses per head, `k`.
    pub top_k: i64,
    /// Which projections are mixtures.
    pub sides: ExpertSides,
    /// How logits become gates.
    pub scoring: Scoring,
    /// Dropout of the keys.
    pub dropout: f64,
    /// Probability that an expert is not eligible for a token, while training.
    pub expert_dropout: f64,
    /// Dropout of the routers' input.
    pub router_dropout: f64,
    /// Whether each coordinate of the expert projections starts with unit norm over the experts.
    pub has_norm_init: bool,
    /// Regularizer of each selection.
    pub balance: BalanceConfig,
    /// Positions.
    pub rope: RopeConfig,
}

/// What the layer needs to know about its model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SwitchHeadPlace {
    /// Width of the residual stream, `D`.
    pub d_model: i64,
    /// Layers of the unrolled stack; a number on pre-layernorm paths, where initial deviations shrink with depth.
    pub depth_init: Option<i64>,
    /// Whether q, k and the routers read `LN(x)`.
    pub has_norm: bool,
}

/// The layer. For a projection with experts, head `h` and one token:
///
/// ```text
/// z_h = r · W_sel[h]ᵀ                          r = LN(x) with a peri-layernorm, else x
/// (e, g) = top_k(z_h), σ                       not renormalized
/// q_h = Σ_j g_j · r · W_q[h, e_j]              likewise k; v from x itself
/// y = Σ_h Σ_j g_hj · attention_h · W_o[h, e_hj]
/// ```
///
/// No biases. The attention is [`attention`]. Projections without experts are ordinary matrices. Keys and values, and
/// their selections, may be made from other states than `x`; a selection that is used on both sides counts twice for
/// the regularizer.
///
/// # Source
/// Csordás et al., arXiv:2312.07987; reference `full_moe_relative_attention.py`.
#[derive(Debug)]
pub struct SwitchHead {
    config: SwitchHeadConfig,
    d_model: i64,
    sources: BTreeMap<Side, Side>,
    rope: Rope,
    norm: Option<LayerNorm>,
    projections: BTreeMap<Side, Tensor>,
    selections: BTreeMap<Side, Tensor>,
}

/// What one layer gathers over its applications in one forward pass, by source of the selection.
#[derive(Debug)]
pub struct SwitchHeadPass {
    experts: BTreeMap<Side, Tensor>,
    balances: BTreeMap<Side, Balance>,
    watch: SwitchHeadWatch,
}

/// What a pass leaves, by the side under which a selection is reported: the first of q, v, k, o that uses it.
#[derive(Debug)]
pub struct SwitchHeadReport {
    /// Weighted regularizers, scalars.
    pub balances: Vec<(Side, Tensor)>,
    /// What was wished for.
    pub stats: SwitchHeadStats,
}

/// One selection of one application.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) routing: Routing,
    /// Which experts, each head's own numbers, `[B, T, H, k]`.
    pub(crate) ids_bthk: Tensor,
    /// Likewise.
    pub(crate) gate_bthk: Tensor,
}

impl SwitchHead {
    /// Adds `projections.*`, `selections.*` and, with a peri-layernorm, `norm.*`.
    pub fn new(params: &Params, place: SwitchHeadPlace, config: SwitchHeadConfig) -> Self {
        let SwitchHeadPlace {
            d_model,
            depth_init,
            has_norm,
        } = place;
        let Heads { n_heads, d_head } = config.heads;
        // The constant is 2 here, whatever the feed-forward layer's argument says.
        let scale = depth_init.map_or(1.0, |n_layers| (2.0 / n_layers as f64).sqrt());
        let std_in = scale / (d_model as f64).sqrt();
        let std_out = scale / ((n_heads * config.d_value) as f64).sqrt();
        let sources = config.sides.sources();
        let n_rows = n_heads * config.n_experts;

        let projection = |side: Side| {
            let (d_in, d_out, std) = match side {
                Side::Q | Side::K => (d_model, d_head, std_in),
                Side::V => (d_model, config.d_value, std_in),
                Side::O => (config.d_value, d_model, std_out),
            };
            let shape = if sources.contains_key(&side) {
                vec![n_rows, d_in, d_out]
            } else if side == Side::O {
                vec![d_out, n_heads * d_in]
            } else {
                vec![n_heads * d_out, d_in]
            };
            let init = if config.has_norm_init && shape.len() == 3 {
                Init::EqualCoordinates(std)
            } else {
                Init::Normal(std)
            };
            let projections = params.sub("projections");
            (side, projections.parameter(side.name(), &shape, init))
        };
        let projections = Side::ALL.into_iter().map(projection).collect();
        let selection = |side: &Side| {
            let selections = params.sub("selections");
            let init = Init::EqualRows(std_in);
            (
                *side,
                selections.parameter(side.name(), &[n_rows, d_model], init),
            )
        };
        let own = sources.iter().filter(|(side, source)| side == source);
        Self {
            selections: own.map(|(side, _)| selection(side)).collect(),
            projections,
            norm: has_norm.then(|| LayerNorm::new(&params.sub("norm"), d_model)),
            rope: Rope::new(config.rope, d_head),
            d_model,
            sources,
            config,
        }
    }

    /// Begins a forward pass; weights of experts are cast once for all applications.
    pub fn begin(&self, ctx: &Context) -> SwitchHeadPass {
        let widths = [self.d_model, self.config.heads.d_head, self.config.d_value];
        let [d_model, d_head, d_value] = widths.map(|width| ctx.aligned(width));
        let cast = |side: &Side| {
            let last = match side {
                Side::Q | Side::K => [d_model, d_head],
                Side::V => [d_model, d_value],
                Side::O => [d_value, d_model],
            };
            (*side, ctx.operand_of(&self.projections[side], &last))
        };
        let balance = |side: &Side| {
            (
                *side,
                Balance::new(self.config.balance, Applications::Averaged, ctx),
            )
        };
        SwitchHeadPass {
            experts: self.sources.keys().map(cast).collect(),
            balances: self.selections.keys().map(balance).collect(),
            watch: SwitchHeadWatch::new(ctx),
        }
    }

    /// What q, k and the routers read the stream through.
    pub fn norm(&self) -> Option<&LayerNorm> {
        self.norm.as_ref()
    }

    /// One application: `[B, T, D]` → `[B, T, D]`; keys and values are made from `attended_bsd`, if given, else from what
    /// is read.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn forward(
        &self,
        reading: &Reading,
        attended_bsd: Option<&Tensor>,
        pass: &mut SwitchHeadPass,
        (earlier, maps): (&mut LayerPast, &mut AttentionMaps),
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let Heads { n_heads, d_head } = self.config.heads;
        let d_value = ctx.aligned(self.config.d_value);
        let scored_btd = &reading.normed;
        let key_in_bsd = attended_bsd.map(|attended_bsd| normed(self.norm.as_ref(), attended_bsd));
        let key_in_bsd = key_in_bsd.as_ref().unwrap_or(scored_btd);
        let v_in_bsd = attended_bsd.unwrap_or(&reading.plain);

        let is_apart = attended_bsd.is_some();
        let mut routes: BTreeMap<(Side, bool), Route> = BTreeMap::new();
        for (&side, &source) in &self.sources {
            let is_attended = is_apart && side.is_attended();
            if let Entry::Vacant(place) = routes.entry((source, is_attended)) {
                let scored = if is_attended { key_in_bsd } else { scored_btd };
                place.insert(self.route(scored, source, pass, ctx)?);
            }
        }
        let shape = [n_heads, self.config.n_experts];
        pass.watch.selected(&routes, shape);
        let route = |side: Side| {
            let source = *self.sources.get(&side)?;
            routes.get(&(source, is_apart && side.is_attended()))
        };
        if let (Some(v), Some(o)) = (route(Side::V), route(Side::O)) {
            pass.watch.selected_both(v, o, shape, ctx)?;
        }

        // Both cast alike, so that libtorch neither casts twice nor adds their gradients in single precision.
        let q_in_btd = ctx.cheap([scored_btd], |[x], ctx| Ok(x.to_kind(ctx.compute)))?;
        let k_in_bsd = if is_apart {
            key_in_bsd.to_kind(ctx.compute)
        } else {
            q_in_btd.shallow_clone()
        };
        let q = self.project(Side::Q, &q_in_btd, route(Side::Q), pass, ctx)?;
        let k = self.project(Side::K, &k_in_bsd, route(Side::K), pass, ctx)?;
        let v = self.project(Side::V, v_in_bsd, route(Side::V), pass, ctx)?;
        let size = reading.stream.size();
        let heads = |x: Tensor, d| x.view([size[0], -1, n_heads, d]);
        let d_inside = ctx.aligned(d_head);
        let (q, k, v) = (heads(q, d_inside), heads(k, d_inside), heads(v, d_value));
        let k = ctx.dropout(k, self.config.dropout);
        let q = self.rope.forward(&q, earlier.query_offset(), ctx)?;
        let k = self.rope.forward(&k, earlier.key_offset(), ctx)?;
        let (k, v) = earlier.joined(k, v);
        if maps.is_on() {
            let gates = self.sources.keys().filter_map(|&side| {
                let gates_tha = route(side)?.of_first_sequence(self.config.n_experts);
                Some(Gates {
                    side: side.name(),
                    is_attended: side.is_attended(),
                    gates_tha,
                })
            });
            let gates: Vec<Gates> = gates.collect();
            maps.add(&q, &k, d_head, earlier.mask(), &gates, ctx)?;
        }
        let mixed_bthd = attention(&q, &k, &v, d_head, earlier.mask());

        let Some(Route {
            routing, gate_bthk, ..
        }) = route(Side::O)
        else {
            let joined = mixed_bthd.reshape([size[0], size[1], n_heads * d_value]);
            let weight = out_of_heads(&self.projections[&Side::O], n_heads, size[2], ctx);
            return Ok(linear(&joined, &weight));
        };
        let gate = gate_bthk.reshape([-1, n_heads * self.config.top_k]);
        let mixed = mixed_bthd.reshape([-1, d_value]);
        let y_nd = ctx.grouped_matmul(&mixed, &pass.experts[&Side::O], routing, Some(&gate))?;
        Ok(y_nd.view_as(&reading.stream))
    }

    /// Ends a forward pass.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn finish(&self, pass: SwitchHeadPass) -> Result<SwitchHeadReport, PluginError> {
        let reported = |source: Side| {
            let mut users = self.sources.iter().filter(|&(_, &used)| used == source);
            users.next().map_or(source, |(&side, _)| side)
        };
        let mut balances = Vec::new();
        for (source, balance) in pass.balances {
            let term = balance.finish()?;
            balances.extend(term.map(|term| (reported(source), term)));
        }
        Ok(SwitchHeadReport {
            balances,
            stats: pass.watch.finish(reported),
        })
    }

    /// Of one application, with `X` projections that have experts and `d` the width of queries or values:
    ///
    /// ```text
    /// scores and values   2·H·d·T·S
    /// projections         (X·k + 4 − X)·D·H·d·T + X·H·k·T·d
    /// routers             n·A·D·S,   n = 1 if k or v has experts, + 1 if q or o has
    /// ```
    ///
    /// The paper's count of the routers is per layer, not per head; kept, so that totals compare with its plots.
    pub fn cost(&self, of: Sequence) -> Cost {
        let SwitchHeadConfig {
            heads,
            d_value,
            n_experts,
            top_k,
            ..
        } = self.config;
        let d_model = count(self.d_model);
        let [n_heads, d_head, d_value] = [heads.n_heads, heads.d_head, d_value].map(count);
        let [n_experts, top_k] = [n_experts, top_k].map(count);
        let n = of.n_tokens;
        let mut projections = 0;
        for side in Side::ALL {
            let width = match side {
                Side::Q | Side::K => n_heads * d_head,
                Side::V | Side::O => n_heads * d_value,
            };
            projections += if self.sources.contains_key(&side) {
                top_k * (d_model * width * n + width * n)
            } else {
                d_model * width * n
            };
        }
        let has = |side| self.sources.contains_key(&side);
        let n_routers =
            u64::from(has(Side::K) || has(Side::V)) + u64::from(has(Side::Q) || has(Side::O));
        let width = 2 * n_heads * (d_head + d_value);
        let logits = self.selections.len() as u64 * n_heads * n_experts * n;
        Cost::default()
            .macs(SCORES, n_heads * (d_head + d_value) * n * of.n_attended())
            .macs(PROJECTIONS, projections)
            .macs(
                "attention: routers",
                n_routers * n_experts * d_model * of.n_attended(),
            )
            .kept(KEPT, kept_bytes(of, d_model, width))
            .kept("attention: routers", logits * of.router_bytes())
    }

    /// `SwitchHead (4 heads of 128; v, o: 2 of 10)`.
    pub fn describe(&self) -> String {
        let SwitchHeadConfig {
            heads,
            n_experts,
            top_k,
            ..
        } = self.config;
        let sides: Vec<&str> = self.sources.keys().map(|side| side.name()).collect();
        format!(
            "SwitchHead ({} heads of {}; {}: {top_k} of {n_experts})",
            heads.n_heads,
            heads.d_head,
            sides.join(", ")
        )
    }

    fn project(
        &self,
        side: Side,
        x_btd: &Tensor,
        route: Option<&Route>,
        pass: &SwitchHeadPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        match route {
            None => {
                let weight = &self.projections[&side];
                let n_heads = self.config.heads.n_heads;
                Ok(linear(x_btd, &into_heads(weight, n_heads, x_btd, ctx)))
            }
            Some(Route {
                routing, gate_bthk, ..
            }) => {
                let x_nd = x_btd.reshape([-1, x_btd.size()[2]]);
                let gate = gate_bthk.reshape([-1, self.config.top_k]);
                ctx.grouped_matmul(&x_nd, &pass.experts[&side], routing, Some(&gate))
            }
        }
    }

    /// The route in one call, if the kernel has it and the call covers the layer's arguments.
    fn fused_route(
        &self,
        x_btd: &Tensor,
        source: Side,
        pass: &mut SwitchHeadPass,
        ctx: &Context,
    ) -> Result<Option<Route>, PluginError> {
        let config = &self.config;
        let balance = pass.balances.get_mut(&source);
        let covers = config.scoring == Scoring::Sigmoid
            && !(ctx.is_training && config.expert_dropout > 0.0)
            && balance
                .as_ref()
                .is_none_or(|balance| balance.takes_log_means());
        if !covers {
            return Ok(None);
        }
        let weight = &self.selections[&source];
        let choice = ctx.select(x_btd, weight, config.heads.n_heads, config.top_k)?;
        let (size, n_heads) = (x_btd.size(), config.heads.n_heads);
        let by_head = |x: Tensor| x.view([size[0], size[1], n_heads, config.top_k]);
        Ok(choice.map(|choice| {
            if let (true, Some(balance)) = (ctx.is_training, balance) {
                balance.add_log_means(&choice.log_means);
            }
            Route {
                routing: choice.routing,
                ids_bthk: by_head(choice.ids.to_kind(Kind::Int64).remainder(config.n_experts)),
                gate_bthk: by_head(choice.gate),
            }
        }))
    }

    fn route(
        &self,
        x_btd: &Tensor,
        source: Side,
        pass: &mut SwitchHeadPass,
        ctx: &Context,
    ) -> Result<Route, PluginError> {
        let SwitchHeadConfig {
            heads,
            n_experts,
            top_k: k,
            scoring,
            ..
        } = self.config;
        let router_in = ctx.dropout(x_btd.shallow_clone(), self.config.router_dropout);
        if let Some(route) = self.fused_route(&router_in, source, pass, ctx)? {
            return Ok(route);
        }
        let logits = ctx.router_logits(&router_in, &self.selections[&source], None)?;
        let logits = logits.to_kind(at_least_f32(logits.kind()));
        let size = x_btd.size();
        let logits_btha = logits.view([size[0], size[1], heads.n_heads, n_experts]);
        if ctx.is_training
            && let Some(balance) = pass.balances.get_mut(&source)
        {
            balance.add(&logits_btha);
        }

        let drop = if ctx.is_training {
            self.config.expert_dropout
        } else {
            0.0
        };
        let ids_bthk = top_k(&logits_btha, k, drop);
        let picked_bthk = logits_btha.gather(-1, &ids_bthk, false);
        let gate_bthk = match scoring {
            Scoring::Sigmoid => picked_bthk.sigmoid(),
            Scoring::Softmax => picked_bthk.softmax(-1, None),
        };
        // Experts are numbered through all heads: expert a of head h is row h·A + a.
        let first_of_head =
            Tensor::arange(heads.n_heads, (Kind::Int64, x_btd.device())) * n_experts;
        let ids = &ids_bthk + first_of_head.unsqueeze(-1);
        Ok(Route {
            routing: Routing::new(&ids, heads.n_heads * n_experts),
            ids_bthk,
            gate_bthk,
        })
    }
}

impl Route {
    /// The gates of the batch's first sequence, 0 where an expert is not selected, `[T, H, A]`.
    fn of_first_sequence(&self, n_experts: i64) -> Tensor {
        let (ids_thk, gate_thk) = (self.ids_bthk.get(0), self.gate_bthk.get(0).detach());
        let size = ids_thk.size();
        let options = (gate_thk.kind(), gate_thk.device());
        Tensor::zeros([size[0], size[1], n_experts], options).scatter(-1, &ids_thk, &gate_thk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_EXPERTS: ExpertSides = ExpertSides {
        q: true,
        k: true,
        v: true,
        o: true,
        same_sel: false,
        separate_kq_sel: false,
    };

    fn sources(sides: ExpertSides) -> String {
        let text = |(side, source): (Side, Side)| format!("{}←{} ", side.name(), source.name());
        sides.sources().into_iter().map(text).collect()
    }

    #[test]
    fn selections_are_shared_as_the_reference_shares_them() {
        assert_eq!(sources(ALL_EXPERTS), "q←o v←v k←v o←o ");
        let same = ExpertSides {
            same_sel: true,
            ..ALL_EXPERTS
        };
        assert_eq!(sources(same), "q←o v←o k←o o←o ");
        let separate = ExpertSides {
            separate_kq_sel: true,
            ..ALL_EXPERTS
        };
        assert_eq!(sources(separate), "q←q v←v k←k o←o ");
        let both = ExpertSides {
            same_sel: true,
            ..separate
        };
        assert_eq!(sources(both), "q←q v←o k←q o←o ");
        let paper = ExpertSides {
            q: false,
            k: false,
            ..ALL_EXPERTS
        };
        assert_eq!(sources(paper), "v←v o←o ");
    }
}
