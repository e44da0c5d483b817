//! One layer of the stack: attention, then experts, around a residual stream.

use crate::config::Blueprint;
use moeut_nn::attention::{DenseAttentionConfig, LinearInit};
use moeut_nn::lm::{self, At, BlockReport, Counted};
use moeut_nn::moe::{MoePass, MoePlace, MoeReport};
use moeut_nn::switchhead::{SwitchHeadPass, SwitchHeadPlace};
use moeut_nn::usage::Optimist;
use moeut_nn::{
    AttentionMaps, Context, Cost, DenseAttention, LayerNorm, LayerPast, Norm, Params, Reading,
    Sequence, SigmaMoe, Stream, SwitchHead, Tally, moe_stats, switchhead_stats,
};
use moeut_plugin_api::{Chart, PluginError};
use tch::Tensor;

/// | norm | attention reads | feed-forward reads | residual |
/// |---|---|---|---|
/// | pre | `LN₁(x)` | `LN₂(x)` | `x + f` |
/// | post | `x` | `x` | `LN(x + f)` |
/// | peri | `x` for v, `LN(x)` for q, k and routers | `x` for experts, `LN(x)` for the router | `x + f` |
///
/// With segment memory keys and values read `LN₁` of the remembered states and `x`, also with post-layernorm, as the
/// reference's. Peri-layernorm without attention experts, which the reference cannot run, is defined by
/// [`DenseAttention`]; with a variant that is not `preln` it keeps that variant's shell and initial values.
///
/// # Source
/// Reference `relative_moe_transformer.py`.
#[derive(Debug)]
pub(crate) struct Block {
    attention: Attention,
    moe: SigmaMoe,
    norms: Norms,
    dropout: f64,
}

#[derive(Debug)]
enum Attention {
    Dense(DenseAttention),
    Experts(Box<SwitchHead>),
}

#[derive(Debug)]
enum Norms {
    Pre([LayerNorm; 2]),
    Post([LayerNorm; 2]),
    /// They belong to the attention and the experts.
    Peri,
}

/// What a block gathers over its applications in one forward pass.
pub(crate) struct BlockPass {
    attention: Option<SwitchHeadPass>,
    moe: MoePass,
    maps: AttentionMaps,
    /// Of the applications, in the stack.
    places: Vec<usize>,
}

/// Names of what the parts report begin so, as those of their parameters.
const ATTENTION: &str = "self_attn/";
const MOE: &str = "pkm/";

impl Block {
    pub(crate) fn new(
        params: &Params,
        blueprint: &Blueprint,
        compat: bool,
    ) -> Result<Self, PluginError> {
        let Blueprint { shell, moe, .. } = blueprint;
        let (d_model, depth_init) = (shell.config.d_model, shell.depth_init());
        let has_norm = blueprint.norm == Norm::Peri;
        let self_attn = params.sub("self_attn");
        let attention = match blueprint.switchhead {
            Some(switchhead) => {
                let place = SwitchHeadPlace {
                    d_model,
                    depth_init,
                    has_norm,
                };
                Attention::Experts(Box::new(SwitchHead::new(&self_attn, place, switchhead)))
            }
            None => Attention::Dense(DenseAttention::new(
                &self_attn,
                DenseAttentionConfig {
                    d_model,
                    heads: shell.heads(),
                    rope: shell.config.rope,
                    has_norm,
                    dropout: blueprint.dense_dropout,
                    init: depth_init.map_or(LinearInit::Xavier, LinearInit::Depth),
                },
            )),
        };
        let place = MoePlace {
            d_model,
            depth_init,
            has_norm,
            activation: shell.activation(moe.d_expert, compat)?,
            balances_selected: compat,
        };
        let moe = SigmaMoe::new(&params.sub("pkm"), place, *moe);
        let norms = || ["norm1", "norm2"].map(|name| LayerNorm::new(&params.sub(name), d_model));
        Ok(Self {
            attention,
            moe,
            norms: match blueprint.norm {
                Norm::Pre => Norms::Pre(norms()),
                Norm::Post => Norms::Post(norms()),
                Norm::Peri => Norms::Peri,
            },
            dropout: shell.config.dropout,
        })
    }

    fn attend(
        &self,
        reading: &Reading,
        attended: Option<&Tensor>,
        pass: &mut BlockPass,
        earlier: &mut LayerPast,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let y = match &self.attention {
            Attention::Dense(attention) => {
                attention.forward(reading, attended, earlier, &mut pass.maps, ctx)?
            }
            Attention::Experts(attention) => {
                let seen = (earlier, &mut pass.maps);
                let pass = pass.attention.get_or_insert_with(|| attention.begin(ctx));
                attention.forward(reading, attended, pass, seen, ctx)?
            }
        };
        Ok(ctx.dropout(y, self.dropout))
    }

    fn feed(
        &self,
        reading: &Reading,
        pass: &mut BlockPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let y = self.moe.forward(reading, &mut pass.moe, ctx)?;
        Ok(ctx.dropout(y, self.dropout))
    }
}

impl lm::Block for Block {
    type Pass = BlockPass;
    type Carry = ();

    fn begin(&self, ctx: &Context) -> BlockPass {
        BlockPass {
            attention: match &self.attention {
                Attention::Dense(_) => None,
                Attention::Experts(attention) => Some(attention.begin(ctx)),
            },
            moe: self.moe.begin(ctx),
            maps: AttentionMaps::new(ctx),
            places: Vec::new(),
        }
    }

    fn forward(&self, x: &Stream, at: At<'_, Self>, ctx: &Context) -> Result<Stream, PluginError> {
        let At {
            place, pass, past, ..
        } = at;
        pass.places.push(place);
        let attended = past.attended(x);
        let is_wide = ctx.has_wide_routers();
        match &self.norms {
            Norms::Pre([norm1, norm2]) => {
                let attended = attended.map(|attended| norm1.forward(&attended));
                let first = ctx.reading(x, Some(norm1), is_wide)?;
                let reading = Reading::plain(&first.normed);
                let y = self.attend(&reading, attended.as_ref(), pass, past, ctx)?;
                let second = Stream::updated(first.stream, y);
                let second = ctx.reading(&second, Some(norm2), is_wide)?;
                let y = self.feed(&Reading::plain(&second.normed), pass, ctx)?;
                Ok(Stream::updated(second.stream, y))
            }
            Norms::Post([norm1, norm2]) => {
                let attended = attended.map(|attended| norm1.forward(&attended));
                let x = x.whole();
                let y = self.attend(&Reading::plain(x), attended.as_ref(), pass, past, ctx)?;
                let x = norm1.forward(&(x + y));
                let y = self.feed(&Reading::plain(&x), pass, ctx)?;
                Ok(norm2.forward(&(x + y)).into())
            }
            Norms::Peri => {
                let norm = match &self.attention {
                    Attention::Dense(attention) => attention.norm(),
                    Attention::Experts(attention) => attention.norm(),
                };
                let reading = ctx.reading(x, norm, is_wide)?;
                let y = self.attend(&reading, attended.as_ref(), pass, past, ctx)?;
                let between = Stream::updated(reading.stream, y);
                let reading = ctx.reading(&between, self.moe.norm(), is_wide)?;
                let y = self.feed(&reading, pass, ctx)?;
                Ok(Stream::updated(reading.stream, y))
            }
        }
    }

    fn finish(&self, pass: BlockPass) -> Result<BlockReport, PluginError> {
        let mut report = BlockReport::default();
        if let (Attention::Experts(attention), Some(pass)) = (&self.attention, pass.attention) {
            let of_attention = attention.finish(pass)?;
            for (side, term) in of_attention.balances {
                let name = format!("moe_att/{}/entropy", side.name());
                report.regularizers.push((name, term));
            }
            let stats = of_attention.stats;
            for (side, value) in stats.usage {
                let name = format!("{ATTENTION}usag_rel_perplexity/{}", side.name());
                report.stats.push((name, value));
            }
            report.counts.extend(below(ATTENTION, stats.counts));
            report.pairs.extend(below(ATTENTION, stats.pairs));
        }
        let MoeReport { balance, stats } = SigmaMoe::finish(pass.moe, &pass.places)?;
        let balance = balance.map(|term| ("moe".to_owned(), term));
        report.regularizers.extend(balance);
        report.stats.extend(below(MOE, stats.stats));
        report.counts.extend(below(MOE, stats.counts));
        report.pairs.extend(below(MOE, stats.pairs));
        report.charts = named(MOE, stats.charts);
        report.maps = named(ATTENTION, pass.maps.finish(&pass.places));
        Ok(report)
    }

    fn usage(&self, counted: Counted, tally: &Tally, optimist: Optimist) -> Vec<Chart> {
        match counted {
            Counted::InTraining => {
                let mut charts = moe_stats::usage_charts(tally, MOE, optimist);
                charts.extend(switchhead_stats::usage_charts(tally, ATTENTION));
                charts
            }
            Counted::InEvaluation => moe_stats::evaluation_chart(tally, MOE)
                .into_iter()
                .collect(),
            Counted::Together => moe_stats::pairs_chart(tally, MOE).into_iter().collect(),
        }
    }

    fn describe(&self) -> String {
        let attention = match &self.attention {
            Attention::Dense(_) => "attention".to_owned(),
            Attention::Experts(attention) => attention.describe(),
        };
        let norm = match &self.norms {
            Norms::Pre(_) => Norm::Pre,
            Norms::Post(_) => Norm::Post,
            Norms::Peri => Norm::Peri,
        };
        format!("{attention} + {}, {}", self.moe.describe(), norm.describe())
    }

    fn cost(&self, of: Sequence) -> Cost {
        let attention = match &self.attention {
            Attention::Dense(attention) => attention.cost(of),
            Attention::Experts(attention) => attention.cost(of),
        };
        attention.plus(&self.moe.cost(of))
    }
}

/// Values of a part, under the block's names for them.
fn below<N: std::fmt::Display>(
    part: &str,
    values: Vec<(N, Tensor)>,
) -> impl Iterator<Item = (String, Tensor)> {
    values
        .into_iter()
        .map(move |(name, value)| (format!("{part}{name}"), value))
}

/// Charts of a part, likewise.
fn named(part: &str, charts: Vec<Chart>) -> Vec<Chart> {
    let named = charts.into_iter().map(|chart| Chart {
        name: format!("{part}{}", chart.name),
        ..chart
    });
    named.collect()
}
