//! Chooses the next token from a model's prediction. Where the prediction comes from, it does not know.

use moeut_plugin_api::PluginError;

/// How random the choice is.
///
/// The steps are those of nucleus sampling in their usual order:
/// ```text
/// p       = softmax(logits / temperature)
/// top-k   keeps the k likeliest tokens
/// top-p   keeps the likeliest of these until their share of what top-k left reaches p
/// draw    from the rest, in proportion to p
/// ```
/// Of two equally likely tokens the one of the lower id counts as likelier.
///
/// # Source
/// Fan et al., arXiv:1805.04833 (top-k); Holtzman et al., arXiv:1904.09751 (top-p).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// 0 or more; 0 takes the likeliest token.
    pub temperature: f64,
    /// 1 or more; all tokens if absent.
    pub top_k: Option<usize>,
    /// In `(0, 1]`; the token that reaches the share is kept, 1 keeps all.
    pub top_p: f64,
}

impl Choice {
    /// Draws a token id; `logits_v` has one number for each id of the vocabulary. A temperature of 0 uses no random
    /// number.
    ///
    /// # Errors
    /// If a logit is not a number or infinite: the weights are of no use.
    pub fn draw(&self, logits_v: &[f64], uniform: &mut Uniform) -> Result<i32, PluginError> {
        if let Some(id) = logits_v
            .iter()
            .position(|logit| logit.is_nan() || *logit == f64::INFINITY)
        {
            return Err(PluginError::new("the model's prediction is not a number")
                .why(format!("the logit of token {id} is {}", logits_v[id]))
                .fix("restore an earlier checkpoint: the weights of this one are broken"));
        }
        let id = if self.temperature > 0.0 {
            draw_by(&self.weights(logits_v), uniform.draw())
        } else {
            ranked(logits_v).first().copied().unwrap_or(0)
        };
        Ok(i32::try_from(id).unwrap_or(i32::MAX))
    }

    /// Probabilities up to a factor; 0 for tokens that are not kept.
    fn weights(&self, logits_v: &[f64]) -> Vec<f64> {
        let highest = logits_v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut weights: Vec<f64> = logits_v
            .iter()
            .map(|logit| ((logit - highest) / self.temperature).exp())
            .collect();
        let n_kept = self.top_k.map_or(weights.len(), |k| k.min(weights.len()));
        if n_kept == weights.len() && self.top_p >= 1.0 {
            return weights;
        }
        let mut kept = ranked(&weights);
        kept.truncate(n_kept);
        if self.top_p < 1.0 {
            let goal = self.top_p * kept.iter().map(|&id| weights[id]).sum::<f64>();
            let mut sum = 0.0;
            let reaches = |&id: &usize| {
                sum += weights[id];
                sum >= goal
            };
            let n_kept = kept
                .iter()
                .position(reaches)
                .map_or(kept.len(), |at| at + 1);
            kept.truncate(n_kept);
        }
        let mut is_kept = vec![false; weights.len()];
        for id in kept {
            is_kept[id] = true;
        }
        for (weight, is_kept) in weights.iter_mut().zip(is_kept) {
            if !is_kept {
                *weight = 0.0;
            }
        }
        weights
    }
}

/// Ids from the highest value to the lowest.
fn ranked(values: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..values.len()).collect();
    ids.sort_by(|&a, &b| values[b].total_cmp(&values[a])); // Stable: lower ids stay first.
    ids
}

/// The id in whose part of the line of all weights, laid end to end, `at` falls; `at` in `[0, 1)` of its length.
fn draw_by(weights: &[f64], at: f64) -> usize {
    let threshold = at * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let is_reached = |weight: &f64| {
        sum += weight;
        sum > threshold
    };
    // Rounding may keep the sum from the threshold, but never the last token that can be drawn from being one.
    weights
        .iter()
        .position(is_reached)
        .or_else(|| weights.iter().rposition(|&weight| weight > 0.0))
        .unwrap_or(0)
}

/// A stream of uniform numbers (`SplitMix64`), apart from libtorch's so that samples do not disturb training.
#[derive(Debug)]
pub struct Uniform(u64);

impl Uniform {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number of `0..n`; the bias of at most `n / 2⁵³` is of no concern here.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number below `n`"
    )]
    pub fn below(&mut self, n: usize) -> usize {
        ((self.draw() * n as f64) as usize).min(n.saturating_sub(1))
    }

    /// The next number in `[0, 1)`.
    pub fn draw(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Choice = Choice {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
    };
    const GREEDY: Choice = Choice {
        temperature: 0.0,
        ..PLAIN
    };

    fn logits(probabilities: &[f64]) -> Vec<f64> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    /// What is left of `probabilities`, as shares.
    fn left(choice: Choice, probabilities: &[f64]) -> Vec<f64> {
        let weights = choice.weights(&logits(probabilities));
        let sum: f64 = weights.iter().sum();
        let rounded = |weight: &f64| (weight / sum * 1e9).round() / 1e9;
        weights.iter().map(rounded).collect()
    }

    #[test]
    fn each_token_has_its_part_of_the_line() {
        let weights = [0.2, 0.0, 0.5, 0.3];
        for (at, id) in [
            (0.0, 0),
            (0.199, 0),
            (0.201, 2),
            (0.699, 2),
            (0.701, 3),
            (0.999, 3),
        ] {
            assert_eq!(draw_by(&weights, at), id, "{at}");
        }
        // A token that is not kept is never drawn, not even at the ends.
        assert_eq!(draw_by(&[0.0, 1.0, 0.0], 0.0), 1);
        assert_eq!(draw_by(&[0.0, 1.0, 0.0], 1.0), 1);
    }

    /// Pearson's statistic with 3 degrees of freedom is above 16.3 in one of a thousand honest runs; the seed is fixed.
    #[test]
    fn draws_follow_the_distribution() {
        let expected = [0.1, 0.2, 0.3, 0.4];
        let logits = logits(&expected);
        let mut uniform = Uniform::new(1);
        let n = 20_000.0;
        let mut counts = [0.0_f64; 4];
        for _ in 0..20_000 {
            let id = PLAIN.draw(&logits, &mut uniform).unwrap();
            counts[usize::try_from(id).unwrap()] += 1.0;
        }
        let statistic: f64 = counts
            .iter()
            .zip(expected)
            .map(|(count, p)| (count - n * p).powi(2) / (n * p))
            .sum();
        assert!(statistic < 16.3, "{statistic}: {counts:?}");
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let at = |temperature| {
            let choice = Choice {
                temperature,
                ..PLAIN
            };
            left(choice, &[0.2, 0.8])
        };
        assert_eq!(at(1.0), [0.2, 0.8]);
        assert_eq!(at(0.5), [0.058_823_529, 0.941_176_471]); // 0.04 : 0.64
        assert_eq!(at(f64::INFINITY), [0.5, 0.5]);
        assert_eq!(at(1e-300), [0.0, 1.0]);
    }

    #[test]
    fn top_k_keeps_the_likeliest_and_of_equals_the_first() {
        let at = |k| {
            let choice = Choice {
                top_k: Some(k),
                ..PLAIN
            };
            left(choice, &[0.2, 0.4, 0.2, 0.2])
        };
        assert_eq!(at(1), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(at(2), [0.333_333_333, 0.666_666_667, 0.0, 0.0]);
        assert_eq!(at(4), [0.2, 0.4, 0.2, 0.2]);
        assert_eq!(at(99), [0.2, 0.4, 0.2, 0.2]);
    }

    /// Probabilities are powers of two, so that sums are exact.
    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        let at = |top_p| left(Choice { top_p, ..PLAIN }, &[0.125, 0.5, 0.25, 0.125]);
        assert_eq!(at(1e-9), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(at(0.5), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(at(0.6), [0.0, 0.666_666_667, 0.333_333_333, 0.0]);
        assert_eq!(at(0.8), [0.142_857_143, 0.571_428_571, 0.285_714_286, 0.0]);
        assert_eq!(at(0.9), [0.125, 0.5, 0.25, 0.125]);
        assert_eq!(at(1.0), [0.125, 0.5, 0.25, 0.125]);
    }

    /// Of 1/2, 1/4, 1/8 and 1/8, the first two are 2/3 and 1/3 of what top-k 2 leaves: 0.6 then keeps one. The other
    /// order would keep two.
    #[test]
    fn top_p_is_a_share_of_what_top_k_leaves() {
        let choice = Choice {
            top_k: Some(2),
            top_p: 0.6,
            ..PLAIN
        };
        assert_eq!(
            left(choice, &[0.5, 0.25, 0.125, 0.125]),
            [1.0, 0.0, 0.0, 0.0]
        );
    }

    #[test]
    fn one_token_to_choose_from_is_the_likeliest() {
        let mut uniform = Uniform::new(3);
        for case in 0..100 {
            let logits: Vec<f64> = (0..7).map(|_| (uniform.draw() * 4.0).floor()).collect();
            let greedy = GREEDY.draw(&logits, &mut uniform).unwrap();
            for only_one in [
                Choice {
                    top_k: Some(1),
                    ..PLAIN
                },
                Choice {
                    top_p: 1e-9,
                    ..PLAIN
                },
            ] {
                assert_eq!(
                    only_one.draw(&logits, &mut uniform).unwrap(),
                    greedy,
                    "{case}: {logits:?}"
                );
            }
        }
    }

    #[test]
    fn a_prediction_that_is_not_a_number_is_an_error() {
        let mut uniform = Uniform::new(1);
        for choice in [PLAIN, GREEDY] {
            for bad in [f64::NAN, f64::INFINITY] {
                let error = choice.draw(&[0.0, bad], &mut uniform).unwrap_err();
                assert!(
                    error.why.starts_with("the logit of token 1 is"),
                    "{error:?}"
                );
            }
            // A token that cannot be is none: some models mask the vocabulary's rest so.
            let masked = [f64::NEG_INFINITY, 0.0];
            assert_eq!(choice.draw(&masked, &mut uniform).unwrap(), 1);
        }
    }
}
