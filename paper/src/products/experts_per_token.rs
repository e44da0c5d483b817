//! Figures: how many experts the occurrences of a token use together in each layer, and which share that is of all
//! experts that they use in the layers of the same group. Mean and standard deviation over the commonest tokens; an
//! error bar ends where the values do, for no token uses less than one expert, or more than all.

use crate::product::{Figure, Made, Product};
use crate::run::Run;
use crate::selections::{Kind, Selections, mean_and_std, sources};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Series, XyChart};
use std::collections::BTreeSet;

pub(super) const PRODUCT: Product = Product {
    name: "experts_per_token",
    summary: "distinct experts of a token by layer",
    make,
    sources,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let mut counts = Chart::new(
        "expert_count_per_token_per_layer",
        "Distinct experts of a token",
    );
    let mut shares = Chart::new("experts_per_token_per_layer", "Share of a token's experts");
    for (run, selections) in made.gather(runs, Selections::of) {
        let kinds = selections.kinds();
        let (mut of_counts, mut of_shares) = (Vec::new(), Vec::new());
        for (place, group) in selections.groups.iter().enumerate() {
            let count = |kind: &Kind| kind.experts[place].len() as f64;
            let all = |kind: &Kind| {
                let layers = kind.experts.iter().zip(&selections.groups);
                let of_group = layers.filter(|(_, other)| *other == group);
                let together: BTreeSet<u32> =
                    of_group.flat_map(|(experts, _)| experts).copied().collect();
                together.len() as f64
            };
            of_counts.push(kinds.iter().map(count).collect());
            of_shares.push(kinds.iter().map(|kind| count(kind) / all(kind)).collect());
        }
        counts.add(run, &of_counts);
        shares.add(run, &of_shares);
    }
    made.figures.extend(counts.figure());
    made.figures.extend(shares.figure());
    made
}

/// A chart over layers.
struct Chart {
    name: &'static str,
    label: &'static str,
    series: Vec<Series>,
    data: Table,
}

impl Chart {
    fn new(name: &'static str, label: &'static str) -> Self {
        let columns = [
            "layer",
            "mean",
            "standard deviation",
            "smallest",
            "largest",
            "tokens",
            "run",
        ];
        let data = Table {
            columns: columns.map(Column::new).to_vec(),
            ..Table::default()
        };
        Self {
            name,
            label,
            series: Vec::new(),
            data,
        }
    }

    /// Adds a run; `values` are those of all tokens, by layer.
    fn add(&mut self, run: &Run, values: &[Vec<f64>]) {
        let (mut means, mut ranges) = (Vec::new(), Vec::new());
        for (layer, values) in values.iter().enumerate() {
            let (mean, std) = mean_and_std(values).unwrap_or((f64::NAN, 0.0));
            let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            means.push(mean);
            ranges.push(((mean - std).max(smallest), (mean + std).min(largest)));
            let numbers = [
                layer.to_string(),
                mean.to_string(),
                std.to_string(),
                smallest.to_string(),
                largest.to_string(),
                values.len().to_string(),
            ];
            self.data
                .rows
                .push(numbers.into_iter().chain([run.name.clone()]).collect());
        }
        let name = format!("{} {}", run.model.family().name(), run.model.size());
        self.series
            .push(Series::new(name, means).with_range(&ranges));
    }

    fn figure(self) -> Option<Figure> {
        let chart = XyChart {
            x: Axis::new("Layer"),
            y: Axis::new(self.label),
            series: self.series,
        };
        (!chart.series.is_empty()).then(|| Figure {
            name: self.name.to_owned(),
            plot: chart.into(),
            data: self.data,
        })
    }
}
