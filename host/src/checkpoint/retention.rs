//! Which old checkpoints to delete. Pure: it sees steps and ages, no files.

use std::time::Duration;

/// The steps that may go, given all checkpoints up to the newest one as `(step, age)`.
///
/// The newest `keep_last` stay. Without `keep_every` all others go. With it, of the others that are younger than
/// `keep_every` the oldest stays as well, and whatever is older stays for good, which leaves about one checkpoint per
/// `keep_every`.
///
/// # Source
/// Reference code `framework/helpers/saver.py`, with `keep_every` = 4 hours for runs that log to TensorBoard only.
pub(super) fn expired(
    checkpoints: &[(u64, Duration)],
    keep_last: usize,
    keep_every: Option<Duration>,
) -> Vec<u64> {
    let mut newest_first = checkpoints.to_vec();
    newest_first.sort_unstable_by_key(|&(step, _)| std::cmp::Reverse(step));
    let others = newest_first.into_iter().skip(keep_last.max(1));
    match keep_every {
        None => others.map(|(step, _)| step).collect(),
        Some(period) => {
            let mut young: Vec<u64> = others
                .take_while(|&(_, age)| age < period)
                .map(|(step, _)| step)
                .collect();
            young.pop();
            young
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    #[test]
    fn without_a_period_only_the_newest_stay() {
        let all: Vec<(u64, Duration)> = [300, 100, 400, 200].map(|step| (step, HOUR)).to_vec();
        assert_eq!(expired(&all, 2, None), [200, 100]);
        assert_eq!(expired(&all, 9, None), [0; 0]);
        assert_eq!(expired(&all, 0, None), [300, 200, 100]);
    }

    #[test]
    fn with_a_period_about_one_checkpoint_per_period_stays_for_good() {
        let mut kept: Vec<u64> = Vec::new();
        for half_hour in 0..48 {
            kept.push(half_hour);
            let aged: Vec<(u64, Duration)> = kept
                .iter()
                .map(|&at| (at, HOUR / 2 * u32::try_from(half_hour - at).unwrap()))
                .collect();
            let doomed = expired(&aged, 1, Some(4 * HOUR));
            kept.retain(|step| !doomed.contains(step));
        }
        assert_eq!(kept, [0, 7, 14, 21, 28, 35, 42, 47], "in half hours");
    }
}
