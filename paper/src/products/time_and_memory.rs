//! Table 5: how long a training step takes and how much memory it needs, for models of about one size.
//!
//! A step is a whole one, optimizer included: the paper's table has forward and backward pass alone. Times are compared
//! only where machine, batch and microbatches are the same.

use crate::model::Family;
use crate::product::{Made, Product, nothing_else};
use crate::run::{Reason, Run};
use crate::table::{Column, Table};

pub(super) const PRODUCT: Product = Product {
    name: "time_and_memory",
    summary: "time and memory of a training step",
    make,
    sources: nothing_else,
};

const COLUMNS: [Column; 8] = [
    Column::new("Model"),
    Column::new("#params"),
    Column::math(
        "Sequences × tokens at once",
        "Sequences $\\times$ tokens at once",
    ),
    Column::new("Step (ms)"),
    Column::new("Relative to the baseline"),
    Column::new("Peak memory (GiB)"),
    Column::new("Machine"),
    Column::origin("Run"),
];

/// A step of a run.
struct Cost {
    ms: f64,
    peak_bytes: Option<f64>,
    machine: String,
    /// Sequences of the step, those of them that are computed at once, and tokens of each.
    shape: [u64; 3],
}

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let costs = made.gather(runs, Cost::of);
    if !costs.is_empty() {
        let table = Table {
            columns: COLUMNS.to_vec(),
            rows: costs
                .iter()
                .map(|(run, cost)| row(run, cost, &costs))
                .collect(),
            n_headings: 0,
        };
        made.tables.push((PRODUCT.name.to_owned(), table));
    }
    made
}

impl Cost {
    fn of(run: &Run) -> Result<Self, Reason> {
        let wanted = |name: &str| run.model.integer(name).ok_or(format!("it has no `{name}`"));
        let n_sequences = wanted("batch_size")?;
        let n_microbatches = run.metric("average_num_chunks").unwrap_or(1.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part of the batch"
        )]
        let at_once = (n_sequences as f64 / n_microbatches).ceil() as u64;
        Ok(Self {
            ms: run.ms_per_step().ok_or("it has no `timing/ms_per_iter`")?,
            peak_bytes: run.metric("memory/peak_bytes").ok(),
            machine: run.gpu().or(run.cpu()).unwrap_or_default().to_owned(),
            shape: [n_sequences, at_once, wanted("lm.unroll")?],
        })
    }

    fn is_comparable_to(&self, other: &Self) -> bool {
        !self.machine.is_empty() && self.machine == other.machine && self.shape == other.shape
    }
}

fn row(run: &Run, cost: &Cost, all: &[(&Run, Cost)]) -> Vec<String> {
    const GIB: f64 = (1_u64 << 30) as f64;
    let baseline = all.iter().find(|(other, of_other)| {
        other.model.family() == Family::Dense
            && other.model.is_as_large_as(&run.model)
            && of_other.is_comparable_to(cost)
    });
    let [_, at_once, seq_len] = cost.shape;
    vec![
        run.model.family().name().to_owned(),
        run.model.size(),
        format!("{at_once} × {seq_len}"),
        format!("{:.1}", cost.ms),
        baseline
            .map(|(_, baseline)| format!("{:.2}", cost.ms / baseline.ms))
            .unwrap_or_default(),
        cost.peak_bytes
            .map(|bytes| format!("{:.2}", bytes / GIB))
            .unwrap_or_default(),
        cost.machine.clone(),
        run.name.clone(),
    ]
}
