//! What a pass tells about itself, under full names, and what is counted from one pass to the next.

use super::{Block, BlockReport, Counted};
use crate::usage::Optimist;
use crate::{Context, Tally};
use moeut_plugin_api::Chart;
use std::collections::BTreeMap;
use tch::Tensor;

/// Counts of every distinct layer since they were last shown.
#[derive(Debug, Default)]
pub(super) struct Tallies {
    training: Vec<Tally>,
    evaluation: Vec<Tally>,
    pairs: Vec<Tally>,
}

/// A pass's report, all layers together.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Summed over distinct layers.
    pub(super) regularizers: BTreeMap<String, Tensor>,
    pub(super) stats: Vec<(String, Tensor)>,
    pub(super) charts: Vec<Chart>,
    pub(super) selections: Vec<(String, Tensor)>,
}

impl Tallies {
    pub(super) fn new(n_blocks: usize) -> Self {
        let empty = || (0..n_blocks).map(|_| Tally::default()).collect();
        Self {
            training: empty(),
            evaluation: empty(),
            pairs: empty(),
        }
    }

    /// Takes the reports of the distinct layers, in their order.
    pub(super) fn report<B: Block>(
        &mut self,
        of_blocks: Vec<(&B, BlockReport)>,
        ctx: &Context,
    ) -> Report {
        let mut all = Report::default();
        for (index, (block, mut report)) in of_blocks.into_iter().enumerate() {
            for (name, term) in report.regularizers.drain(..) {
                let sum = match all.regularizers.remove(&name) {
                    Some(sum) => sum + term,
                    None => term,
                };
                all.regularizers.insert(name, sum);
            }
            self.count(index, &report, ctx);
            if ctx.wishes.details {
                report.charts.extend(self.shown(index, block, ctx));
            }
            let full = |name: &str| format!("unique_layers.{index}.{name}");
            let stats = report.stats.into_iter();
            all.stats
                .extend(stats.map(|(name, value)| (full(&name), value)));
            if ctx.wishes.selections {
                let counts = report.counts.into_iter().chain(report.pairs);
                let counts = counts.map(|(name, value)| (full(&name), value));
                all.selections.extend(counts);
            }
            all.charts
                .extend(report.charts.into_iter().map(|chart| Chart {
                    name: full(&chart.name),
                    ..chart
                }));
            all.charts.extend(report.maps.into_iter().map(|map| Chart {
                name: format!("activations/{}", full(&map.name)),
                ..map
            }));
        }
        all
    }

    fn count(&mut self, index: usize, report: &BlockReport, ctx: &Context) {
        let wishes = ctx.wishes;
        let counts = if ctx.is_training {
            &mut self.training
        } else {
            &mut self.evaluation
        };
        if wishes.counts {
            counts[index].add(&report.counts);
        }
        if wishes.pairs {
            self.pairs[index].add(&report.pairs);
        }
    }

    /// The charts of what was counted, which begins anew. What was selected in evaluation is shown by the next pass of
    /// training that shows anything, as in the reference.
    fn shown(&mut self, index: usize, block: &impl Block, ctx: &Context) -> Vec<Chart> {
        let optimist = if ctx.is_compat {
            Optimist::Reference
        } else {
            Optimist::Others
        };
        let shown = |tallies: &mut Vec<Tally>, counted: Counted| {
            block.usage(counted, &std::mem::take(&mut tallies[index]), optimist)
        };
        if ctx.is_training {
            let mut charts = shown(&mut self.training, Counted::InTraining);
            charts.extend(shown(&mut self.evaluation, Counted::InEvaluation));
            charts
        } else {
            shown(&mut self.pairs, Counted::Together)
        }
    }
}
