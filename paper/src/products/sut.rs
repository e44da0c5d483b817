//! Figure: perplexity of dense models, MoEUT and SUT by dataset and size.

use crate::product::{Bar, Made, Product, nothing_else, perplexity, sizes};
use crate::run::{Reason, Run};
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
    let bars = made.gather(runs, |run| bar(run, &sizes[&run.name]));
    let bars: Vec<Bar> = bars.into_iter().map(|(_, bar)| bar).collect();
    made.bars("sut", "", &bars, Scale::Log);
    made
}

fn bar(run: &Run, size: &str) -> Result<Bar, Reason> {
    Ok(Bar {
        place: format!("{} {size}", run.model.dataset_title()),
        series: run.model.family().name().to_owned(),
        value: perplexity(run)?,
        run: run.name.clone(),
    })
}
