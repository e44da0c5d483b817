//! Figure: perplexity by number of distinct layers.

use crate::product::{Made, Product, nothing_else};
use crate::run::Run;
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "group_size",
    summary: "perplexity by number of distinct layers",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    made.bars("group_ppl", "Group size G", Scale::Linear, runs, |run| {
        let model = &run.model;
        let kind = if model.group_type() == "aabb" {
            " (AABB)"
        } else {
            ""
        };
        Ok((format!("{}{kind}", model.n_groups()), String::new()))
    });
    made
}
