//! Tells the user that the process keeps more and more memory, before the system ends it.
//!
//! Who keeps it cannot be told from outside: freed blocks stay with the process, so that a call that leaks takes them and
//! it is a later, innocent one for which the process grows. So the user hears which calls were repeated meanwhile.

use crate::watchdog::{self, Counts};

/// Samples in which the process must have grown without a pause.
const N_RISES: u32 = 8;
/// What counts as growth: a quarter of what the process had, and not less than so many bytes.
const PARTS: u64 = 4;
const MIN_BYTES: u64 = 128 << 20;
/// A call that was made less often is no loop.
const MIN_CALLS: u64 = 8;

/// The memory of the process over time.
#[derive(Debug, Default)]
pub struct Growth {
    last: u64,
    n_rises: u32,
    /// What the process had, and which calls it had made, when it began to grow or the user was last told.
    since: Option<(u64, Counts)>,
}

impl Growth {
    /// Takes a sample; says what the user should know.
    pub fn sample(&mut self) -> Option<String> {
        self.look(resident()?, watchdog::counts())
    }

    fn look(&mut self, bytes: u64, calls: Counts) -> Option<String> {
        let has_grown = bytes > self.last;
        self.last = bytes;
        if !has_grown || self.since.is_none() {
            self.n_rises = 0;
            self.since = Some((bytes, calls));
            return None;
        }
        self.n_rises += 1;
        let (before, calls_before) = self.since.as_ref()?;
        let grown = bytes - before;
        let enough = MIN_BYTES.max(before / PARTS);
        if self.n_rises < N_RISES || grown < enough {
            return None;
        }
        let repeated = calls
            .iter()
            .map(|(call, &n)| (call, n - calls_before.get(call).copied().unwrap_or(0)))
            .filter(|&(_, n)| n >= MIN_CALLS)
            .map(|((kind, name, what), n)| format!("{n} times `{what}` of {kind} `{name}`"));
        let repeated: Vec<String> = repeated.collect();
        if repeated.is_empty() {
            return None; // Whatever it is has just begun, and may need what it takes.
        }
        let text = format!(
            "this process grows: it has {:.2} GB of memory, {:.2} GB more than before it called {}; one of these, or \
             what they call, does not free its memory",
            gigabytes(bytes),
            gigabytes(grown),
            repeated.join(", ")
        );
        self.n_rises = 0;
        self.since = Some((bytes, calls));
        Some(text)
    }
}

fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

/// Memory of this process that is no file's.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const GB: u64 = 1 << 30;

    /// What is said when the process has so many bytes at one sample after the other, each after `n_calls` more calls.
    fn told(samples: impl IntoIterator<Item = u64>, n_calls: u64) -> Vec<String> {
        let mut growth = Growth::default();
        let looked = samples.into_iter().zip(1..).filter_map(|(bytes, i)| {
            let call = ("model", Arc::from("moeut"), "forward");
            let once = ("dataset", Arc::from("c4"), "open");
            growth.look(bytes, Counts::from([(call, i * n_calls), (once, 1)]))
        });
        looked.collect()
    }

    #[test]
    fn steady_growth_is_told_with_what_was_called_and_again_when_it_goes_on() {
        let said = told((0..30).map(|i| GB + i * GB / 10), 100);
        assert_eq!(
            said[0],
            "this process grows: it has 1.93 GB of memory, 0.86 GB more than before it called 800 times `forward` of \
             model `moeut`; one of these, or what they call, does not free its memory"
        );
        assert_eq!(said.len(), 3, "{said:?}");
    }

    #[test]
    fn a_slow_leak_is_told_once_it_matters() {
        let said = told((0..300).map(|i| GB + i * (1 << 20)), 100);
        assert_eq!(said.len(), 1, "{said:?}");
    }

    #[test]
    fn what_comes_to_rest_is_not_told() {
        // Warming up, then as it was; up at each validation; and a peak now and then.
        assert_eq!(told((0..60).map(|i| GB + i.min(7) * GB), 100), [""; 0]);
        assert_eq!(told((0..60).map(|i| GB + i / 5 * GB), 100), [""; 0]);
        assert_eq!(told((0..60).map(|i| GB + i % 6 * GB), 100), [""; 0]);
    }

    #[test]
    fn one_long_call_may_need_what_it_takes() {
        assert_eq!(told((0..60).map(|i| GB + i * GB), 0), [""; 0]);
    }

    #[test]
    fn this_process_has_memory() {
        assert!(resident().unwrap() > 1 << 16);
    }
}
