//! Figure: perplexity of dense models, MoEUT and SUT by dataset and size.

use crate::product::{Made, Product, nothing_else, sizes};
use crate::run::Run;
use moeut_plot::Scale;

pub(super) const PRODUCT: Product = Product {
    name: "sut",
    summary: "perplexity of dense models, MoEUT and SUT by dataset and size",
    make,
    sources: nothing_else,
};

fn make(runs: &[&Run]) -> Made {
    let mut made = Made::default();
    let sizes = sizes(runs);
    made.bars("sut", "", Scale::Log, runs, |run| {
        let place = format!("{} {}", run.model.dataset_title(), sizes[&run.name]);
        Ok((place, run.model.family().name().to_owned()))
    });
    made
}
