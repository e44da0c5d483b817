//! What plugins hand over, checked before it is used: shapes, element types and sizes, never values on the device, so
//! that no step waits.
//!
//! A mistake of a plugin is named here, in its words; behind this border it would surface as a message of libtorch's, or
//! on a GPU as the end of the process.

use super::Output;
use moeut_plugin_api::{PluginError, StreamInfo, StreamRequest, TaskPlan};
use std::collections::BTreeSet;
use tch::Tensor;

fn defect(what: impl Into<String>, why: impl Into<String>) -> PluginError {
    PluginError::new(what)
        .why(why)
        .fix("this is a defect of its plugin: report it to its authors (`moeut-host plugins list` names it)")
}

/// A task's wishes.
///
/// # Errors
/// If two streams have one name, or a sequence has no tokens.
pub(crate) fn check_plan(task: &str, plan: &TaskPlan) -> Result<(), PluginError> {
    let refuse = |why: String| {
        Err(defect(
            format!("the plan of task `{task}` cannot be carried out"),
            why,
        ))
    };
    let mut names = BTreeSet::new();
    for stream in std::iter::once(&plan.train).chain(&plan.validation) {
        let StreamRequest { name, seq_len, .. } = stream;
        if *seq_len == 0 {
            return refuse(format!("stream `{name}` has sequences of 0 tokens"));
        }
        if name.is_empty() || !names.insert(name) {
            return refuse(format!(
                "{} streams are called `{name}`",
                if name.is_empty() { "some" } else { "two" }
            ));
        }
    }
    Ok(())
}

/// Sizes of an opened stream.
///
/// # Errors
/// If they contradict each other.
pub(crate) fn check_info(
    dataset: &str,
    info: &StreamInfo,
    seq_len: usize,
) -> Result<(), PluginError> {
    let refuse = |why: String| {
        Err(defect(
            format!("dataset `{dataset}` contradicts itself"),
            why,
        ))
    };
    let StreamInfo {
        vocab_size,
        n_windows,
        n_tokens,
        ..
    } = *info;
    if vocab_size == 0 || vocab_size > i32::MAX as u64 {
        return refuse(format!(
            "it says that there are {vocab_size} distinct tokens"
        ));
    }
    // Windows overlap by one token, and the last one may be short.
    let held = n_windows.saturating_sub(1).checked_mul(seq_len as u64);
    if !info.has_documents && held.is_none_or(|held| held > n_tokens) {
        return refuse(format!(
            "it says that {n_tokens} tokens are {n_windows} sequences of {seq_len}"
        ));
    }
    if info
        .utf8_bytes_per_token
        .is_some_and(|bytes| !bytes.is_finite() || bytes <= 0.0)
    {
        return refuse(format!(
            "it says that a token has {:?} bytes",
            info.utf8_bytes_per_token
        ));
    }
    Ok(())
}

/// Token ids that were read. On a GPU an id outside the vocabulary would end the process.
///
/// # Errors
/// If there is one.
pub(crate) fn check_tokens(ids: &[i32], vocab_size: u64) -> Result<(), PluginError> {
    let is_word = |&id: &i32| u64::try_from(id).is_ok_and(|id| id < vocab_size);
    match ids.iter().find(|id| !is_word(id)) {
        None => Ok(()),
        Some(id) => Err(defect(
            "the dataset returned a token that does not exist",
            format!("it returned {id}, and said that there are {vocab_size} distinct tokens"),
        )),
    }
}

/// A model's tensors: name, tensor, whether it is trained.
///
/// # Errors
/// If names are missing or double, or what is trained cannot be.
pub(crate) fn check_parameters<'a>(
    parameters: impl IntoIterator<Item = (&'a str, &'a Tensor, bool)>,
) -> Result<(), PluginError> {
    let refuse = |why: String| Err(defect("the parameters of the model cannot be trained", why));
    let (mut names, mut n_trainable) = (BTreeSet::new(), 0);
    for (name, tensor, is_trainable) in parameters {
        if name.is_empty() {
            return refuse(format!("one has no name; its shape is {:?}", tensor.size()));
        }
        if !names.insert(name) {
            return refuse(format!("two are called `{name}`"));
        }
        if is_trainable && !tensor.is_floating_point() {
            return refuse(format!(
                "`{name}` is {:?}, which has no gradient",
                tensor.kind()
            ));
        }
        n_trainable += u32::from(is_trainable);
    }
    if n_trainable == 0 {
        return refuse("there are none".to_owned());
    }
    Ok(())
}

/// What a pass over `tokens_tb` gave.
///
/// # Errors
/// If a tensor is not what the interface says.
pub(crate) fn check_output(
    output: &Output,
    tokens_tb: &Tensor,
    is_training: bool,
) -> Result<(), PluginError> {
    let refuse = |why: String| {
        Err(defect(
            "the model returned something else than it should",
            why,
        ))
    };
    let logits = &output.logits;
    let (shape, tokens) = (logits.size(), tokens_tb.size());
    if shape.len() != 3 || shape[..2] != tokens[..] || shape[2] == 0 {
        return refuse(format!(
            "logits of shape {shape:?} for tokens of shape {tokens:?}; they are [tokens, batch, vocabulary]"
        ));
    }
    if !logits.is_floating_point() || logits.device() != tokens_tb.device() {
        return refuse(format!(
            "logits are {:?} on {:?}; they are floating-point numbers on {:?}",
            logits.kind(),
            logits.device(),
            tokens_tb.device()
        ));
    }
    if is_training && !logits.requires_grad() {
        return refuse(
            "logits are not connected to the parameters: nothing can be learned from them"
                .to_owned(),
        );
    }
    let numbers = output.regularizers.iter().map(|item| ("regularizer", item));
    for (what, (name, tensor)) in numbers.chain(output.stats.iter().map(|item| ("statistic", item)))
    {
        if tensor.numel() != 1 {
            return refuse(format!(
                "{what} `{name}` has shape {:?}; it is one number",
                tensor.size()
            ));
        }
    }
    if let Some((name, tensor)) = output
        .regularizers
        .iter()
        .find(|(_, tensor)| !tensor.is_floating_point())
    {
        return refuse(format!(
            "regularizer `{name}` is {:?}, which has no gradient",
            tensor.kind()
        ));
    }
    Ok(())
}
