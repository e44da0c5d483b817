//! A trained model with its tokenizer, for commands that use one and change nothing.

use crate::args::HostConfig;
use crate::checkpoint::{self, Loaded};
use crate::distributed::Group;
use crate::error::HostError;
use crate::log::Terminal;
use crate::plan::{Resolved, resolve_with};
use crate::plugins::Registry;
use crate::services::Services;
use crate::signals::Signals;
use crate::train::build::{Blueprint, Site, n_gpus, parameters};
use crate::train::device::place;
use crate::train::restore::load_tensors;
use moeut_plugin_api::abi::client::{HostServices, ModelClient, TokenDatasetClient};
use moeut_plugin_api::{ComponentKind, PluginError, StreamRequest, TaskPlan};
use std::path::PathBuf;
use std::sync::Arc;
use tch::Device;

/// A checkpoint, or a folder of checkpoints; a run's folder has them in a folder of their own.
///
/// # Errors
/// If neither `-restore` nor `-name` is given.
pub fn checkpoint_folder(config: &HostConfig) -> Result<PathBuf, HostError> {
    let given = match (&config.restore, &config.name) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => config.save_dir.join(name),
        (None, None) => {
            return Err(HostError::new(
                "no model is named",
                "trained weights are needed, and neither `-restore` nor `-name` is given",
                "add `-name <name of a run>` or `-restore <checkpoint>`",
            ));
        }
    };
    let below = given.join("checkpoint");
    Ok(if below.is_dir() { below } else { given })
}

/// The arguments of a checkpoint, with those of the command line over them. The evaluation sets named `sets` take part.
///
/// # Errors
/// If there is no checkpoint in `folder`, or a mistake in the arguments.
pub fn blueprint(
    argv: &[String],
    folder: PathBuf,
    sets: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Blueprint, HostError> {
    let loaded = checkpoint::load(&folder)?;
    let stored = Some(&loaded.snapshot.args);
    let resolved = resolve_with(argv, stored, sets, registry, terminal)?;
    let Resolved { mut arguments, .. } = resolved;
    arguments.warnings.extend(loaded.warnings.clone());
    let mut config = HostConfig::new(&arguments)?;
    // As in validation, everything is computed in the type of the parameters.
    config.amp = false;
    Ok(Blueprint {
        group: Group::single(),
        arguments,
        config,
        folder,
        restored: Some(loaded),
        job: None,
        signals: Arc::default(),
    })
}

/// A model with trained weights.
pub struct Trained {
    /// The model.
    pub model: ModelClient,
    /// Its tokenizer: a stream of little data.
    pub tokenizer: Arc<TokenDatasetClient>,
    /// Ids that it knows.
    pub vocab_size: u64,
    /// Where it is.
    pub device: Device,
    /// What it was trained on.
    pub plan: TaskPlan,
    /// What plugins may ask of the host.
    pub services: Arc<dyn HostServices>,
}

impl Trained {
    /// Builds the model and puts the checkpoint's tensors into it.
    ///
    /// # Errors
    /// If a component is missing, or the checkpoint does not fit.
    pub fn open(
        blueprint: &Blueprint,
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
        signals: &Arc<Signals>,
    ) -> Result<Self, PluginError> {
        let config = &blueprint.config;
        let placement = place(config, n_gpus())?;
        if let Some(n_threads) = config.threads {
            tch::set_num_threads(i32::try_from(n_threads).unwrap_or(i32::MAX));
        }
        let services: Arc<dyn HostServices> = Services::new(registry, terminal, config, signals);
        let site = Site {
            blueprint,
            registry,
            services: &services,
        };
        let plan = site.plan()?;
        let component = registry.find(ComponentKind::Model, &plan.model)?;
        let tokenizer = site.stream(&least_data(&plan))?;
        let vocab_size = tokenizer.info()?.vocab_size;
        let model = site.model(component, vocab_size, placement)?;
        let (parameters, _) = parameters(&model)?;
        if let Some(Loaded { snapshot, .. }) = &blueprint.restored {
            load_tensors("model", &parameters, &snapshot.model)?;
        }
        Ok(Self {
            model,
            tokenizer,
            vocab_size,
            device: moeut_torch::device(placement.device),
            plan,
            services,
        })
    }
}

/// A stream of one window, which brings the tokenizer of the training data with the least work: where there are no
/// tokens in the cache, a held-out split has fewer of them.
fn least_data(plan: &TaskPlan) -> StreamRequest {
    let held_out = plan
        .validation
        .iter()
        .filter(|request| request.dataset == plan.train.dataset)
        .min_by_key(|request| request.token_limit.unwrap_or(u64::MAX));
    StreamRequest {
        token_limit: Some(plan.train.seq_len),
        ..held_out.unwrap_or(&plan.train).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Owner, parse};
    use moeut_plugin_api::Split;

    fn folder(line: &str) -> Result<PathBuf, HostError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let arguments = parse(&argv, &[Owner::host()], None).unwrap();
        checkpoint_folder(&HostConfig::new(&arguments).unwrap())
    }

    #[test]
    fn a_run_is_found_by_name_by_folder_and_by_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().display();
        let checkpoints = dir.path().join("a/checkpoint");
        std::fs::create_dir_all(checkpoints.join("model-5")).unwrap();
        for (line, found) in [
            (format!("-name a -save_dir {root}"), checkpoints.clone()),
            (format!("-restore {root}/a"), checkpoints.clone()),
            (format!("-restore {root}/a/checkpoint"), checkpoints.clone()),
            (
                format!("-name b -restore {root}/a/checkpoint/model-5"),
                checkpoints.join("model-5"),
            ),
        ] {
            assert_eq!(folder(&line).unwrap(), found, "{line}");
        }
        assert!(folder("").is_err());
    }

    #[test]
    fn the_tokenizer_comes_with_little_data_of_the_right_kind() {
        let request = |name: &str, dataset: &str, token_limit| StreamRequest {
            name: name.into(),
            dataset: dataset.into(),
            split: Split::Validation,
            seq_len: 64,
            token_limit,
        };
        let mut plan = TaskPlan {
            model: "m".into(),
            train: request("train", "a", Some(1000)),
            validation: vec![
                request("all", "a", None),
                request("part", "a", Some(500)),
                request("other", "b", Some(1)),
            ],
            prompts: Vec::new(),
            evaluations: Vec::new(),
        };
        assert_eq!(least_data(&plan), request("part", "a", Some(64)));
        plan.validation.clear();
        assert_eq!(least_data(&plan), request("train", "a", Some(64)));
    }
}
