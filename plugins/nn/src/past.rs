//! What a layer sees of the tokens before its input: the states of earlier segments, or cached keys and values.
//!
//! An attention layer asks it three questions: what to make keys and values from, where they are, and who may see whom.
//! Which states are kept, and for how long, is the business of [`crate::lm`].

use crate::Stream;
use tch::{Device, Kind, Tensor};

/// Which keys a query may see; `T` queries, `S` keys.
#[derive(Debug)]
pub enum Mask {
    /// As many keys as queries; each query sees its own and the earlier ones.
    Causal,
    /// All.
    Everything,
    /// Bool `[T, S]`, true where visible.
    Explicit(Tensor),
}

impl Mask {
    /// For `n_new` tokens that follow `n_earlier` ones and see all of them and, causally, each other.
    pub fn after(n_earlier: i64, n_new: i64, device: Device) -> Self {
        if n_earlier == 0 {
            Self::Causal
        } else if n_new == 1 {
            Self::Everything
        } else {
            Self::Explicit(all_visible(n_earlier, n_new, device).tril(n_earlier))
        }
    }

    /// The same, but each token sees only the `n_earlier` tokens up to itself, so that all see equally far.
    pub fn window(n_earlier: i64, n_new: i64, device: Device) -> Self {
        if n_earlier == 0 {
            return Self::Causal;
        }
        let visible = all_visible(n_earlier, n_new, device);
        Self::Explicit(visible.tril(n_earlier).triu(1))
    }

    /// As a tensor, bool `[T, S]`; `n_queries` and `n_keys` are those of the product that is masked.
    pub fn tensor(&self, n_queries: i64, n_keys: i64, device: Device) -> Tensor {
        let ones = || Tensor::ones([n_queries, n_keys], (Kind::Bool, device));
        match self {
            Self::Causal => ones().tril(0),
            Self::Everything => ones(),
            Self::Explicit(visible_ts) => visible_ts.shallow_clone(),
        }
    }

    fn share(&self) -> Self {
        match self {
            Self::Causal => Self::Causal,
            Self::Everything => Self::Everything,
            Self::Explicit(visible_ts) => Self::Explicit(visible_ts.shallow_clone()),
        }
    }
}

fn all_visible(n_earlier: i64, n_new: i64, device: Device) -> Tensor {
    Tensor::ones([n_new, n_earlier + n_new], (Kind::Bool, device))
}

/// Rotated keys and values of all tokens so far, `[B, S, H, d]` each.
#[derive(Debug)]
pub struct KeyValues {
    /// Keys, at their positions.
    pub k_bshd: Tensor,
    /// Values.
    pub v_bshd: Tensor,
}

impl KeyValues {
    fn share(&self) -> Self {
        Self {
            k_bshd: self.k_bshd.shallow_clone(),
            v_bshd: self.v_bshd.shallow_clone(),
        }
    }
}

/// The past of one application of a layer.
#[derive(Debug)]
pub struct LayerPast {
    kind: Kept,
    /// Whether the model was made for segment memory, so that attended states are normalized on their own.
    has_memory: bool,
    n_earlier: i64,
    mask: Mask,
}

#[derive(Debug)]
enum Kept {
    Nothing,
    /// `[B, M, D]`, detached.
    States(Tensor),
    /// Nothing before the first token.
    Cache(Option<KeyValues>),
}

impl LayerPast {
    /// The tokens stand alone.
    pub fn none(has_memory: bool) -> Self {
        Self {
            kind: Kept::Nothing,
            has_memory,
            n_earlier: 0,
            mask: Mask::Causal,
        }
    }

    /// The states of earlier segments at this place of the stack, `[B, M, D]`.
    pub fn segments(states_bmd: Tensor, mask: &Mask) -> Self {
        Self {
            n_earlier: states_bmd.size()[1],
            kind: Kept::States(states_bmd),
            has_memory: true,
            mask: mask.share(),
        }
    }

    /// The keys and values of `n_earlier` tokens.
    pub fn cache(
        earlier: Option<KeyValues>,
        n_earlier: i64,
        has_memory: bool,
        mask: &Mask,
    ) -> Self {
        Self {
            kind: Kept::Cache(earlier),
            has_memory,
            n_earlier,
            mask: mask.share(),
        }
    }

    /// The same once more, sharing its tensors.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            kind: match &self.kind {
                Kept::Nothing => Kept::Nothing,
                Kept::States(states_bmd) => Kept::States(states_bmd.shallow_clone()),
                Kept::Cache(kept) => Kept::Cache(kept.as_ref().map(KeyValues::share)),
            },
            has_memory: self.has_memory,
            n_earlier: self.n_earlier,
            mask: self.mask.share(),
        }
    }

    /// What keys and values are made from, `[B, S, D]`, where that is not just the layer's input `[B, T, D]`.
    ///
    /// A model made for segment memory gets an answer also when nothing is remembered: its post-layernorm blocks
    /// normalize what they attend to, but not what queries are made from, and were trained so.
    pub fn attended(&self, x: &Stream) -> Option<Tensor> {
        match &self.kind {
            Kept::States(states_bmd) => Some(Tensor::cat(&[states_bmd, x.whole()], 1)),
            Kept::Nothing | Kept::Cache(_) => self.has_memory.then(|| x.whole().shallow_clone()),
        }
    }

    /// Position of the first query.
    pub fn query_offset(&self) -> i64 {
        self.n_earlier
    }

    /// Position of the first key that is made now.
    pub fn key_offset(&self) -> i64 {
        match self.kind {
            Kept::Nothing | Kept::States(_) => 0,
            Kept::Cache(_) => self.n_earlier,
        }
    }

    /// All keys and values to attend to, given those made now, the keys rotated; a cache keeps them.
    pub fn joined(&mut self, k_bshd: Tensor, v_bshd: Tensor) -> (Tensor, Tensor) {
        let Kept::Cache(earlier) = &mut self.kind else {
            return (k_bshd, v_bshd);
        };
        let (k_bshd, v_bshd) = match earlier.take() {
            None => (k_bshd, v_bshd),
            Some(earlier) => (
                Tensor::cat(&[earlier.k_bshd, k_bshd], 1),
                Tensor::cat(&[earlier.v_bshd, v_bshd], 1),
            ),
        };
        *earlier = Some(KeyValues {
            k_bshd: k_bshd.detach(),
            v_bshd: v_bshd.detach(),
        });
        (k_bshd, v_bshd)
    }

    /// Who may see whom.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    /// What a cache holds after the layer.
    pub fn into_cache(self) -> Option<KeyValues> {
        match self.kind {
            Kept::Nothing | Kept::States(_) => None,
            Kept::Cache(kept) => kept,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(mask: &Mask, n_queries: i64, n_keys: i64) -> Vec<String> {
        let visible = mask.tensor(n_queries, n_keys, Device::Cpu);
        let row = |t| {
            let row = Vec::<bool>::try_from(visible.get(t)).unwrap();
            row.iter().map(|&is| if is { '1' } else { '.' }).collect()
        };
        (0..n_queries).map(row).collect()
    }

    #[test]
    fn history_is_visible_and_the_rest_causal() {
        assert_eq!(
            picture(&Mask::after(0, 3, Device::Cpu), 3, 3),
            ["1..", "11.", "111"]
        );
        assert_eq!(
            picture(&Mask::after(2, 3, Device::Cpu), 3, 5),
            ["111..", "1111.", "11111"]
        );
        assert_eq!(picture(&Mask::after(4, 1, Device::Cpu), 1, 5), ["11111"]);
    }

    /// Two earlier segments of two tokens: the oldest one is seen ever less, all rows see as many.
    #[test]
    fn a_window_sees_equally_far_from_everywhere() {
        assert_eq!(
            picture(&Mask::window(4, 2, Device::Cpu), 2, 6),
            [".1111.", "..1111"]
        );
    }
}
