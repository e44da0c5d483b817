//! Where the time goes, as the host sees it, without waiting for the device.
//!
//! A GPU works behind the host: the time of work that the host only enqueues shows where the host next waits for a
//! result, mostly in `log`. The sum is right in any case. `-speedtest iter` waits around each step instead.

use std::time::{Duration, Instant};

/// What the host does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Waits for data.
    Load,
    /// Forward and backward passes.
    ForwardBackward,
    /// Clipping and the update.
    Optimizer,
    /// Reads results and hands them to the logs.
    Log,
    /// Validates.
    Validate,
    /// Copies the state for a checkpoint.
    Save,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 6] = [
        Self::Load,
        Self::ForwardBackward,
        Self::Optimizer,
        Self::Log,
        Self::Validate,
        Self::Save,
    ];

    /// Its name in the logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::ForwardBackward => "forward_backward",
            Self::Optimizer => "optimizer",
            Self::Log => "log",
            Self::Validate => "validate",
            Self::Save => "save",
        }
    }
}

/// A stopwatch that is always in one phase.
#[derive(Debug)]
pub struct Timing {
    spent: [Duration; Phase::ALL.len()],
    n_validations: u64,
    phase: Phase,
    since: Instant,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            spent: Default::default(),
            n_validations: 0,
            phase: Phase::Log,
            since: Instant::now(),
        }
    }
}

impl Timing {
    /// Ends the phase before and begins another.
    pub fn enter(&mut self, phase: Phase) {
        let now = Instant::now();
        self.spent[self.phase as usize] += now - self.since;
        self.n_validations += u64::from(phase == Phase::Validate && self.phase != phase);
        (self.phase, self.since) = (phase, now);
    }

    /// The phase that it is in.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The seconds of each phase since the last call.
    pub fn take(&mut self) -> Spent {
        self.enter(self.phase);
        let seconds = std::mem::take(&mut self.spent).map(|time| time.as_secs_f64());
        Spent::new(seconds, std::mem::take(&mut self.n_validations))
    }
}

/// Seconds by phase.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spent {
    seconds: [f64; Phase::ALL.len()],
    n_validations: u64,
}

impl Spent {
    /// Seconds by the phases' order, and how many validations were begun.
    pub(super) fn new(seconds: [f64; Phase::ALL.len()], n_validations: u64) -> Self {
        Self {
            seconds,
            n_validations,
        }
    }

    /// Seconds in a phase.
    pub fn of(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Validations that were begun.
    pub fn n_validations(&self) -> u64 {
        self.n_validations
    }

    /// Seconds of training: all but validation and checkpoints.
    pub fn training(&self) -> f64 {
        let is_training = |phase: &Phase| !matches!(phase, Phase::Validate | Phase::Save);
        let phases = Phase::ALL.into_iter().filter(is_training);
        phases.map(|phase| self.of(phase)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moment_belongs_to_one_phase() {
        let start = Instant::now();
        let mut timing = Timing::default();
        for phase in Phase::ALL {
            timing.enter(phase);
            std::hint::black_box((0..1000).sum::<u64>());
        }
        let spent = timing.take();
        let whole = start.elapsed().as_secs_f64();
        let sum: f64 = Phase::ALL.into_iter().map(|phase| spent.of(phase)).sum();
        assert!(sum > 0.0 && sum <= whole, "{sum} of {whole}");
        let apart = spent.of(Phase::Validate) + spent.of(Phase::Save);
        assert!((spent.training() + apart - sum).abs() < 1e-12);
        assert_eq!((timing.phase(), spent.n_validations()), (Phase::Save, 1));
        assert!(timing.take().of(Phase::Load) < 1e-12);
    }
}
