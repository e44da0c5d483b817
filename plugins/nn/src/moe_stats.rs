//! What a σ-MoE layer tells about its routing: measured at each application, told when the pass ends.

use crate::routing::Routing;
use crate::tally::Tally;
use crate::usage::{self, Optimist};
use crate::{Context, charts};
use moeut_plugin_api::{Chart, PluginError, Wishes};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Name of the selection counts, int64 `[L, E]`, among the counts of a pass; `L` applications.
pub const COUNTS: &str = "counts";
/// Name of the counts of experts that are selected together, int64 `[E, E]`.
pub const PAIRS: &str = "pairs";

/// Gathers over the applications of one layer in one forward pass; only what is wished for.
#[derive(Debug)]
pub(crate) struct MoeWatch {
    wishes: Wishes,
    is_detailed: bool,
    counts_e: Vec<Tensor>,
    pairs_ee: Option<Tensor>,
    /// Averaged over applications; logged with every record.
    stats: BTreeMap<&'static str, Vec<Tensor>>,
    /// The same, with the charts.
    details: BTreeMap<&'static str, Vec<Tensor>>,
    /// Which experts each token used last time, float `[N, E]`.
    previous_ne: Option<Tensor>,
    /// Between each application and the one before.
    overlaps: Vec<Tensor>,
}

/// What a pass leaves.
#[derive(Debug)]
pub struct MoeStats {
    /// Scalars for every record.
    pub stats: Vec<(&'static str, Tensor)>,
    /// Counts to be added up over passes: [`COUNTS`].
    pub counts: Vec<(&'static str, Tensor)>,
    /// Likewise: [`PAIRS`].
    pub pairs: Vec<(&'static str, Tensor)>,
    /// Numbers of this pass.
    pub charts: Vec<Chart>,
}

impl MoeWatch {
    pub(crate) fn new(ctx: &Context) -> Self {
        Self {
            wishes: ctx.wishes,
            is_detailed: ctx.wishes.details && ctx.is_training,
            counts_e: Vec::new(),
            pairs_ee: None,
            stats: BTreeMap::new(),
            details: BTreeMap::new(),
            previous_ne: None,
            overlaps: Vec::new(),
        }
    }

    /// Whether numbers that cost something are wanted of the application that is under way.
    pub(crate) fn is_detailed(&self) -> bool {
        self.is_detailed
    }

    /// Whether no application was watched yet.
    pub(crate) fn is_first(&self) -> bool {
        self.overlaps.is_empty() && self.previous_ne.is_none()
    }

    /// Notes the experts and gates `[N, K]` of an application.
    pub(crate) fn selected(
        &mut self,
        ids_nk: &Tensor,
        gate_nk: &Tensor,
        routing: &Routing,
        (n_experts, ctx): (i64, &Context),
    ) -> Result<(), PluginError> {
        if self.wishes.needs_counts() {
            self.counts_e.push(routing.counts());
        }
        if self.wishes.needs_pairs() {
            let _exact = ctx.full_precision(ids_nk.device())?;
            let pairs_ee = usage::pairs(ids_nk, n_experts, ids_nk, n_experts);
            self.pairs_ee = Some(match self.pairs_ee.take() {
                Some(sum_ee) => sum_ee + pairs_ee,
                None => pairs_ee,
            });
        }
        if self.is_detailed {
            tch::no_grad(|| self.scores_and_overlap(ids_nk, gate_nk, n_experts));
        }
        Ok(())
    }

    fn scores_and_overlap(&mut self, ids_nk: &Tensor, gate_nk: &Tensor, n_experts: i64) {
        if let Some(previous_ne) = &self.previous_ne {
            let shared_nk = previous_ne.gather(-1, ids_nk, false);
            self.overlaps.push(shared_nk.mean(None));
        }
        self.previous_ne = Some(usage::membership(ids_nk, n_experts));
        self.detail(
            "min_sel_score",
            gate_nk.amin(-1i64, false).mean(Kind::Float),
        );
        self.detail(
            "max_sel_score",
            gate_nk.amax(-1i64, false).mean(Kind::Float),
        );
    }

    /// Notes scores `[.., E]` that sum to one.
    pub(crate) fn competed(&mut self, scores: &Tensor) {
        if self.wishes.stats {
            let perplexity = tch::no_grad(|| usage::relative_perplexity(scores).mean(None));
            let name = "expert_rel_perplexity_per_selection";
            self.stats.entry(name).or_default().push(perplexity);
        }
    }

    /// Notes a number of an application.
    pub(crate) fn detail(&mut self, name: &'static str, value: Tensor) {
        self.details.entry(name).or_default().push(value);
    }

    /// Ends the pass; `places` are those of the applications in the stack.
    pub(crate) fn finish(self, places: &[usize]) -> MoeStats {
        let mut charts: Vec<Chart> = averages(self.details)
            .map(|(name, value)| charts::number(name, &value))
            .collect();
        let overlaps = places.iter().skip(1).zip(&self.overlaps);
        charts.extend(
            overlaps.map(|(place, overlap)| {
                charts::number(format!("layer_sel_overlap_{place}"), overlap)
            }),
        );
        let counts_le = (!self.counts_e.is_empty()).then(|| Tensor::stack(&self.counts_e, 0));
        let mut stats: Vec<_> = averages(self.stats).collect();
        if let (true, Some(counts_le)) = (self.wishes.stats, &counts_le) {
            let all_e = counts_le.sum_dim_intlist(0i64, false, None);
            let perplexity = usage::relative_perplexity(&all_e);
            stats.push(("usag_rel_perplexity_all_layers", perplexity));
            let dead = usage::dead_share(&all_e);
            stats.push(("dead_expert_proportion_all_layers", dead));
        }
        MoeStats {
            stats,
            counts: counts_le
                .map(|counts| (COUNTS, counts))
                .into_iter()
                .collect(),
            pairs: self
                .pairs_ee
                .map(|pairs| (PAIRS, pairs))
                .into_iter()
                .collect(),
            charts,
        }
    }
}

fn averages(
    values: BTreeMap<&'static str, Vec<Tensor>>,
) -> impl Iterator<Item = (&'static str, Tensor)> {
    let average = |values: Vec<Tensor>| Tensor::stack(&values, 0).mean(None);
    values
        .into_iter()
        .map(move |(name, values)| (name, average(values)))
}

/// Charts of all that was counted in training since the last time, below `prefix` in `tally`.
pub fn usage_charts(tally: &Tally, prefix: &str, optimist: Optimist) -> Vec<Chart> {
    let Some(counts_le) = tally.get(&format!("{prefix}{COUNTS}")) else {
        return Vec::new();
    };
    let name = |what: &str| format!("{prefix}{what}");
    let all_e = counts_le.sum_dim_intlist(0i64, false, None);
    let perplexity = usage::relative_perplexity(&all_e);
    let (sorted_e, _) = all_e.sort(-1, true);
    let mut all = vec![
        charts::number(name("usag_rel_perplexity_100"), &perplexity),
        charts::number(
            name("dead_expert_proportion_100"),
            &usage::dead_share(&all_e),
        ),
        charts::usage_bars(name("usage_counts_100"), &sorted_e),
    ];
    if counts_le.size()[0] > 1 {
        let frequencies_le = usage::frequencies(counts_le);
        let similarity_ll = usage::similarity(&frequencies_le);
        let [score, best] = usage::universal_scores(&similarity_ll, optimist);
        all.extend([
            charts::heatmap(
                name("moe_per_layer_100"),
                ["expert", "layer"],
                None,
                &frequencies_le,
            ),
            charts::heatmap(
                name("layer_sel_similarity_100"),
                ["layer", "layer"],
                None,
                &similarity_ll,
            ),
            charts::number(name("universal_score"), &score),
            charts::number(name("universal_score_optimist"), &best),
        ]);
    }
    all
}

/// The chart of what was selected in evaluation since the last time.
pub fn evaluation_chart(tally: &Tally, prefix: &str) -> Option<Chart> {
    let counts_le = tally.get(&format!("{prefix}{COUNTS}"))?;
    let (sorted_e, _) = counts_le.sum_dim_intlist(0i64, false, None).sort(-1, true);
    // Named by the reference.
    Some(charts::usage_bars(
        format!("{prefix}test_exert_channel_usage"),
        &sorted_e,
    ))
}

/// How often an expert (row) was selected together with another one, as a share of how often it was selected.
pub fn pairs_chart(tally: &Tally, prefix: &str) -> Option<Chart> {
    let pairs_ee = tally.get(&format!("{prefix}{PAIRS}"))?;
    let selected_e1 = pairs_ee.diagonal(0, 0, 1).clamp_min(1).unsqueeze(-1);
    let name = format!("{prefix}expert_coocurence");
    Some(charts::heatmap(
        name,
        ["expert", "expert"],
        None,
        &(pairs_ee / selected_e1),
    ))
}
