//! What the model is made of, and what a sequence costs: counted, not measured.

use crate::config::Layers;
use moeut_plugin_api::{LayerSummary, ModelSummary};

/// Bytes of an activation in single precision.
const N_BYTES: u64 = 4;

/// The stack `order` (for each place the index of its distinct layer) on one sequence of `seq_len` tokens.
///
/// Multiply-accumulates of matrix products, all of them counted: halted tokens, masked keys. Embedding and output are
/// left out, as in the paper's accounting, which has no rule for a SUT. Activations are what the backward pass reads
/// of one sequence in single precision without dropout; mixed precision keeps about half.
pub(crate) fn of(layers: &Layers, order: &[usize], seq_len: u64) -> ModelSummary {
    let per_layer = Counts::new(layers, seq_len);
    let n_layers = order.len() as u64;
    let n_halting = if layers.can_halt {
        n_layers.saturating_sub(1)
    } else {
        0
    };
    let parts = |of: fn(&Counts) -> [u64; 4]| {
        let [attention, feed_forward, routers, halting] = of(&per_layer);
        let mut parts = vec![
            ("attention".to_owned(), n_layers * attention),
            ("feed-forward".to_owned(), n_layers * feed_forward),
            ("routers".to_owned(), n_layers * routers),
        ];
        if layers.can_halt {
            parts.push(("halting".to_owned(), n_halting * halting));
        }
        parts
    };
    ModelSummary {
        layers: order
            .iter()
            .map(|&index| LayerSummary {
                unique_index: index as u64,
                what: describe(layers),
            })
            .collect(),
        macs: parts(|counts| counts.macs),
        activation_bytes: parts(|counts| counts.activations.map(|n| n * N_BYTES)),
    }
}

/// Of one layer: attention, feed-forward, routers, halting.
struct Counts {
    macs: [u64; 4],
    /// Numbers, not bytes.
    activations: [u64; 4],
}

impl Counts {
    fn new(layers: &Layers, t: u64) -> Self {
        let (attention, feed_forward) = (&layers.attention, &layers.feed_forward);
        let d = count(layers.d_model);
        let (e_a, k_a) = (count(attention.gate.n_experts), count(attention.gate.top_k));
        let (e_f, k_f) = (
            count(feed_forward.gate.n_experts),
            count(feed_forward.gate.top_k),
        );
        let n_heads = count(attention.n_heads);
        let width = n_heads * count(attention.d_head);
        let d_expert = count(feed_forward.d_expert);
        let n_positions = count(attention.max_distance).min(t);
        // q and o of each expert, k and v; scores and mixture; positions.
        let attention_macs =
            2 * t * d * width * (k_a + 1) + 2 * k_a * width * t * t + k_a * width * t * n_positions;
        // Probabilities; input; q, mixture and gated output rows of each expert; k and v.
        let attention_numbers =
            n_heads * k_a * t * t + t * d + k_a * t * (2 * width + d) + 2 * t * width;
        Self {
            macs: [
                attention_macs,
                2 * t * k_f * d * d_expert,
                t * (2 * d * d + d * (e_a + e_f)),
                t * (d * d + 2 * d),
            ],
            activations: [
                attention_numbers,
                // Input, hidden units before and after the non-linearity, gated output rows.
                t * d + 2 * k_f * t * d_expert + k_f * t * d,
                // Hidden layer, and logits, probabilities and gates of both routers.
                t * (2 * d + 3 * (e_a + e_f)),
                // Hidden layer before and after its non-linearity, what halted, the mixture.
                4 * t * d,
            ],
        }
    }
}

fn describe(layers: &Layers) -> String {
    let (attention, feed_forward) = (&layers.attention, &layers.feed_forward);
    format!(
        "expert attention ({} of {}, {} heads of {}) + experts ({} of {}, width {}), {}-layernorm{}",
        attention.gate.top_k,
        attention.gate.n_experts,
        attention.n_heads,
        attention.d_head,
        feed_forward.gate.top_k,
        feed_forward.gate.n_experts,
        feed_forward.d_expert,
        if layers.is_pre_ln { "pre" } else { "post" },
        if layers.can_halt { ", halting" } else { "" },
    )
}

/// Counts were checked to be positive.
fn count(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn summary(variant: &str, seq_len: u64) -> ModelSummary {
        let config = testing::config(&[
            ("transformer.variant", variant),
            ("transformer.head_projection_size", "8"),
            ("state_size", "10"),
            ("moe.n_experts", "7"),
            ("moe.expert_size", "6"),
            ("pkm.n_heads", "3"),
            ("moe.att.n_experts", "5"),
            ("moe.att.k", "2"),
            ("moe.att.expert_size", "16"),
            ("sut.max_relative_positions", "4"),
        ]);
        let (_, layers) = config.resolve(false).unwrap();
        of(&layers, &[0, 0, 0], seq_len)
    }

    /// One token, no halting, by hand: q and o of two experts, k and v: 6 · 10 · 16; scores, mixture and positions of
    /// two experts of width 16: 3 · 32; feed-forward 2 · 3 · 10 · 6; two routers 2 · 100 + 10 · (5 + 7).
    #[test]
    fn counts_by_hand() {
        let named = |parts: &[(&str, u64)]| -> Vec<(String, u64)> {
            let owned = |&(name, n): &(&str, u64)| (name.to_owned(), n);
            parts.iter().map(owned).collect()
        };
        assert_eq!(
            summary("sut_universal", 1).macs,
            named(&[
                ("attention", 3 * (960 + 96)),
                ("feed-forward", 3 * 360),
                ("routers", 3 * 320)
            ])
        );
        // The first layer does not ask who halts.
        assert_eq!(
            summary("actsut_universal", 1).macs[3],
            ("halting".to_owned(), 2 * 120)
        );
        // Only products of queries with keys and values grow faster than the sequence; positions stop at four.
        let long = summary("sut_universal", 1000).macs[0].1;
        assert_eq!(long, 3 * (960_000 + 2 * 32 * 1_000_000 + 32 * 1000 * 4));
    }

    #[test]
    fn layers_say_what_they_are() {
        let summary = summary("preln_actsut_universal", 8);
        assert_eq!(summary.layers.len(), 3);
        assert_eq!(summary.layers[2].unique_index, 0);
        assert_eq!(
            summary.layers[2].what,
            "expert attention (2 of 5, 2 heads of 8) + experts (3 of 7, width 6), pre-layernorm, halting"
        );
        // Probabilities of 2 heads and 2 experts: 4 · 8 · 8; input 80; 16 rows of 16 + 16 + 10; k and v 256.
        let attention = 256 + 80 + 16 * 42 + 256;
        assert_eq!(summary.activation_bytes[0].1, 3 * 4 * attention);
    }
}
