//! Figure: perplexity by number of parameters, for dense models, σ-MoE and MoEUT.

use crate::model::Family;
use crate::product::{Figure, Made, Product, nothing_else, perplexity};
use crate::run::{Reason, Run};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Series, XyChart};

pub(super) const PRODUCT: Product = Product {
    name: "plot_scaling",
    summary: "perplexity by number of parameters",
    make: |runs| {
        curves(
            runs,
            "scaling",
            "Parameters of the layers, millions",
            |run| Ok(run.model.n_model_weights as f64 / 1e6),
        )
    },
    sources: nothing_else,
};

/// Families with a line of their own.
const FAMILIES: [Family; 3] = [Family::Dense, Family::Moeut, Family::SigmaMoe];

/// A line for each family; `x` is what its models are ordered by.
pub(super) fn curves(
    runs: &[&Run],
    name: &str,
    label: &'static str,
    x: impl Fn(&Run) -> Result<f64, Reason>,
) -> Made {
    let mut made = Made::default();
    let mut points = made.gather(runs, |run| {
        let family = run.model.family();
        if FAMILIES.contains(&family) {
            Ok((family, x(run)?, perplexity(run)?))
        } else {
            Err(format!("{} has no line in this figure", family.name()))
        }
    });
    points.sort_by(|(_, a), (_, b)| a.1.total_cmp(&b.1));
    let mut data = Table {
        columns: ["model", "x", "perplexity", "run"]
            .map(Column::new)
            .to_vec(),
        ..Table::default()
    };
    let mut series = Vec::new();
    for family in FAMILIES {
        let of_family = points.iter().filter(|(_, point)| point.0 == family);
        let (mut xs, mut ys) = (Vec::new(), Vec::new());
        for (run, (_, x, y)) in of_family {
            xs.push(*x);
            ys.push(*y);
            data.rows.push(vec![
                family.name().to_owned(),
                x.to_string(),
                y.to_string(),
                run.name.clone(),
            ]);
        }
        if !xs.is_empty() {
            series.push(Series::new(family.name(), ys).at(xs));
        }
    }
    if !series.is_empty() {
        let chart = XyChart {
            x: Axis::new(label).log(),
            y: Axis::new("Perplexity").log(),
            series,
        };
        made.figures.push(Figure {
            name: name.to_owned(),
            plot: chart.into(),
            data,
        });
    }
    made
}
