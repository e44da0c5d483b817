//! Figure: how alike layers are in the experts that they select.
//!
//! ```text
//! similarity(a, b) = mean over tokens of |S_a ∩ S_b| / |S_a ∪ S_b|
//! ```
//! `S` is the set of experts that a layer selects for a token. Layers of different groups have no experts in common, and
//! nothing to compare.

use crate::product::{Figure, Made, Product};
use crate::run::Run;
use crate::selections::{Selections, sources};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Heatmap, Matrix};

pub(super) const PRODUCT: Product = Product {
    name: "layer_similarity",
    summary: "how alike layers are in the experts that they select",
    make,
    sources,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let found = made.gather(runs, Selections::of);
    let is_only = found.len() == 1;
    for (run, selections) in found {
        let similarity = similarity(&selections);
        let n_layers = selections.groups.len();
        let mut rows = Vec::new();
        for (index, value) in similarity
            .iter()
            .enumerate()
            .filter(|(_, value)| !value.is_nan())
        {
            let (a, b) = (index / n_layers, index % n_layers);
            rows.push(vec![
                a.to_string(),
                b.to_string(),
                value.to_string(),
                run.name.clone(),
            ]);
        }
        #[expect(clippy::cast_possible_truncation, reason = "colours")]
        let values = similarity.iter().map(|&value| value as f32).collect();
        let chart = Heatmap {
            matrix: Matrix::new(n_layers, values),
            x: Axis::new("Layer"),
            y: Axis::new("Layer"),
            range: Some((0.0, 1.0)),
            // Numbers only where each cell has one and room for it.
            shows_values: n_layers <= 9 && rows.len() == similarity.len(),
            scale: "Overlap of selected experts".to_owned(),
            missing: "other group".to_owned(),
            ..Heatmap::default()
        };
        made.figures.push(Figure {
            name: if is_only {
                "layer_similarity".to_owned()
            } else {
                format!("layer_similarity_{}", run.name)
            },
            plot: chart.into(),
            data: Table {
                columns: ["layer", "other layer", "similarity", "run"]
                    .map(Column::new)
                    .to_vec(),
                rows,
                ..Table::default()
            },
        });
    }
    made
}

/// Row by row; NaN for layers of different groups.
fn similarity(selections: &Selections) -> Vec<f64> {
    let groups = &selections.groups;
    let mut values = Vec::new();
    for (a, group) in groups.iter().enumerate() {
        for (b, other) in groups.iter().enumerate() {
            let of_token = |layers: &Vec<Vec<u32>>| {
                let shared = layers[a]
                    .iter()
                    .filter(|expert| layers[b].contains(expert))
                    .count();
                let all = layers[a].len() + layers[b].len() - shared;
                if all == 0 {
                    0.0
                } else {
                    shared as f64 / all as f64
                }
            };
            let sum: f64 = selections.experts.iter().map(of_token).sum();
            let mean = sum / selections.experts.len() as f64;
            values.push(if group == other { mean } else { f64::NAN });
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_is_the_mean_overlap_of_sets() {
        let selections = Selections {
            step: 0,
            n_wanted: 2,
            groups: vec![0, 1, 0],
            n_experts: 4,
            texts: std::collections::BTreeMap::new(),
            tokens: vec![1, 2],
            experts: vec![
                vec![vec![0, 1], vec![0, 1], vec![1, 2]],
                vec![vec![0, 3], vec![0, 1], vec![3, 0]],
            ],
        };
        let values = similarity(&selections);
        let expected = f64::midpoint(1.0 / 3.0, 1.0);
        assert!((values[2] - expected).abs() < 1e-12 && (values[6] - expected).abs() < 1e-12);
        assert!((values[0] - 1.0).abs() < 1e-12 && values[1].is_nan());
    }
}
