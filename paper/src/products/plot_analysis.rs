//! Figures: in which layers each expert is used, one for each distinct layer.
//!
//! A column is an expert, and shows its selections as shares of the layer where it is selected most. Experts are ordered
//! by the mean of the layers in which they are selected at least as often as in nine tenths of the layers.

use crate::product::{Figure, Made, Product};
use crate::run::Run;
use crate::selections::{Selections, sources};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Heatmap, Matrix};

pub(super) const PRODUCT: Product = Product {
    name: "plot_analysis",
    summary: "usage of each expert by layer",
    make,
    sources,
};

const QUANTILE: f64 = 0.9;

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let found = made.gather(runs, Selections::of);
    let is_only = found.len() == 1;
    for (run, selections) in found {
        for (group, places) in selections.places() {
            let counts: Vec<Vec<u64>> = places
                .iter()
                .map(|&place| selections.counts(place))
                .collect();
            let name = if is_only {
                format!("expert_layer_g{group}")
            } else {
                format!("expert_layer_{}_g{group}", run.name)
            };
            made.figures.push(Figure {
                name,
                plot: chart(&places, &counts).into(),
                data: data(run, &places, &counts),
            });
        }
    }
    made
}

fn chart(places: &[usize], counts: &[Vec<u64>]) -> Heatmap {
    let order = order(places, counts);
    let mut values = Vec::new();
    for of_place in counts {
        for &expert in &order {
            let most = counts
                .iter()
                .map(|of_place| of_place[expert])
                .max()
                .unwrap_or_default();
            // Who is never selected is grey.
            let share = if most == 0 {
                f64::NAN
            } else {
                of_place[expert] as f64 / most as f64
            };
            #[expect(clippy::cast_possible_truncation, reason = "a colour")]
            values.push(share as f32);
        }
    }
    Heatmap {
        matrix: Matrix::new(order.len(), values),
        x: Axis::new("Expert, ordered by layer")
            .with_names(order.iter().map(usize::to_string).collect()),
        y: Axis::new("Layer").with_names(places.iter().map(usize::to_string).collect()),
        range: Some((0.0, 1.0)),
        scale: "Selections / most in a layer".to_owned(),
        missing: "never selected".to_owned(),
        ..Heatmap::default()
    }
}

/// Experts by the mean of their layers; those that are never selected are last.
fn order(places: &[usize], counts: &[Vec<u64>]) -> Vec<usize> {
    let n_experts = counts.first().map_or(0, Vec::len);
    let mean_layer = |expert: usize| {
        let of_expert: Vec<u64> = counts.iter().map(|of_place| of_place[expert]).collect();
        if of_expert.iter().all(|&count| count == 0) {
            return f64::INFINITY;
        }
        let least = quantile(&of_expert, QUANTILE);
        let of_layers = places.iter().zip(&of_expert);
        let layers: Vec<f64> = of_layers
            .filter(|(_, count)| **count as f64 >= least)
            .map(|(place, _)| *place as f64)
            .collect();
        layers.iter().sum::<f64>() / layers.len() as f64
    };
    let mut order: Vec<(usize, f64)> = (0..n_experts)
        .map(|expert| (expert, mean_layer(expert)))
        .collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    order.into_iter().map(|(expert, _)| expert).collect()
}

/// Between two values a straight line, as NumPy's `quantile`.
fn quantile(values: &[u64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let place = share * (sorted.len() - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index into the values"
    )]
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let (low, high) = (sorted[below] as f64, sorted[above] as f64);
    low + (place - place.floor()) * (high - low)
}

fn data(run: &Run, places: &[usize], counts: &[Vec<u64>]) -> Table {
    let mut rows = Vec::new();
    for (place, of_place) in places.iter().zip(counts) {
        for (expert, count) in of_place.iter().enumerate() {
            rows.push(vec![
                place.to_string(),
                expert.to_string(),
                count.to_string(),
                run.name.clone(),
            ]);
        }
    }
    Table {
        columns: ["layer", "expert", "selections", "run"]
            .map(Column::new)
            .to_vec(),
        rows,
        ..Table::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_stand_in_the_order_of_their_layers() {
        // Expert 0 is of the last layer, 1 of the first, 2 of none, 3 of both ends.
        let counts = [vec![0, 9, 0, 5], vec![1, 2, 0, 0], vec![8, 0, 0, 5]];
        assert_eq!(order(&[0, 2, 4], &counts), [1, 3, 0, 2]);
        let chart = chart(&[0, 2, 4], &counts);
        assert!((chart.matrix.values[0] - 1.0).abs() < f32::EPSILON);
        assert!(chart.matrix.values[3].is_nan());
    }

    #[test]
    fn quantiles_are_interpolated() {
        assert!((quantile(&[4, 0, 2], 0.9) - 3.6).abs() < 1e-12);
        assert!((quantile(&[7], 0.9) - 7.0).abs() < 1e-12);
    }
}
