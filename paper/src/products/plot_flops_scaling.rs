//! Figure: perplexity by multiply-accumulates of the training; see [`crate::model`] for how they are counted.

use super::plot_scaling::curves;
use crate::product::{Product, nothing_else};

pub(super) const PRODUCT: Product = Product {
    name: "plot_flops_scaling",
    summary: "perplexity by multiply-accumulates of the training",
    make: |runs| {
        curves(
            runs,
            "scaling_flops",
            "Multiply-accumulates of the training",
            |run| {
                let macs = run.model.training_macs();
                macs.ok_or_else(|| "it has no `stop_after`".to_owned())
            },
        )
    },
    sources: nothing_else,
};
