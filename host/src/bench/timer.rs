//! Wall time of calls whose work may lie on a GPU.

use super::options::Effort;
use serde::Serialize;
use std::time::Instant;
use tch::{Cuda, Device};

/// Seconds of one call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Spread {
    /// In the middle of the rounds.
    pub(super) median: f64,
    /// Of the fastest round.
    pub(super) min: f64,
    /// Of the slowest round.
    pub(super) max: f64,
    /// Rounds.
    pub(super) n_rounds: u64,
    /// Calls in each.
    pub(super) n_calls: u64,
}

/// Times `work`, which does so many calls; the device has nothing to do when a round begins and when it ends.
///
/// # Errors
/// Whatever `work` says.
pub(super) fn time<E>(
    device: Device,
    effort: Effort,
    mut work: impl FnMut(u64) -> Result<(), E>,
) -> Result<Spread, E> {
    work(effort.n_warmup)?;
    let mut seconds = Vec::new();
    for _ in 0..effort.n_rounds {
        wait_for(device);
        let start = Instant::now();
        work(effort.n_calls)?;
        wait_for(device);
        seconds.push(start.elapsed().as_secs_f64() / effort.n_calls as f64);
    }
    Ok(Spread::of(seconds, effort.n_calls))
}

impl Spread {
    fn of(mut seconds: Vec<f64>, n_calls: u64) -> Self {
        seconds.sort_by(f64::total_cmp);
        let n = seconds.len();
        let at = |index: usize| seconds.get(index).copied().unwrap_or(f64::NAN);
        Self {
            median: f64::midpoint(at(n.saturating_sub(1) / 2), at(n / 2)),
            min: at(0),
            max: at(n.saturating_sub(1)),
            n_rounds: n as u64,
            n_calls,
        }
    }
}

fn wait_for(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(i64::try_from(index).unwrap_or(-1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let median = |seconds: &[f64]| Spread::of(seconds.to_vec(), 1).median;
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-12);
        assert!((median(&[4.0, 1.0, 2.0, 9.0]) - 3.0).abs() < 1e-12);
        let spread = Spread::of(vec![3.0, 1.0, 2.0], 4);
        assert_eq!((spread.min, spread.max), (1.0, 3.0));
        assert_eq!((spread.n_rounds, spread.n_calls), (3, 4));
    }

    #[test]
    fn warm_up_is_not_timed_and_every_round_has_its_calls() {
        let effort = Effort {
            n_warmup: 5,
            n_rounds: 3,
            n_calls: 2,
        };
        let mut asked = Vec::new();
        let spread = time(Device::Cpu, effort, |n| {
            asked.push(n);
            std::thread::sleep(std::time::Duration::from_micros(50));
            Ok::<(), ()>(())
        });
        assert_eq!(asked, [5, 2, 2, 2]);
        // Two calls share the 50 µs.
        assert!(spread.unwrap().min >= 25e-6);
    }
}
