//! Figure: perplexity by width of the experts.

use crate::product::{Made, Product, nothing_else};
use crate::run::Run;
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "plot_expert_size",
    summary: "perplexity by width of the experts",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    made.bars(
        "moe_expert_size",
        "Expert size",
        Scale::Linear,
        runs,
        |run| {
            let size = run.model.integer("moe.expert_size");
            Ok((size.ok_or("it has no experts")?.to_string(), String::new()))
        },
    );
    made
}
