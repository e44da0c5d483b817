//! Figures: how large the update of each layer is, and the state that it is added to.
//!
//! `activation_norm/abs_update_layer_<l>` and `activation_norm/in_layer_<l>` are the mean Euclidean norms of a layer's
//! update and of its input, over positions.

use crate::product::{Figure, Made, Product, nothing_else};
use crate::run::Run;
use crate::table::{Column, Table};
use moeut_plot::{Axis, Series, XyChart};

pub(super) const PRODUCT: Product = Product {
    name: "plot_update_magnitude",
    summary: "norm of each layer's update, and of its input",
    make,
    sources: nothing_else,
};

/// Name of the figure, beginning of the metrics, label.
const FIGURES: [(&str, &str, &str); 2] = [
    (
        "update_magnitude",
        "activation_norm/abs_update_layer_",
        "Norm of the update",
    ),
    ("in_norm", "activation_norm/in_layer_", "Norm of the input"),
];

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    for (name, beginning, label) in FIGURES {
        let curves = made.gather(runs, |run| {
            let layers = run.numbered(beginning)?;
            match layers.len() {
                0 => Err(format!("it has no `{beginning}<l>`")),
                _ => Ok(layers),
            }
        });
        let mut data = Table {
            columns: ["layer", "norm", "run"].map(Column::new).to_vec(),
            ..Table::default()
        };
        let mut series = Vec::new();
        for (run, layers) in curves {
            data.rows.extend(
                layers.iter().map(|(layer, norm)| {
                    vec![layer.to_string(), norm.to_string(), run.name.clone()]
                }),
            );
            let (xs, ys) = layers
                .iter()
                .map(|&(layer, norm)| (layer as f64, norm))
                .unzip();
            series.push(
                Series::new(
                    format!("{} {}", run.model.family().name(), run.model.size()),
                    ys,
                )
                .at(xs),
            );
        }
        if !series.is_empty() {
            let chart = XyChart {
                x: Axis::new("Layer"),
                y: Axis::new(label),
                series,
            };
            made.figures.push(Figure {
                name: name.to_owned(),
                plot: chart.into(),
                data,
            });
        }
    }
    made
}
