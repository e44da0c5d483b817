//! Table 1: perplexity and zero-shot accuracy by dataset, size and model.
//!
//! Unless each run was scored on all questions, a column says what of them its accuracies are from.

use crate::product::{Made, Product, nothing_else, perplexity, sizes};
use crate::run::{Reason, Run};
use crate::table::{Column, Table};
use moeut_host::eval_cli::COLUMNS;

pub(super) const PRODUCT: Product = Product {
    name: "main_result_table",
    summary: "perplexity and zero-shot accuracy by dataset, size and model",
    make: |runs| results("main_result_table", runs),
    sources: nothing_else,
};

/// What stands in the column of questions where all were scored.
const ALL: &str = "all";

/// The table of a set of runs. A run without some evaluation has a gap there, and none of those that it lacks counts in
/// its mean: there is no mean then.
pub(super) fn results(name: &str, runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let sizes = sizes(runs);
    let rows = made.gather(runs, |run| row(run, sizes[&run.name].clone()));
    if rows.is_empty() {
        return made;
    }
    let titles = COLUMNS.iter().map(|(title, ..)| Column::new(title));
    let columns = ["Dataset", "Size", "Model", "PPL"]
        .into_iter()
        .map(Column::new);
    let columns = columns.chain(titles).chain([Column::new("Average")]);
    let are_all = rows.iter().all(|(run, _)| questions(run) == ALL);
    let said = (!are_all).then(|| Column::new("Questions"));
    let whole = |(run, mut row): (&Run, Vec<String>)| {
        row.extend(said.map(|_| questions(run)));
        row.push(run.name.clone());
        row
    };
    let table = Table {
        columns: columns.chain(said).chain([Column::origin("Run")]).collect(),
        rows: rows.into_iter().map(whole).collect(),
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
    let accuracies = COLUMNS.map(|(_, set, metric)| accuracy(run, set, metric));
    let mean = accuracies.iter().copied().sum::<Option<f64>>();
    let mean = mean.map(|sum| sum / COLUMNS.len() as f64);
    let shown = accuracies.into_iter().chain([mean]);
    row.extend(shown.map(|share| {
        share
            .map(|share| format!("{:.1}", 100.0 * share))
            .unwrap_or_default()
    }));
    Ok(row)
}

fn accuracy(run: &Run, set: &str, metric: &str) -> Option<f64> {
    run.metric(&format!("validation/{set}/{metric}")).ok()
}

/// Which questions a run was scored on: of several samples the smallest, so that no score seems to be of more.
fn questions(run: &Run) -> String {
    let is_scored = |(_, set, metric): &&(&str, &str, &str)| accuracy(run, set, metric).is_some();
    let mut scored = COLUMNS.iter().filter(is_scored).peekable();
    if scored.peek().is_none() {
        return "not scored".to_owned();
    }
    let samples = scored.filter_map(|(_, set, _)| run.sample(set));
    let smallest = samples.reduce(f64::min);
    smallest.map_or_else(|| ALL.to_owned(), |n| format!("first {n} of each group"))
}
