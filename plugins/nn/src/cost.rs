//! What a layer costs: multiply-accumulates, and the activations that it keeps for the backward pass.
//!
//! Multiply-accumulates are counted as the paper's plots count them (reference `paper/moe_universal/common.py`), so that
//! totals can be compared: products of one forward pass of one sequence, without embedding, output, norms and softmax.

use tch::Kind;

/// One sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Tokens, `T`.
    pub n_tokens: u64,
    /// Earlier segments of the same length that each token attends to.
    pub n_segments: u64,
    /// Bytes of an element of the residual stream.
    pub stream_bytes: u64,
    /// Bytes of an element of a matrix product.
    pub product_bytes: u64,
    /// Whether what costs little to make is made again instead of being kept.
    pub is_frugal: bool,
}

impl Sequence {
    /// Tokens that are attended to.
    pub fn n_attended(&self) -> u64 {
        self.n_tokens * (1 + self.n_segments)
    }

    /// Bytes that are kept of an element of a layer's input: of the stream, or of a rounded copy alone.
    pub fn input_bytes(&self) -> u64 {
        if self.is_frugal {
            self.product_bytes
        } else {
            self.stream_bytes
        }
    }

    /// The same of a hidden unit.
    pub fn hidden_bytes(&self) -> u64 {
        if self.is_frugal {
            0
        } else {
            self.product_bytes
        }
    }

    /// The same of a router's logit and its logarithmic softmax for the regularizer, each at least in single precision.
    pub(crate) fn router_bytes(&self) -> u64 {
        if self.is_frugal { 0 } else { 2 * 4 }
    }
}

/// Of one application, or summed over several; parts by name, each name once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-accumulates of the forward pass.
    pub macs: Vec<(&'static str, u64)>,
    /// Bytes kept for the backward pass. An estimate: what any kernel has to keep, without what some keep beyond it.
    pub kept_bytes: Vec<(&'static str, u64)>,
}

impl Cost {
    /// Adds multiply-accumulates.
    #[must_use]
    pub fn macs(mut self, part: &'static str, n: u64) -> Self {
        add(&mut self.macs, part, n);
        self
    }

    /// Adds bytes, if there are any.
    #[must_use]
    pub fn kept(mut self, part: &'static str, n: u64) -> Self {
        if n > 0 {
            add(&mut self.kept_bytes, part, n);
        }
        self
    }

    /// The sum.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for &(part, n) in &other.macs {
            add(&mut self.macs, part, n);
        }
        for &(part, n) in &other.kept_bytes {
            add(&mut self.kept_bytes, part, n);
        }
        self
    }
}

fn add(parts: &mut Vec<(&'static str, u64)>, part: &'static str, n: u64) {
    match parts.iter_mut().find(|(name, _)| *name == part) {
        Some((_, sum)) => *sum += n,
        None => parts.push((part, n)),
    }
}

/// Bytes of an element.
pub fn element_bytes(kind: Kind) -> u64 {
    match kind {
        Kind::Double => 8,
        Kind::Half | Kind::BFloat16 => 2,
        _ => 4,
    }
}

/// A width or count as layers hold them.
pub(crate) fn count(n: i64) -> u64 {
    n.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_name_are_summed() {
        let one = Cost::default().macs("router", 2).macs("experts", 5);
        let two = Cost::default().macs("experts", 1).kept("experts", 8);
        let sum = one.plus(&two);
        assert_eq!(sum.macs, [("router", 2), ("experts", 6)]);
        assert_eq!(sum.kept_bytes, [("experts", 8)]);
    }
}
