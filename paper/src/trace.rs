//! `trace`: which experts a trained model selects for each token of the held-out text, layer by layer.
//!
//! The host's tokens and the model's plugin are used as they are. A pass can be asked how often each expert is selected
//! in it; here a pass is a single token, which sees the earlier ones in the cache of keys and values, so that the counts
//! say which experts it selects. That takes as many passes as there are tokens, and needs nothing of a plugin that
//! training does not need. Whether the tokens one by one are what the model sees in training is not taken for granted: each
//! window is shown as a whole, too, and the counts of its tokens have to add up to those of the whole.

use crate::files;
use crate::model::Catalog;
use crate::selections::{self, Selections};
use crate::words::{Words, misuse};
use moeut_host::error::HostError;
use moeut_host::log::Terminal;
use moeut_host::plugins::Registry;
use moeut_host::signals::Signals;
use moeut_host::train::build::Blueprint;
use moeut_host::trained::{self, Trained};
use moeut_plugin_api::abi::client::TokenDatasetClient;
use moeut_plugin_api::{ComponentKind, ForwardInput, Past, PluginError, StreamRequest, Wishes};
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Flags of the command.
pub(crate) const FLAGS: [&str; 3] = ["save_dir", "n_tokens", "plugin_dir"];
/// Tokens that are looked at, unless the command line says otherwise.
const N_TOKENS: u64 = 4096;
/// The share of selections that may differ between tokens one by one and a whole window, whose sums are rounded
/// differently: two experts may have nearly the same score.
const TOLERANCE: f64 = 0.01;

/// Writes the selections of each run that is named into its folder; what is there and of the same checkpoint stays.
///
/// # Errors
/// If a run has no checkpoint, its data are not there, or its model selects no experts.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    if words.names.is_empty() {
        return Err(misuse("no run is named"));
    }
    let n_tokens = words.positive("n_tokens")?.unwrap_or(N_TOKENS);
    let catalog = Catalog::open(&words.list("plugin_dir", ""))?;
    for name in &words.names {
        let folder = words.path("save_dir", "save").join(name);
        trace(&folder, n_tokens, &catalog)?;
    }
    Ok(0)
}

/// Traces one run, if that is not done.
pub(crate) fn trace(folder: &Path, n_tokens: u64, catalog: &Catalog) -> Result<(), HostError> {
    let (registry, terminal) = (&catalog.registry, &catalog.terminal);
    let checkpoints = folder.join("checkpoint");
    let checkpoints = if checkpoints.is_dir() {
        checkpoints
    } else {
        folder.to_owned()
    };
    let blueprint = trained::blueprint(&[], checkpoints, &[], registry, terminal)?;
    let step = blueprint
        .restored
        .as_ref()
        .map_or(0, |loaded| loaded.snapshot.step);
    let path = selections::path(folder);
    let earlier: Option<Selections> = files::remembered(&path);
    if earlier.is_some_and(|earlier| earlier.step == step && earlier.n_wanted == n_tokens) {
        crate::make::say(&format!("{}: nothing has changed", path.display()));
        return Ok(());
    }
    let mut trained = Trained::open(
        &blueprint,
        registry,
        terminal,
        &Arc::new(Signals::default()),
    )?;
    let stream = held_out(&trained, &blueprint, registry, n_tokens)?;
    let (selections, agreement) = follow(&mut trained, &stream, (step, n_tokens), terminal)?;
    terminal.finish();
    agreement.check()?;
    let text = serde_json::to_vec(&selections).unwrap_or_default();
    files::write(&path, &text)?;
    crate::make::say(&format!(
        "{}: {} tokens; {agreement} differ from those of whole windows",
        path.display(),
        selections.tokens.len()
    ));
    Ok(())
}

/// The beginning of the first validation stream.
fn held_out(
    trained: &Trained,
    blueprint: &Blueprint,
    registry: &Registry,
    n_tokens: u64,
) -> Result<TokenDatasetClient, PluginError> {
    let first = trained.plan.validation.first().ok_or_else(|| {
        PluginError::new("there is no held-out text").why("the task of this run does not validate")
    })?;
    let limit = first.token_limit.unwrap_or(u64::MAX);
    let wanted = n_tokens.next_multiple_of(first.seq_len.max(1));
    let request = StreamRequest {
        token_limit: Some(limit.min(wanted)),
        ..first.clone()
    };
    let dataset = registry.find(ComponentKind::Dataset, &request.dataset)?;
    let arguments = blueprint.arguments.config_for(&dataset.info.args)?;
    let client = dataset.client();
    client.new_token_dataset(&dataset.info.name, &arguments, &request, &trained.services)
}

/// How the selections of tokens one by one compare with those of whole windows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Agreement {
    n_selections: u64,
    /// Of those, the ones that a whole window gives to another expert.
    n_other: u64,
}

impl Agreement {
    /// Adds a layer's counts by expert, of the tokens of a window and of the whole.
    fn add(&mut self, of_tokens: &[i64], of_whole: &[i64]) {
        let distance: u64 = of_tokens
            .iter()
            .zip(of_whole)
            .map(|(a, b)| a.abs_diff(*b))
            .sum();
        self.n_selections += of_tokens.iter().sum::<i64>().unsigned_abs();
        self.n_other += distance.div_ceil(2);
    }

    fn check(self) -> Result<(), PluginError> {
        if self.n_other as f64 <= TOLERANCE * self.n_selections as f64 {
            return Ok(());
        }
        Err(PluginError::new(
            "what this model selects for tokens one by one is not what it selects for whole windows",
        )
        .why(format!("{self} differ"))
        .fix("correct the model's cache of keys and values, or its counts"))
    }
}

impl std::fmt::Display for Agreement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} selections", self.n_other, self.n_selections)
    }
}

/// Shows the model token by token, from the beginning of each window anew.
fn follow(
    trained: &mut Trained,
    stream: &TokenDatasetClient,
    (step, n_tokens): (u64, u64),
    terminal: &Terminal,
) -> Result<(Selections, Agreement), PluginError> {
    let _no_grad = tch::no_grad_guard();
    if !trained.model.abilities()?.has_cache {
        return Err(
            PluginError::new("the selections of this model cannot be traced")
                .why("it has no cache of keys and values"),
        );
    }
    let seq_len = trained.plan.train.seq_len;
    let layers = trained.model.summary(seq_len)?.layers;
    let groups = layers
        .iter()
        .map(|layer| usize::try_from(layer.unique_index).unwrap_or(usize::MAX));
    let mut selections = Selections {
        step,
        n_wanted: n_tokens,
        groups: groups.collect(),
        n_experts: 0,
        texts: BTreeMap::new(),
        tokens: Vec::new(),
        experts: Vec::new(),
    };
    let n_windows = stream
        .info()?
        .n_windows
        .min(n_tokens.div_ceil(seq_len.max(1)));
    let length = usize::try_from(seq_len).unwrap_or(usize::MAX);
    let mut ids = vec![0; length + 1];
    let mut agreement = Agreement::default();
    for window in 0..n_windows {
        stream.read(&[window], &mut ids)?;
        let whole = counts(trained, &ids[..length], Past::None, &selections.groups)?;
        let mut sums: Vec<Vec<i64>> = whole
            .iter()
            .map(|of_layer| vec![0; of_layer.len()])
            .collect();
        for (index, &id) in ids[..length].iter().enumerate() {
            let past = Past::Cache {
                slot: 0,
                is_reset: index == 0,
            };
            let per_layer = counts(trained, &[id], past, &selections.groups)?;
            for (sums_e, of_layer) in sums.iter_mut().zip(&per_layer) {
                for (sum, count) in sums_e.iter_mut().zip(of_layer) {
                    *sum += count;
                }
            }
            selections.tokens.push(id);
            selections.experts.push(
                per_layer
                    .iter()
                    .map(|of_layer| selected(of_layer))
                    .collect(),
            );
            if let std::collections::btree_map::Entry::Vacant(entry) = selections.texts.entry(id) {
                entry.insert(text(&trained.tokenizer, id)?);
            }
        }
        for (of_tokens, of_whole) in sums.iter().zip(&whole) {
            selections.n_experts = selections.n_experts.max(of_whole.len());
            agreement.add(of_tokens, of_whole);
        }
        terminal.work("windows traced", window + 1, n_windows);
    }
    Ok((selections, agreement))
}

/// The text of a token in the middle of others: alone it would lose the space at its beginning.
fn text(tokenizer: &TokenDatasetClient, id: i32) -> Result<String, PluginError> {
    let (once, twice) = (tokenizer.decode(&[id])?, tokenizer.decode(&[id, id])?);
    Ok(twice.strip_prefix(&once).unwrap_or(&once).to_owned())
}

/// Experts that are selected at all.
fn selected(of_layer: &[i64]) -> Vec<u32> {
    let selected = (0u32..).zip(of_layer).filter(|(_, count)| **count > 0);
    selected.map(|(expert, _)| expert).collect()
}

/// One pass: how often each layer of the stack, whose distinct layers are `groups`, selects each expert for these tokens.
fn counts(
    trained: &mut Trained,
    ids: &[i32],
    past: Past,
    groups: &[usize],
) -> Result<Vec<Vec<i64>>, PluginError> {
    let tokens_tb = Tensor::from_slice(ids)
        .to_kind(Kind::Int64)
        .unsqueeze(1)
        .to_device(trained.device);
    let output = trained.model.forward(ForwardInput {
        tokens_tb: tokens_tb.share(),
        is_training: false,
        wishes: Wishes {
            selections: true,
            ..Wishes::default()
        },
        past,
    })?;
    let by_name: BTreeMap<String, Tensor> = output
        .selections
        .into_iter()
        .map(|named| (named.name, named.tensor.into_tensor()))
        .collect();
    let mut used: BTreeMap<usize, usize> = BTreeMap::new();
    let mut per_layer = Vec::new();
    for &group in groups {
        let name = format!("unique_layers.{group}.pkm/counts");
        let by_layer_le = by_name.get(&name).ok_or_else(|| {
            PluginError::new("the selections of this model cannot be traced")
                .why(format!("a pass does not tell `{name}`"))
                .fix("use a model with a mixture of experts in each layer, and plugins of this version")
        })?;
        let place = used.entry(group).or_default();
        let of_layer: Vec<i64> = by_layer_le
            .f_get(i64::try_from(*place).unwrap_or_default())
            .and_then(|row_e| {
                Vec::try_from(
                    row_e
                        .f_to_kind(Kind::Int64)?
                        .f_to_device(tch::Device::Cpu)?,
                )
            })
            .or_plugin_error("counts of selections cannot be read")?;
        *place += 1;
        per_layer.push(of_layer);
    }
    Ok(per_layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_of_whole_windows_may_differ_in_near_ties_only() {
        let mut agreement = Agreement::default();
        agreement.add(&[50, 50, 0], &[50, 50, 0]);
        agreement.add(&[60, 40, 0], &[59, 40, 1]);
        assert_eq!(agreement.to_string(), "1 of 200 selections");
        agreement.check().unwrap();
        agreement.add(&[2, 0, 0], &[0, 2, 0]);
        let error = agreement.check().unwrap_err();
        assert_eq!(error.why, "3 of 202 selections differ");
    }
}
