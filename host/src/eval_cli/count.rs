//! `moeut-host eval --count-only`: reads datasets without a model and says how much there is.

use super::{Words, choice_sets, is_absent, unknown};
use crate::args::{HostConfig, Role, parse};
use crate::cli::print;
use crate::error::HostError;
use crate::log::{Level, Terminal};
use crate::plan::owners;
use crate::plugins::{Component, Registry};
use crate::services::Services;
use crate::signals::Signals;
use moeut_plugin_api::abi::client::HostServices;
use moeut_plugin_api::{ComponentKind, DocumentCount, PluginError, Split, StreamRequest};
use std::sync::Arc;

/// Prints a line `name read skipped` for each dataset, as soon as it is known: questions of choice datasets, documents of
/// token datasets, over all splits that are there.
///
/// # Errors
/// If a name is unknown, or what it names is missing or damaged.
pub(super) fn count(
    words: &Words,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
    signals: &Arc<Signals>,
) -> Result<(), HostError> {
    if words.limit.is_some() {
        let text = "`-limit` has no effect with `--count-only`, which counts all questions";
        terminal.message(Level::Warning, text);
    }
    let names = match &words.sets {
        Some(names) => names.clone(),
        None => choice_sets(registry),
    };
    let components = names
        .iter()
        .map(|name| find(name, registry))
        .collect::<Result<Vec<_>, _>>()?;
    let arguments = parse(
        &words.argv,
        &owners(&components, Role::Idle, registry),
        None,
    )?;
    for warning in &arguments.warnings {
        terminal.message(Level::Warning, warning);
    }
    let config = HostConfig::new(&arguments)?;
    let services: Arc<dyn HostServices> = Services::new(registry, terminal, &config, signals);
    for component in components {
        let own = arguments.config_for(&component.info.args)?;
        let name = &component.info.name;
        let counted = if component.info.kind == ComponentKind::ChoiceDataset {
            questions(component, &own, &services)
        } else {
            documents(component, &own, &services)
        };
        match counted {
            Ok(count) => print(&format!(
                "{name} {} {}\n",
                count.n_documents, count.n_skipped
            )),
            Err(error) if words.sets.is_none() && is_absent(&error) => {
                let text = format!("`{name}` is left out: {}, {}", error.what, error.why);
                terminal.message(Level::Warning, &text);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A choice dataset or token dataset.
fn find<'a>(name: &str, registry: &'a Registry) -> Result<Component<'a>, HostError> {
    let kinds = [ComponentKind::ChoiceDataset, ComponentKind::Dataset];
    let known: Vec<String> = registry
        .components()
        .filter(|component| kinds.contains(&component.info.kind))
        .map(|component| component.info.name.clone())
        .collect();
    let plain = name.split('@').next().unwrap_or(name);
    let kind = kinds.into_iter().find(|&kind| {
        registry
            .components()
            .any(|component| component.info.kind == kind && component.info.name == plain)
    });
    match kind {
        Some(kind) => Ok(registry.find(kind, name)?),
        None => Err(unknown(name, &known)),
    }
}

fn questions(
    component: Component<'_>,
    arguments: &serde_json::Value,
    services: &Arc<dyn HostServices>,
) -> Result<DocumentCount, PluginError> {
    let client = component.client();
    let set = client.new_choice_dataset(&component.info.name, arguments, services)?;
    let info = set.info()?;
    Ok(DocumentCount {
        n_documents: info.n_questions,
        n_skipped: info.n_skipped,
    })
}

/// The sum over the splits that are there; the error of the first if none is.
fn documents(
    component: Component<'_>,
    arguments: &serde_json::Value,
    services: &Arc<dyn HostServices>,
) -> Result<DocumentCount, PluginError> {
    let client = component.client();
    let name = &component.info.name;
    let mut sum: Option<DocumentCount> = None;
    let mut absent: Option<PluginError> = None;
    for split in [Split::Train, Split::Validation, Split::Test] {
        let request = StreamRequest {
            name: name.clone(),
            dataset: name.clone(),
            split,
            seq_len: 1,
            token_limit: None,
        };
        match client.count_documents(name, arguments, &request, services) {
            Ok(count) => {
                let before = sum.unwrap_or_default();
                sum = Some(DocumentCount {
                    n_documents: before.n_documents + count.n_documents,
                    n_skipped: before.n_skipped + count.n_skipped,
                });
            }
            Err(error) if error.what.ends_with(" has no text") => {
                absent.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    sum.ok_or_else(|| absent.unwrap_or_else(|| PluginError::new(format!("`{name}` has no text"))))
}
