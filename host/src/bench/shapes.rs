//! Shapes of layers: the paper's by name, others by numbers.

use super::misuse;
use crate::error::HostError;

/// A model's layer in numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    /// As typed.
    pub(super) name: String,
    /// Tokens per sequence.
    pub(super) seq_len: i64,
    /// All tokens of a call.
    pub(super) n_tokens: i64,
    /// Width of the residual stream.
    pub(super) d_model: i64,
    /// Feed-forward experts.
    pub(super) n_experts: i64,
    /// Those that a token uses.
    pub(super) top_k: i64,
    /// Their width.
    pub(super) d_expert: i64,
    /// Of the attention, if there is one.
    pub(super) heads: Option<Heads>,
}

/// Attention in numbers; every head selects two of its own experts.
#[expect(clippy::struct_field_names, reason = "the field's terms")]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Heads {
    /// Heads.
    pub(super) n_heads: i64,
    /// Experts of each.
    pub(super) n_experts: i64,
    /// Width of each.
    pub(super) d_head: i64,
}

/// Name, tokens of a sequence, sequences, `d_model`, experts, experts per token, width of an expert; heads, experts of a
/// head, width of a head. The paper's are those of its sweeps at 64 sequences a step, for 1B in four microbatches.
const KNOWN: [(&str, [i64; 6], [i64; 3]); 4] = [
    ("44M", [1024, 64, 412, 155, 12, 128], [4, 8, 82]),
    ("244M", [1024, 64, 1024, 387, 16, 128], [4, 10, 128]),
    ("1B", [1024, 16, 1536, 565, 24, 128], [6, 12, 128]),
    ("tiny", [64, 4, 64, 16, 4, 32], [2, 4, 32]),
];

/// What was typed, read; or the usual shapes of a device.
///
/// # Errors
/// Whatever `read` says.
pub(super) fn wanted<S>(
    typed: &[String],
    is_gpu: bool,
    read: impl Fn(&str) -> Result<S, HostError>,
) -> Result<Vec<(String, S)>, HostError> {
    let usual: &[&str] = if is_gpu {
        &["44M", "244M", "1B"]
    } else {
        &["tiny"]
    };
    let usual = usual.iter().filter(|_| typed.is_empty()).copied();
    let names = typed.iter().map(String::as_str).chain(usual);
    let read = |name: &str| Ok((name.to_owned(), read(name)?));
    names.map(read).collect()
}

impl Shape {
    fn known(name: &str) -> Option<Self> {
        let (_, [seq_len, n_sequences, d_model, n_experts, top_k, d_expert], heads) =
            KNOWN.into_iter().find(|(known, ..)| *known == name)?;
        let [n_heads, experts_of_head, d_head] = heads;
        Some(Self {
            name: name.to_owned(),
            seq_len,
            n_tokens: seq_len * n_sequences,
            d_model,
            n_experts,
            top_k,
            d_expert,
            heads: Some(Heads {
                n_heads,
                n_experts: experts_of_head,
                d_head,
            }),
        })
    }

    /// The σ-MoE layer that a user means.
    ///
    /// # Errors
    /// If it is neither a name nor numbers that go together.
    pub(super) fn of_moe(text: &str) -> Result<Self, HostError> {
        if let Some(known) = Self::known(text) {
            return Ok(known);
        }
        let [n_tokens, d_model, n_experts, top_k, d_expert] = numbers(
            text,
            "tokens x d_model x experts x top_k x width of an expert",
        )?;
        if top_k > n_experts {
            return Err(misuse(format!(
                "`-shape {text}` selects {top_k} of {n_experts} experts"
            )));
        }
        Ok(Self {
            name: text.to_owned(),
            seq_len: n_tokens,
            n_tokens,
            d_model,
            n_experts,
            top_k,
            d_expert,
            heads: None,
        })
    }

    /// The attention that a user means: `[sequences, tokens, heads, width]`.
    ///
    /// # Errors
    /// As [`Shape::of_moe`].
    pub(super) fn of_attention(text: &str) -> Result<[i64; 4], HostError> {
        match Self::known(text) {
            Some(Self {
                seq_len,
                n_tokens,
                heads: Some(heads),
                ..
            }) => Ok([n_tokens / seq_len, seq_len, heads.n_heads, heads.d_head]),
            _ => numbers(text, "sequences x tokens x heads x width of a head"),
        }
    }
}

/// `2x3x4`.
fn numbers<const N: usize>(text: &str, what: &str) -> Result<[i64; N], HostError> {
    let numbers: Option<Vec<i64>> = text
        .split('x')
        .map(|number| number.trim().parse().ok().filter(|&number| number > 0))
        .collect();
    let numbers = numbers.and_then(|numbers| numbers.try_into().ok());
    numbers.ok_or_else(|| {
        let names: Vec<&str> = KNOWN.iter().map(|(name, ..)| *name).collect();
        misuse(format!(
            "`-shape {text}` is none of {}, and not {what}",
            names.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_names_or_numbers() {
        let shape = Shape::of_moe("244M").unwrap();
        assert_eq!(
            (shape.n_tokens, shape.n_experts, shape.top_k),
            (65536, 387, 16)
        );
        let shape = Shape::of_moe("10x8x4x2x16").unwrap();
        assert_eq!((shape.n_tokens, shape.d_model, shape.d_expert), (10, 8, 16));
        assert_eq!(shape.heads, None);
        assert_eq!(Shape::of_attention("1B").unwrap(), [16, 1024, 6, 128]);
        assert_eq!(Shape::of_attention("2x3x4x5").unwrap(), [2, 3, 4, 5]);
    }

    #[test]
    fn other_shapes_are_refused_with_the_reason() {
        let moe = |text| Shape::of_moe(text).unwrap_err().render(false);
        assert!(moe("3B").contains("none of 44M, 244M, 1B, tiny"));
        assert!(moe("10x8x4x0x16").contains("`-shape 10x8x4x0x16`"));
        assert!(moe("10x8x4x5x16").contains("selects 5 of 4 experts"));
        assert!(Shape::of_attention("2x3x4").is_err());
    }
}
