//! Figure: perplexity by number of distinct layers.

use crate::product::{Bar, Made, Product, nothing_else, perplexity};
use crate::run::{Reason, Run};
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "group_size",
    summary: "perplexity by number of distinct layers",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let bars = made.gather(runs, bar);
    let bars: Vec<Bar> = bars.into_iter().map(|(_, bar)| bar).collect();
    made.bars("group_ppl", "Group size G", &bars, Scale::Linear);
    made
}

fn bar(run: &Run) -> Result<Bar, Reason> {
    let model = &run.model;
    let is_aabb = model.group_type() == "aabb";
    Ok(Bar {
        place: format!(
            "{}{}",
            model.n_groups(),
            if is_aabb { " (AABB)" } else { "" }
        ),
        series: String::new(),
        value: perplexity(run)?,
        run: run.name.clone(),
    })
}
