//! Table 1: perplexity and zero-shot accuracy by dataset, size and model.

use crate::product::{Made, Product, nothing_else, perplexity, sizes};
use crate::run::{Reason, Run};
use crate::table::{Column, Table};

pub(super) const PRODUCT: Product = Product {
    name: "main_result_table",
    summary: "perplexity and zero-shot accuracy by dataset, size and model",
    make: |runs| results("main_result_table", runs),
    sources: nothing_else,
};

/// Title and metric of each evaluation; the last column is their mean.
const ACCURACIES: [(&str, &str); 6] = [
    ("LAMBADA", "validation/lambada/accuracy/total"),
    ("BLiMP", "validation/blimp/accuracy/group_average"),
    ("CBT", "validation/cbt/accuracy/group_average"),
    ("HellaSwag", "validation/hellaswag/accuracy/group_average"),
    ("PIQA", "validation/piqa/accuracy/group_average"),
    ("ARC-E", "validation/ai2arc/accuracy/ARC-Easy"),
];

/// The table of a set of runs. A run without some evaluation has a gap there, and none of those that it lacks counts in
/// its mean: there is no mean then.
pub(super) fn results(name: &str, runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let sizes = sizes(runs);
    let rows = made.gather(runs, |run| row(run, sizes[&run.name].clone()));
    if rows.is_empty() {
        return made;
    }
    let titles = ACCURACIES.iter().map(|(title, _)| Column::new(title));
    let columns = ["Dataset", "Size", "Model", "PPL"]
        .into_iter()
        .map(Column::new);
    let columns = columns.chain(titles).chain([Column::new("Average")]);
    let table = Table {
        columns: columns.chain([Column::origin("Run")]).collect(),
        rows: rows.into_iter().map(|(_, row)| row).collect(),
        n_headings: 2,
    };
    made.tables.push((name.to_owned(), table));
    made
}

fn row(run: &Run, size: String) -> Result<Vec<String>, Reason> {
    let model = &run.model;
    let mut row = vec![
        model.dataset_title().to_owned(),
        size,
        model.family().name().to_owned(),
        format!("{:.2}", perplexity(run)?),
    ];
    let accuracies = ACCURACIES.map(|(_, metric)| run.metric(metric).ok());
    let mean = accuracies.iter().copied().sum::<Option<f64>>();
    let mean = mean.map(|sum| sum / ACCURACIES.len() as f64);
    let shown = accuracies.into_iter().chain([mean]);
    row.extend(shown.map(|share| {
        share
            .map(|share| format!("{:.1}", 100.0 * share))
            .unwrap_or_default()
    }));
    row.push(run.name.clone());
    Ok(row)
}
