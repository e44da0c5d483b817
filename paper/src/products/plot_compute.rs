//! Table 6: on what each run was trained, and for how long.

use crate::product::{Made, Product, nothing_else};
use crate::run::{Reason, Run};
use crate::table::{Column, Table};

pub(super) const PRODUCT: Product = Product {
    name: "plot_compute",
    summary: "hardware and duration of each run",
    make,
    sources: nothing_else,
};

const COLUMNS: [&str; 7] = [
    "Dataset",
    "Model",
    "#params",
    "Training MACs",
    "GPU",
    "CPU",
    "Duration (h:mm)",
];

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let rows = made.gather(runs, row);
    if !rows.is_empty() {
        let table = Table {
            columns: COLUMNS
                .map(Column::new)
                .into_iter()
                .chain([Column::origin("Run")])
                .collect(),
            rows: rows.into_iter().map(|(_, row)| row).collect(),
            n_headings: 1,
        };
        made.tables.push((PRODUCT.name.to_owned(), table));
    }
    made
}

fn row(run: &Run) -> Result<Vec<String>, Reason> {
    let model = &run.model;
    let seconds = run
        .seconds()
        .ok_or("neither `startup_log.txt` nor `metrics.jsonl` tells how long it took")?;
    let macs = model.training_macs().ok_or("it has no `stop_after`")?;
    Ok(vec![
        model.dataset_title().to_owned(),
        model.family().name().to_owned(),
        model.size(),
        format!("{macs:.2e}"),
        run.gpu().unwrap_or_default().to_owned(),
        run.cpu().unwrap_or_default().to_owned(),
        hours_and_minutes(seconds),
        run.name.clone(),
    ])
}

/// Rounded to the next minute up, so that nothing took no time.
fn hours_and_minutes(seconds: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the minutes of a run"
    )]
    let minutes = (seconds / 60.0).ceil() as u64;
    format!("{}:{:02}", minutes / 60, minutes % 60)
}
