//! How long a training still takes: its steps and its validations, each at the pace that this process has seen.

use super::timing::{Phase, Spent};
use std::time::Duration;

/// Records that the pace is an average of: short enough to follow a machine that becomes slower, long enough to be
/// steady.
const MEMORY: f64 = 50.0;

/// Estimates from the times of a run's phases.
#[derive(Debug, Default)]
pub(super) struct Eta {
    has_begun: bool,
    /// Sums in which what is `MEMORY` records old has faded.
    n_steps: f64,
    step_seconds: f64,
    n_validations: f64,
    validation_seconds: f64,
}

impl Eta {
    /// Takes in what `n_steps` steps and the validations between them took. The first call does not count: its steps
    /// include what happens once.
    pub(super) fn note(&mut self, n_steps: u64, spent: &Spent) {
        let fade = 1.0 - 1.0 / MEMORY;
        if std::mem::replace(&mut self.has_begun, true) {
            self.n_steps = self.n_steps * fade + n_steps as f64;
            let seconds = spent.training() + spent.of(Phase::Save);
            self.step_seconds = self.step_seconds * fade + seconds;
        }
        if spent.n_validations() > 0 {
            self.n_validations = self.n_validations * fade + spent.n_validations() as f64;
            let seconds = spent.of(Phase::Validate);
            self.validation_seconds = self.validation_seconds * fade + seconds;
        }
    }

    /// Until the last step and its validation, from `step` on; nothing if that is not known.
    pub(super) fn left(&self, step: u64, n_steps: u64, eval_interval: u64) -> Option<Duration> {
        if self.n_steps <= 0.0 || n_steps == u64::MAX {
            return None;
        }
        let mean = |sum: f64, n: f64| if n > 0.0 { sum / n } else { 0.0 };
        let steps = n_steps.saturating_sub(step) as f64 * mean(self.step_seconds, self.n_steps);
        let n_validations = n_validations(step, n_steps, eval_interval) as f64;
        let validations = n_validations * mean(self.validation_seconds, self.n_validations);
        Duration::try_from_secs_f64(steps + validations).ok()
    }
}

/// Validations that come after that of `step`.
fn n_validations(step: u64, n_steps: u64, interval: u64) -> u64 {
    let interval = interval.max(1);
    let is_last_extra = u64::from(!n_steps.is_multiple_of(interval) && step < n_steps);
    (n_steps / interval).saturating_sub(step / interval) + is_last_extra
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validations_are_counted_to_the_end() {
        for (step, n_steps, n) in [(0, 100, 10), (5, 100, 10), (10, 100, 9), (90, 100, 1)] {
            assert_eq!(n_validations(step, n_steps, 10), n, "{step} of {n_steps}");
        }
        assert_eq!(n_validations(0, 15, 10), 2);
        assert_eq!(n_validations(10, 15, 10), 1);
        assert_eq!(n_validations(15, 15, 10), 0);
        assert_eq!(n_validations(200, 100, 10), 0);
    }

    #[test]
    fn steps_and_validations_have_their_own_pace() {
        let spent = |training: f64, validation: f64, n: u64| {
            let mut seconds = [0.0; Phase::ALL.len()];
            seconds[Phase::ForwardBackward as usize] = training;
            seconds[Phase::Validate as usize] = validation;
            Spent::new(seconds, n)
        };
        let mut eta = Eta::default();
        assert_eq!(eta.left(0, 100, 50), None);
        eta.note(10, &spent(600.0, 0.0, 0)); // Once.
        assert_eq!(eta.left(10, 100, 50), None);
        eta.note(10, &spent(5.0, 0.0, 0));
        let left = |eta: &Eta, step| eta.left(step, 100, 50).unwrap().as_secs_f64();
        assert!((left(&eta, 20) - 40.0).abs() < 1e-6);
        // The time of a validation changes nothing about that of steps.
        eta.note(10, &spent(5.0, 30.0, 1));
        assert!(
            (left(&eta, 30) - (35.0 + 60.0)).abs() < 1e-6,
            "{}",
            left(&eta, 30)
        );
        assert!((left(&eta, 50) - (25.0 + 30.0)).abs() < 1e-6);
        // A slower machine is believed after a while, and not at once.
        for _ in 0..100 {
            eta.note(10, &spent(10.0, 0.0, 0));
        }
        let slow = left(&eta, 90) - 30.0;
        assert!((9.0..=10.0).contains(&slow), "{slow}");
        assert_eq!(eta.left(90, u64::MAX, 50), None);
    }
}
