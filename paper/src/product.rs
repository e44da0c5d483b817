//! What tables and figures have in common: what they are made from, what they are, and who was left out.

use crate::run::{PERPLEXITY, Reason, Run};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Bars, Plot, Scale, Series};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A table or figure of the paper.
pub(crate) struct Product {
    /// What one types; the name of the paper's script where there was one.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) summary: &'static str,
    /// Makes it.
    pub(crate) make: fn(&[&Run]) -> Made,
    /// Further files that it is made from, in the folder of a run; see [`crate::selections`].
    pub(crate) sources: fn(&Path) -> Vec<PathBuf>,
}

/// For products that need nothing but [`Run`].
pub(crate) fn nothing_else(_: &Path) -> Vec<PathBuf> {
    Vec::new()
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pub(crate) figures: Vec<Figure>,
    /// By name of the file.
    pub(crate) tables: Vec<(String, Table)>,
    /// Runs that are not in it, and why.
    pub(crate) left_out: Vec<(String, Reason)>,
}

/// A figure with the numbers that it shows.
#[derive(Debug)]
pub(crate) struct Figure {
    /// Of its files.
    pub(crate) name: String,
    pub(crate) plot: Plot,
    /// Each number with the run that it is from.
    pub(crate) data: Table,
}

impl Made {
    /// What is known about each run; who lacks it is named and left out.
    pub(crate) fn gather<'a, T>(
        &mut self,
        runs: &[&'a Run],
        find: impl Fn(&'a Run) -> Result<T, Reason>,
    ) -> Vec<(&'a Run, T)> {
        let mut found = Vec::new();
        for &run in runs {
            match find(run) {
                Ok(value) => found.push((run, value)),
                Err(reason) => self.left_out.push((run.name.clone(), reason)),
            }
        }
        found
    }

    /// A chart of the runs' perplexities as bars, each at the place and in the series that `place` says; nothing if there
    /// are none.
    pub(crate) fn bars<'a>(
        &mut self,
        name: &str,
        x: &str,
        scale: Scale,
        runs: &[&'a Run],
        place: impl Fn(&'a Run) -> Result<(String, String), Reason>,
    ) {
        let found = self.gather(runs, |run| {
            let (place, series) = place(run)?;
            Ok(Bar {
                place,
                series,
                value: perplexity(run)?,
                run: run.name.clone(),
            })
        });
        let bars: Vec<Bar> = found.into_iter().map(|(_, bar)| bar).collect();
        let (mut places, mut names) = (Vec::new(), Vec::new());
        for bar in &bars {
            if !places.contains(&bar.place) {
                places.push(bar.place.clone());
            }
            if !names.contains(&bar.series) {
                names.push(bar.series.clone());
            }
        }
        let mut series: Vec<Series> = names
            .iter()
            .map(|name| Series::new(name, vec![f64::NAN; places.len()]))
            .collect();
        let mut data = Table {
            columns: ["place", "series", "perplexity", "run"]
                .map(Column::new)
                .to_vec(),
            ..Table::default()
        };
        for bar in &bars {
            let place = places.iter().position(|place| *place == bar.place);
            let index = names.iter().position(|name| *name == bar.series);
            let (Some(place), Some(index)) = (place, index) else {
                continue;
            };
            let height = &mut series[index].y[place];
            if !height.is_nan() {
                let twice = format!(
                    "there is a run at `{}`, `{}` already",
                    bar.place, bar.series
                );
                self.left_out.push((bar.run.clone(), twice));
                continue;
            }
            *height = bar.value;
            data.rows.push(vec![
                bar.place.clone(),
                bar.series.clone(),
                bar.value.to_string(),
                bar.run.clone(),
            ]);
        }
        if data.rows.is_empty() {
            return;
        }
        let limits = limits(&bars, scale);
        let label = if limits.is_some() {
            "Perplexity (axis cut)"
        } else {
            "Perplexity"
        };
        let y = Axis {
            label: label.to_owned(),
            scale,
            limits,
            ..Axis::default()
        };
        let plot = Bars {
            x: Axis::new(x).with_names(places),
            y,
            series,
            shows_values: true,
        };
        self.figures.push(Figure {
            name: name.to_owned(),
            plot: plot.into(),
            data,
        });
    }

    /// Whether there is something to show.
    pub(crate) fn is_empty(&self) -> bool {
        self.figures.is_empty() && self.tables.is_empty()
    }
}

/// One bar.
#[derive(Debug)]
struct Bar {
    /// Where on the axis.
    place: String,
    /// Which of those beside each other.
    series: String,
    value: f64,
    run: String,
}

/// Names of sizes, by run: those that are compared have the same, that of the first.
pub(crate) fn sizes(runs: &[&Run]) -> BTreeMap<String, String> {
    let size = |run: &&Run| {
        let first = runs
            .iter()
            .find(|other| other.model.is_as_large_as(&run.model));
        (run.name.clone(), first.unwrap_or(run).model.size())
    };
    runs.iter().map(size).collect()
}

/// The perplexity on the held-out text.
pub(crate) fn perplexity(run: &Run) -> Result<f64, Reason> {
    run.metric(PERPLEXITY)
}

/// Perplexities differ by percents: the axis begins below the smallest by as much as they differ, not at zero, where
/// all bars would look alike. The chart shows that it does, and each number. None if it begins at zero.
fn limits(bars: &[Bar], scale: Scale) -> Option<(f64, f64)> {
    let (low, high) = bars
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), bar| {
            (low.min(bar.value), high.max(bar.value))
        });
    let span = high - low;
    match scale {
        Scale::Log => Some((low / 1.5, high * 1.15)),
        Scale::Linear if span > 0.0 && low > span => Some((low - span, high + 0.15 * span)),
        Scale::Linear => None,
    }
}
