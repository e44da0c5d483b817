//! Where a run's records go, by its arguments: the sinks, and TensorBoard's server.

use super::build::Blueprint;
use super::restore::is_below;
use super::state::TrainState;
use crate::args::{LogSink, ServerChoice, Source};
use crate::log::{
    Jsonl, Level, PlotFiles, ServerSettings, Sink, SinkError, TensorBoard, Terminal, Wandb,
    WandbRun, WandbStart,
};
use std::io::IsTerminal;
use std::path::Path;

/// Folder of TensorBoard's event files in that of the run.
const EVENTS: &str = "tensorboard";

impl Blueprint {
    /// The TensorBoard server to start, if one is wanted: by default for somebody who sits in front of a terminal.
    pub fn tensorboard_server(&self) -> Option<ServerSettings> {
        let is_logged = matches!(self.config.log, LogSink::Tb | LogSink::All);
        let is_watched = self.job.is_none() && std::io::stderr().is_terminal();
        let is_wanted = match self.config.tb_server {
            ServerChoice::On => true,
            ServerChoice::Off => false,
            ServerChoice::Auto => is_watched && self.is_training(),
        };
        (is_logged && is_wanted && !self.config.dry_run).then(|| ServerSettings {
            events: self.folder.join(EVENTS),
            output: self.folder.join("tensorboard.log"),
            binds_all: self.config.tb_bind_all,
        })
    }
}

/// The sinks of a run; one that cannot be opened is reported and left out.
pub(super) fn sinks(
    blueprint: &Blueprint,
    state: &mut TrainState,
    terminal: &Terminal,
) -> Vec<Box<dyn Sink>> {
    let resume_at = blueprint
        .restored
        .as_ref()
        .map(|loaded| loaded.snapshot.step);
    let folder: &Path = &blueprint.folder;
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    if blueprint.config.dry_run {
        return sinks;
    }
    let mut add = |sink: Result<Option<Box<dyn Sink>>, SinkError>| match sink {
        Ok(sink) => sinks.extend(sink),
        Err(error) => {
            let text = format!("{error}; {}", error.help());
            terminal.message(Level::Warning, &text);
        }
    };
    let jsonl = Jsonl::open(folder.join("metrics.jsonl"), resume_at);
    add(jsonl.map(|sink| Some(Box::new(sink) as _)));
    add(Ok(Some(Box::new(PlotFiles::new(folder.join("plots"))))));
    if matches!(blueprint.config.log, LogSink::Tb | LogSink::All) {
        let sink = TensorBoard::open(&folder.join(EVENTS), resume_at);
        add(sink.map(|sink| Some(Box::new(sink) as _)));
    }
    if matches!(blueprint.config.log, LogSink::Wandb | LogSink::All) && blueprint.is_training() {
        let sink = wandb(blueprint, state.wandb.as_ref());
        if let Ok(Some(sink)) = &sink {
            state.wandb = Some(sink.run().clone());
        }
        add(sink.map(|sink| sink.map(|sink| Box::new(sink) as _)));
    }
    sinks
}

/// The run in Weights & Biases, described by its arguments. It goes on with the checkpoint's, if that is this run's own.
fn wandb(blueprint: &Blueprint, earlier: Option<&WandbRun>) -> Result<Option<Wandb>, SinkError> {
    let (folder, config) = (&blueprint.folder, &blueprint.config);
    let restored = blueprint.restored.as_ref();
    let is_own = restored.is_some_and(|loaded| is_below(&loaded.path, &folder.join("checkpoint")));
    let typed = |(name, (raw, _)): (&String, &(String, Source))| {
        let value = blueprint.arguments.values.get(name);
        let plain = value.filter(|value| !value.is_array() && !value.is_object());
        (
            name.clone(),
            plain.cloned().unwrap_or_else(|| raw.as_str().into()),
        )
    };
    let mut described: Vec<_> = blueprint.arguments.raw.iter().map(typed).collect();
    described.push(("experiment_name".into(), config.name.as_deref().into()));
    described.push(("n_nodes".into(), 1.into()));
    Wandb::open(WandbStart {
        folder,
        name: config.name.as_deref(),
        project: config.wandb_project.as_deref(),
        drops_tables: config.wandb_drops_tables,
        config: &described,
        earlier: earlier.filter(|_| is_own),
    })
}
