//! Table 2: the results beside those of the Sparse Universal Transformer.

use super::main_result_table::results;
use crate::product::{Product, nothing_else};

pub(super) const PRODUCT: Product = Product {
    name: "sut_result_table",
    summary: "perplexity and zero-shot accuracy beside SUT",
    make: |runs| results("sut_result_table", runs),
    sources: nothing_else,
};
