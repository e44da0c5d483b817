//! Who takes part in a run, and so whose arguments count: what the task plans, asked before anything is opened or built.

use crate::args::{Arguments, HostConfig, Owner, Role, parse, peek};
use crate::error::HostError;
use crate::log::Terminal;
use crate::plugins::{Component, Registry};
use crate::services::Services;
use crate::train::border::check_plan;
use moeut_plugin_api::abi::client::HostServices;
use moeut_plugin_api::{ComponentKind, PluginError, RunFacts, TaskPlan};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Arguments, and who has a say about them.
pub struct Resolved {
    /// The arguments.
    pub arguments: Arguments,
    /// The host and all components, each with its part in this run.
    pub owners: Vec<Owner>,
    /// What the task plans; nothing if no task is named.
    pub plan: Option<TaskPlan>,
}

/// Reads the command line: once to ask the task for its plan, and once more with the owners that this plan makes.
///
/// # Errors
/// For mistakes in the arguments, and if the plan names a component that is not there.
pub fn resolve(
    argv: &[String],
    stored: Option<&BTreeMap<String, String>>,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Resolved, HostError> {
    resolve_with(argv, stored, &[], registry, terminal)
}

/// As [`resolve`], for a command in which the evaluation sets named `sets` take part, too.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with(
    argv: &[String],
    stored: Option<&BTreeMap<String, String>>,
    sets: &[String],
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Resolved, HostError> {
    let owners = candidates(argv, registry)?;
    let arguments = parse(argv, &owners, stored)?;
    let config = HostConfig::new(&arguments)?;
    let Some(task) = &config.task else {
        return Ok(Resolved {
            arguments,
            owners,
            plan: None,
        });
    };
    let services: Arc<dyn HostServices> =
        Services::new(registry, terminal, &config, &Arc::default());
    let task = registry.find(ComponentKind::Task, task)?;
    let plan = ask(task, &arguments, &config, &services)?;
    let owners = participants(task, &plan, sets, &arguments, registry)?;
    Ok(Resolved {
        arguments: parse(argv, &owners, stored)?,
        owners,
        plan: Some(plan),
    })
}

/// Asks a task what to build.
///
/// # Errors
/// If the task refuses its arguments, or its plan cannot be carried out.
pub fn ask(
    task: Component<'_>,
    arguments: &Arguments,
    config: &HostConfig,
    services: &Arc<dyn HostServices>,
) -> Result<TaskPlan, PluginError> {
    let own = arguments.config_for(&task.info.args)?;
    let facts = RunFacts {
        batch_size: config.batch_size as u64,
        n_steps: config.n_steps.filter(|&n_steps| n_steps > 0),
    };
    let client = task.client();
    let plan = client
        .new_task(&task.info.name, &own, services)?
        .plan(&facts)?;
    check_plan(&task.info.name, &plan)?;
    Ok(plan)
}

/// Who accepts arguments as far as `argv` alone says: the host, the task that it names, and every component that is no
/// task.
///
/// Another task's defaults and profiles are none of this run's business. If no task is named (a run that goes on has
/// it in its stored arguments), all of them count.
///
/// # Errors
/// If there is no such task.
pub fn candidates(argv: &[String], registry: &Registry) -> Result<Vec<Owner>, HostError> {
    let named = peek(argv, "task");
    let task = match named.last() {
        Some(name) => Some(registry.find(ComponentKind::Task, name)?),
        None => None,
    };
    let certain: Vec<Component<'_>> = task.into_iter().collect();
    Ok(owners(&certain, Role::Possible, registry))
}

/// Who accepts arguments under a plan: the host, the task, what it names, and `sets`; everything else is idle.
fn participants(
    task: Component<'_>,
    plan: &TaskPlan,
    sets: &[String],
    arguments: &Arguments,
    registry: &Registry,
) -> Result<Vec<Owner>, PluginError> {
    let mut certain = vec![task];
    for stream in std::iter::once(&plan.train).chain(&plan.validation) {
        certain.push(registry.find(ComponentKind::Dataset, &stream.dataset)?);
    }
    let planned = plan.evaluations.iter().map(|request| &request.dataset);
    // One that is not there is reported, or refused, when it is opened.
    let sets = planned.chain(sets);
    certain.extend(sets.filter_map(|set| registry.find(ComponentKind::ChoiceDataset, set).ok()));
    let model = registry.find(ComponentKind::Model, &plan.model);
    certain.push(model.map_err(|error| name_source(error, &plan.model, task, arguments))?);
    Ok(owners(&certain, Role::Idle, registry))
}

/// The host and the components in `certain`, then all others that are no tasks, which have the role `others`. Other
/// tasks are there only if none is certain.
pub(crate) fn owners(certain: &[Component<'_>], others: Role, registry: &Registry) -> Vec<Owner> {
    let has_task = certain
        .iter()
        .any(|component| component.info.kind == ComponentKind::Task);
    let rest = registry
        .components()
        .filter(|component| !has_task || component.info.kind != ComponentKind::Task)
        .map(|component| (component, others));
    let certain = certain.iter().map(|&component| (component, Role::Active));
    let mut seen = BTreeSet::new();
    let mut owners = vec![Owner::host()];
    for (component, role) in certain.chain(rest) {
        let info = component.info;
        if seen.insert((info.kind, &info.name)) {
            let plugin = &component.library.manifest.plugin;
            let plugin = format!("{} {}", plugin.name, plugin.version);
            owners.push(Owner::component(info, &plugin, role));
        }
    }
    owners
}

/// Adds to "unknown model" which argument of the task has that value, and what it is for.
fn name_source(
    error: PluginError,
    model: &str,
    task: Component<'_>,
    arguments: &Arguments,
) -> PluginError {
    let names_it = |name: &str| {
        let raw = arguments.raw.get(name);
        raw.is_some_and(|(raw, _)| raw == model)
    };
    match task.info.args.iter().find(|def| names_it(&def.name)) {
        Some(def) => {
            let why = format!("{}; `-{}` takes: {}", error.why, def.name, def.help);
            PluginError { why, ..error }
        }
        None => error,
    }
}
