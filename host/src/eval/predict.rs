//! The probability that a model gives to each token of all options, with as few tokens computed as its abilities allow.
//!
//! ```text
//! whole    sequences of prefix and option, sorted by length, in batches; padded at the end, where a causal model does
//!          not look, and cut off again by position
//! shared   the prefixes of questions with as many options and equally long prefixes go into a cache once; the options
//!          go on from a fork of it, which leaves the cache as it is
//! ```
//! Sharing computes `P + n·O` tokens of a question instead of `n·(P + O)`, but in smaller batches: questions whose
//! prefixes differ in length cannot share a call. So it is chosen where it saves at least [`WORTH`] of the tokens.
//! A model that cannot fork a cache gets all sequences whole.

use super::item::Item;
use super::metrics::Predicted;
use crate::train::{inputs_and_targets, stream::BEHIND_END, token_losses};
use moeut_plugin_api::abi::client::ModelClient;
use moeut_plugin_api::{ForwardInput, Past, PluginError, Wishes};
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError};
use std::collections::BTreeMap;
use tch::{Device, Kind, TchError, Tensor};

/// The share of the tokens that sharing has to save.
const WORTH: f64 = 0.25;

/// No more than this cache is used at a time; it is emptied before.
const SLOT: u32 = 0;

/// Something that predicts tokens.
pub trait Predictor {
    /// Logits `[T, B, V]`.
    ///
    /// # Errors
    /// Whatever the model says.
    fn logits(&mut self, tokens_tb: &Tensor, past: Past) -> Result<Tensor, PluginError>;

    /// Where it computes.
    fn device(&self) -> Device;

    /// Whether [`Past::Fork`] is supported.
    fn can_fork(&self) -> bool;
}

/// A model in a plugin.
pub struct Client<'a> {
    /// The model.
    pub model: &'a mut ModelClient,
    /// Where it is.
    pub device: Device,
    /// Whether it can fork a cache.
    pub can_fork: bool,
}

impl Predictor for Client<'_> {
    fn logits(&mut self, tokens_tb: &Tensor, past: Past) -> Result<Tensor, PluginError> {
        let output = self.model.forward(ForwardInput {
            tokens_tb: tokens_tb.share(),
            is_training: false,
            wishes: Wishes::default(),
            past,
        })?;
        Ok(output.logits_tbv.into_tensor())
    }

    fn device(&self) -> Device {
        self.device
    }

    fn can_fork(&self) -> bool {
        self.can_fork
    }
}

/// What a scoring took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Effort {
    /// Tokens that the model computed, padding included.
    pub n_computed: u64,
    /// Tokens that it would have computed without sharing or padding.
    pub n_whole: u64,
}

/// What goes through the model in one call, or in two if a prefix is shared.
#[derive(Debug, PartialEq, Eq)]
enum Work {
    /// Sequences by item and option.
    Whole(Vec<(usize, usize)>),
    /// Items with as many options and equally long prefixes.
    Shared(Vec<usize>),
}

/// By item and option.
type AllPredicted = Vec<Vec<Predicted>>;

/// Predicts all options of all items, or the share of process `rank` of `n_ranks`, at most `batch_size` sequences at a time,
/// unless one question alone has more; nothing if `goes_on`, told how many sequences are done and in all, ends it.
/// `wants_best` fills [`Predicted::best`].
///
/// # Errors
/// If the model fails.
pub fn predict(
    predictor: &mut impl Predictor,
    items: &[Item],
    batch_size: usize,
    wants_best: bool,
    (rank, n_ranks): (usize, usize),
    mut goes_on: impl FnMut(u64, u64) -> bool,
) -> Result<Option<(AllPredicted, Effort)>, PluginError> {
    let n_all = items.iter().map(|item| item.options.len() as u64).sum();
    let mut all: AllPredicted = items
        .iter()
        .map(|item| vec![Predicted::default(); item.options.len()])
        .collect();
    let mut effort = Effort {
        n_whole: items.iter().map(n_whole).sum(),
        ..Effort::default()
    };
    let mut n_done = 0;
    // Last words are asked for with the whole text as the only option, so there is nothing to share.
    let plan = plan(items, batch_size, predictor.can_fork() && !wants_best);
    for work in plan.into_iter().skip(rank).step_by(n_ranks) {
        if !goes_on(n_done, n_all) {
            return Ok(None);
        }
        let done = match &work {
            Work::Whole(sequences) => whole(predictor, items, sequences, wants_best, &mut effort)?,
            Work::Shared(group) => shared(predictor, items, group, &mut effort)?,
        };
        n_done += done.len() as u64;
        for ((item, option), predicted) in done {
            all[item][option] = predicted;
        }
    }
    Ok(goes_on(n_done, n_all).then_some((all, effort)))
}

/// Tokens of an item without sharing; the last of a sequence is only a target.
fn n_whole(item: &Item) -> u64 {
    item.lengths().map(|length| length as u64 - 1).sum()
}

/// Tokens of an item whose prefix is shared, with its options padded.
fn n_shared(item: &Item) -> u64 {
    let longest = item.options.iter().map(Vec::len).max().unwrap_or(1);
    (item.prefix.len() + item.options.len() * (longest - 1)) as u64
}

fn is_worth_sharing(item: &Item) -> bool {
    let saved = 1.0 - n_shared(item) as f64 / n_whole(item) as f64;
    !item.prefix.is_empty() && saved >= WORTH
}

/// Every sequence once. The longest come first, so that what does not fit into memory fails at once.
fn plan(items: &[Item], batch_size: usize, can_fork: bool) -> Vec<Work> {
    let mut alone: Vec<(usize, usize)> = Vec::new();
    let mut groups: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    for (index, item) in items.iter().enumerate() {
        if can_fork && is_worth_sharing(item) {
            let key = (item.prefix.len(), item.options.len());
            groups.entry(key).or_default().push(index);
        } else {
            alone.extend((0..item.options.len()).map(|option| (index, option)));
        }
    }
    alone.sort_by_key(|&(item, option)| {
        std::cmp::Reverse(items[item].prefix.len() + items[item].options[option].len())
    });
    let batch_size = batch_size.max(1);
    let shared = groups
        .into_iter()
        .rev()
        .flat_map(|((_, n_options), group)| {
            let n_items = (batch_size / n_options).max(1);
            let parts: Vec<Work> = group
                .chunks(n_items)
                .map(|part| Work::Shared(part.to_vec()))
                .collect();
            parts
        });
    let alone = alone
        .chunks(batch_size)
        .map(|part| Work::Whole(part.to_vec()));
    shared.chain(alone).collect()
}

type Done = Vec<((usize, usize), Predicted)>;

fn whole(
    predictor: &mut impl Predictor,
    items: &[Item],
    sequences: &[(usize, usize)],
    wants_best: bool,
    effort: &mut Effort,
) -> Result<Done, PluginError> {
    let rows: Vec<Vec<i32>> = sequences
        .iter()
        .map(|&(item, option)| items[item].sequence(option))
        .collect();
    let tokens_tb = padded(&rows).to_device(predictor.device());
    let (inputs, targets) = inputs_and_targets(&tokens_tb);
    effort.n_computed += inputs.numel() as u64;
    let logits_tbv = predictor.logits(&inputs, Past::None)?;
    let log_p = log_probabilities(&logits_tbv, &targets)?;
    let best = if wants_best {
        let best = logits_tbv
            .f_argmax(-1, false)
            .and_then(|best_tb| columns::<i32>(&best_tb, Kind::Int));
        Some(best.or_plugin_error("the model's prediction cannot be read")?)
    } else {
        None
    };
    let predicted = rows.iter().enumerate().map(|(row, tokens)| {
        let n_targets = tokens.len() - 1;
        let best = best.as_ref().map(|best| best[row][..n_targets].to_vec());
        Predicted {
            log_p: log_p[row][..n_targets].to_vec(),
            best: best.unwrap_or_default(),
        }
    });
    Ok(sequences.iter().copied().zip(predicted).collect())
}

fn shared(
    predictor: &mut impl Predictor,
    items: &[Item],
    group: &[usize],
    effort: &mut Effort,
) -> Result<Done, PluginError> {
    let device = predictor.device();
    let prefixes: Vec<Vec<i32>> = group
        .iter()
        .map(|&item| items[item].prefix.clone())
        .collect();
    let sequences: Vec<(usize, usize)> = group
        .iter()
        .flat_map(|&item| (0..items[item].options.len()).map(move |option| (item, option)))
        .collect();
    let options: Vec<Vec<i32>> = sequences
        .iter()
        .map(|&(item, option)| items[item].options[option].clone())
        .collect();

    let prefix_tb = padded(&prefixes).to_device(device);
    effort.n_computed += prefix_tb.numel() as u64;
    let fill = Past::Cache {
        slot: SLOT,
        is_reset: true,
    };
    let logits_tbv = predictor.logits(&prefix_tb, fill)?;
    let n_prefix = prefix_tb.size()[0];
    let of_prefix = log_probabilities(
        &logits_tbv.narrow(0, 0, n_prefix - 1),
        &prefix_tb.narrow(0, 1, n_prefix - 1),
    )?;
    // The prefix's end predicts the first token of each of its options.
    let option_tb = padded(&options).to_device(device);
    let n_options = int(options.len() / prefixes.len());
    let ends = logits_tbv
        .f_narrow(0, n_prefix - 1, 1)
        .and_then(|end_1bv| end_1bv.f_repeat_interleave_self_int(n_options, 1, None))
        .or_plugin_error("the model's prediction cannot be read")?;
    let of_first = log_probabilities(&ends, &option_tb.narrow(0, 0, 1))?;
    let of_rest = if option_tb.size()[0] > 1 {
        let (inputs, targets) = inputs_and_targets(&option_tb);
        effort.n_computed += inputs.numel() as u64;
        let logits_tbv = predictor.logits(&inputs, Past::Fork { slot: SLOT })?;
        log_probabilities(&logits_tbv, &targets)?
    } else {
        vec![Vec::new(); options.len()]
    };
    let predicted = options.iter().enumerate().map(|(row, option)| {
        let prefix = &of_prefix[row * prefixes.len() / options.len()];
        Predicted {
            log_p: [
                &prefix[..],
                &of_first[row],
                &of_rest[row][..option.len() - 1],
            ]
            .concat(),
            best: Vec::new(),
        }
    });
    Ok(sequences.into_iter().zip(predicted).collect())
}

/// Rows of tokens as columns, `[T, B]`, with [`BEHIND_END`] below the end of the shorter ones.
fn padded(rows: &[Vec<i32>]) -> Tensor {
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut ids = vec![BEHIND_END; longest * rows.len()];
    for (row, tokens) in rows.iter().enumerate() {
        for (t, &id) in tokens.iter().enumerate() {
            ids[t * rows.len() + row] = i64::from(id);
        }
    }
    Tensor::from_slice(&ids).view([int(longest), int(rows.len())])
}

/// `log p` of each target, by column; 0 where there is none.
fn log_probabilities(
    logits_tbv: &Tensor,
    targets_tb: &Tensor,
) -> Result<Vec<Vec<f64>>, PluginError> {
    if targets_tb.numel() == 0 {
        let n_columns = usize::try_from(targets_tb.size()[1]).unwrap_or(0);
        return Ok(vec![Vec::new(); n_columns]);
    }
    let losses = token_losses(logits_tbv, targets_tb)?;
    losses
        .f_neg()
        .and_then(|log_p| columns(&log_p.f_view_as(targets_tb)?, Kind::Double))
        .or_plugin_error("the model's prediction cannot be read")
}

/// The columns of `[T, B]`, with elements of the type `T`, which is `kind`.
fn columns<T>(tensor_tb: &Tensor, kind: Kind) -> Result<Vec<Vec<T>>, TchError>
where
    Vec<Vec<T>>: for<'a> TryFrom<&'a Tensor, Error = TchError>,
{
    let by_column = tensor_tb
        .f_transpose(0, 1)?
        .f_contiguous()?
        .f_to_kind(kind)?;
    (&by_column.f_to_device(Device::Cpu)?).try_into()
}

fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const N_IDS: i64 = 13;

    /// A model whose prediction depends on every token so far and on their order. Its cache is the tokens.
    struct Toy {
        can_fork: bool,
        cache: Vec<Vec<i64>>,
        /// Rows of each call.
        n_rows: Vec<usize>,
    }

    impl Predictor for Toy {
        fn logits(&mut self, tokens_tb: &Tensor, past: Past) -> Result<Tensor, PluginError> {
            let rows: Vec<Vec<i64>> = columns(tokens_tb, Kind::Int64).unwrap();
            self.n_rows.push(rows.len());
            let earlier = match past {
                Past::Fork { .. } => self.cache.clone(),
                Past::None | Past::Cache { is_reset: true, .. } => vec![Vec::new(); rows.len()],
                other => panic!("{other:?}"),
            };
            let n_each = rows.len() / earlier.len();
            let all: Vec<Vec<i64>> = rows
                .iter()
                .enumerate()
                .map(|(row, new)| [&earlier[row / n_each][..], new].concat())
                .collect();
            let seq_len = rows[0].len();
            let mut logits = Vec::new();
            for t in 0..seq_len {
                for seen in &all {
                    let end = seen.len() - seq_len + t + 1;
                    let hash = seen[..end]
                        .iter()
                        .fold(7, |hash, id| (hash * 31 + id + 1) % 10_007);
                    logits.extend((0..N_IDS).map(|id| (hash * (id + 3) % 97) as f64 / 20.0));
                }
            }
            if matches!(past, Past::Cache { .. }) {
                self.cache = all;
            }
            Ok(Tensor::from_slice(&logits).view([int(seq_len), int(rows.len()), N_IDS]))
        }

        fn device(&self) -> Device {
            Device::Cpu
        }

        fn can_fork(&self) -> bool {
            self.can_fork
        }
    }

    /// An item whose tokens follow from their places.
    fn item(n_prefix: usize, lengths: &[usize]) -> Item {
        let tokens = |n: usize, start: usize| -> Vec<i32> {
            let id = |t| i32::try_from((start + 5 * t) % 13).unwrap();
            (0..n).map(id).collect()
        };
        Item {
            group: "g".into(),
            answer: 0,
            prefix: tokens(n_prefix, 2),
            options: lengths
                .iter()
                .enumerate()
                .map(|(option, &n)| tokens(n, option))
                .collect(),
            last_word: None,
        }
    }

    fn items() -> Vec<Item> {
        vec![
            item(9, &[1, 4, 2]),
            item(9, &[3, 1, 1]),
            item(0, &[5, 7]),
            item(1, &[9, 8]),
            item(9, &[2, 2, 5]),
            item(20, &[1, 1]),
            item(9, &[1, 2]),
        ]
    }

    fn run(can_fork: bool, batch_size: usize, wants_best: bool) -> (Toy, AllPredicted, Effort) {
        let mut toy = Toy {
            can_fork,
            cache: Vec::new(),
            n_rows: Vec::new(),
        };
        let outcome = predict(
            &mut toy,
            &items(),
            batch_size,
            wants_best,
            (0, 1),
            |_, _| true,
        )
        .unwrap();
        let (predicted, effort) = outcome.unwrap();
        (toy, predicted, effort)
    }

    fn largest_difference(a: &AllPredicted, b: &AllPredicted) -> f64 {
        let pairs = a.iter().flatten().zip(b.iter().flatten());
        let differences = pairs.flat_map(|(a, b)| {
            assert_eq!(a.log_p.len(), b.log_p.len());
            let tokens = a.log_p.iter().zip(&b.log_p);
            tokens.map(|(a, b)| (a - b).abs())
        });
        differences.fold(0.0, f64::max)
    }

    /// One sequence at a time, straight from the definition.
    fn alone() -> AllPredicted {
        let mut toy = Toy {
            can_fork: false,
            cache: Vec::new(),
            n_rows: Vec::new(),
        };
        let mut of = |item: &Item, option| {
            let ids: Vec<i64> = item.sequence(option).into_iter().map(i64::from).collect();
            let tokens = Tensor::from_slice(&ids).view([-1, 1]);
            let log_p = toy
                .logits(&tokens, Past::None)
                .unwrap()
                .log_softmax(-1, Kind::Double);
            let at = |t: usize| log_p.double_value(&[int(t), 0, ids[t + 1]]);
            let best = log_p.argmax(-1, false);
            let best = |t: usize| i32::try_from(best.int64_value(&[int(t), 0])).unwrap();
            Predicted {
                log_p: (0..ids.len() - 1).map(at).collect(),
                best: (0..ids.len() - 1).map(best).collect(),
            }
        };
        let items = items();
        let all = items
            .iter()
            .map(|item| (0..item.options.len()).map(|o| of(item, o)).collect());
        all.collect()
    }

    #[test]
    fn neither_batches_nor_padding_nor_shared_prefixes_change_a_probability() {
        let expected = alone();
        for batch_size in [1, 2, 6, 100] {
            for can_fork in [false, true] {
                let (_, predicted, _) = run(can_fork, batch_size, false);
                let difference = largest_difference(&predicted, &expected);
                assert!(difference < 1e-12, "{can_fork} {batch_size}: {difference}");
            }
            let (_, predicted, _) = run(true, batch_size, true);
            assert!(
                predicted
                    .iter()
                    .flatten()
                    .zip(expected.iter().flatten())
                    .all(|(a, b)| a.best == b.best)
            );
        }
    }

    #[test]
    fn sharing_saves_tokens_and_batches_hold_what_they_may() {
        let (whole, _, of_whole) = run(false, 6, false);
        let (shared, _, of_shared) = run(true, 6, false);
        assert_eq!(of_whole.n_whole, of_shared.n_whole);
        // 1·20 + 2·9 + 9 prefixes (two questions with three options fill a batch), 6·3 + 3·4 + 2·1 of their options, and
        // whole: 2 of 9 and 2 of 6.
        assert_eq!(of_shared.n_computed, 20 + 18 + 9 + 9 + 18 + 12 + 2 + 4 * 9);
        assert!(of_whole.n_computed >= of_whole.n_whole);
        assert!(
            of_shared.n_computed < of_whole.n_computed,
            "{of_shared:?} {of_whole:?}"
        );
        assert!(whole.n_rows.iter().chain(&shared.n_rows).all(|&n| n <= 6));
    }

    #[test]
    fn every_sequence_is_planned_once() {
        let items = items();
        for (batch_size, can_fork) in [(1, false), (4, false), (1, true), (4, true)] {
            let mut seen = BTreeSet::new();
            for work in plan(&items, batch_size, can_fork) {
                let sequences = match work {
                    Work::Whole(sequences) => sequences,
                    Work::Shared(group) => {
                        let all =
                            |item: usize| (0..items[item].options.len()).map(move |o| (item, o));
                        group.into_iter().flat_map(all).collect()
                    }
                };
                assert!(sequences.into_iter().all(|one| seen.insert(one)));
            }
            assert_eq!(
                seen.len(),
                items.iter().map(|item| item.options.len()).sum::<usize>()
            );
        }
    }

    #[test]
    fn a_short_prefix_is_not_worth_sharing() {
        assert!(is_worth_sharing(&item(9, &[1, 4, 2])));
        assert!(!is_worth_sharing(&item(1, &[9, 8])));
        assert!(!is_worth_sharing(&item(0, &[9, 8])));
        assert!(!is_worth_sharing(&item(9, &[4])));
    }

    #[test]
    fn it_ends_when_told_so() {
        let mut toy = Toy {
            can_fork: true,
            cache: Vec::new(),
            n_rows: Vec::new(),
        };
        let mut seen = Vec::new();
        let goes_on = |done, all| {
            seen.push((done, all));
            seen.len() < 3
        };
        assert_eq!(
            predict(&mut toy, &items(), 4, false, (0, 1), goes_on).unwrap(),
            None
        );
        assert_eq!(seen, [(0, 17), (2, 17), (5, 17)]);
    }
}
