//! Turns the tensors of finished steps into log records, a step late so that no step waits for the device.

use super::charts::{Shown, Sketch};
use super::dumps::Dumps;
use super::eta::Eta;
use super::labels::{Follower, Labels};
use super::non_finite::NonFinite;
use super::reporting::{self, Intervals, Observer};
use super::state::TrainState;
use super::throughput::Throughput;
use super::timing::{Phase, Spent, Timing};
use super::{StepStats, TrainError, memory};
use crate::log::{End, Record, Sinks, StepLine, Terminal};
use crate::profile::Profile;
use crate::signals::Signals;
use moeut_plot::Plot;
use moeut_plugin_api::{Past, PluginError, Wishes};
use moeut_torch::OrPluginError;
use moeut_torch::readback::Readback;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Cuda, Device, Tensor};

/// Learning rates are logged this often, as in the reference.
const LR_INTERVAL: u64 = 100;

/// What a monitor is told once.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// What is reported when.
    pub intervals: Intervals,
    /// Last step.
    pub n_steps: u64,
    /// Steps between validations.
    pub eval_interval: u64,
    /// Where the model lives.
    pub device: Device,
    /// How much arithmetic a token costs, and what the device can do.
    pub throughput: Throughput,
    /// Steps that are not finite and may be dropped.
    pub nan_budget: u64,
    /// Whether to wait for the device around each step, for exact times.
    pub is_speedtest: bool,
    /// Whether to log the norm of each parameter's gradient with each step.
    pub logs_grad_norms: bool,
}

/// Observes a run and tells sinks and terminal.
pub struct Monitor {
    sinks: Sinks,
    terminal: Arc<Terminal>,
    watch: Watch,
    follower: Follower,
    dumps: Dumps,
    pending: Option<Pending>,
    timing: Timing,
    profile: Option<Profile>,
    signals: Option<Arc<Signals>>,
    eta: Eta,
    /// Tokens and steps per second of the last record with new steps.
    rates: (f64, f64),
    clock: Clock,
    step_began: Instant,
    /// Set until the first step is done.
    built_at: Option<Instant>,
}

/// A step whose numbers are on their way.
struct Pending {
    step: u64,
    lr: f64,
    readback: Readback,
    names: Vec<Metric>,
    /// Of its attention maps.
    labels: Option<Labels>,
}

/// What a number of a step is.
enum Metric {
    /// Averaged over the steps between two records.
    Averaged(String),
    /// Of the very step that is logged.
    Single(String),
    GradNorm,
    /// Logged with each step, under these names.
    GradNorms(Vec<String>),
    IsBad,
    Wishes,
    Chart(Sketch),
    /// Counts of this shape.
    Selections(String, Vec<i64>),
}

/// What is logged of a step besides averages.
#[derive(Default)]
struct Details {
    scalars: Vec<(String, f64)>,
    plots: Vec<(String, Plot)>,
}

/// Since the last record.
struct Clock {
    n_steps: u64,
    n_microbatches: u64,
    tokens_at_start: u64,
    /// Time of steps that the device was waited for.
    exact: Duration,
}

impl Clock {
    fn new(tokens_at_start: u64) -> Self {
        Self {
            n_steps: 0,
            n_microbatches: 0,
            tokens_at_start,
            exact: Duration::ZERO,
        }
    }
}

impl Monitor {
    /// Observes from the state a run starts in.
    pub fn new(
        sinks: Sinks,
        terminal: Arc<Terminal>,
        watch: Watch,
        (follower, dumps): (Follower, Dumps),
        state: &TrainState,
    ) -> Self {
        Self {
            sinks,
            terminal,
            watch,
            follower,
            dumps,
            pending: None,
            timing: Timing::default(),
            profile: None,
            signals: None,
            eta: Eta::default(),
            rates: (0.0, 0.0),
            clock: Clock::new(state.n_tokens),
            step_began: Instant::now(),
            built_at: Some(Instant::now()),
        }
    }

    /// Records a profile, too.
    #[must_use]
    pub fn with_profile(self, profile: Option<Profile>) -> Self {
        Self { profile, ..self }
    }

    /// Tells what all processes are asked for, once it has arrived.
    #[must_use]
    pub fn with_signals(self, signals: &Arc<Signals>) -> Self {
        Self {
            signals: Some(Arc::clone(signals)),
            ..self
        }
    }

    /// What the model should tell about a microbatch of the coming step, the part `index` of `n`; `past` is what it sees
    /// of earlier ones.
    pub fn wishes(
        &mut self,
        state: &TrainState,
        (index, n): (usize, usize),
        tokens_tb: &Tensor,
        past: Past,
    ) -> Wishes {
        self.clock.n_microbatches += 1;
        if index == 0 {
            self.follower.follow(tokens_tb, past);
        }
        self.watch.intervals.training(state.step + 1, index, n)
    }

    /// Whether the next step's microbatch number `index` of `n` is asked for nothing but the loss.
    pub(super) fn is_plain(&self, state: &TrainState, (index, n): (usize, usize)) -> bool {
        self.watch.intervals.training(state.step + 1, index, n) == Wishes::default()
    }

    /// Whether a profile is recorded in this run.
    pub(super) fn is_profiled(&self) -> bool {
        self.profile.is_some()
    }

    /// Whether there are steps of which nothing is logged.
    pub(super) fn has_plain_steps(&self) -> bool {
        self.watch.intervals.has_plain_steps()
    }

    /// For the validation of a stream.
    pub fn observer(&self) -> Observer {
        self.watch.intervals.observer()
    }

    /// Whether the norms of a step's gradients are logged, one by one.
    pub fn wants_grad_norms(&self) -> bool {
        self.watch.logs_grad_norms
    }

    /// Says what the host does from now on, for the time split.
    pub fn enter(&mut self, phase: Phase) {
        self.timing.enter(phase);
        if let Some(profile) = &mut self.profile {
            profile.enter(phase);
        }
    }

    /// How much arithmetic a token costs, and what the device can do.
    pub fn throughput(&self) -> Throughput {
        self.watch.throughput
    }

    /// What the host does.
    pub fn phase(&self) -> Phase {
        self.timing.phase()
    }

    /// Begins a step; steps count from 1.
    pub fn begin_step(&mut self, step: u64) {
        self.profile_with(|profile| profile.begin_step(step));
        self.synchronize();
        self.step_began = Instant::now();
        self.enter(Phase::Load);
    }

    /// Tells what came of a profile, which is no reason to end the training.
    fn profile_with(
        &mut self,
        work: impl FnOnce(&mut Profile) -> Result<Option<String>, PluginError>,
    ) {
        match self.profile.as_mut().map(work) {
            None | Some(Ok(None)) => {}
            Some(Ok(Some(text))) => self.message(&text),
            Some(Err(error)) => {
                self.profile = None;
                self.warn(&format!("{}: {}; {}", error.what, error.why, error.fix));
            }
        }
    }

    /// For exact times only.
    fn synchronize(&self) {
        if let (true, Device::Cuda(index)) = (self.watch.is_speedtest, self.watch.device) {
            Cuda::synchronize(i64::try_from(index).unwrap_or(-1));
        }
    }

    /// Takes a step's results and reads those of the step before.
    ///
    /// # Errors
    /// If the step before is not finite.
    pub fn observe(
        &mut self,
        state: &mut TrainState,
        lr: f64,
        results: StepStats,
    ) -> Result<(), TrainError> {
        self.synchronize();
        self.clock.exact += self.step_began.elapsed();
        self.enter(Phase::Log);
        let has_tokens = results.charts.iter().any(|(sketch, _)| sketch.has_tokens());
        let labels = has_tokens.then(|| self.follower.labels());
        let current = Pending::start(state.step, lr, results, labels)?;
        // The time up to now is that of all steps up to this one, also where the one before is logged.
        self.clock.n_steps += 1;
        self.settle(state)?;
        if let Some(built_at) = self.built_at.take() {
            let seconds = built_at.elapsed().as_secs_f64();
            self.message(&format!("first step {seconds:.2} s"));
        }
        self.pending = Some(current);
        Ok(())
    }

    /// Reads what is pending, so that `state` holds every step up to now.
    ///
    /// # Errors
    /// If a step is not finite, and more were not than may be dropped.
    pub fn settle(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let Some(mut pending) = self.pending.take() else {
            return Ok(());
        };
        let (step, lr) = (pending.step, pending.lr);
        let (mut averaged, mut single) = (Vec::new(), Vec::new());
        let (mut grad_norm, mut is_bad) = (0.0, false);
        let (mut details, mut selections) = (Details::default(), Vec::new());
        let labels = pending.labels.take();
        for (metric, values) in pending.read()? {
            let value = values.first().copied().unwrap_or(f64::NAN);
            match metric {
                Metric::Averaged(name) => averaged.push((name, value)),
                Metric::Single(name) => single.push((name, value)),
                Metric::GradNorm => grad_norm = value,
                Metric::GradNorms(names) => details.scalars.extend(names.into_iter().zip(values)),
                Metric::IsBad => is_bad = value > 0.0,
                Metric::Wishes => {
                    if let Some(signals) = &self.signals {
                        signals.agree(&values);
                    }
                }
                Metric::Chart(sketch) => self.draw(sketch, &values, labels.as_ref(), &mut details),
                Metric::Selections(name, size) => {
                    selections.push((name, reporting::counts(&values, &size)));
                }
            }
        }
        self.dump(step, None, &selections);
        if is_bad {
            self.note_bad(state, step, loss_of(&averaged), grad_norm)?;
        } else {
            // Under a loss scaler, a step whose gradients overflow is dropped, and that is all.
            let grad_norm = if grad_norm.is_finite() {
                grad_norm
            } else {
                0.0
            };
            state.window.add(&averaged, grad_norm);
        }
        if step.is_multiple_of(self.watch.intervals.record) || step == self.watch.n_steps {
            details.scalars.extend(single);
            self.log(state, step, lr, details);
        } else {
            self.record(step, details.scalars, details.plots);
        }
        Ok(())
    }

    /// A chart that is none is left out: it is no reason to end a training.
    fn draw(&self, sketch: Sketch, values: &[f64], labels: Option<&Labels>, details: &mut Details) {
        match sketch.draw(values, labels) {
            Ok((name, Shown::Number(value))) => details.scalars.push((name, value)),
            Ok((name, Shown::Plot(plot))) => details.plots.push((name, *plot)),
            Err(error) => self.warn(&format!("{}: {}; {}", error.what, error.why, error.fix)),
        }
    }

    /// Writes counts of selections to a file, if there are any: those of a step, or of a stream's validation.
    pub fn dump(&self, step: u64, stream: Option<&str>, selections: &[(String, Tensor)]) {
        if selections.is_empty() {
            return;
        }
        if let Err(error) = self.dumps.write(step, stream, selections) {
            self.warn(&format!("{error}; {}", error.help()));
        }
    }

    /// A step was not finite, and its update was dropped.
    fn note_bad(
        &self,
        state: &mut TrainState,
        step: u64,
        loss: f64,
        grad_norm: f64,
    ) -> Result<(), TrainError> {
        let why = format!("loss {loss}, norm of the gradient {grad_norm}");
        if state.n_skipped < self.watch.nan_budget {
            state.n_skipped += 1;
            state.forgets = true;
            let (n_skipped, budget) = (state.n_skipped, self.watch.nan_budget);
            self.warn(&format!(
                "step {step} is not finite ({why}); its update is dropped, {n_skipped} of at most {budget}"
            ));
            return Ok(());
        }
        Err(TrainError::NonFinite(Box::new(NonFinite {
            step,
            why,
            ..NonFinite::default()
        })))
    }

    fn log(&mut self, state: &mut TrainState, step: u64, lr: f64, details: Details) {
        let mut scalars = state.window.take();
        scalars.extend(details.scalars);
        let spent = self.timing.take();
        let seconds = spent.training();
        let tokens_per_s = (state.n_tokens - self.clock.tokens_at_start) as f64 / seconds;
        // The last record of a run may be of a step whose time is in the one before.
        if self.clock.n_steps > 0 {
            scalars.extend(self.timings(&spent, tokens_per_s));
        }
        let peak = memory::peak(self.watch.device);
        scalars.extend(peak.map(|bytes| ("memory/peak_bytes".into(), bytes as f64)));
        if step.is_multiple_of(LR_INTERVAL) {
            scalars.push(("lr".into(), lr));
        }
        self.eta.note(self.clock.n_steps, &spent);
        if self.clock.n_steps > 0 {
            self.rates = (tokens_per_s, self.clock.n_steps as f64 / seconds);
        }
        let (tokens_per_s, steps_per_s) = self.rates;
        let Watch {
            n_steps,
            eval_interval,
            device,
            ..
        } = self.watch;
        self.terminal.train(&StepLine {
            step,
            n_steps,
            loss: loss_of(&scalars),
            lr,
            tokens_per_s,
            steps_per_s,
            left: self.eta.left(step, n_steps, eval_interval),
            memory: memory::current(device).zip(peak),
            wait_fraction: spent.of(Phase::Load) / seconds,
        });
        self.sinks.record(Record {
            step,
            scalars,
            plots: details.plots,
            ..Record::default()
        });
        self.pass_on_notices();
        self.clock = Clock::new(state.n_tokens);
    }

    /// Where the time of the steps since the last record went.
    fn timings(&self, spent: &Spent, tokens_per_s: f64) -> Vec<(String, f64)> {
        let (seconds, n_steps) = (spent.training(), self.clock.n_steps as f64);
        let per_step = 1e3 / n_steps;
        let ms_per_token = 1e3 / tokens_per_s;
        let computing = spent.of(Phase::ForwardBackward) + spent.of(Phase::Optimizer);
        let mut timings = vec![
            ("timing/ms_per_iter".to_owned(), seconds * per_step),
            // The reference's name for the time that logs take.
            (
                "timing/ms_per_plot".to_owned(),
                spent.of(Phase::Log) * per_step,
            ),
            ("timing/tokens_per_s".to_owned(), tokens_per_s),
            ("timing/total_ms_per_token".to_owned(), ms_per_token),
            (
                "timing/ms_per_token".to_owned(),
                ms_per_token * computing / seconds,
            ),
            (
                "average_num_chunks".to_owned(),
                self.clock.n_microbatches as f64 / n_steps,
            ),
        ];
        timings.extend(Phase::ALL.map(|phase| {
            let name = format!("timing/ms_per_{}", phase.name());
            (name, spent.of(phase) * per_step)
        }));
        let mfu = self.watch.throughput.mfu(tokens_per_s);
        timings.extend(mfu.map(|mfu| ("timing/mfu".to_owned(), mfu)));
        if self.watch.is_speedtest {
            let exact = self.clock.exact.as_secs_f64() * per_step;
            timings.push(("timing/exact_ms_per_iter".to_owned(), exact));
        }
        timings
    }

    /// Logs a generated text.
    pub fn sample(&mut self, step: u64, index: usize, text: &str) {
        self.message(&format!("sample {index}: {text}"));
        self.sinks.record(Record {
            step,
            texts: vec![(format!("examples/{index}"), text.to_owned())],
            ..Record::default()
        });
    }

    /// Logs numbers that are not averaged: of a validation, or known once.
    pub fn once(&mut self, step: u64, scalars: Vec<(String, f64)>) {
        self.record(step, scalars, Vec::new());
    }

    /// Logs such numbers and charts, if there are any.
    pub fn record(&mut self, step: u64, scalars: Vec<(String, f64)>, plots: Vec<(String, Plot)>) {
        if scalars.is_empty() && plots.is_empty() {
            return;
        }
        self.sinks.record(Record {
            step,
            scalars,
            plots,
            ..Record::default()
        });
    }

    /// Shows how far a piece of work is that training waits for.
    pub fn work(&self, label: &str, done: u64, total: u64) {
        self.terminal.work(label, done, total);
    }

    /// A line that the user wants to see in any case, if it is about the end of the run.
    pub fn result(&self, is_end: bool, text: &str) {
        if is_end {
            self.terminal.message(crate::log::Level::Result, text);
        } else {
            self.message(text);
        }
    }

    /// A line for the user.
    pub fn message(&self, text: &str) {
        self.terminal.message(crate::log::Level::Info, text);
        self.pass_on_notices();
    }

    /// What the logs have to say.
    fn pass_on_notices(&self) {
        for (level, text) in self.sinks.take_notices() {
            self.terminal.message(level, &text);
        }
    }

    /// A warning for the user.
    pub fn warn(&self, text: &str) {
        self.terminal.message(crate::log::Level::Warning, text);
    }

    /// Writes everything out; the logs are told how the run ended.
    pub fn finish(mut self, end: End) {
        self.profile_with(Profile::finish);
        self.terminal.finish();
        for (level, text) in self.sinks.finish(end) {
            self.terminal.message(level, &text);
        }
    }
}

impl Pending {
    /// Starts to read a step's results.
    fn start(
        step: u64,
        lr: f64,
        stats: StepStats,
        labels: Option<Labels>,
    ) -> Result<Self, TrainError> {
        let StepStats {
            averaged,
            single,
            charts,
            selections,
            grad_norm,
            grad_norms,
            is_bad,
            wishes,
            ..
        } = stats;
        let averaged = averaged
            .into_iter()
            .map(|(name, t)| (Metric::Averaged(name), t));
        let single = single
            .into_iter()
            .map(|(name, t)| (Metric::Single(name), t));
        let charts = charts
            .into_iter()
            .map(|(sketch, t)| (Metric::Chart(sketch), t));
        let selections = selections
            .into_iter()
            .map(|(name, t)| (Metric::Selections(name, t.size()), t));
        let (names, tensors): (Vec<Metric>, Vec<Tensor>) = averaged
            .chain(single)
            .chain(charts)
            .chain(selections)
            .chain(grad_norm.map(|norm| (Metric::GradNorm, norm)))
            .chain(grad_norms.map(|(names, norms)| (Metric::GradNorms(names), norms)))
            .chain(is_bad.map(|is_bad| (Metric::IsBad, is_bad)))
            .chain(wishes.map(|wishes| (Metric::Wishes, wishes)))
            .unzip();
        let readback = Readback::start(&tensors.iter().collect::<Vec<_>>())
            .or_plugin_error("the results of a step cannot be read")?;
        Ok(Self {
            step,
            lr,
            readback,
            names,
            labels,
        })
    }

    /// The numbers, once they have arrived.
    fn read(self) -> Result<impl Iterator<Item = (Metric, Vec<f64>)>, TrainError> {
        let values = self.readback.wait();
        let values = values.or_plugin_error("the results of a step cannot be read")?;
        Ok(self.names.into_iter().zip(values))
    }
}

fn loss_of(scalars: &[(String, f64)]) -> f64 {
    let loss = scalars.iter().find(|(name, _)| name == "train/loss");
    loss.map_or(f64::NAN, |(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Sink, SinkError, Verbosity};
    use crate::train::reporting::tests::intervals;
    use moeut_plugin_api::{AxisPart, ChartAxis, ChartKind, TokenRange};
    use std::sync::{Mutex, PoisonError};

    /// Keeps the records.
    #[derive(Default, Clone)]
    struct Memory(Arc<Mutex<Vec<Record>>>);

    impl Sink for Memory {
        #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
        fn name(&self) -> &str {
            "memory"
        }

        fn write(&mut self, record: &Record) -> Result<(), SinkError> {
            let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            records.push(record.clone());
            Ok(())
        }

        fn flush(&mut self) -> Result<(), SinkError> {
            Ok(())
        }
    }

    fn chart(name: &str, kind: ChartKind, values: &Tensor) -> (Sketch, Tensor) {
        let sketch = Sketch {
            name: name.to_owned(),
            kind,
            size: values.size(),
        };
        (sketch, values.shallow_clone())
    }

    /// A step that is no record by itself tells norms, a number, a map of tokens, a chart that is none, and counts.
    #[test]
    fn what_a_model_tells_is_logged_a_step_later() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Memory::default();
        let watch = Watch {
            intervals: intervals(None),
            n_steps: 100,
            eval_interval: 100,
            device: Device::Cpu,
            throughput: Throughput {
                flops_per_token: 1.0,
                peak_flops: None,
            },
            nan_budget: 0,
            is_speedtest: false,
            logs_grad_norms: false,
        };
        let follower = Follower::new(|id| format!("<{id}>"), true);
        let mut state = TrainState::default();
        let mut monitor = Monitor::new(
            Sinks::start(vec![Box::new(memory.clone())]),
            Arc::new(Terminal::new(Verbosity::Quiet)),
            watch,
            (follower, Dumps::new(folder.path())),
            &state,
        );

        let tokens_tb = Tensor::from_slice(&[5i64, 6, 7]).unsqueeze(1);
        let _ = monitor.wishes(&state, (0, 1), &tokens_tb, Past::None);
        let tokens = |part: fn(TokenRange) -> AxisPart| ChartAxis {
            label: String::new(),
            parts: vec![part(TokenRange { from_end: 2, n: 2 })],
        };
        let map = ChartKind::Frames {
            x: tokens(AxisPart::Inputs),
            y: tokens(AxisPart::Targets),
            range: None,
            titles: vec!["layer 0".to_owned()],
        };
        let square = Tensor::from_slice(&[1.0, 0.0, 0.5, 0.5]).view([1, 2, 2]);
        let results = StepStats {
            charts: vec![
                chart("out_diff_0", ChartKind::Number, &Tensor::from(0.25)),
                chart("activations/map", map, &square),
                chart("broken", ChartKind::Number, &square),
            ],
            selections: [("counts".to_owned(), Tensor::from_slice2(&[[3i64, 4]]))].into(),
            grad_norms: Some((
                vec!["norms/a".to_owned(), "norms/b".to_owned()],
                Tensor::from_slice(&[1.5, 2.5]),
            )),
            ..StepStats::default()
        };
        state.step = 3;
        monitor.observe(&mut state, 0.1, results).unwrap();
        monitor.settle(&mut state).unwrap();
        monitor.finish(End::Finished);

        let records = memory.0.lock().unwrap();
        assert!(records.iter().all(|record| record.step == 3));
        let scalars: Vec<_> = records.iter().flat_map(|record| &record.scalars).collect();
        let expected = [("out_diff_0", 0.25), ("norms/a", 1.5), ("norms/b", 2.5)];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(scalars, expected.each_ref());
        let plots: Vec<_> = records.iter().flat_map(|record| &record.plots).collect();
        let [(name, Plot::Frames(frames))] = &plots[..] else {
            panic!("{plots:?}");
        };
        assert_eq!(name, "activations/map");
        assert_eq!(frames.x.names, ["<5>", "<6>"]);
        assert_eq!(frames.y.names, ["<6>", "<7>"]);
        assert_eq!(frames.frames[0].1.values, [1.0, 0.0, 0.5, 0.5]);

        let path = folder
            .path()
            .join("export/log_dumps/3/selections.safetensors");
        let dumped = crate::checkpoint::read_tensors(&path).unwrap();
        assert_eq!(dumped[0].0, "counts");
        assert_eq!(dumped[0].1, Tensor::from_slice2(&[[3i64, 4]]));
    }
}
