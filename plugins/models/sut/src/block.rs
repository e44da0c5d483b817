//! One layer of the stack: expert attention, then experts, around a residual stream; perhaps with halting.

use crate::attention::{Attention, AttentionPass};
use crate::config::Layers;
use crate::feed_forward::{FeedForward, FeedForwardPass};
use crate::halting::{Halting, HaltingState};
use crate::losses::Tally;
use crate::scorer::ScorerPass;
use moeut_nn::lm::{self, At, BlockReport};
use moeut_nn::{Context, Cost, LayerNorm, LayerPast, Params, Sequence, Stream, usage};
use moeut_plugin_api::PluginError;
use tch::Tensor;

/// | norm | attention | feed-forward |
/// |---|---|---|
/// | pre | `h + f(LN₁(h); LN₁(s))` | `h + f(LN₂(h))` |
/// | post | `LN₁(h + f(h; s))` | `LN₂(h + f(h))` |
///
/// The source `s` of keys and values is `h` without halting, else the mixture of [`Halting`]; with segment memory the
/// states of earlier segments stand before it.
///
/// # Source
/// Reference `sut/sut_transformer_layer.py`.
#[derive(Debug)]
pub(crate) struct Block {
    halting: Option<Halting>,
    attention: Attention,
    feed_forward: FeedForward,
    norm1: LayerNorm,
    norm2: LayerNorm,
    layers: Layers,
}

/// What a block gathers over its applications in one forward pass.
pub(crate) struct BlockPass {
    halting: Option<ScorerPass>,
    attention: AttentionPass,
    feed_forward: FeedForwardPass,
    /// Sum over applications.
    depth: Option<Tensor>,
    /// Of the last application.
    last_depth: Option<Tensor>,
    wants_stats: bool,
}

impl Block {
    /// Adds `self_attn.*`, `moe.*`, the norms, and with halting `_gate.*`, the others then below `mod`.
    pub(crate) fn new(params: &Params, layers: &Layers) -> Self {
        let d_model = layers.d_model;
        let halting = layers
            .can_halt
            .then(|| Halting::new(&params.sub("_gate"), d_model));
        let params = match halting {
            Some(_) => params.sub("mod"),
            None => params.clone(),
        };
        let norm = |name| LayerNorm::new(&params.sub(name), d_model);
        Self {
            halting,
            attention: Attention::new(&params.sub("self_attn"), d_model, layers.attention),
            feed_forward: FeedForward::new(&params.sub("moe"), d_model, layers.feed_forward),
            norm1: norm("self_attn_layer_norm"),
            norm2: norm("final_layer_norm"),
            layers: *layers,
        }
    }

    /// The layer itself; `rounded_btd` is its input in the compute type, if somebody has needed it. Without a source it
    /// attends to its own input.
    fn layer(
        &self,
        (h, rounded_btd): (&Stream, Option<&Tensor>),
        source_btd: Option<&Tensor>,
        alive_bt: Option<&Tensor>,
        (pass, earlier): (&mut BlockPass, &mut LayerPast),
        ctx: &Context,
    ) -> Result<Stream, PluginError> {
        let Layers {
            is_pre_ln, dropout, ..
        } = self.layers;
        // What several products read is rounded once.
        let rounded = |x: &Tensor| x.to_kind(ctx.compute);
        let (stream, query) = if is_pre_ln {
            let first = ctx.reading(h, Some(&self.norm1), false)?;
            (first.stream, rounded(&first.normed))
        } else {
            let h_btd = h.whole();
            let query = rounded_btd.map_or_else(|| rounded(h_btd), Tensor::shallow_clone);
            (h_btd.shallow_clone(), query)
        };
        let source = match source_btd {
            Some(source_btd) if is_pre_ln => rounded(&self.norm1.forward(source_btd)),
            Some(source_btd) => rounded(source_btd),
            None => query.shallow_clone(),
        };
        let seen = (&mut pass.attention, earlier);
        let y = self
            .attention
            .forward(&query, &source, alive_bt, seen, ctx)?;
        let between = Stream::updated(stream, ctx.dropout(y, dropout));
        let between = if is_pre_ln {
            ctx.reading(&between, Some(&self.norm2), false)?
        } else {
            ctx.reading(&between, Some(&self.norm1), true)?
        };
        let x = rounded(&between.normed);
        let y = self
            .feed_forward
            .forward(&x, alive_bt, &mut pass.feed_forward, ctx)?;
        let y = ctx.dropout(y, dropout);
        if is_pre_ln {
            return Ok(Stream::updated(between.stream, y));
        }
        let after = Stream::updated(between.normed, y);
        let after = ctx.reading(&after, Some(&self.norm2), true)?;
        Ok(after.normed.into())
    }
}

impl lm::Block for Block {
    type Pass = BlockPass;
    type Carry = HaltingState;

    fn begin(&self, ctx: &Context) -> BlockPass {
        let tally = || Tally::new(self.layers.losses, self.layers.formula, ctx.wishes.stats);
        BlockPass {
            halting: self.halting.as_ref().map(|halting| halting.begin(ctx)),
            attention: self.attention.begin(tally(), ctx),
            feed_forward: self.feed_forward.begin(tally(), ctx),
            depth: None,
            last_depth: None,
            wants_stats: ctx.wishes.stats,
        }
    }

    fn forward(&self, x: &Stream, at: At<'_, Self>, ctx: &Context) -> Result<Stream, PluginError> {
        let At {
            pass, carry, past, ..
        } = at;
        let remembered = past.attended(x);
        let Some(scorer) = &pass.halting else {
            return self.layer((x, None), remembered.as_ref(), None, (pass, past), ctx);
        };
        let x_btd = x.whole();
        let entry = Halting::enter(x_btd, std::mem::take(carry), scorer, ctx)?;
        // In the first layer the mixture is the layer's own input.
        let mixture = entry.alive_bt.as_ref().map(|_| x_btd);
        let h = Stream::from(entry.h_btd.shallow_clone());
        let h = self.layer(
            (&h, entry.rounded_btd.as_ref()),
            remembered.as_ref().or(mixture),
            entry.alive_bt.as_ref(),
            (&mut *pass, past),
            ctx,
        )?;
        let h_btd = h.whole().shallow_clone();
        let (next, mixture_btd, depth) = entry.leave(h_btd, x_btd);
        *carry = next;
        if let Some(depth) = depth {
            pass.last_depth = Some(depth.detach());
            if ctx.is_training {
                pass.depth = Some(match pass.depth.take() {
                    Some(sum) => sum + depth,
                    None => depth,
                });
            }
        }
        Ok(mixture_btd.into())
    }

    fn finish(&self, pass: BlockPass) -> Result<BlockReport, PluginError> {
        let mut report = BlockReport::default();
        for (part, tally) in [
            ("self_attn", &pass.attention.gate.tally),
            ("moe", &pass.feed_forward.gate.tally),
        ] {
            let terms = tally.finish().into_iter();
            report
                .regularizers
                .extend(terms.map(|(name, term)| (name.to_owned(), term)));
            if let (true, Some(counts_e)) = (pass.wants_stats, tally.counts()) {
                let perplexity = usage::relative_perplexity(&counts_e);
                let dead = usage::dead_share(&counts_e);
                for (what, value) in [
                    ("usag_rel_perplexity", perplexity),
                    ("dead_expert_proportion", dead),
                ] {
                    report
                        .stats
                        .push((format!("{part}/{what}_all_layers"), value));
                }
            }
        }
        if let Some(depth) = pass.depth {
            let term = depth * self.layers.act_loss;
            report.regularizers.push(("act_loss".to_owned(), term));
        }
        if let (true, Some(depth)) = (pass.wants_stats, pass.last_depth) {
            report.stats.push(("halting/mean_depth".to_owned(), depth));
        }
        Ok(report)
    }

    fn describe(&self) -> String {
        format!(
            "{} + {}, {}-layernorm{}",
            self.attention.describe(),
            self.feed_forward.describe(),
            if self.layers.is_pre_ln { "pre" } else { "post" },
            if self.halting.is_some() {
                ", halting"
            } else {
                ""
            },
        )
    }

    /// What has halted, and the layer's own output.
    fn n_carried(&self) -> u64 {
        self.halting.as_ref().map_or(0, |_| 2)
    }

    fn cost(&self, of: Sequence) -> Cost {
        let d_model = self.layers.d_model.unsigned_abs();
        let cost = self.attention.cost(d_model, of);
        let cost = cost.plus(&self.feed_forward.cost(d_model, of));
        match self.halting {
            Some(_) => cost.plus(&Halting::cost(d_model, of)),
            None => cost,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use moeut_nn::lm::Block as _;
    use moeut_nn::padding::padded;
    use moeut_nn::past::Mask;
    use tch::{Device, Kind};

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
    const D_MODEL: i64 = 8;
    const BATCH: i64 = 2;
    const SEQ_LEN: i64 = 6;
    const N_LAYERS: usize = 4;
    const VARIANTS: [&str; 4] = [
        "sut_universal",
        "preln_sut_universal",
        "actsut_universal",
        "preln_actsut_universal",
    ];

    /// A block of which also the parameters that start at 0 do something.
    fn block(variant: &str) -> Block {
        block_of(variant, "8")
    }

    fn block_of(variant: &str, d_model: &str) -> Block {
        let config = testing::config(&[
            ("transformer.variant", variant),
            ("transformer.head_projection_size", "4"),
            ("state_size", d_model),
            ("moe.n_experts", "5"),
            ("moe.expert_size", "6"),
            ("pkm.n_heads", "2"),
            ("moe.att.n_experts", "3"),
            ("moe.att.expert_size", "8"),
            ("sut.max_relative_positions", "3"),
            ("moa.miloss", "0.1"),
            ("moa.cvloss", "0.1"),
            ("transformer.act_loss", "0.1"),
        ]);
        let (_, layers) = config.resolve(false).unwrap();
        let params = Params::new(Kind::Double, Device::Cpu);
        let block = Block::new(&params, &layers);
        for (index, parameter) in params.parameters().iter().enumerate() {
            let start = testing::parameter(&params, &parameter.name).detach();
            // Vectors start at ones or zeros, matrices at random.
            let base = if start.dim() > 1 {
                start.zeros_like()
            } else {
                start
            };
            let noise = values(index as f64, &base.size()) * 0.4;
            testing::set(&params, &parameter.name, &(base + noise));
        }
        block
    }

    /// The stack on `x`, where each place sees its own past.
    fn stack(
        block: &Block,
        x: &Tensor,
        earlier: impl FnMut(usize) -> LayerPast,
        is_training: bool,
    ) -> (Tensor, BlockReport, Vec<LayerPast>) {
        stack_in(&testing::context(is_training), block, x, earlier)
    }

    fn stack_in(
        ctx: &Context,
        block: &Block,
        x: &Tensor,
        mut earlier: impl FnMut(usize) -> LayerPast,
    ) -> (Tensor, BlockReport, Vec<LayerPast>) {
        let mut gathered = block.begin(ctx);
        let mut carry = HaltingState::default();
        let (mut x, mut pasts) = (Stream::from(x.shallow_clone()), Vec::new());
        for place in 0..N_LAYERS {
            let mut past = earlier(place);
            let at = At {
                place,
                pass: &mut gathered,
                carry: &mut carry,
                past: &mut past,
            };
            x = block.forward(&x, at, ctx).unwrap();
            pasts.push(past);
        }
        let x = x.whole().shallow_clone();
        (x, block.finish(gathered).unwrap(), pasts)
    }

    fn output(block: &Block, x: &Tensor) -> Tensor {
        stack(block, x, |_| LayerPast::none(false), false).0
    }

    fn input() -> Tensor {
        values(0.5, &[BATCH, SEQ_LEN, D_MODEL])
    }

    /// Values without a pattern, and without the random generator, which all tests of a process share: with it, it would
    /// depend on their order whether a central difference crosses a kink.
    fn values(shift: f64, shape: &[i64]) -> Tensor {
        let index = Tensor::arange(shape.iter().product::<i64>(), DOUBLE);
        ((&index * &index * 0.7 + shift).sin() * 1.4).reshape(shape)
    }

    #[test]
    fn a_later_token_never_changes_an_earlier_one() {
        for variant in VARIANTS {
            let block = block(variant);
            let x = input();
            let before = output(&block, &x);
            let _ = x.narrow(1, 4, 2).fill_(0.7);
            let after = output(&block, &x);
            let (a, b) = (before.narrow(1, 0, 4), after.narrow(1, 0, 4));
            assert!(a.allclose(&b, 0.0, 1e-12, false), "{variant}");
            assert!(!before.allclose(&after, 0.0, 1e-3, false), "{variant}");
        }
    }

    #[test]
    fn sequences_of_a_batch_do_not_see_each_other() {
        for variant in VARIANTS {
            let block = block(variant);
            let x = input();
            let together = output(&block, &x);
            for index in 0..BATCH {
                let alone = output(&block, &x.narrow(0, index, 1));
                let expected = together.narrow(0, index, 1);
                assert!(alone.allclose(&expected, 0.0, 1e-12, false), "{variant}");
            }
        }
    }

    /// Token by token with cached keys and values is the whole at once, halting included.
    #[test]
    fn a_cache_changes_nothing() {
        for variant in VARIANTS {
            let block = block(variant);
            let x = input();
            let expected = output(&block, &x);
            let mut kept: Vec<_> = (0..N_LAYERS).map(|_| None).collect();
            for token in 0..SEQ_LEN {
                let mask = Mask::after(token, 1, Device::Cpu);
                let (y, _, pasts) = stack(
                    &block,
                    &x.narrow(1, token, 1),
                    |place| LayerPast::cache(kept[place].take(), token, false, &mask),
                    false,
                );
                kept = pasts.into_iter().map(LayerPast::into_cache).collect();
                let expected = expected.narrow(1, token, 1);
                assert!(
                    y.allclose(&expected, 0.0, 1e-11, false),
                    "{variant} {token}"
                );
            }
        }
    }

    /// A stream with zeros behind its 10 channels keeps them and changes neither a result nor a gradient.
    #[test]
    fn padding_changes_nothing() {
        for variant in VARIANTS {
            let block = block_of(variant, "10");
            let outcome = |is_mixed| {
                let ctx = Context {
                    is_mixed,
                    ..testing::context(true)
                };
                let x = values(0.5, &[BATCH, SEQ_LEN, 10]).set_requires_grad(true);
                let wide = padded(&x, &[ctx.aligned(10)]);
                let (y, report, _) = stack_in(&ctx, &block, &wide, |_| LayerPast::none(false));
                let (y, rest) = (y.narrow(2, 0, 10), y.narrow(2, 10, y.size()[2] - 10));
                assert!(rest.abs().sum(None).double_value(&[]).abs() < f64::EPSILON);
                let terms: Tensor = report.regularizers.into_iter().map(|(_, term)| term).sum();
                let loss = (&y * values(2.0, &y.size())).sum(None) + terms;
                (
                    y,
                    loss.shallow_clone(),
                    Tensor::run_backward(&[loss], &[x], false, false),
                )
            };
            let (plain, padded) = (outcome(false), outcome(true));
            for (plain, padded) in [
                (&plain.0, &padded.0),
                (&plain.1, &padded.1),
                (&plain.2[0], &padded.2[0]),
            ] {
                assert!(plain.allclose(padded, 1e-10, 1e-11, false), "{variant}");
            }
        }
    }

    /// The input, through four applications and all losses. A step of the central differences that flips a routing would
    /// show, too; the steps are small enough that none was seen to.
    #[test]
    fn gradients_agree_with_differences() {
        for variant in VARIANTS {
            let block = block(variant);
            let x = input().set_requires_grad(true);
            let cotangent = values(2.0, &[BATCH, SEQ_LEN, D_MODEL]);
            let loss = || {
                let (y, report, _) = stack(&block, &x, |_| LayerPast::none(false), true);
                let terms: Tensor = report.regularizers.into_iter().map(|(_, term)| term).sum();
                (y * &cotangent).sum(None) + terms
            };
            testing::check_gradients(&[("x", &x)], &loss);
        }
    }

    #[test]
    fn regularizers_have_the_names_of_the_reference() {
        let names = |variant, is_training| {
            let past = |_| LayerPast::none(false);
            let (_, report, _) = stack(&block(variant), &input(), past, is_training);
            let names = report.regularizers.into_iter().map(|(name, _)| name);
            names.collect::<Vec<_>>().join(" ")
        };
        let both = "cvloss switchloss zloss miloss cvloss switchloss zloss miloss";
        assert_eq!(names("preln_sut_universal", true), both);
        assert_eq!(names("actsut_universal", true), format!("{both} act_loss"));
        assert_eq!(names("actsut_universal", false), "");
    }
}
