//! The learning rate as a function of the step. Knows nothing about optimizers.

use crate::args::{ScheduleConfig, ScheduleKind};
use moeut_plugin_api::PluginError;
use std::f64::consts::PI;

/// A learning-rate schedule, in closed form: it has no state, so resuming a run needs nothing from it.
///
/// With step `i` (counted from 0), warm-up `W`, and `e = max(0, i − W)`:
///
/// ```text
/// step   lr · γ^(number of boundaries ≤ e)
/// cos    m + (lr − m)(1 + cos(π e / n_steps)) / 2,   m = min_lr_multiplier · lr
/// noam   lr / √d_model · ( 1 / √(i + 1)         if i ≥ W
///                        , (i + 1) / W^1.5      otherwise )
/// ```
///
/// During the warm-up, `step` and `cos` are `lr · (i + 1) / W`. Because `e` starts after it, the cosine ends `W` steps
/// before its minimum; that is the reference's behavior and the one that the paper's models were trained with.
///
/// # Source
/// Reference code `framework/task/task.py`; `noam` is of Vaswani et al., arXiv:1706.03762, §5.3.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    lr: f64,
    warmup_steps: u64,
    curve: Curve,
}

#[derive(Debug, Clone, PartialEq)]
enum Curve {
    Step { boundaries: Vec<u64>, gamma: f64 },
    Noam { d_model: u64 },
    Cos { min_lr: f64, n_steps: u64 },
}

impl Schedule {
    /// The schedule of a configuration.
    ///
    /// `n_steps` is the length of the training, which `cos` needs; `d_model` is the model's width, which `noam` needs.
    ///
    /// # Errors
    /// If the kind of schedule needs one of them and it is absent or zero.
    pub fn new(
        config: &ScheduleConfig,
        n_steps: Option<u64>,
        d_model: Option<u64>,
    ) -> Result<Self, PluginError> {
        let curve = match config.kind {
            ScheduleKind::Step => Curve::Step {
                boundaries: config.boundaries.clone(),
                gamma: config.gamma,
            },
            ScheduleKind::Noam => Curve::Noam {
                d_model: d_model.filter(|&d| d > 0).ok_or_else(no_width)?,
            },
            ScheduleKind::Cos => Curve::Cos {
                min_lr: config.min_lr_multiplier * config.lr,
                n_steps: n_steps.filter(|&n| n > 0).ok_or_else(no_length)?,
            },
        };
        Ok(Self {
            lr: config.lr,
            warmup_steps: config.warmup_steps,
            curve,
        })
    }

    /// The learning rate of step `step`, the first of which is 0.
    pub fn lr_at(&self, step: u64) -> f64 {
        match self.curve {
            Curve::Step {
                ref boundaries,
                gamma,
            } => self.warmed_up(step, |e| {
                let passed = boundaries.iter().filter(|&&boundary| boundary <= e).count();
                std::iter::repeat_n(gamma, passed).fold(self.lr, |lr, gamma| lr * gamma)
            }),
            Curve::Cos { min_lr, n_steps } => self.warmed_up(step, |e| {
                let phase = PI * e as f64 / n_steps as f64;
                min_lr + (self.lr - min_lr) * (1.0 + phase.cos()) / 2.0
            }),
            Curve::Noam { d_model } => {
                let base = self.lr / (d_model as f64).sqrt();
                let position = (step + 1) as f64;
                if step >= self.warmup_steps {
                    base / position.sqrt()
                } else {
                    base * position / (self.warmup_steps as f64).powf(1.5)
                }
            }
        }
    }

    /// A curve that begins after a linear warm-up to its first value.
    fn warmed_up(&self, step: u64, curve: impl Fn(u64) -> f64) -> f64 {
        if step < self.warmup_steps {
            curve(0) * (step + 1) as f64 / self.warmup_steps as f64
        } else {
            curve(step - self.warmup_steps)
        }
    }
}

fn no_length() -> PluginError {
    PluginError::new("no length for the schedule `cos`")
        .why("`-lr_sched.type cos` falls over the whole training, and `-stop_after` is not given")
        .fix("set `-stop_after <steps>`, or `-lr_sched.type step`")
}

fn no_width() -> PluginError {
    PluginError::new("no width for the schedule `noam`")
        .why("`-lr_sched.type noam` divides by the root of `-state_size`, which the model does not have")
        .fix("set `-lr_sched.type` to `cos` or `step`")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The golden table is printed with eleven digits.
    const RELATIVE_TOLERANCE: f64 = 1e-10;

    fn config(kind: ScheduleKind, warmup_steps: u64) -> ScheduleConfig {
        ScheduleConfig {
            kind,
            lr: 2.5e-4,
            warmup_steps,
            min_lr_multiplier: 0.1,
            boundaries: vec![10, 20],
            gamma: 0.1,
        }
    }

    fn assert_close(actual: f64, expected: f64, what: &str) {
        assert!(
            (actual - expected).abs() <= RELATIVE_TOLERANCE * expected,
            "{what}: {actual:e}, not {expected:e}"
        );
    }

    /// Values of the reference's scheduler for lr = 2.5e-4, floor 0.1, 100,000 steps, in fp64.
    #[test]
    fn cosine_equals_the_reference() {
        let [warm, cold] = [4000, 0].map(|warmup| {
            Schedule::new(&config(ScheduleKind::Cos, warmup), Some(100_000), None).unwrap()
        });
        for (step, lr_warm, lr_cold) in [
            (0, 6.25e-8, 2.5e-4),
            (1999, 1.25e-4, 2.497_782_288_1e-4),
            (3999, 2.5e-4, 2.491_133_468_1e-4),
            (4000, 2.5e-4, 2.491_129_039_0e-4),
            (50_000, 1.515_999_887_8e-4, 1.375e-4),
            (99_999, 2.588_753_912_1e-5, 2.500_000_005_6e-5),
        ] {
            assert_close(
                warm.lr_at(step),
                lr_warm,
                &format!("warm-up 4000, step {step}"),
            );
            assert_close(
                cold.lr_at(step),
                lr_cold,
                &format!("no warm-up, step {step}"),
            );
        }
    }

    #[test]
    fn steps_fall_at_their_boundaries_counted_after_the_warmup() {
        let schedule = Schedule::new(&config(ScheduleKind::Step, 4), None, None).unwrap();
        for (step, lr) in [
            (0, 6.25e-5),
            (3, 2.5e-4),
            (4, 2.5e-4),
            (13, 2.5e-4),
            (14, 2.5e-5),
            (24, 2.5e-6),
        ] {
            assert_close(schedule.lr_at(step), lr, &format!("step {step}"));
        }
    }

    #[test]
    fn noam_rises_to_the_end_of_its_own_warmup() {
        let schedule = Schedule::new(&config(ScheduleKind::Noam, 100), None, Some(400)).unwrap();
        for (step, lr) in [(0, 1.25e-8), (99, 1.25e-6), (399, 6.25e-7)] {
            assert_close(schedule.lr_at(step), lr, &format!("step {step}"));
        }
    }

    #[test]
    fn a_schedule_that_lacks_something_says_what_to_type() {
        let cos = Schedule::new(&config(ScheduleKind::Cos, 0), None, None).unwrap_err();
        assert_eq!(
            cos.fix,
            "set `-stop_after <steps>`, or `-lr_sched.type step`"
        );
        let noam = Schedule::new(&config(ScheduleKind::Noam, 0), None, None).unwrap_err();
        assert_eq!(noam.fix, "set `-lr_sched.type` to `cos` or `step`");
    }
}
