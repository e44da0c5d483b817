//! `fetch`: finished runs of a Weights & Biases project become run folders, which stay: later calls need no network for
//! them.
//!
//! `config.json` has the project as the paper's scripts want it: `{"wandb_project": "entity/project"}`. A run is named
//! after its sweep, as there, or itself if it is in none. Names that two runs have are taken from neither.

use crate::files;
use crate::make::say;
use crate::model::Catalog;
use crate::words::{Words, misuse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moeut_host::error::HostError;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

/// Flags of the command.
pub(crate) const FLAGS: [&str; 3] = ["config", "out", "plugin_dir"];

/// A page of the project's sweeps, and one of its runs.
const SWEEPS: &str = "query Sweeps($entity: String!, $project: String!, $cursor: String) { \
    project(name: $project, entityName: $entity) { page: sweeps(first: 100, after: $cursor) { \
    edges { node { name displayName } } pageInfo { endCursor hasNextPage } } } }";
const RUNS: &str = "query Runs($entity: String!, $project: String!, $cursor: String) { \
    project(name: $project, entityName: $entity) { page: runs(first: 50, after: $cursor) { \
    edges { node { name displayName sweepName state config summaryMetrics runInfo { gpu gpuCount cpuCount } } } \
    pageInfo { endCursor hasNextPage } } } }";

#[derive(Deserialize)]
struct Config {
    wandb_project: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SweepNode {
    name: String,
    display_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RunNode {
    name: String,
    display_name: Option<String>,
    sweep_name: Option<String>,
    state: String,
    /// JSON in JSON, as the next.
    config: Option<String>,
    summary_metrics: Option<String>,
    run_info: Option<RunInfo>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RunInfo {
    gpu: Option<String>,
    gpu_count: Option<u64>,
    cpu_count: Option<u64>,
}

/// Fetches what is not there yet.
///
/// # Errors
/// If the project is not named, or the service does not answer.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    let path = words.path("config", "config.json");
    let config: Config = files::remembered(&path).ok_or_else(|| {
        HostError::new(
            format!("`{}` names no project", path.display()),
            "there is no such file, or it has another form",
            "write `{\"wandb_project\": \"entity/project\"}` into it",
        )
    })?;
    let out = words.path("out", "paper/wandb");
    let catalog = Catalog::open(&words.list("plugin_dir", ""))?;
    let service = Service::new(&config.wandb_project)?;
    let sweeps: BTreeMap<String, String> = service
        .nodes::<SweepNode>(SWEEPS)?
        .into_iter()
        .filter_map(|sweep| Some((sweep.name, sweep.display_name?)))
        .collect();
    let named = |run: &RunNode| {
        let sweep = run.sweep_name.as_ref().and_then(|sweep| sweeps.get(sweep));
        sweep
            .or(run.display_name.as_ref())
            .unwrap_or(&run.name)
            .clone()
    };
    let runs = service.nodes::<RunNode>(RUNS)?;
    let (mut seen, mut twice) = (BTreeSet::new(), BTreeSet::new());
    for run in &runs {
        if !seen.insert(named(run)) {
            twice.insert(named(run));
        }
    }
    for name in &twice {
        say(&format!("`{name}` is left out: several runs are called so"));
    }
    for run in &runs {
        let name = named(run);
        let folder = out.join(&name);
        if twice.contains(&name) || name.contains(['/', '\\']) || name.starts_with('.') {
            continue;
        }
        if run.state != "finished" {
            say(&format!("`{name}` is left out: it is {}", run.state));
        } else if folder.join("args.json").is_file() {
            say(&format!("{}: nothing has changed", folder.display()));
        } else {
            match write(run, &folder, &catalog) {
                Ok(()) => say(&format!("{}: fetched", folder.display())),
                Err(error) => say(&format!(
                    "`{name}` is left out: {}",
                    crate::run::one_line(&error)
                )),
            }
        }
    }
    Ok(0)
}

/// Writes a run in the form that training leaves; the arguments last, since they say that all is there.
fn write(run: &RunNode, folder: &Path, catalog: &Catalog) -> Result<(), HostError> {
    let object = |text: &Option<String>| -> Map<String, Value> {
        text.as_deref()
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default()
    };
    let (config, mut summary) = (object(&run.config), object(&run.summary_metrics));
    let args = arguments(&config, catalog)?;
    let time = summary
        .get("_timestamp")
        .and_then(Value::as_f64)
        .unwrap_or_default();
    let seconds = summary
        .get("_wandb")
        .and_then(|wandb| wandb.get("runtime"))
        .and_then(Value::as_f64);
    let seconds = seconds.unwrap_or_default();
    let step = summary
        .get("iteration")
        .or_else(|| summary.get("_step"))
        .cloned();
    summary.retain(|_, value| value.is_number());
    summary.insert("step".to_owned(), step.unwrap_or_default());
    summary.insert("time".to_owned(), time.into());
    files::write(
        &folder.join("metrics.jsonl"),
        format!("{}\n", Value::Object(summary)).as_bytes(),
    )?;
    let mut starts = format!(
        "start        {:.0} s after 1970, Weights & Biases\n",
        (time - seconds).ceil()
    );
    if let Some(RunInfo {
        gpu,
        gpu_count,
        cpu_count,
    }) = &run.run_info
    {
        if let Some(gpu) = gpu {
            let _ = writeln!(starts, "GPU          {} × {gpu}", gpu_count.unwrap_or(1));
        }
        if let Some(n) = cpu_count {
            let _ = writeln!(starts, "CPU          {n} cores");
        }
    }
    files::write(&folder.join("startup_log.txt"), starts.as_bytes())?;
    let text = serde_json::to_string_pretty(&args).unwrap_or_default();
    files::write(&folder.join("args.json"), text.as_bytes())
}

/// Those that this program has; the reference logs everything, also what it no longer reads.
fn arguments(
    config: &Map<String, Value>,
    catalog: &Catalog,
) -> Result<BTreeMap<String, String>, HostError> {
    let text = |value: &Value| match value {
        Value::Null => Some("none".to_owned()),
        Value::Bool(is_set) => Some(u8::from(*is_set).to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.clone()),
        Value::Array(_) | Value::Object(_) => None,
    };
    let values = config.iter().filter_map(|(name, entry)| {
        // `{"value": x}`, or in some versions the value alone.
        Some((name.clone(), text(entry.get("value").unwrap_or(entry))?))
    });
    let values: BTreeMap<String, String> = values.collect();
    let known = catalog.known(values.get("task").map_or("", String::as_str))?;
    Ok(values
        .into_iter()
        .filter(|(name, _)| known.contains(name))
        .collect())
}

/// The project's place on the server.
struct Service {
    url: String,
    authorization: String,
    entity: String,
    project: String,
}

impl Service {
    fn new(project: &str) -> Result<Self, HostError> {
        let (entity, project) = project.split_once('/').ok_or_else(|| {
            misuse(format!(
                "`{project}` is no project; it is written `entity/project`"
            ))
        })?;
        let key = std::env::var("WANDB_API_KEY").map_err(|_| {
            HostError::new(
                "Weights & Biases cannot be asked",
                "`WANDB_API_KEY` is not set",
                "export it; https://wandb.ai/authorize shows it",
            )
        })?;
        let base =
            std::env::var("WANDB_BASE_URL").unwrap_or_else(|_| "https://api.wandb.ai".to_owned());
        Ok(Self {
            url: format!("{}/graphql", base.trim_end_matches('/')),
            authorization: format!("Basic {}", STANDARD.encode(format!("api:{key}"))),
            entity: entity.to_owned(),
            project: project.to_owned(),
        })
    }

    /// All pages of a query.
    fn nodes<T: for<'a> Deserialize<'a>>(&self, query: &str) -> Result<Vec<T>, HostError> {
        let mut nodes = Vec::new();
        let mut cursor = Value::Null;
        loop {
            let page = self.page(query, &cursor)?;
            for edge in page["edges"].as_array().into_iter().flatten() {
                let node = serde_json::from_value(edge["node"].clone());
                nodes.push(node.map_err(|error| self.refused(&error.to_string()))?);
            }
            if page["pageInfo"]["hasNextPage"] != true {
                return Ok(nodes);
            }
            cursor = page["pageInfo"]["endCursor"].clone();
        }
    }

    fn page(&self, query: &str, cursor: &Value) -> Result<Value, HostError> {
        let variables = json!({"entity": self.entity, "project": self.project, "cursor": cursor});
        let body = json!({"query": query, "variables": variables}).to_string();
        let mut response = ureq::post(&self.url)
            .header("Authorization", &self.authorization)
            .header("Content-Type", "application/json")
            .send(body)
            .map_err(|error| self.refused(&error.to_string()))?;
        let text = response.body_mut().read_to_string();
        let text = text.map_err(|error| self.refused(&error.to_string()))?;
        let mut answer: Value =
            serde_json::from_str(&text).map_err(|error| self.refused(&error.to_string()))?;
        if let Some(error) = answer["errors"][0]["message"].as_str() {
            return Err(self.refused(error));
        }
        match answer["data"]["project"]["page"].take() {
            Value::Null => Err(self.refused("there is no such project, or the key may not see it")),
            page => Ok(page),
        }
    }

    fn refused(&self, why: &str) -> HostError {
        HostError::new(
            format!(
                "`{}/{}` of Weights & Biases cannot be read",
                self.entity, self.project
            ),
            why,
            format!(
                "check the project, `WANDB_API_KEY`, and that {} can be reached",
                self.url
            ),
        )
    }
}
