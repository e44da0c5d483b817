//! Losses and gradients that are not finite: the update is dropped on the device, the host learns of it a step later,
//! and the step is then repeated to find the tensor where it began.

use super::batches::Microbatch;
use super::graphs::Graphs;
use super::run::{Named, RNG_CPU, RNG_CUDA, Run, rng_states};
use super::{Output, StepStats, TrainError, forward_backward};
use crate::checkpoint::write_tensors;
use crate::log::normalize_name;
use moeut_plugin_api::PluginError;
use moeut_torch::{OrPluginError, rng};
use serde_json::json;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Most tensors that an error names and a dump keeps.
const MAX_FINDINGS: usize = 8;

/// Why training cannot go on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NonFinite {
    /// The step, counted from 1.
    pub step: u64,
    /// What was not finite, with values.
    pub why: String,
    /// Tensors that are not finite, in the order in which they are computed.
    pub findings: Vec<String>,
    /// Where the step was written to.
    pub dump: Option<PathBuf>,
}

impl From<NonFinite> for PluginError {
    fn from(report: NonFinite) -> Self {
        let mut why = report.why;
        if !report.findings.is_empty() {
            why = format!("{why}; first not finite: {}", report.findings.join(", "));
        }
        if let Some(dump) = &report.dump {
            why = format!("{why}; the step is in `{}`", dump.display());
        }
        let fix = "the last checkpoint is intact: start again with a lower `-lr` or `-grad_clip`, or with `-nan_policy skip`";
        Self::new(format!(
            "training stopped: step {} is not finite",
            report.step
        ))
        .why(why)
        .fix(fix)
    }
}

/// Decides on the device which updates are dropped, and remembers what it takes to repeat a step.
pub struct Guard {
    /// Steps that may be dropped in the whole run.
    budget: u64,
    /// Steps that were, one float on the device.
    n_bad: Tensor,
    recent: VecDeque<Remembered>,
}

/// What it takes to repeat a step while its parameters are unchanged.
struct Remembered {
    step: u64,
    lr: f64,
    batch: Vec<Microbatch>,
    rng: Named,
}

impl Guard {
    /// A guard of a run that has dropped `n_skipped` steps so far.
    pub fn new(budget: u64, n_skipped: u64, device: Device) -> Self {
        Self {
            budget,
            n_bad: Tensor::full([], n_skipped as f64, (Kind::Float, device)),
            recent: VecDeque::new(),
        }
    }

    /// Keeps a step that is about to be made, and the one before, whose result nobody knows yet.
    ///
    /// # Errors
    /// If the state of the random generators cannot be read.
    pub fn remember(
        &mut self,
        step: u64,
        lr: f64,
        batch: &[Microbatch],
        device: Device,
    ) -> Result<(), TrainError> {
        self.recent.truncate(1);
        self.recent.push_front(Remembered {
            step,
            lr,
            batch: batch.iter().map(Microbatch::share).collect(),
            rng: rng_states(device)?,
        });
        Ok(())
    }

    /// One float on the device: 1 if the update must not happen, because the step is not finite, or because too many
    /// were not (so that what the host notices a step later finds the parameters as they were), or because
    /// `overflow`, the loss scaler's flag, says so. Under a scaler gradients that are not finite are its matter.
    pub fn judge(&mut self, stats: &mut StepStats, overflow: Option<Tensor>) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let mut is_finite = Tensor::from(true).to_device(self.n_bad.device());
        let norm = stats.grad_norm.as_ref().filter(|_| overflow.is_none());
        for number in stats.objective.iter().chain(norm) {
            is_finite = is_finite.logical_and(&number.isfinite());
        }
        let is_bad = is_finite.logical_not().to_kind(Kind::Float);
        self.n_bad = &self.n_bad + &is_bad;
        let is_over = self.n_bad.gt(self.budget as f64).to_kind(Kind::Float);
        let mut skip = is_bad.maximum(&is_over);
        if let Some(overflow) = overflow {
            skip = skip.maximum(&overflow);
        }
        stats.is_bad = Some(is_bad);
        skip
    }
}

/// Looks for tensors that are not finite, if it is on. Looking waits for the device.
#[derive(Default)]
pub struct Inspector {
    found: Option<Vec<Finding>>,
}

struct Finding {
    kind: &'static str,
    name: String,
    tensor: Tensor,
    n_nan: i64,
    n_infinite: i64,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            kind,
            name,
            n_nan,
            n_infinite,
            ..
        } = self;
        let n_elements = self.tensor.numel();
        write!(
            f,
            "{kind} `{name}` ({n_nan} NaN and {n_infinite} infinite of {n_elements})"
        )
    }
}

impl Inspector {
    /// One that looks, or one that does not.
    pub fn new(is_on: bool) -> Self {
        Self {
            found: is_on.then(Vec::new),
        }
    }

    /// Whether it looks.
    pub(super) fn is_on(&self) -> bool {
        self.found.is_some()
    }

    fn look(&mut self, kind: &'static str, name: &str, tensor: &Tensor) {
        let Some(found) = &mut self.found else {
            return;
        };
        if found.len() < MAX_FINDINGS && tensor.is_floating_point() {
            let _no_grad = tch::no_grad_guard();
            let count = |mask: Tensor| mask.sum(Kind::Int64).int64_value(&[]);
            let (n_nan, n_infinite) = (count(tensor.isnan()), count(tensor.isinf()));
            if n_nan + n_infinite > 0 {
                found.push(Finding {
                    kind,
                    name: name.to_owned(),
                    tensor: tensor.detach(),
                    n_nan,
                    n_infinite,
                });
            }
        }
    }

    /// Looks at what a model returned for a microbatch, and at its loss.
    pub fn output(&mut self, microbatch: usize, output: &Output, loss: &Tensor) {
        self.look(
            "logits",
            &format!("microbatch {microbatch}"),
            &output.logits,
        );
        for (name, value) in &output.regularizers {
            self.look("regularizer", name, value);
        }
        self.look("loss", &format!("microbatch {microbatch}"), loss);
    }

    /// Looks at gradients.
    pub fn gradients(&mut self, grads: &[(&str, Tensor)]) {
        for (name, grad) in grads {
            self.look("gradient", name, grad);
        }
    }

    /// Ends a step with an error if something was found in it.
    ///
    /// # Errors
    /// If something was found.
    pub fn verdict(&self, step: u64) -> Result<(), TrainError> {
        if self.found.as_ref().is_none_or(Vec::is_empty) {
            return Ok(());
        }
        Err(TrainError::NonFinite(Box::new(NonFinite {
            step,
            why: "`-nan_detect 1` found it".to_owned(),
            ..NonFinite::default()
        })))
    }
}

/// Looks at the parameters and gradients of a step whose update has not been made, if `-nan_detect` is on.
///
/// # Errors
/// If something in the step was not finite.
pub(super) fn inspect(run: &mut Run) -> Result<(), TrainError> {
    if run.inspector.found.is_none() {
        return Ok(());
    }
    for (name, tensor) in &run.parameters {
        run.inspector.look("parameter", name, tensor);
    }
    // Scaled gradients overflow as a matter of course.
    if !run.scaler.is_on() {
        run.inspector.gradients(&run.optimizer.grads());
    }
    run.inspector.verdict(run.state.step + 1)
}

/// Finds the tensors that are not finite, by repeating the step if need be, and writes the dump; other errors pass.
pub(super) fn explain(error: TrainError, run: &mut Run) -> TrainError {
    let (mut report, step) = match error {
        TrainError::NonFinite(report) => {
            let step = report.step;
            (report, step)
        }
        // libtorch's anomaly detection ended the backward pass.
        TrainError::Component(cause) if cause.why.contains("returned nan values") => {
            let step = run.state.step + 1;
            let report = NonFinite {
                step,
                why: cause.why,
                ..NonFinite::default()
            };
            (Box::new(report), step)
        }
        other => return other,
    };
    let Some(at) = run
        .guard
        .recent
        .iter()
        .position(|kept| kept.step + 1 == step)
    else {
        return TrainError::NonFinite(report);
    };
    let Some(remembered) = run.guard.recent.remove(at) else {
        return TrainError::NonFinite(report);
    };
    let seen = run.inspector.found.take().unwrap_or_default();
    let found = if seen.is_empty() {
        repeat(run, &remembered)
    } else {
        seen
    };
    report.findings = found.iter().map(ToString::to_string).collect();
    if report.findings.is_empty() {
        report
            .why
            .push_str("; when the step was repeated everything was finite");
    }
    if let Some(folder) = run.dump_folder(step) {
        match dump(&folder, run, &remembered, &report, &found) {
            Ok(()) => report.dump = Some(folder),
            Err(error) => run
                .monitor
                .warn(&format!("no dump of step {step}: {error}")),
        }
    }
    TrainError::NonFinite(report)
}

/// The step again, from the same parameters and random numbers, looking at everything. Segment memory is empty: keeping
/// what it held before each step would take as much room again, and what it holds now is of the step itself.
fn repeat(run: &mut Run, remembered: &Remembered) -> Vec<Finding> {
    run.inspector = Inspector::new(true);
    run.graphs = Graphs::default();
    run.state.forgets = true;
    for (name, tensor) in &run.parameters {
        run.inspector.look("parameter", name, tensor);
    }
    let places = [(RNG_CPU, Device::Cpu), (RNG_CUDA, run.device)];
    for (name, place) in places {
        if let Some((_, state)) = remembered.rng.iter().find(|(known, _)| known == name)
            && let Err(error) = rng::set_state(place, state)
        {
            run.monitor.warn(&format!("other random numbers: {error}"));
        }
    }
    // What cannot be repeated has been looked at as far as it went, and scaled gradients overflow as a matter of course.
    run.optimizer.isolate();
    if forward_backward(run, &remembered.batch).is_ok() && !run.scaler.is_on() {
        run.inspector.gradients(&run.optimizer.own_grads());
    }
    run.inspector.found.take().unwrap_or_default()
}

/// Writes what it takes to look into the step elsewhere.
fn dump(
    folder: &Path,
    run: &Run,
    remembered: &Remembered,
    report: &NonFinite,
    found: &[Finding],
) -> Result<(), PluginError> {
    let fail = |error: &dyn std::fmt::Display| {
        PluginError::new(format!("`{}` cannot be written", folder.display())).why(error.to_string())
    };
    std::fs::create_dir_all(folder).map_err(|error| fail(&error))?;
    let tokens = |microbatch: &Microbatch| -> Result<Vec<Vec<i64>>, PluginError> {
        let rows = microbatch.tokens.transpose(0, 1).contiguous();
        Vec::<Vec<i64>>::try_from(&rows).or_plugin_error("the batch cannot be read")
    };
    let batch: Vec<_> = remembered
        .batch
        .iter()
        .map(tokens)
        .collect::<Result<_, _>>()?;
    let text = json!({
        "step": report.step,
        "lr": remembered.lr,
        "why": report.why,
        "not_finite": report.findings,
        "tokens_by_microbatch": batch,
    });
    std::fs::write(folder.join("report.json"), format!("{text:#}"))
        .map_err(|error| fail(&error))?;

    let mut tensors: Named = Vec::new();
    let mut keep = |name: String, tensor: &Tensor| {
        tensors.push((name, tensor.detach().to_device(Device::Cpu).contiguous()));
    };
    for (name, tensor) in &run.parameters {
        keep(format!("model/{name}"), tensor);
    }
    for (name, state) in &remembered.rng {
        keep(name.clone(), state);
    }
    for finding in found.iter().filter(|finding| finding.kind != "parameter") {
        let name = format!("{}/{}", finding.kind, normalize_name(&finding.name));
        keep(name, &finding.tensor);
    }
    let path = folder.join("tensors.safetensors");
    let mut file = BufWriter::new(File::create(&path).map_err(|error| fail(&error))?);
    write_tensors(&mut file, &path, &tensors)?;
    file.flush().map_err(|error| fail(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(guard: &mut Guard, loss: f64, norm: f64, overflow: Option<f64>) -> (bool, bool) {
        let flag = |value: f64| Tensor::from(value).to_kind(Kind::Float);
        let mut stats = StepStats {
            objective: Some(flag(loss)),
            grad_norm: Some(flag(norm)),
            ..StepStats::default()
        };
        let skip = guard.judge(&mut stats, overflow.map(flag));
        let is_one = |flag: &Tensor| (flag.double_value(&[]) - 1.0).abs() < 1e-9;
        (is_one(&stats.is_bad.unwrap()), is_one(&skip))
    }

    #[test]
    fn a_step_that_is_not_finite_is_dropped_and_counted() {
        let mut guard = Guard::new(2, 0, Device::Cpu);
        assert_eq!(judge(&mut guard, 3.0, 1.0, None), (false, false));
        assert_eq!(judge(&mut guard, f64::NAN, 1.0, None), (true, true));
        assert_eq!(judge(&mut guard, 3.0, f64::INFINITY, None), (true, true));
        assert_eq!(judge(&mut guard, 3.0, 1.0, None), (false, false));
    }

    #[test]
    fn beyond_the_budget_nothing_changes_any_more() {
        let mut guard = Guard::new(1, 1, Device::Cpu);
        assert_eq!(judge(&mut guard, f64::NAN, 1.0, None), (true, true));
        assert_eq!(judge(&mut guard, 3.0, 1.0, None), (false, true));
    }

    #[test]
    fn under_a_scaler_gradients_may_overflow() {
        let mut guard = Guard::new(0, 0, Device::Cpu);
        let infinite = f64::INFINITY;
        assert_eq!(judge(&mut guard, 3.0, infinite, Some(1.0)), (false, true));
        assert_eq!(judge(&mut guard, 3.0, 1.0, Some(0.0)), (false, false));
        assert_eq!(judge(&mut guard, infinite, 1.0, Some(0.0)), (true, true));
    }

    #[test]
    fn an_inspector_counts_what_is_not_finite() {
        let mut inspector = Inspector::new(true);
        let bad = Tensor::from_slice(&[1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY]);
        inspector.gradients(&[("good", Tensor::from(1.0)), ("bad", bad.shallow_clone())]);
        assert!(
            matches!(inspector.verdict(3), Err(TrainError::NonFinite(report)) if report.step == 3)
        );
        let found = inspector.found.unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].to_string(),
            "gradient `bad` (1 NaN and 2 infinite of 4)"
        );

        let mut off = Inspector::new(false);
        off.gradients(&[("bad", bad)]);
        assert!(off.verdict(3).is_ok());
    }
}
