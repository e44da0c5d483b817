//! What a sweep has reached so far: a table for the terminal, `results.csv` and `results.json`.

use super::record::Record;
use super::runs::{Sweep, SweepRun};
use crate::error::HostError;
use crate::whole_file::write_or_explain;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not started.
    Waiting,
    /// Being trained.
    Running,
    /// Trained and validated to its end.
    Done,
    /// Ended by a signal; goes on when the sweep is started again.
    Stopped,
    /// Ended by an error: how the process ended.
    Failed(String),
}

impl State {
    fn word(&self) -> String {
        match self {
            Self::Waiting => "waiting".to_owned(),
            Self::Running => "running".to_owned(),
            Self::Done => "done".to_owned(),
            Self::Stopped => "stopped".to_owned(),
            Self::Failed(how) => format!("failed: {how}"),
        }
    }
}

/// One run of the table.
#[derive(Debug)]
pub struct Row<'a> {
    /// The run.
    pub run: &'a SweepRun,
    /// How far it is.
    pub state: State,
    /// What it has reached.
    pub record: Record,
    /// What its process says.
    pub log: PathBuf,
}

/// Scores of the first validation stream, by their names in the files.
const SCORES: [&str; 3] = ["loss", "perplexity", "accuracy"];

/// The table: run, what differs, scores of the last validation, state. Nats per token, and a share for the accuracy.
pub fn render(sweep: &Sweep, rows: &[Row<'_>]) -> String {
    let mut lines = vec![Vec::from(["RUN".to_owned()])];
    lines[0].extend(sweep.axes.iter().cloned());
    lines[0].extend(["STEP", "VAL LOSS", "PERPLEXITY", "ACCURACY", "STATE"].map(str::to_owned));
    for row in rows {
        let mut line = vec![row.run.name.clone()];
        line.extend(
            sweep
                .axes
                .iter()
                .map(|axis| row.run.value(axis).unwrap_or_default().to_owned()),
        );
        line.push(
            row.record
                .saved
                .map_or_else(|| "-".to_owned(), |step| step.to_string()),
        );
        for (metric, n_digits) in SCORES.into_iter().zip([4, 2, 4]) {
            let score = row.record.score(row.run, metric);
            line.push(score.map_or_else(|| "-".to_owned(), |score| format!("{score:.n_digits$}")));
        }
        line.push(row.state.word());
        lines.push(line);
    }
    let n_columns = lines[0].len();
    let widths: Vec<usize> = (0..n_columns)
        .map(|column| {
            lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

/// Writes both files into a folder, each beside its earlier version until it is whole.
///
/// # Errors
/// If one cannot be written.
pub fn write(folder: &Path, sweep: &Sweep, rows: &[Row<'_>]) -> Result<(), HostError> {
    write_or_explain(
        &folder.join("results.json"),
        as_json(sweep, rows).as_bytes(),
    )?;
    write_or_explain(&folder.join("results.csv"), as_csv(sweep, rows).as_bytes())
}

fn as_json(sweep: &Sweep, rows: &[Row<'_>]) -> String {
    let runs: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.run.name,
                "state": row.state.word(),
                "step": row.record.saved,
                "validated": row.record.validated,
                "parameters": pairs(&row.run.parameters),
                "metrics": row.record.metrics,
                "log": row.log,
            })
        })
        .collect();
    format!(
        "{:#}\n",
        json!({"sweep": sweep.name, "varied": sweep.axes, "runs": runs})
    )
}

/// Pairs as a JSON object in their order.
pub fn pairs(pairs: &[(String, String)]) -> Value {
    pairs
        .iter()
        .map(|(name, value)| (name.clone(), Value::from(value.as_str())))
        .collect()
}

fn as_csv(sweep: &Sweep, rows: &[Row<'_>]) -> String {
    let mut header = vec!["run".to_owned()];
    header.extend(sweep.axes.iter().cloned());
    header.extend(["step", "val_loss", "perplexity", "accuracy", "state"].map(str::to_owned));
    let mut lines = vec![header];
    for row in rows {
        let mut line = vec![row.run.name.clone()];
        line.extend(
            sweep
                .axes
                .iter()
                .map(|axis| row.run.value(axis).unwrap_or_default().to_owned()),
        );
        line.push(
            row.record
                .saved
                .map(|step| step.to_string())
                .unwrap_or_default(),
        );
        let scores = SCORES
            .iter()
            .map(|metric| row.record.score(row.run, metric));
        line.extend(scores.map(|score| score.map(|score| score.to_string()).unwrap_or_default()));
        line.push(row.state.word());
        lines.push(line);
    }
    let quoted = |cell: &String| {
        if cell.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", cell.replace('"', "\"\""))
        } else {
            cell.clone()
        }
    };
    let lines = lines
        .iter()
        .map(|line| line.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n");
    lines.collect()
}
