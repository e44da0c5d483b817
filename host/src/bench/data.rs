//! `bench data`: how fast a run's batches are read, by the thread that reads them for the training.

use super::blueprint;
use super::ceilings::Ceilings;
use super::options::Options;
use super::report::{Report, Row, Work};
use super::timer::time;
use crate::error::HostError;
use crate::log::Terminal;
use crate::plugins::Registry;
use crate::services::Services;
use crate::train::TrainError;
use crate::train::batches::{Batches, Position};
use crate::train::build::{Site, batch_shape, sampler, size};
use crate::train::memory;
use crate::train::stream::Stream;
use moeut_plugin_api::abi::client::HostServices;
use std::sync::Arc;
use tch::{Device, Kind};

/// Opens the training stream and takes its batches as fast as they come; no model is built.
///
/// # Errors
/// For mistakes in the arguments, and if the data cannot be read.
pub(super) fn bench(
    argv: &[String],
    options: &Options,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Report, HostError> {
    let blueprint = blueprint(argv, registry, terminal)?;
    let config = &blueprint.config;
    if let Some(n_threads) = config.threads {
        tch::set_num_threads(i32::try_from(n_threads).unwrap_or(i32::MAX));
    }
    let services: Arc<dyn HostServices> =
        Services::new(registry, terminal, config, &blueprint.signals);
    let site = Site {
        blueprint: &blueprint,
        registry,
        services: &services,
    };
    let plan = site.plan()?;
    let request = &plan.train;
    let dataset = site.stream(request)?;
    let info = dataset.info()?;
    let stream = Stream::new(&request.dataset, dataset, size(request.seq_len)?, &info)?;
    let shape = batch_shape(config, request.seq_len, &blueprint.group)?;
    let seed = config.seed.map_or(0, i64::cast_unsigned);
    let sampler = sampler(config, &stream, seed, terminal);
    let mut batches = Batches::start(stream, sampler, shape, Position::default())?;
    let mut n_bytes = 0;
    let seconds = time(Device::Cpu, options.effort, |n| {
        for _ in 0..n {
            let batch = batches.next_batch()?;
            let tokens = batch.iter().map(|part| &part.tokens);
            n_bytes = tokens
                .map(|x| x.numel() * x.kind().elt_size_in_bytes())
                .sum();
        }
        Ok::<(), TrainError>(())
    })?;
    let work = Work {
        n_tokens: batches.n_targets() as u64,
        flops: None,
        bytes: Some(n_bytes as f64),
    };
    let peak_bytes = memory::peak(Device::Cpu);
    let ceilings = Ceilings::measure(Device::Cpu, Kind::Float)?;
    let name = format!("`{}`", request.dataset);
    let mut row = Row::new(name, "batch", seconds, work, &ceilings);
    row.peak_bytes = peak_bytes;
    Report::new(
        "data",
        argv,
        (Device::Cpu, Kind::Float),
        ceilings,
        vec![row],
    )
}
