//! Figure: perplexity by layer norm scheme and size.

use crate::product::{Bar, Made, Product, nothing_else, perplexity, sizes};
use crate::run::{Reason, Run};
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_layernorm",
    summary: "perplexity by layer norm scheme and size",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let sizes = sizes(runs);
    let bars = made.gather(runs, |run| bar(run, sizes[&run.name].clone()));
    let bars: Vec<Bar> = bars.into_iter().map(|(_, bar)| bar).collect();
    made.bars("layernorm", "", &bars, Scale::Linear);
    made
}

fn bar(run: &Run, size: String) -> Result<Bar, Reason> {
    Ok(Bar {
        place: size,
        series: run.model.norm().to_owned(),
        value: perplexity(run)?,
        run: run.name.clone(),
    })
}
