//! Figure: perplexity by width of the experts.

use crate::product::{Bar, Made, Product, nothing_else, perplexity};
use crate::run::{Reason, Run};
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_expert_size",
    summary: "perplexity by width of the experts",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let bars = made.gather(runs, bar);
    let bars: Vec<Bar> = bars.into_iter().map(|(_, bar)| bar).collect();
    made.bars("moe_expert_size", "Expert size", &bars, Scale::Linear);
    made
}

fn bar(run: &Run) -> Result<Bar, Reason> {
    let size = run.model.integer("moe.expert_size");
    Ok(Bar {
        place: size.ok_or("it has no experts")?.to_string(),
        series: String::new(),
        value: perplexity(run)?,
        run: run.name.clone(),
    })
}
