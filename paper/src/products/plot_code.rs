//! Figure: perplexity on code by size and model.

use crate::product::{Made, Product, nothing_else, sizes};
use crate::run::Run;
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_code",
    summary: "perplexity on code by size and model",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let sizes = sizes(runs);
    made.bars("code", "", Scale::Linear, runs, |run| {
        Ok((
            sizes[&run.name].clone(),
            run.model.family().name().to_owned(),
        ))
    });
    made
}
