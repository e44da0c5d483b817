//! Figure: perplexity by number of active experts.

use crate::product::{Made, Product, nothing_else};
use crate::run::Run;
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_k",
    summary: "perplexity by number of active experts",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    made.bars("moe_k", "Active experts K", Scale::Linear, runs, |run| {
        let top_k = run.model.integer("pkm.n_heads");
        Ok((top_k.ok_or("it has no experts")?.to_string(), String::new()))
    });
    made
}
