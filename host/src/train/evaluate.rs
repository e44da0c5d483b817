//! Validation: token-exact loss over every window of a stream, in the parameters' own precision.

use super::batches::read_windows;
use super::{TrainError, forward, int, token_losses};
use crate::signals::Signals;
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use std::sync::Arc;
use tch::{Device, Kind};

/// A stream to validate on.
pub struct EvalStream {
    /// Name in the logs, such as `val`.
    pub name: String,
    /// The data.
    pub dataset: Arc<TokenDatasetClient>,
    /// Its windows.
    pub n_windows: u64,
    /// Tokens per window.
    pub seq_len: usize,
    /// UTF-8 bytes of text per token, if known.
    pub utf8_bytes_per_token: Option<f64>,
}

/// The result of a validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Nats per token.
    pub loss: f64,
    /// Share of tokens that were the likeliest, 0 to 1.
    pub accuracy: f64,
    /// Bits per UTF-8 byte of the text, if its bytes were counted.
    pub bits_per_byte: Option<f64>,
}

impl Scores {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Scores a model on a stream; no scores if a signal ends it.
///
/// # Errors
/// If the data cannot be read or the model fails.
pub fn evaluate(
    model: &mut ModelClient,
    stream: &EvalStream,
    batch_size: usize,
    device: Device,
    signals: &Signals,
) -> Result<Option<Scores>, TrainError> {
    let _no_grad = tch::no_grad_guard();
    let (mut loss, mut n_right, mut n_tokens) = (0.0, 0.0, 0.0);
    let windows: Vec<u64> = (0..stream.n_windows).collect();
    for batch in windows.chunks(batch_size) {
        if signals.is_ending() {
            return Ok(None);
        }
        let tokens = read_windows(&stream.dataset, batch, stream.seq_len)?.to_device(device);
        let targets = tokens.narrow(0, 1, int(stream.seq_len));
        let output = forward(
            model,
            &tokens.narrow(0, 0, int(stream.seq_len)),
            false,
            false,
        )?;
        loss += token_losses(&output.logits, &targets)?
            .sum(Kind::Double)
            .double_value(&[]);
        let right = output.logits.argmax(-1, false).eq_tensor(&targets);
        n_right += right.sum(Kind::Double).double_value(&[]);
        n_tokens += targets.numel() as f64;
    }
    let loss = loss / n_tokens;
    Ok(Some(Scores {
        loss,
        accuracy: n_right / n_tokens,
        bits_per_byte: stream
            .utf8_bytes_per_token
            .map(|bytes| loss / std::f64::consts::LN_2 / bytes),
    }))
}
