//! Figure: perplexity by layer norm scheme and size.

use crate::product::{Made, Product, nothing_else, sizes};
use crate::run::Run;
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
    made.bars("layernorm", "", Scale::Linear, runs, |run| {
        Ok((sizes[&run.name].clone(), run.model.norm().to_owned()))
    });
    made
}
