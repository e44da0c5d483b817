//! What a model is asked to tell about itself, and when.
//!
//! | wish | training | validation |
//! |---|---|---|
//! | cheap numbers | each `-log_interval` steps | with `-val_log_details` |
//! | counts of selections | each tenth step, and the step that shows them | always |
//! | counts of what is selected together | – | with `-val_log_details` |
//! | costly numbers, and charts | each `-details_log_interval` steps, last microbatch | with `-val_log_details`, last batch |
//! | attention maps | each `-debug_plot_interval` steps, first microbatch | – |
//! | the counts of a step for a file | with `-dump_logs`, each step | with `-dump_logs`, each stream |
//!
//! Nothing is counted or charted with `-details_log_interval none`. The reference counts microbatches where steps are
//! counted here, and shows one step later. Its `layer_stats/…` has no counterpart: it asks for them each twenty steps, but
//! none of its layers has the method that would answer. What a layer has to tell is among the cheap numbers.

use super::Output;
use super::charts::{Shown, Sketch};
use crate::args::{HostConfig, ReportConfig};
use moeut_plot::Plot;
use moeut_plugin_api::{MapWish, PluginError, Wishes};
use moeut_torch::OrPluginError;
use moeut_torch::readback::Readback;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Selections of one step in so many are counted, as in the reference.
const COUNT_INTERVAL: u64 = 10;

/// When a run reports what.
#[derive(Debug, Clone, Copy)]
pub struct Intervals {
    /// Steps between records.
    pub record: u64,
    /// Steps between charts; never if absent.
    details: Option<u64>,
    /// Steps between attention maps; never if absent.
    maps: Option<u64>,
    map: MapWish,
    logs_validation: bool,
    dumps: bool,
}

impl Intervals {
    /// As the user wants it.
    pub fn new(config: &HostConfig) -> Self {
        let &ReportConfig {
            details_interval,
            map_interval,
            n_map_steps,
            has_head_maps,
            logs_validation,
            dumps,
        } = &config.reports;
        Self {
            record: config.log_interval,
            details: details_interval,
            maps: map_interval,
            map: MapWish {
                n_steps: n_map_steps,
                has_heads: has_head_maps,
            },
            logs_validation,
            dumps: dumps && !config.dry_run,
        }
    }

    /// Whether attention maps will ever be made.
    pub fn has_maps(&self) -> bool {
        self.maps.is_some()
    }

    /// For a microbatch of the training step that will be number `step`.
    pub fn training(&self, step: u64, microbatch: usize, n_microbatches: usize) -> Wishes {
        let is_due = |interval: Option<u64>| interval.is_some_and(|n| step.is_multiple_of(n));
        let has_details = is_due(self.details);
        Wishes {
            stats: is_due(Some(self.record)),
            counts: has_details || self.details.is_some() && step.is_multiple_of(COUNT_INTERVAL),
            pairs: false,
            details: has_details && microbatch + 1 == n_microbatches,
            selections: self.dumps,
            maps: (is_due(self.maps) && microbatch == 0).then_some(self.map),
        }
    }

    /// Whether there are training steps of which nothing is wished for.
    pub(super) fn has_plain_steps(&self) -> bool {
        self.record > 1 && !self.dumps
    }

    /// For the validation of a stream.
    pub fn observer(&self) -> Observer {
        Observer::new(Wishes {
            stats: self.logs_validation,
            counts: self.details.is_some(),
            pairs: self.logs_validation,
            details: self.logs_validation,
            selections: self.dumps,
            maps: None,
        })
    }
}

/// Gathers what the passes of a validation tell.
#[derive(Debug, Default)]
pub struct Observer {
    wishes: Wishes,
    n_rows: f64,
    /// Sums over rows.
    stats: BTreeMap<String, Tensor>,
    selections: BTreeMap<String, Tensor>,
    sketches: Vec<(Sketch, Tensor)>,
}

/// What a validation tells about a stream.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    /// Numbers by name.
    pub scalars: Vec<(String, f64)>,
    /// Charts by name.
    pub plots: Vec<(String, Plot)>,
}

impl Observer {
    fn new(wishes: Wishes) -> Self {
        Self {
            wishes,
            ..Self::default()
        }
    }

    /// The wishes of a pass.
    pub(super) fn wishes(&self, is_last: bool) -> Wishes {
        Wishes {
            details: self.wishes.details && is_last,
            ..self.wishes
        }
    }

    /// Takes what a pass of `n_rows` sequences told.
    pub(super) fn add(&mut self, n_rows: usize, output: Output) {
        self.n_rows += n_rows as f64;
        for (name, value) in output.stats {
            accumulate(&mut self.stats, name, value * n_rows as f64);
        }
        for (name, value) in output.selections {
            accumulate(&mut self.selections, name, value);
        }
        self.sketches.extend(output.charts);
    }

    /// The counts of all passes, for a file.
    pub(super) fn take_selections(&mut self) -> Vec<(String, Tensor)> {
        std::mem::take(&mut self.selections).into_iter().collect()
    }

    /// Numbers and charts, averaged over rows; waits for the device.
    pub(super) fn finish(self) -> Result<Seen, PluginError> {
        let (names, sums): (Vec<String>, Vec<Tensor>) = self.stats.into_iter().unzip();
        let (sketches, values): (Vec<Sketch>, Vec<Tensor>) = self.sketches.into_iter().unzip();
        let tensors: Vec<&Tensor> = sums.iter().chain(&values).collect();
        let mut seen = Seen::default();
        if tensors.is_empty() {
            return Ok(seen);
        }
        let read = Readback::start(&tensors).and_then(Readback::wait);
        let mut read = read
            .or_plugin_error("the statistics of a validation cannot be read")?
            .into_iter();
        for (name, value) in names.into_iter().zip(&mut read) {
            let sum = value.first().copied().unwrap_or(f64::NAN);
            seen.scalars.push((name, sum / self.n_rows));
        }
        for (sketch, values) in sketches.into_iter().zip(read) {
            match sketch.draw(&values, None)? {
                (name, Shown::Number(value)) => seen.scalars.push((name, value)),
                (name, Shown::Plot(plot)) => seen.plots.push((name, *plot)),
            }
        }
        Ok(seen)
    }
}

/// Adds a value to the sum of its name.
pub(super) fn accumulate(sums: &mut BTreeMap<String, Tensor>, name: String, value: Tensor) {
    let sum = match sums.remove(&name) {
        Some(sum) => sum + value,
        None => value,
    };
    sums.insert(name, sum);
}

/// How many numbers a model has, which the reference logs once; a model without layers of those names has none to tell.
///
/// ```text
/// n_model_weights           trained numbers of the layers, without embedding and output
/// n_attention_weights       those in modules whose names contain `attention` or `attn`
/// n_non_attnetion_weights   the others; attention_precent is the share of the former, 0 to 1
/// ```
pub(super) fn weight_counts(trained: &[(String, Tensor)]) -> Vec<(String, f64)> {
    let of_layers = trained.iter().filter_map(|(name, tensor)| {
        let name = name.strip_prefix("unique_layers.")?;
        let is_attention = name.contains("attention") || name.contains("attn");
        Some((is_attention, tensor.numel() as f64))
    });
    let (mut all, mut attention) = (0.0, 0.0);
    for (is_attention, n) in of_layers {
        all += n;
        attention += if is_attention { n } else { 0.0 };
    }
    if all == 0.0 {
        return Vec::new();
    }
    [
        ("n_model_weights", all),
        ("n_attention_weights", attention),
        ("n_non_attnetion_weights", all - attention),
        ("attention_precent", attention / all),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// Counts that arrived as numbers, as they were.
pub(super) fn counts(values: &[f64], size: &[i64]) -> Tensor {
    Tensor::from_slice(values)
        .to_kind(Kind::Int64)
        .reshape(size)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tch::Device;

    /// With records each 20 steps and maps each 30.
    pub(in crate::train) fn intervals(details: Option<u64>) -> Intervals {
        Intervals {
            record: 20,
            details,
            maps: Some(30),
            map: MapWish {
                n_steps: -4,
                has_heads: true,
            },
            logs_validation: false,
            dumps: false,
        }
    }

    /// The steps up to 100 at which a wish of one of two microbatches is made.
    fn steps(intervals: Intervals, of: impl Fn(&Wishes) -> bool) -> [Vec<u64>; 2] {
        [0, 1].map(|microbatch| {
            let wishes = |step: &u64| of(&intervals.training(*step, microbatch, 2));
            (1..=100).filter(wishes).collect()
        })
    }

    #[test]
    fn each_wish_has_its_interval() {
        let on = intervals(Some(45));
        let each = |n: u64| -> Vec<u64> { (1..=100).filter(|step| step % n == 0).collect() };
        assert_eq!(steps(on, |wishes| wishes.stats), [each(20), each(20)]);
        assert_eq!(steps(on, |wishes| wishes.details), [vec![], each(45)]);
        assert_eq!(
            steps(on, |wishes| wishes.maps.is_some()),
            [each(30), vec![]]
        );
        let mut counted = [each(10), vec![45]].concat();
        counted.sort_unstable();
        assert_eq!(
            steps(on, |wishes| wishes.counts),
            [counted.clone(), counted]
        );
    }

    #[test]
    fn without_an_interval_nothing_is_counted() {
        let off = intervals(None);
        let none: [Vec<u64>; 2] = [vec![], vec![]];
        assert_eq!(steps(off, |wishes| wishes.counts || wishes.details), none);
        assert_eq!(off.observer().wishes(true), Wishes::default());
        assert_eq!(steps(off, |wishes| wishes.pairs || wishes.selections), none);
    }

    #[test]
    fn a_validation_shows_details_with_its_last_batch() {
        let mut on = intervals(Some(100));
        on.logs_validation = true;
        let observer = on.observer();
        assert!(observer.wishes(false).pairs && !observer.wishes(false).details);
        assert!(observer.wishes(true).details);
    }

    #[test]
    fn statistics_of_a_validation_are_averaged_over_sequences() {
        let output = |value: f64, n: i64| Output {
            logits: Tensor::new(),
            regularizers: Vec::new(),
            stats: vec![("a".to_owned(), Tensor::from(value))],
            charts: Vec::new(),
            selections: vec![("n".to_owned(), Tensor::from(n))],
        };
        let mut observer = Observer::default();
        observer.add(3, output(1.0, 5));
        observer.add(1, output(5.0, 7));
        let selections = observer.take_selections();
        assert_eq!(selections[0].1.int64_value(&[]), 12);
        let seen = observer.finish().unwrap();
        assert_eq!(seen.scalars, [("a".to_owned(), 2.0)]);
    }

    #[test]
    fn weights_are_counted_by_the_names_of_their_modules() {
        let tensor = |n: i64| Tensor::zeros([n], (Kind::Float, Device::Cpu));
        let named = [
            ("embedding.weight", 100),
            ("unique_layers.0.self_attn.projections.q", 6),
            ("unique_layers.1.pkm.keys", 18),
        ]
        .map(|(name, n)| (name.to_owned(), tensor(n)));
        let expected = [
            ("n_model_weights", 24.0),
            ("n_attention_weights", 6.0),
            ("n_non_attnetion_weights", 18.0),
            ("attention_precent", 0.25),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value));
        assert_eq!(weight_counts(&named), expected);
        assert_eq!(weight_counts(&named[..1]), []);
    }
}
