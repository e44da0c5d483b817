//! Turns the tensors of finished steps into log records, a step late so that no step waits for the device.

use super::evaluate::Scores;
use super::state::TrainState;
use super::{StepStats, TrainError};
use crate::log::{Record, Sinks, StepLine, Terminal};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Learning rates are logged this often, as in the reference.
const LR_INTERVAL: u64 = 100;

/// Observes a run and tells sinks and terminal.
pub struct Monitor {
    sinks: Sinks,
    terminal: Arc<Terminal>,
    log_interval: u64,
    n_steps: u64,
    pending: Option<Pending>,
    clock: Clock,
    /// Set until the first step is done.
    built_at: Option<Instant>,
}

/// A step whose tensors have not been read yet.
struct Pending {
    step: u64,
    lr: f64,
    stats: StepStats,
}

/// Time since the last log line.
struct Clock {
    start: Instant,
    n_steps: u64,
    tokens_at_start: u64,
    waited: Duration,
}

impl Clock {
    fn new(tokens_at_start: u64) -> Self {
        Self {
            start: Instant::now(),
            n_steps: 0,
            tokens_at_start,
            waited: Duration::ZERO,
        }
    }
}

impl Monitor {
    /// Observes from the state a run starts in.
    pub fn new(
        sinks: Sinks,
        terminal: Arc<Terminal>,
        log_interval: u64,
        n_steps: u64,
        state: &TrainState,
    ) -> Self {
        Self {
            sinks,
            terminal,
            log_interval,
            n_steps,
            pending: None,
            clock: Clock::new(state.n_tokens),
            built_at: Some(Instant::now()),
        }
    }

    /// Whether the coming step's statistics will be logged.
    pub fn wants_stats(&self, state: &TrainState) -> bool {
        (state.step + 1).is_multiple_of(self.log_interval)
    }

    /// Takes a step's results and reads those of the step before.
    ///
    /// # Errors
    /// If the loss of the step before is not finite.
    pub fn observe(
        &mut self,
        state: &mut TrainState,
        lr: f64,
        step: StepStats,
        waited: Duration,
    ) -> Result<(), TrainError> {
        self.settle(state)?;
        if let Some(built_at) = self.built_at.take() {
            let seconds = built_at.elapsed().as_secs_f64();
            self.message(&format!("first step {seconds:.2} s"));
        }
        self.clock.n_steps += 1;
        self.clock.waited += waited;
        self.pending = Some(Pending {
            step: state.step,
            lr,
            stats: step,
        });
        Ok(())
    }

    /// Reads what is pending, so that `state` holds every step up to now.
    ///
    /// # Errors
    /// If the loss is not finite.
    pub fn settle(&mut self, state: &mut TrainState) -> Result<(), TrainError> {
        let Some(Pending { step, lr, stats }) = self.pending.take() else {
            return Ok(());
        };
        let metrics: Vec<(String, f64)> = stats
            .scalars
            .iter()
            .map(|(name, value)| (name.clone(), value.double_value(&[])))
            .collect();
        let grad_norm = stats.grad_norm.map_or(0.0, |norm| norm.double_value(&[]));
        let loss = metrics
            .iter()
            .find(|(name, _)| name == "train/loss")
            .map_or(f64::NAN, |m| m.1);
        if !loss.is_finite() {
            return Err(TrainError::NonFinite { step, loss });
        }
        state.window.add(&metrics, grad_norm);
        if step.is_multiple_of(self.log_interval) || step == self.n_steps {
            self.log(state, step, lr);
        }
        Ok(())
    }

    fn log(&mut self, state: &mut TrainState, step: u64, lr: f64) {
        let mut scalars = state.window.take();
        let seconds = self.clock.start.elapsed().as_secs_f64();
        let tokens_per_s = (state.n_tokens - self.clock.tokens_at_start) as f64 / seconds;
        let wait_fraction = self.clock.waited.as_secs_f64() / seconds;
        let per_step = 1e3 / self.clock.n_steps.max(1) as f64;
        scalars.extend([
            ("timing/ms_per_iter".into(), seconds * per_step),
            (
                "timing/ms_per_load".into(),
                self.clock.waited.as_secs_f64() * per_step,
            ),
            ("timing/tokens_per_s".into(), tokens_per_s),
        ]);
        if step.is_multiple_of(LR_INTERVAL) {
            scalars.push(("lr".into(), lr));
        }
        let loss = scalars
            .iter()
            .find(|(name, _)| name == "train/loss")
            .map_or(f64::NAN, |m| m.1);
        self.terminal.train(&StepLine {
            step,
            n_steps: self.n_steps,
            loss,
            lr,
            tokens_per_s,
            wait_fraction,
        });
        self.sinks.record(Record {
            step,
            scalars,
            texts: Vec::new(),
        });
        self.clock = Clock::new(state.n_tokens);
    }

    /// Logs a validation.
    pub fn validated(&mut self, state: &mut TrainState, stream: &str, scores: &Scores) {
        let since_best = state.note_loss(stream, scores.loss);
        let name = |metric: &str| format!("validation/{stream}/{metric}");
        let mut scalars = vec![
            (name("loss"), scores.loss),
            (name("accuracy"), scores.accuracy),
            (name("perplexity"), scores.perplexity()),
            (name("time_since_best_loss"), since_best as f64),
        ];
        scalars.extend(
            scores
                .bits_per_byte
                .map(|bits| (name("bits_per_byte"), bits)),
        );
        let bits = scores
            .bits_per_byte
            .map(|bits| format!(", {bits:.3} bits per UTF-8 byte"));
        self.message(&format!(
            "step {}: {stream} loss {:.4} nats per token, perplexity {:.2}, accuracy {:.1} %{}",
            state.step,
            scores.loss,
            scores.perplexity(),
            scores.accuracy * 100.0,
            bits.unwrap_or_default()
        ));
        self.sinks.record(Record {
            step: state.step,
            scalars,
            texts: Vec::new(),
        });
    }

    /// Begins to measure anew: what was done meanwhile is not training.
    pub fn restart_clock(&mut self, state: &TrainState) {
        self.clock = Clock::new(state.n_tokens);
    }

    /// Logs a generated text.
    pub fn sample(&mut self, step: u64, index: usize, text: &str) {
        self.message(&format!("sample {index}: {text}"));
        self.sinks.record(Record {
            step,
            scalars: Vec::new(),
            texts: vec![(format!("examples/{index}"), text.to_owned())],
        });
    }

    /// Logs numbers that are known once.
    pub fn once(&mut self, step: u64, scalars: Vec<(String, f64)>) {
        self.sinks.record(Record {
            step,
            scalars,
            texts: Vec::new(),
        });
    }

    /// A line for the user.
    pub fn message(&self, text: &str) {
        self.terminal.message(crate::log::Level::Info, text);
        for warning in self.sinks.take_warnings() {
            self.warn(&warning);
        }
    }

    /// A warning for the user.
    pub fn warn(&self, text: &str) {
        self.terminal.message(crate::log::Level::Warning, text);
    }

    /// Writes everything out.
    pub fn finish(self) {
        self.terminal.finish();
        for warning in self.sinks.finish() {
            self.terminal.message(crate::log::Level::Warning, &warning);
        }
    }
}
