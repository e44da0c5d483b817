//! `bench step`: whole training steps of a run, by the training loop itself.

use super::blueprint;
use super::ceilings::Ceilings;
use super::options::Options;
use super::report::{Report, Row, Work};
use super::timer::time;
use crate::error::HostError;
use crate::log::{End, Terminal};
use crate::plugins::Registry;
use crate::train::build::build;
use crate::train::{self, memory};
use std::sync::Arc;

/// Builds the run, trains through warm-up and rounds, and says how fast it was.
///
/// A round is a training that ends after so many steps more; validation and evaluation sets are left out. Statistics are
/// gathered at the steps of `-log_interval`, as in any run.
///
/// # Errors
/// As a training.
pub(super) fn bench(
    argv: &[String],
    options: &Options,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Report, HostError> {
    let mut run = build(blueprint(argv, registry, terminal)?, registry, terminal)?;
    run.validation.clear();
    run.evaluations.clear();
    let device = run.device;
    let seconds = time(device, options.effort, |n_steps| {
        run.n_steps = run.state.step + n_steps;
        train::train(&mut run).map_err(|error| train::explain(error, &mut run))
    })?;
    let n_tokens = run.batches.n_targets() as u64;
    let work = Work {
        n_tokens,
        flops: Some(run.monitor.throughput().flops_per_token * n_tokens as f64),
        bytes: None,
    };
    let kind = run
        .autocast
        .unwrap_or_else(|| moeut_torch::kind(run.config.dtype));
    let (name, peak_bytes) = (run.model.name().to_string(), memory::peak(device));
    run.monitor.finish(End::Finished);
    // Whatever the run held is free for the largest product.
    let ceilings = Ceilings::measure(device, kind)?;
    let mut row = Row::new(name, "step", seconds, work, &ceilings);
    row.peak_bytes = peak_bytes;
    Report::new("step", argv, (device, kind), ceilings, vec![row])
}
