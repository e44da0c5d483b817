//! What a model keeps between calls: segment memory and caches of keys and values, by slot.

use super::args::MemoryConfig;
use crate::Stream;
use crate::padding::padded;
use crate::past::{KeyValues, LayerPast, Mask};
use moeut_plugin_api::{NamedTensor, Past, PluginError};
use moeut_torch::{IntoHandle, IntoTensor};
use std::collections::BTreeMap;
use tch::{Device, Tensor};

/// All slots.
#[derive(Debug)]
pub(super) struct Memory {
    config: MemoryConfig,
    n_layers: usize,
    d_model: i64,
    /// Slot → place → states `[B, T, D]`, oldest first. With `is_last_layer` there is one place, the end of the stack.
    segments: BTreeMap<u32, Vec<Vec<Tensor>>>,
    caches: BTreeMap<u32, Cache>,
}

/// A cache between two calls.
#[derive(Debug)]
struct Cache {
    n_tokens: i64,
    layers: Vec<Option<KeyValues>>,
}

/// The past of one forward pass.
#[derive(Debug)]
pub(super) struct PassPast {
    kind: Kind,
    has_memory: bool,
    n_earlier: i64,
    n_new: i64,
    mask: Mask,
}

#[derive(Debug)]
enum Kind {
    None,
    Segments {
        slot: u32,
        n_kept: usize,
        /// Whether the one list of states is the last layer's.
        is_last_layer: bool,
        /// Those of earlier passes.
        states: Vec<Vec<Tensor>>,
        /// Those of this one, detached.
        new: Vec<Tensor>,
    },
    Cache {
        /// Where it is kept; nowhere if it is a fork.
        slot: Option<u32>,
        layers: Vec<Option<KeyValues>>,
    },
}

/// Shape and place of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub(super) size: i64,
    pub(super) seq_len: i64,
    pub(super) device: Device,
}

impl Memory {
    pub(super) fn new(config: MemoryConfig, n_layers: usize, d_model: i64) -> Self {
        Self {
            config,
            n_layers,
            d_model,
            segments: BTreeMap::new(),
            caches: BTreeMap::new(),
        }
    }

    /// Takes out what a pass sees; [`Memory::close`] puts it back. After an error in between the slot is empty.
    pub(super) fn open(
        &mut self,
        past: Past,
        is_training: bool,
        batch: Batch,
    ) -> Result<PassPast, PluginError> {
        let Batch {
            size,
            seq_len,
            device,
        } = batch;
        let n_kept = self.config.n_kept(is_training);
        let mut opened = PassPast {
            kind: Kind::None,
            has_memory: self.config.is_on(),
            n_earlier: 0,
            n_new: seq_len,
            mask: Mask::Causal,
        };
        match past {
            Past::Segments { slot, is_reset } if n_kept > 0 => {
                let kept = self.segments.remove(&slot).filter(|_| !is_reset);
                let states = kept.unwrap_or_else(|| self.no_states());
                let first = states.first().map_or(&[][..], Vec::as_slice);
                if let Some(other) = first.iter().map(|x| x.size()[0]).find(|&n| n != size) {
                    return Err(other_batch_size("segment memory", slot, other, size));
                }
                opened.n_earlier = first.iter().map(|x| x.size()[1]).sum();
                let is_window =
                    self.config.is_window || (!is_training && self.config.is_eval_window);
                opened.mask = if is_window {
                    Mask::window(opened.n_earlier, seq_len, device)
                } else {
                    Mask::after(opened.n_earlier, seq_len, device)
                };
                opened.kind = Kind::Segments {
                    slot,
                    n_kept,
                    is_last_layer: self.config.is_last_layer,
                    states,
                    new: Vec::new(),
                };
            }
            Past::None | Past::Segments { .. } => {}
            Past::Cache { slot, is_reset } => {
                let kept = self.caches.remove(&slot).filter(|_| !is_reset);
                let cache = kept.unwrap_or_else(|| Cache {
                    n_tokens: 0,
                    layers: (0..self.n_layers).map(|_| None).collect(),
                });
                if let Some(Some(kept)) = cache.layers.first()
                    && kept.k_bshd.size()[0] != size
                {
                    let other = kept.k_bshd.size()[0];
                    return Err(other_batch_size("cache", slot, other, size));
                }
                opened.n_earlier = cache.n_tokens;
                opened.mask = Mask::after(cache.n_tokens, seq_len, device);
                opened.kind = Kind::Cache {
                    slot: Some(slot),
                    layers: cache.layers,
                };
            }
            Past::Fork { slot } => {
                let cache = self.caches.get(&slot);
                let n_tokens = cache.map_or(0, |cache| cache.n_tokens);
                let layers = match cache {
                    Some(cache) => fork(&cache.layers, slot, size)?,
                    None => (0..self.n_layers).map(|_| None).collect(),
                };
                opened.n_earlier = n_tokens;
                opened.mask = Mask::after(n_tokens, seq_len, device);
                opened.kind = Kind::Cache { slot: None, layers };
            }
        }
        Ok(opened)
    }

    /// Keeps what the next pass will see; `last` is what the last layer gave.
    pub(super) fn close(&mut self, pass: PassPast, last: &Stream) {
        match pass.kind {
            Kind::None => {}
            Kind::Segments {
                slot,
                n_kept,
                is_last_layer,
                mut states,
                mut new,
            } => {
                if is_last_layer {
                    new = vec![last.whole().detach()];
                }
                for (list, state_btd) in states.iter_mut().zip(new) {
                    list.push(state_btd.narrow(2, 0, self.d_model).contiguous());
                    let n_old = list.len().saturating_sub(n_kept);
                    list.drain(..n_old);
                }
                self.segments.insert(slot, states);
            }
            Kind::Cache { slot, layers } => {
                let n_tokens = pass.n_earlier + pass.n_new;
                if let Some(slot) = slot {
                    self.caches.insert(slot, Cache { n_tokens, layers });
                }
            }
        }
    }

    /// The segments under the names of [`Memory::restore`].
    pub(super) fn named(&self) -> Vec<NamedTensor> {
        let mut all = Vec::new();
        for (slot, states) in &self.segments {
            for (layer, list) in states.iter().enumerate() {
                for (age, state_btd) in list.iter().enumerate() {
                    all.push(NamedTensor {
                        name: format!("memory.slot_{slot}.layer_{layer}.segment_{age}"),
                        tensor: state_btd.share(),
                    });
                }
            }
        }
        all
    }

    /// Replaces all segments.
    pub(super) fn restore(
        &mut self,
        memory: Vec<NamedTensor>,
        device: Device,
    ) -> Result<(), PluginError> {
        let d_model = self.d_model;
        let mut segments: BTreeMap<u32, Vec<Vec<Tensor>>> = BTreeMap::new();
        for NamedTensor { name, tensor } in memory {
            let state_btd = tensor.into_tensor();
            let size = state_btd.size();
            let place = parse(&name).filter(|&(_, layer, _)| layer < self.n_lists());
            let Some((slot, layer, age)) = place.filter(|_| size.len() == 3 && size[2] == d_model)
            else {
                return Err(PluginError::new("a remembered state does not fit the model")
                    .why(format!(
                        "`{name}` has the shape {size:?}; the model is {d_model} wide and has {} layers",
                        self.n_layers
                    ))
                    .fix("start the run with the arguments of its checkpoint"));
            };
            let states = segments.entry(slot).or_insert_with(|| self.no_states());
            let list = &mut states[layer];
            list.insert(age.min(list.len()), state_btd.to_device(device));
        }
        self.segments = segments;
        Ok(())
    }

    fn no_states(&self) -> Vec<Vec<Tensor>> {
        (0..self.n_lists()).map(|_| Vec::new()).collect()
    }

    fn n_lists(&self) -> usize {
        if self.config.is_last_layer {
            1
        } else {
            self.n_layers
        }
    }
}

impl PassPast {
    pub(super) fn is_cache(&self) -> bool {
        matches!(self.kind, Kind::Cache { .. })
    }

    /// The past of the layer at `place`, whose input is `x`.
    pub(super) fn enter(&mut self, place: usize, x: &Stream) -> LayerPast {
        match &mut self.kind {
            Kind::None => LayerPast::none(self.has_memory),
            Kind::Segments {
                is_last_layer,
                states,
                new,
                ..
            } => {
                if !*is_last_layer {
                    new.push(x.whole().detach());
                }
                let list = if *is_last_layer {
                    states.first()
                } else {
                    states.get(place)
                };
                match list.map_or(&[][..], Vec::as_slice) {
                    [] => LayerPast::none(self.has_memory),
                    list => {
                        let states_btd = padded(&Tensor::cat(list, 1), &x.whole().size()[2..]);
                        LayerPast::segments(states_btd, &self.mask)
                    }
                }
            }
            Kind::Cache { layers, .. } => {
                let earlier = layers.get_mut(place).and_then(Option::take);
                LayerPast::cache(earlier, self.n_earlier, self.has_memory, &self.mask)
            }
        }
    }

    /// Keeps what the layer left.
    pub(super) fn leave(&mut self, place: usize, past: LayerPast) {
        if let Kind::Cache { layers, .. } = &mut self.kind
            && let Some(kept) = layers.get_mut(place)
        {
            *kept = past.into_cache();
        }
    }
}

/// A copy of a cache in which each row is there as often as it takes to make `size` of them.
fn fork(
    layers: &[Option<KeyValues>],
    slot: u32,
    size: i64,
) -> Result<Vec<Option<KeyValues>>, PluginError> {
    let forked = |kept: &KeyValues| {
        let n_rows = kept.k_bshd.size()[0];
        if size % n_rows != 0 {
            return Err(other_batch_size("cache", slot, n_rows, size));
        }
        let repeat = |x: &Tensor| x.repeat_interleave_self_int(size / n_rows, 0, None);
        Ok(KeyValues {
            k_bshd: repeat(&kept.k_bshd),
            v_bshd: repeat(&kept.v_bshd),
        })
    };
    layers
        .iter()
        .map(|kept| kept.as_ref().map(forked).transpose())
        .collect()
}

/// `memory.slot_2.layer_11.segment_0`.
fn parse(name: &str) -> Option<(u32, usize, usize)> {
    let mut parts = name.split('.');
    let ("memory", slot, layer, segment, None) = (
        parts.next()?,
        parts.next()?.strip_prefix("slot_")?,
        parts.next()?.strip_prefix("layer_")?,
        parts.next()?.strip_prefix("segment_")?,
        parts.next(),
    ) else {
        return None;
    };
    Some((
        slot.parse().ok()?,
        layer.parse().ok()?,
        segment.parse().ok()?,
    ))
}

fn other_batch_size(what: &str, slot: u32, kept: i64, given: i64) -> PluginError {
    PluginError::new(format!("the {what} belongs to another batch size"))
        .why(format!(
            "slot {slot} holds {kept} sequences, the batch has {given}"
        ))
        .fix("reset the slot before its first batch of another size")
}
