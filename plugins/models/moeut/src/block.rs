//! One layer of the stack: attention, then experts, around a residual stream.

use crate::config::Config;
use moeut_nn::attention::LinearInit;
use moeut_nn::moe::{MoePass, MoePlace, MoeReport};
use moeut_nn::switchhead::{SwitchHeadPass, SwitchHeadPlace};
use moeut_nn::{Context, DenseAttention, LayerNorm, Norm, Params, SigmaMoe, SwitchHead};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// | norm | attention reads | feed-forward reads | residual |
/// |---|---|---|---|
/// | pre | `LN₁(x)` | `LN₂(x)` | `x + f` |
/// | post | `x` | `x` | `LN(x + f)` |
/// | peri | `x` for v, `LN(x)` for q, k and routers | `x` for experts, `LN(x)` for the router | `x + f` |
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
}

/// Names and values that a pass leaves.
#[derive(Default)]
pub(crate) struct BlockReport {
    pub(crate) regularizers: Vec<(String, Tensor)>,
    pub(crate) stats: Vec<(String, Tensor)>,
}

impl Block {
    pub(crate) fn new(params: &Params, config: &Config, compat: bool) -> Self {
        let (d_model, depth_init) = (config.d_model, config.depth_init());
        let has_norm = config.norm() == Norm::Peri;
        let self_attn = params.sub("self_attn");
        let attention = match config.switchhead(compat) {
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
                d_model,
                config.heads(),
                config.rope,
                has_norm,
                depth_init.map_or(LinearInit::Xavier, LinearInit::Depth),
            )),
        };
        let place = MoePlace {
            d_model,
            depth_init,
            has_norm,
            activation: config.activation,
            balances_selected: compat,
        };
        let moe = SigmaMoe::new(&params.sub("pkm"), place, config.moe);
        let norms = || ["norm1", "norm2"].map(|name| LayerNorm::new(&params.sub(name), d_model));
        Self {
            attention,
            moe,
            norms: match config.norm() {
                Norm::Pre => Norms::Pre(norms()),
                Norm::Post => Norms::Post(norms()),
                Norm::Peri => Norms::Peri,
            },
            dropout: config.dropout,
        }
    }

    /// Begins a forward pass.
    pub(crate) fn begin(&self, ctx: &Context) -> BlockPass {
        BlockPass {
            attention: match &self.attention {
                Attention::Dense(_) => None,
                Attention::Experts(attention) => Some(attention.begin(ctx)),
            },
            moe: self.moe.begin(ctx),
        }
    }

    /// One application: `[B, T, D]` → `[B, T, D]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: &mut BlockPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        match &self.norms {
            Norms::Pre([norm1, norm2]) => {
                let x = x + self.attend(&norm1.forward(x), pass, ctx)?;
                let y = self.feed(&norm2.forward(&x), pass, ctx)?;
                Ok(x + y)
            }
            Norms::Post([norm1, norm2]) => {
                let x = norm1.forward(&(x + self.attend(x, pass, ctx)?));
                let y = self.feed(&x, pass, ctx)?;
                Ok(norm2.forward(&(x + y)))
            }
            Norms::Peri => {
                let x = x + self.attend(x, pass, ctx)?;
                let y = self.feed(&x, pass, ctx)?;
                Ok(x + y)
            }
        }
    }

    /// Ends a forward pass.
    pub(crate) fn finish(&self, pass: BlockPass) -> BlockReport {
        let mut report = BlockReport::default();
        if let (Attention::Experts(attention), Some(pass)) = (&self.attention, pass.attention) {
            let of_attention = attention.finish(pass);
            for (side, term) in of_attention.balances {
                let name = format!("moe_att/{}/entropy", side.name());
                report.regularizers.push((name, term));
            }
            for (side, value) in of_attention.usage {
                let name = format!("self_attn/usag_rel_perplexity/{}", side.name());
                report.stats.push((name, value));
            }
        }
        let MoeReport { balance, stats } = SigmaMoe::finish(pass.moe);
        let balance = balance.map(|term| ("moe".to_owned(), term));
        report.regularizers.extend(balance);
        let named = stats
            .into_iter()
            .map(|(name, value)| (format!("pkm/{name}"), value));
        report.stats.extend(named);
        report
    }

    fn attend(
        &self,
        x: &Tensor,
        pass: &mut BlockPass,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        let y = match (&self.attention, &mut pass.attention) {
            (Attention::Dense(attention), _) => attention.forward(x),
            (Attention::Experts(attention), Some(pass)) => attention.forward(x, pass, ctx)?,
            (Attention::Experts(attention), None) => {
                attention.forward(x, &mut attention.begin(ctx), ctx)?
            }
        };
        Ok(ctx.dropout(y, self.dropout))
    }

    fn feed(&self, x: &Tensor, pass: &mut BlockPass, ctx: &Context) -> Result<Tensor, PluginError> {
        let y = self.moe.forward(x, &mut pass.moe, ctx)?;
        Ok(ctx.dropout(y, self.dropout))
    }
}
