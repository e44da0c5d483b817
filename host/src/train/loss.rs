//! The loss of next-token prediction: which tokens a model must say, and how surprised it is.

use super::stream::BEHIND_END;
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use tch::{Kind, Reduction, Tensor};

/// Cross-entropy of each target, in nats, at least in float32; `[seq_len · batch]`. 0 behind the end of a document.
///
/// # Errors
/// If memory does not suffice: it is the largest tensor of a step.
pub(super) fn token_losses(
    logits_tbv: &Tensor,
    targets_tb: &Tensor,
) -> Result<Tensor, PluginError> {
    let kind = Kind::Float.max(logits_tbv.kind());
    let vocab_size = logits_tbv.size()[2];
    logits_tbv
        .f_reshape([-1, vocab_size])
        .and_then(|logits| logits.f_to_kind(kind))
        .and_then(|logits| {
            logits.f_cross_entropy_loss(
                &targets_tb.f_reshape([-1])?,
                None::<&Tensor>,
                Reduction::None,
                BEHIND_END,
                0.0,
            )
        })
        .or_plugin_error("the loss cannot be computed")
}

/// The mean of [`token_losses`] over the `n_targets` that are not behind the end of a document; a scalar.
pub(super) fn mean_loss(
    logits_tbv: &Tensor,
    targets_tb: &Tensor,
    n_targets: usize,
) -> Result<Tensor, PluginError> {
    let losses = token_losses(logits_tbv, targets_tb)?;
    Ok(losses.sum(losses.kind()) / n_targets as f64)
}

/// Cuts `[seq_len + 1, batch]` into what the model sees, with token 0 behind the end of a document, and what it must say.
pub(super) fn inputs_and_targets(tokens_tb: &Tensor) -> (Tensor, Tensor) {
    let seq_len = tokens_tb.size()[0] - 1;
    (
        tokens_tb.narrow(0, 0, seq_len).clamp_min(0),
        tokens_tb.narrow(0, 1, seq_len),
    )
}

/// The wider of two floating-point types.
trait Wider {
    fn max(self, other: Self) -> Self;
}

impl Wider for Kind {
    fn max(self, other: Self) -> Self {
        if other == Self::Double { other } else { self }
    }
}
