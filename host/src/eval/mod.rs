//! Downstream evaluation: how often a model finds the right continuation of a text likelier than wrong ones.
//!
//! ```text
//! question (text) → item (token ids) → log p of each token → metrics
//!   the dataset's     [`item`]           [`predict`]          [`metrics`]
//! ```
//! A set is read, tokenized and checked when it is opened, so that whatever is wrong with it is found before the first
//! step of a training. Scoring is in the parameters' own precision, with no past: a model's segment memory is neither
//! used nor changed.

pub mod item;
pub mod metrics;
pub mod predict;

use crate::distributed::Group;
use crate::signals::Signals;
use crate::train::TrainError;
use item::{Item, Tokens};
use metrics::{Predicted, SetScores, choice_scores, last_word_scores};
use moeut_plugin_api::abi::client::{ChoiceDatasetClient, ModelClient, TokenDatasetClient};
use moeut_plugin_api::{EvaluationRequest, PluginError, ScoringRule};
use moeut_torch::OrPluginError;
use predict::{Client, Effort, predict};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// Questions that are read at once.
const PAGE: u64 = 1024;

/// A choice dataset, ready to be scored.
pub struct EvalSet {
    /// Its name in logs and results.
    pub name: String,
    /// Whether it is scored only after the last step.
    pub is_end_only: bool,
    rule: ScoringRule,
    items: Vec<Item>,
    batch_size: usize,
}

/// What a set needs to know of the run.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    /// Of the model.
    pub tokenizer: &'a TokenDatasetClient,
    /// Ids that the model knows.
    pub vocab_size: u64,
    /// Sequences in a batch of the validation.
    pub batch_size: usize,
    /// The length that the model was trained on.
    pub seq_len: usize,
    /// Whether to leave out what the reference's sampler leaves out.
    pub compat: bool,
    /// So many questions of each group, the first ones; all if absent.
    pub limit: Option<usize>,
    /// Told what the user may not expect.
    pub warn: &'a dyn Fn(&str),
}

/// Whether a choice dataset says that its files are not in the folder where it was to look. Errors cross the plugin
/// boundary as text, so these are the words of the datasets; end-to-end tests hold them together.
pub fn is_missing(error: &PluginError) -> bool {
    error.what.ends_with(" are missing")
}

impl EvalSet {
    /// Reads, tokenizes and checks all questions.
    ///
    /// # Errors
    /// If a question cannot be read or scored.
    pub fn open(
        dataset: &ChoiceDatasetClient,
        request: &EvaluationRequest,
        setting: Setting<'_>,
    ) -> Result<Self, PluginError> {
        let name = &request.dataset;
        let info = dataset.info()?;
        let multiplier = usize::try_from(request.batch_multiplier)
            .unwrap_or(1)
            .max(1);
        let batch_size = setting.batch_size.saturating_mul(multiplier);
        let mut n_questions = info.n_questions;
        if setting.compat && info.rule == ScoringRule::LastWord {
            n_questions -= n_questions % batch_size as u64;
        }
        let tokens = Tokens {
            set: name,
            rule: info.rule,
            vocab_size: setting.vocab_size,
            encode: &|text| setting.tokenizer.encode(text),
        };
        let mut items = Vec::new();
        let mut n_of_group: BTreeMap<String, usize> = BTreeMap::new();
        let mut first = 0;
        while first < n_questions {
            let n = PAGE.min(n_questions - first);
            for (index, question) in (first..).zip(dataset.read(first, n)?) {
                if let Some(limit) = setting.limit {
                    let n_taken = n_of_group.entry(question.group.clone()).or_default();
                    if *n_taken == limit {
                        continue;
                    }
                    *n_taken += 1;
                }
                items.push(tokens.item(index, question)?);
            }
            first += n;
        }
        if items.is_empty() {
            return Err(PluginError::new(format!("`{name}` has nothing to score"))
                .why(format!(
                    "it has {} questions, and `-compat 1` leaves out what does not fill a batch of {batch_size}",
                    info.n_questions
                ))
                .fix("leave out `-compat`, or lower `-test_batch_size`"));
        }
        warn_about_length(name, &items, setting);
        Ok(Self {
            name: name.clone(),
            is_end_only: request.is_end_only,
            rule: info.rule,
            items,
            batch_size,
        })
    }

    /// Number of questions.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Never: a set without questions does not open.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Scores a model, in several processes each its share of the questions; no scores if a signal ends it. `progress`
    /// gets sequences done and in all.
    ///
    /// # Errors
    /// If the model or the tokenizer fails.
    pub fn score(
        &self,
        model: &mut ModelClient,
        tokenizer: &TokenDatasetClient,
        device: Device,
        (signals, group): (&Signals, &Group),
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Option<(SetScores, Effort)>, TrainError> {
        let _no_grad = tch::no_grad_guard();
        let abilities = model.abilities()?;
        let mut client = Client {
            model,
            device,
            can_fork: abilities.can_fork,
        };
        let wants_best = self.rule == ScoringRule::LastWord;
        let predicted = predict(
            &mut client,
            &self.items,
            self.batch_size,
            wants_best,
            (group.rank(), group.n_ranks()),
            |done, all| {
                progress(done, all);
                signals.asked().is_none()
            },
        )?;
        group.confer(signals)?;
        let Some((predicted, effort)) = predicted.filter(|_| !signals.is_ending()) else {
            return Ok(None);
        };
        let predicted = combined(predicted, &self.items, wants_best, device, group)?;
        let (name, items) = (&self.name, &self.items);
        let scores = match self.rule {
            ScoringRule::Choice { is_normalized } => {
                choice_scores(name, items, &predicted, is_normalized)
            }
            ScoringRule::LastWord => {
                last_word_scores(name, items, &predicted, |ids| tokenizer.decode(ids))?
            }
        };
        Ok(Some((scores, effort)))
    }
}

/// What all processes predicted together; of other processes' questions each knows nothing.
fn combined(
    mut predicted: Vec<Vec<Predicted>>,
    items: &[Item],
    wants_best: bool,
    device: Device,
    group: &Group,
) -> Result<Vec<Vec<Predicted>>, PluginError> {
    if group.is_single() {
        return Ok(predicted);
    }
    let (mut log_p, mut best): (Vec<f64>, Vec<i64>) = (Vec::new(), Vec::new());
    for (item, options) in items.iter().zip(&mut predicted) {
        for (length, option) in item.lengths().zip(options) {
            option.log_p.resize(length - 1, 0.0);
            let n_best = if wants_best { length - 1 } else { 0 };
            option.best.resize(n_best, 0);
            log_p.extend(&option.log_p);
            best.extend(option.best.iter().map(|&token| i64::from(token)));
        }
    }
    let [log_p, best] = [Tensor::from_slice(&log_p), Tensor::from_slice(&best)];
    let [log_p, best] = [log_p, best].map(|numbers| numbers.to_device(device));
    group.sum(&[&log_p])?;
    if wants_best {
        group.sum(&[&best])?;
    }
    let unreadable = "the scores of other processes cannot be read";
    let log_p = Vec::<f64>::try_from(log_p.to_device(Device::Cpu)).or_plugin_error(unreadable)?;
    let best = best.to_kind(Kind::Int).to_device(Device::Cpu);
    let best = Vec::<i32>::try_from(best).or_plugin_error(unreadable)?;
    let (mut log_p, mut best) = (log_p.into_iter(), best.into_iter());
    for option in predicted.iter_mut().flatten() {
        let n = option.log_p.len();
        option.log_p = log_p.by_ref().take(n).collect();
        let n = option.best.len();
        option.best = best.by_ref().take(n).collect();
    }
    Ok(predicted)
}

/// Rotary positions go on beyond the trained length, but the model has never seen such distances.
fn warn_about_length(name: &str, items: &[Item], setting: Setting<'_>) {
    let lengths = items.iter().flat_map(Item::lengths);
    let (n_long, longest) = lengths
        .filter(|&length| length > setting.seq_len + 1)
        .fold((0_usize, 0), |(n, longest), length| {
            (n + 1, length.max(longest))
        });
    if n_long > 0 {
        (setting.warn)(&format!(
            "`{name}`: {n_long} of its texts, the longest of {longest} tokens, exceed the context of {} that the model \
             was trained on; they are scored whole",
            setting.seq_len
        ));
    }
}
