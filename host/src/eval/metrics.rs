//! From probabilities of tokens to the numbers that are reported. No model and no tokenizer takes part.
//!
//! ```text
//! choices     score      = Σ log p(token)    over the tokens after the first, prefix included
//!             normalized = Σ log p(token) / n    over the n tokens of the option alone
//!             right      = the right option's score is strictly greater than every other
//!             loss       = −Σ log p / n    over the tokens after the first of all options with their prefixes
//! last word   accuracy/total             the likeliest tokens at the last len(w) places end in " w"
//!             accuracy/openai_last_token the likeliest token at the last place is the last one of encode(" w")
//!             perplexity                 exp of the mean over passages of the mean loss of the last word's tokens
//!             lm_loss, lm_perplexity     over all tokens of all passages, and exp of that
//! ```
//! `len(w)` is the number of *characters* of the word `w`, taken for a number of tokens: the reference does so, and
//! published numbers depend on it. All sums are in double precision.
//!
//! Source: reference `dataset/text/lambada.py`, `dataset/text/probability_compare_dataset.py`.

use super::item::Item;
use moeut_plugin_api::PluginError;
use std::collections::BTreeMap;

/// What a model said of one option and what comes before it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Predicted {
    /// `log p` of each token after the first, nats.
    pub log_p: Vec<f64>,
    /// The likeliest token at each of these places; empty unless asked for.
    pub best: Vec<i32>,
}

/// A number under its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Metric {
    /// Below the set's name: `accuracy/group_average`.
    pub name: String,
    /// The value.
    pub value: f64,
    /// How many questions, groups or tokens it is made of.
    pub n: u64,
}

/// The metrics of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct SetScores {
    /// The set.
    pub name: String,
    /// All of them, in the order of reports.
    pub metrics: Vec<Metric>,
    /// Nats per token.
    pub loss: f64,
    /// The one that stands for the set, 0 to 1: of choices the average over groups, of last words `total`.
    pub accuracy: f64,
    /// Whether it counts in `mean_loss` and `mean_accuracy`: as in the reference, last words do and choices do not.
    pub is_in_means: bool,
}

impl SetScores {
    /// A metric's value.
    pub fn get(&self, name: &str) -> Option<f64> {
        let metric = self.metrics.iter().find(|metric| metric.name == name)?;
        Some(metric.value)
    }
}

/// The score of an option of which the model said `log_p`, behind a prefix of `n_prefix` tokens.
pub fn score(log_p: &[f64], n_prefix: usize, is_normalized: bool) -> f64 {
    if is_normalized {
        let own = &log_p[n_prefix.saturating_sub(1)..];
        own.iter().sum::<f64>() / own.len() as f64
    } else {
        log_p.iter().sum()
    }
}

/// Whether the right option's score is strictly greater than every other; never if it is not a number.
pub fn is_right(scores: &[f64], answer: usize) -> bool {
    scores
        .iter()
        .enumerate()
        .all(|(option, score)| option == answer || scores[answer] > *score)
}

/// How many questions were answered right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    n_right: u64,
    n: u64,
}

impl Tally {
    fn add(&mut self, is_right: bool) {
        self.n_right += u64::from(is_right);
        self.n += 1;
    }

    fn share(self) -> f64 {
        self.n_right as f64 / self.n as f64
    }
}

/// Accuracy by group, its mean over groups, and over all questions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accuracy(BTreeMap<String, Tally>);

impl Accuracy {
    /// Counts a question.
    pub fn add(&mut self, group: &str, is_right: bool) {
        self.0.entry(group.to_owned()).or_default().add(is_right);
    }

    /// Mean over groups, 0 to 1.
    pub fn group_average(&self) -> f64 {
        self.0.values().map(|tally| tally.share()).sum::<f64>() / self.0.len() as f64
    }

    /// Over all questions, 0 to 1.
    pub fn seq_average(&self) -> f64 {
        self.all().share()
    }

    fn all(&self) -> Tally {
        self.0.values().fold(Tally::default(), |sum, tally| Tally {
            n_right: sum.n_right + tally.n_right,
            n: sum.n + tally.n,
        })
    }

    fn metrics(&self) -> Vec<Metric> {
        let groups = self
            .0
            .iter()
            .map(|(group, tally)| metric(&format!("accuracy/{group}"), tally.share(), tally.n));
        let averages = [
            metric(
                "accuracy/group_average",
                self.group_average(),
                self.0.len() as u64,
            ),
            metric("accuracy/seq_average", self.seq_average(), self.all().n),
        ];
        groups.chain(averages).collect()
    }
}

/// Mean of losses.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    n: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.n += 1;
    }

    fn value(self) -> f64 {
        self.sum / self.n as f64
    }
}

fn metric(name: &str, value: f64, n: u64) -> Metric {
    Metric {
        name: name.to_owned(),
        value,
        n,
    }
}

/// The metrics of choices; `predicted` is by item and option.
pub fn choice_scores(
    set: &str,
    items: &[Item],
    predicted: &[Vec<Predicted>],
    is_normalized: bool,
) -> SetScores {
    let mut accuracy = Accuracy::default();
    let mut loss = Mean::default();
    for (item, options) in items.iter().zip(predicted) {
        let scores: Vec<f64> = options
            .iter()
            .map(|option| score(&option.log_p, item.prefix.len(), is_normalized))
            .collect();
        accuracy.add(&item.group, is_right(&scores, item.answer));
        for log_p in options.iter().flat_map(|option| &option.log_p) {
            loss.add(-log_p);
        }
    }
    let mut metrics = vec![metric("loss", loss.value(), loss.n)];
    metrics.extend(accuracy.metrics());
    SetScores {
        name: set.to_owned(),
        metrics,
        loss: loss.value(),
        accuracy: accuracy.group_average(),
        is_in_means: false,
    }
}

/// The metrics of last words; `decode` is the tokenizer's.
///
/// # Errors
/// If the tokenizer refuses what the model says.
pub fn last_word_scores(
    set: &str,
    items: &[Item],
    predicted: &[Vec<Predicted>],
    decode: impl Fn(&[i32]) -> Result<String, PluginError>,
) -> Result<SetScores, PluginError> {
    let (mut total, mut last_token) = (Tally::default(), Tally::default());
    let (mut word_loss, mut loss) = (Mean::default(), Mean::default());
    for (item, options) in items.iter().zip(predicted) {
        let (Some(last), Some(said)) = (&item.last_word, options.get(item.answer)) else {
            continue;
        };
        let n_chars = last.word.chars().count();
        let end = &said.best[said.best.len().saturating_sub(n_chars)..];
        let text = decode(end)?;
        total.add(text.rsplit(' ').next() == Some(&last.word));
        last_token.add(said.best.last() == Some(&last.last_token));
        let of_word = &said.log_p[said.log_p.len().saturating_sub(last.n_tokens)..];
        word_loss.add(-of_word.iter().sum::<f64>() / of_word.len() as f64);
        said.log_p.iter().for_each(|log_p| loss.add(-log_p));
    }
    let metrics = vec![
        metric("loss", loss.value(), loss.n),
        metric("accuracy/total", total.share(), total.n),
        metric(
            "accuracy/openai_last_token",
            last_token.share(),
            last_token.n,
        ),
        metric("perplexity", word_loss.value().exp(), word_loss.n),
        metric("lm_loss", loss.value(), loss.n),
        metric("lm_perplexity", loss.value().exp(), loss.n),
    ];
    Ok(SetScores {
        name: set.to_owned(),
        metrics,
        loss: loss.value(),
        accuracy: total.share(),
        is_in_means: true,
    })
}

#[cfg(test)]
mod tests {
    use super::super::item::LastWord;
    use super::*;

    fn predicted(log_p: &[f64], best: &[i32]) -> Predicted {
        Predicted {
            log_p: log_p.to_vec(),
            best: best.to_vec(),
        }
    }

    fn item(group: &str, n_prefix: usize, answer: usize, last_word: Option<LastWord>) -> Item {
        Item {
            group: group.into(),
            answer,
            prefix: vec![0; n_prefix],
            options: vec![vec![0]; 2],
            last_word,
        }
    }

    /// Tokens 10 to 35 are letters, and 0 is a space.
    #[expect(clippy::unnecessary_wraps, reason = "the signature of a tokenizer")]
    fn decode(ids: &[i32]) -> Result<String, PluginError> {
        let letter = |&id: &i32| match id {
            0 => ' ',
            id => char::from_digit(u32::try_from(id).unwrap(), 36).unwrap(),
        };
        Ok(ids.iter().map(letter).collect())
    }

    fn values(scores: &SetScores) -> Vec<(&str, f64, u64)> {
        let metrics = scores.metrics.iter();
        metrics
            .map(|metric| (metric.name.as_str(), metric.value, metric.n))
            .collect()
    }

    #[test]
    fn a_score_is_over_all_tokens_or_the_mean_over_the_options_own() {
        // A prefix of two tokens, of which the first is not predicted, and an option of three.
        let log_p = [-8.0, -1.0, -2.0, -4.5];
        assert_eq!(score(&log_p, 2, false).to_string(), "-15.5");
        assert_eq!(score(&log_p, 2, true).to_string(), "-2.5");
        // Without a prefix the option's own first token has no probability.
        assert_eq!(score(&log_p[1..], 0, true).to_string(), "-2.5");
    }

    #[test]
    fn only_the_strictly_greatest_wins() {
        assert!(is_right(&[-1.0, -2.0, -1.5], 0));
        assert!(!is_right(&[-1.0, -2.0, -1.5], 2));
        assert!(!is_right(&[-1.0, -1.0], 0));
        assert!(!is_right(&[f64::NAN, -1.0], 0));
        assert!(!is_right(&[-1.0, f64::NAN], 0));
    }

    #[test]
    fn groups_count_alike_in_their_average() {
        let items: Vec<Item> = [("a", 0), ("a", 0), ("a", 1), ("b", 1)]
            .map(|(group, answer)| item(group, 1, answer, None))
            .into();
        let options = vec![predicted(&[-1.0], &[]), predicted(&[-2.0], &[])];
        let scores = choice_scores("toy", &items, &vec![options; 4], false);
        assert_eq!(
            values(&scores),
            [
                ("loss", 1.5, 8),
                ("accuracy/a", 2.0 / 3.0, 3),
                ("accuracy/b", 0.0, 1),
                ("accuracy/group_average", 1.0 / 3.0, 2),
                ("accuracy/seq_average", 0.5, 4),
            ]
        );
        assert!(!scores.is_in_means);
    }

    /// The word has two characters and three tokens (a space, and each letter).
    #[test]
    fn a_last_word_is_judged_by_characters_and_by_its_last_token() {
        let word = || {
            Some(LastWord {
                word: "ab".into(),
                n_tokens: 3,
                last_token: 11,
            })
        };
        let items = vec![item("lambada", 0, 0, word()); 3];
        let said = |best: &[i32]| vec![predicted(&[-3.0, -1.0, -2.0, -6.0], best)];
        // Right; the last token only; a space within the last two places.
        let all = [
            said(&[0, 0, 10, 11]),
            said(&[0, 0, 12, 11]),
            said(&[0, 10, 0, 12]),
        ];
        let scores = last_word_scores("lambada", &items, &all, decode).unwrap();
        assert_eq!(
            values(&scores),
            [
                ("loss", 3.0, 12),
                ("accuracy/total", 1.0 / 3.0, 3),
                ("accuracy/openai_last_token", 2.0 / 3.0, 3),
                ("perplexity", 3_f64.exp(), 3),
                ("lm_loss", 3.0, 12),
                ("lm_perplexity", 3_f64.exp(), 12),
            ]
        );
        assert!(scores.is_in_means);
    }

    #[test]
    fn a_word_with_more_characters_than_the_text_has_tokens_takes_all_of_them() {
        let word = LastWord {
            word: "abcdef".into(),
            n_tokens: 9,
            last_token: 15,
        };
        let items = [item("lambada", 0, 0, Some(word))];
        let said = [vec![predicted(&[-1.0, -2.0], &[10, 15])]];
        let scores = last_word_scores("lambada", &items, &said, decode).unwrap();
        assert_eq!(scores.get("accuracy/total"), Some(0.0));
        assert_eq!(scores.get("accuracy/openai_last_token"), Some(1.0));
        assert_eq!(scores.get("perplexity"), Some(1.5_f64.exp()));
    }
}
