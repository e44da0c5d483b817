//! Layers of which only the inputs are kept for the backward pass, which runs them again: `-transformer.recompute 1`.
//!
//! ```text
//! kept      L inputs [B, T, D], and the activations of one layer     instead of the activations of L layers
//! time      one forward pass of the stack more
//! ```
//! Losses and gradients are those of a run without it, to the bit: see [`moeut_torch::recompute`].
//!
//! # Source
//! Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.

use super::{At, Block, Carry as _};
use crate::{Context, Stream};
use moeut_plugin_api::PluginError;
use moeut_torch::recompute::recomputed;
use moeut_torch::{Autocast, FunctionError, OrPluginError, rng};
use std::rc::Rc;

/// One application of the block `index`; the second one draws the same random numbers, and what it gathers is thrown away.
/// It has the same wishes, since statistics may be part of the graph.
pub(super) fn application<B: Block>(
    blocks: &Rc<[B]>,
    index: usize,
    x: &Stream,
    at: At<'_, B>,
    ctx: &Context,
) -> Result<Stream, PluginError> {
    const WHAT: &str = "a layer cannot be prepared to be run again";
    // One tensor to keep, not two.
    let x_btd = x.whole().shallow_clone();
    let device = x_btd.device();
    let random = rng::state(device).or_plugin_error(WHAT)?;
    let (of_again, x_again, of_both) = (Rc::clone(blocks), x_btd.shallow_clone(), ctx.clone());
    let (place, carry, past) = (at.place, at.carry.share(), at.past.share());
    let again = move || {
        let _mixed = Autocast::new(device, of_both.is_mixed.then_some(of_both.compute))?;
        let block = &of_again[index];
        let at = At {
            place,
            pass: &mut block.begin(&of_both),
            carry: &mut carry.share(),
            past: &mut past.share(),
        };
        let later = rng::state(device)?;
        rng::set_state(device, &random)?;
        let y = block.forward(&x_again.shallow_clone().into(), at, &of_both);
        rng::set_state(device, &later)?;
        y.map(drop)
            .map_err(|error| FunctionError::from(error.to_string()))
    };
    recomputed(again, || blocks[index].forward(&x_btd.into(), at, ctx)).or_plugin_error(WHAT)?
}
