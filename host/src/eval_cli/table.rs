//! The scores as a table: a line for each metric, and at the end the columns of the paper's tables.

use crate::train::validation::AllScores;
use std::fmt::Write;

/// What the paper's tables show of each set: title, set, metric; the last column is their mean.
pub const COLUMNS: [(&str, &str, &str); 6] = [
    ("LAMBADA", "lambada", "accuracy/total"),
    ("BLiMP", "blimp", "accuracy/group_average"),
    ("CBT", "cbt", "accuracy/group_average"),
    ("HellaSwag", "hellaswag", "accuracy/group_average"),
    ("PIQA", "piqa", "accuracy/group_average"),
    ("ARC-E", "ai2arc", "accuracy/ARC-Easy"),
];

/// The stream whose perplexity the paper's tables show.
const STREAM: &str = "val";

/// The whole text; `limit` is how many questions of each group were scored, if not all.
pub(super) fn render(all: &AllScores, limit: Option<usize>) -> String {
    let mut rows = vec![["set", "metric", "value", "n"].map(String::from)];
    let mut row = |set: &str, metric: &str, value: f64, n: u64| {
        rows.push([
            set.to_owned(),
            metric.to_owned(),
            format!("{value:.4}"),
            n.to_string(),
        ]);
    };
    for (name, scores) in &all.streams {
        let n = scores.n_tokens;
        row(name, "loss", scores.loss, n);
        row(name, "accuracy", scores.accuracy, n);
        row(name, "perplexity", scores.perplexity(), n);
        if let Some(bits) = scores.bits_per_byte {
            row(name, "bits_per_byte", bits, n);
        }
    }
    for set in &all.sets {
        for metric in &set.metrics {
            row(&set.name, &metric.name, metric.value, metric.n);
        }
    }
    let mut text = aligned(&rows, 2);
    let _ = write!(text, "\n{}", aligned(&paper(all), 0));
    if let (Some(limit), false) = (limit, all.sets.is_empty()) {
        let _ = writeln!(
            text,
            "of a sample: the first {limit} questions of each group"
        );
    }
    text
}

/// Perplexity, accuracies in percent, and their average if all are there.
fn paper(all: &AllScores) -> Vec<[String; 8]> {
    let stream = all.streams.iter().find(|(name, _)| name == STREAM);
    let perplexity = stream.map(|(_, scores)| scores.perplexity());
    let accuracies = COLUMNS.map(|(_, name, metric)| {
        let set = all.sets.iter().find(|set| set.name == name)?;
        Some(100.0 * set.get(metric)?)
    });
    let average: Option<f64> = accuracies.iter().copied().sum::<Option<f64>>();
    let average = average.map(|sum| sum / COLUMNS.len() as f64);
    let shown = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let mut rows = vec![
        std::array::from_fn(|_| String::new()),
        std::array::from_fn(|_| String::new()),
    ];
    let titles = ["ppl"].into_iter();
    let titles = titles
        .chain(COLUMNS.iter().map(|(title, ..)| *title))
        .chain(["avg %"]);
    let values = [shown(perplexity, 2)].into_iter();
    let values = values
        .chain(accuracies.map(|accuracy| shown(accuracy, 1)))
        .chain([shown(average, 1)]);
    for (index, (title, value)) in titles.zip(values).enumerate() {
        title.clone_into(&mut rows[0][index]);
        rows[1][index] = value;
    }
    rows
}

/// Columns with two spaces between them; the first `n_texts` to the left, numbers to the right.
fn aligned<const N: usize>(rows: &[[String; N]], n_texts: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(column, (cell, width))| {
                if column < n_texts {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            })
            .collect();
        let _ = writeln!(text, "{}", cells.join("  "));
    }
    text
}
