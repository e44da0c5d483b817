//! Figures: which experts the commonest tokens select, one for each distinct layer.
//!
//! A cell is the share of a token's occurrences, over all layers of the group, for which an expert is selected. Experts
//! are ordered by how often they are selected.

use crate::product::{Figure, Made, Product};
use crate::run::Run;
use crate::selections::{Selections, sources};
use crate::table::{Column, Table};
use moeut_plot::{Axis, Heatmap, Matrix};

pub(super) const PRODUCT: Product = Product {
    name: "token_experts",
    summary: "experts of the commonest tokens",
    make,
    sources,
};

/// Rows of which each has room for its name.
const N_TOKENS: usize = 28;

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let found = made.gather(runs, Selections::of);
    let is_only = found.len() == 1;
    for (run, selections) in found {
        let kinds = selections.kinds();
        let ids: Vec<i32> = kinds.iter().take(N_TOKENS).map(|kind| kind.id).collect();
        for (group, places) in selections.places() {
            let shares = shares(&selections, &places, &ids);
            let name = if is_only {
                format!("token_expert_g{group}")
            } else {
                format!("token_expert_{}_g{group}", run.name)
            };
            made.figures
                .push(figure(name, run, &selections, &ids, &shares));
        }
    }
    made
}

/// By token and expert.
fn shares(selections: &Selections, places: &[usize], ids: &[i32]) -> Vec<Vec<f64>> {
    let mut sums = vec![vec![0.0; selections.n_experts]; ids.len()];
    let mut ns = vec![0.0; ids.len()];
    for (id, layers) in selections.tokens.iter().zip(&selections.experts) {
        let Some(row) = ids.iter().position(|other| other == id) else {
            continue;
        };
        for &place in places {
            ns[row] += 1.0;
            for &expert in &layers[place] {
                sums[row][expert as usize] += 1.0;
            }
        }
    }
    for (row, n) in sums.iter_mut().zip(ns) {
        for share in row {
            *share /= n;
        }
    }
    sums
}

fn figure(
    name: String,
    run: &Run,
    selections: &Selections,
    ids: &[i32],
    shares: &[Vec<f64>],
) -> Figure {
    let sum = |expert: usize| shares.iter().map(|row| row[expert]).sum::<f64>();
    let mut order: Vec<usize> = (0..selections.n_experts).collect();
    order.sort_by(|&a, &b| sum(b).total_cmp(&sum(a)));
    let text = |id: &i32| {
        let text = selections.texts.get(id).cloned().unwrap_or_default();
        // What cannot be seen is shown.
        let text = text.replace(' ', "▁").replace('\n', "\\n");
        if text.is_empty() {
            format!("{id}")
        } else {
            text
        }
    };
    let (mut values, mut rows) = (Vec::new(), Vec::new());
    for (id, row) in ids.iter().zip(shares) {
        #[expect(clippy::cast_possible_truncation, reason = "a colour")]
        values.extend(order.iter().map(|&expert| row[expert] as f32));
        for (expert, share) in row.iter().enumerate().filter(|(_, share)| **share > 0.0) {
            rows.push(vec![
                id.to_string(),
                text(id),
                expert.to_string(),
                share.to_string(),
                run.name.clone(),
            ]);
        }
    }
    let chart = Heatmap {
        matrix: Matrix::new(order.len(), values),
        x: Axis::new("Expert").with_names(order.iter().map(usize::to_string).collect()),
        y: Axis::new("Token").with_names(ids.iter().map(text).collect()),
        scale: "Share of occurrences".to_owned(),
        ..Heatmap::default()
    };
    Figure {
        name,
        plot: chart.into(),
        data: Table {
            columns: ["token", "text", "expert", "share", "run"]
                .map(Column::new)
                .to_vec(),
            rows,
            ..Table::default()
        },
    }
}
