//! Continues a text with the model's own predictions.

use super::{TrainError, forward, int};
use moeut_plugin_api::abi::client::{ModelClient, TokenDatasetClient};
use tch::{Device, Kind, Tensor};

/// How to continue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Tokens to add.
    pub length: usize,
    /// Logits are divided by it; 0 takes the likeliest token.
    pub temperature: f64,
    /// The model's context: earlier tokens are forgotten.
    pub seq_len: usize,
}

/// A stream of uniform numbers (`SplitMix64`), apart from libtorch's so that samples do not disturb training.
pub struct Uniform(u64);

impl Uniform {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number in `[0, 1)`.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Continues `prompt`; returns prompt and continuation as text.
///
/// # Errors
/// If the tokenizer or the model fails.
pub fn generate(
    model: &mut ModelClient,
    tokenizer: &TokenDatasetClient,
    prompt: &str,
    sampling: &Sampling,
    device: Device,
    uniform: &mut Uniform,
) -> Result<String, TrainError> {
    let _no_grad = tch::no_grad_guard();
    let mut ids = tokenizer.encode(prompt)?;
    for _ in 0..sampling.length {
        let context = &ids[ids.len().saturating_sub(sampling.seq_len)..];
        let tokens = Tensor::from_slice(context)
            .to_kind(Kind::Int64)
            .unsqueeze(1)
            .to_device(device);
        let output = forward(model, &tokens, false, false)?;
        let last = output.logits.get(int(context.len()) - 1).get(0);
        ids.push(pick(&last, sampling.temperature, uniform));
    }
    Ok(tokenizer.decode(&ids)?)
}

/// Draws a token id from `softmax(logits / temperature)`.
fn pick(logits_v: &Tensor, temperature: f64, uniform: &mut Uniform) -> i32 {
    let id = if temperature > 0.0 {
        let cumulative = (logits_v.to_kind(Kind::Double) / temperature)
            .softmax(-1, Kind::Double)
            .cumsum(0, Kind::Double);
        let threshold = uniform.next() * cumulative.double_value(&[-1]);
        cumulative
            .le(threshold)
            .sum(Kind::Int64)
            .int64_value(&[])
            .min(int(logits_v.numel()) - 1)
    } else {
        logits_v.argmax(0, false).int64_value(&[])
    };
    i32::try_from(id).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let logits = Tensor::from_slice(&[0.2_f64, 0.5, 0.3]).log();
        let mut uniform = Uniform::new(1);
        let mut counts = [0.0_f64; 3];
        for _ in 0..10_000 {
            counts[usize::try_from(pick(&logits, 1.0, &mut uniform)).unwrap()] += 1e-4;
        }
        for (count, expected) in counts.iter().zip([0.2, 0.5, 0.3]) {
            assert!((count - expected).abs() < 0.02, "{counts:?}");
        }
        assert_eq!(pick(&logits, 0.0, &mut uniform), 1);
    }
}
