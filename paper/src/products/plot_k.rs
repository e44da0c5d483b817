//! Figure: perplexity by number of active experts.

use crate::product::{Bar, Made, Product, nothing_else, perplexity};
use crate::run::{Reason, Run};
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_k",
    summary: "perplexity by number of active experts",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let bars = made.gather(runs, bar);
    let bars: Vec<Bar> = bars.into_iter().map(|(_, bar)| bar).collect();
    made.bars("moe_k", "Active experts K", &bars, Scale::Linear);
    made
}

fn bar(run: &Run) -> Result<Bar, Reason> {
    let top_k = run.model.integer("pkm.n_heads");
    Ok(Bar {
        place: top_k.ok_or("it has no experts")?.to_string(),
        series: String::new(),
        value: perplexity(run)?,
        run: run.name.clone(),
    })
}
