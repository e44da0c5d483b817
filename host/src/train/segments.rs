//! Segment memory as the host sees it: which of the model's memories a batch goes on from, and when one is emptied.
//!
//! ```text
//! microbatch i of the training → slot i        validation → a slot of its own
//! ```
//! A row of a batch continues the text of the same row of the batch before, so its memory is what came just before.
//! What is remembered, and how far back, is the model's business; one without memory sees no past at all.

use super::run::Named;
use moeut_plugin_api::abi::client::ModelClient;
use moeut_plugin_api::{NamedTensor, Past, PluginError};
use moeut_torch::{IntoHandle, IntoTensor};
use tch::{Device, Kind, Tensor};

/// The slot of the validation; no training has so many microbatches.
const VALIDATION: u32 = u32::MAX;

/// Names of remembered tensors among a checkpoint's optimizer tensors begin so.
const PREFIX: &str = "memory/";

/// Hands out the past of each pass.
#[derive(Debug, Clone, Copy)]
pub struct Segments {
    has_memory: bool,
    drop_probability: f64,
}

impl Segments {
    /// For a model that `has_memory` or not; `drop_probability` is that of an empty memory in training, 0 to 1.
    pub fn new(has_memory: bool, drop_probability: f64) -> Self {
        Self {
            has_memory,
            drop_probability,
        }
    }

    /// Whether the order of the batches matters.
    pub fn is_on(self) -> bool {
        self.has_memory
    }

    /// The past of a microbatch in training; empty if `is_reset`, or by chance. Chance is libtorch's generator on the
    /// CPU, which checkpoints hold.
    pub fn training(self, microbatch: usize, is_reset: bool) -> Past {
        let is_dropped = self.has_memory
            && self.drop_probability > 0.0
            && Tensor::rand([], (Kind::Double, Device::Cpu)).double_value(&[])
                < self.drop_probability;
        self.past(
            u32::try_from(microbatch).unwrap_or(VALIDATION),
            is_reset || is_dropped,
        )
    }

    /// The past of a batch in validation, empty for a stream's first.
    pub fn validation(self, is_first: bool) -> Past {
        self.past(VALIDATION, is_first)
    }

    fn past(self, slot: u32, is_reset: bool) -> Past {
        if self.has_memory {
            Past::Segments { slot, is_reset }
        } else {
            Past::None
        }
    }

    /// What the model remembers, under the names of a checkpoint; shared, not copied.
    ///
    /// # Errors
    /// If the plugin panics.
    pub(super) fn tensors(self, model: &ModelClient) -> Result<Named, PluginError> {
        if !self.has_memory {
            return Ok(Vec::new());
        }
        let memory = model.memory()?.into_iter();
        Ok(memory
            .map(|item| (format!("{PREFIX}{}", item.name), item.tensor.into_tensor()))
            .collect())
    }

    /// Replaces what the model remembers by what is there of it among a checkpoint's tensors.
    ///
    /// # Errors
    /// If it is another model's.
    pub(super) fn restore(
        self,
        model: &mut ModelClient,
        stored: &Named,
    ) -> Result<(), PluginError> {
        if !self.has_memory {
            return Ok(());
        }
        let memory = stored.iter().filter_map(|(name, tensor)| {
            Some(NamedTensor {
                name: name.strip_prefix(PREFIX)?.to_owned(),
                tensor: tensor.share(),
            })
        });
        model.set_memory(memory.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_without_memory_has_no_past() {
        let none = Segments::new(false, 1.0);
        assert_eq!(none.training(0, true), Past::None);
        assert_eq!(none.validation(true), Past::None);
    }

    #[test]
    fn each_microbatch_has_a_memory_and_validation_another() {
        let segments = Segments::new(true, 0.0);
        let past = |slot, is_reset| Past::Segments { slot, is_reset };
        assert_eq!(segments.training(0, true), past(0, true));
        assert_eq!(segments.training(3, false), past(3, false));
        assert_eq!(segments.validation(false), past(u32::MAX, false));
    }

    #[test]
    fn memory_is_dropped_as_often_as_asked() {
        moeut_torch::rng::seed(1).unwrap();
        let n_dropped = |probability| {
            let segments = Segments::new(true, probability);
            let is_reset = |past| matches!(past, Past::Segments { is_reset: true, .. });
            (0..1000)
                .filter(|_| is_reset(segments.training(0, false)))
                .count()
        };
        assert_eq!((n_dropped(0.0), n_dropped(1.0)), (0, 1000));
        // Five standard deviations of a binomial distribution.
        assert!(n_dropped(0.25).abs_diff(250) < 69);
    }
}
