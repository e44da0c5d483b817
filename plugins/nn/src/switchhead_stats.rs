//! What a SwitchHead layer tells about its routing.

use crate::switchhead::{Route, Side};
use crate::tally::Tally;
use crate::{Context, charts, usage};
use moeut_plugin_api::{Chart, PluginError, Wishes};
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

/// Names of the selection counts, int64 `[L, H, A]`, begin so, and end with the side; `L` applications.
pub const COUNTS: &str = "counts/";
/// Name of the counts of experts that a head selects together for a token, int64 `[H, A, A]`: of values (row) and output
/// (column).
pub const PAIRS: &str = "sel_correlation";

/// Selections of an application, by source and by whether they belong to what is attended to apart from the input.
type Routes = BTreeMap<(Side, bool), Route>;

/// Gathers over the applications of one layer in one forward pass; only what is wished for.
#[derive(Debug)]
pub(crate) struct SwitchHeadWatch {
    wishes: Wishes,
    /// Of each application `[H, A]`, by source.
    counts_ha: BTreeMap<Side, Vec<Tensor>>,
    pairs_haa: Option<Tensor>,
}

/// What a pass leaves, by the side under which a selection is reported.
#[derive(Debug)]
pub struct SwitchHeadStats {
    /// Relative perplexity of the experts' use, 1 = even; for every record.
    pub usage: Vec<(Side, Tensor)>,
    /// Counts to be added up over passes: [`COUNTS`].
    pub counts: Vec<(String, Tensor)>,
    /// Likewise: [`PAIRS`].
    pub pairs: Vec<(String, Tensor)>,
}

impl SwitchHeadWatch {
    pub(crate) fn new(ctx: &Context) -> Self {
        Self {
            wishes: ctx.wishes,
            counts_ha: BTreeMap::new(),
            pairs_haa: None,
        }
    }

    /// Notes the selections of an application; `shape` is heads and experts. One that is used on both sides counts twice.
    pub(crate) fn selected(&mut self, routes: &Routes, shape: [i64; 2]) {
        if !self.wishes.needs_counts() {
            return;
        }
        let mut of_application: BTreeMap<Side, Tensor> = BTreeMap::new();
        for ((source, _), route) in routes {
            let counts_ha = route.routing.counts().view(shape);
            let sum_ha = match of_application.remove(source) {
                Some(sum_ha) => sum_ha + counts_ha,
                None => counts_ha,
            };
            of_application.insert(*source, sum_ha);
        }
        for (source, counts_ha) in of_application {
            self.counts_ha.entry(source).or_default().push(counts_ha);
        }
    }

    /// Notes which experts of the values and of the output a token has selected; where values are attended to from
    /// further back, their last positions are the layer's own.
    pub(crate) fn selected_both(
        &mut self,
        v: &Route,
        o: &Route,
        [n_heads, n_experts]: [i64; 2],
        ctx: &Context,
    ) -> Result<(), PluginError> {
        if !self.wishes.needs_pairs() {
            return Ok(());
        }
        let _exact = ctx.full_precision(o.ids_bthk.device())?;
        let (n_own, n_attended) = (o.ids_bthk.size()[1], v.ids_bthk.size()[1]);
        let own = v.ids_bthk.narrow(1, n_attended - n_own, n_own);
        let of_head = |ids_bthk: &Tensor, head| {
            let k = ids_bthk.size()[3];
            ids_bthk.select(2, head).reshape([-1, k])
        };
        let pairs: Vec<Tensor> = (0..n_heads)
            .map(|head| {
                let (v, o) = (of_head(&own, head), of_head(&o.ids_bthk, head));
                usage::pairs(&v, n_experts, &o, n_experts)
            })
            .collect();
        let pairs_haa = Tensor::stack(&pairs, 0);
        self.pairs_haa = Some(match self.pairs_haa.take() {
            Some(sum_haa) => sum_haa + pairs_haa,
            None => pairs_haa,
        });
        Ok(())
    }

    /// Ends the pass; `reported` says the side under which a source is reported.
    pub(crate) fn finish(self, reported: impl Fn(Side) -> Side) -> SwitchHeadStats {
        let stacked = self.counts_ha.into_iter();
        let counts_lha: Vec<(Side, Tensor)> = stacked
            .map(|(source, counts)| (reported(source), Tensor::stack(&counts, 0)))
            .collect();
        let usage = |(side, counts_lha): &(Side, Tensor)| {
            let counts = counts_lha.sum_dim_intlist(0i64, false, None).reshape([-1]);
            (*side, usage::relative_perplexity(&counts))
        };
        SwitchHeadStats {
            usage: if self.wishes.stats {
                counts_lha.iter().map(usage).collect()
            } else {
                Vec::new()
            },
            counts: counts_lha
                .into_iter()
                .map(|(side, counts)| (format!("{COUNTS}{}", side.name()), counts))
                .collect(),
            pairs: self
                .pairs_haa
                .map(|pairs| (PAIRS.to_owned(), pairs))
                .into_iter()
                .collect(),
        }
    }
}

/// Charts of all that was counted in training since the last time, below `prefix` in `tally`.
///
/// ```text
/// sel_counts/<side>                    each head's counts, sorted; their mean over heads, and the range
/// moe_per_layer_100/<side>_h<head>     counts by application and expert
/// usag_rel_perplexity_100              mean over heads and sides
/// ```
/// The reference logs the perplexities of all sides under the one name, so that a set's order of iteration decides which
/// one stays.
pub fn usage_charts(tally: &Tally, prefix: &str) -> Vec<Chart> {
    let name = |what: &str| format!("{prefix}{what}");
    let (mut all, mut perplexities) = (Vec::new(), Vec::new());
    for (side, counts_lha) in tally.below(&name(COUNTS)) {
        let counts_ha = counts_lha.sum_dim_intlist(0i64, false, None);
        perplexities.push(usage::relative_perplexity(&counts_ha).mean(None));
        let (sorted_ha, _) = counts_ha.to_kind(Kind::Float).sort(-1, true);
        let mean_a = sorted_ha.mean_dim(0i64, false, None);
        let (below, above) = (
            &mean_a - sorted_ha.amin(0i64, false),
            sorted_ha.amax(0i64, false) - &mean_a,
        );
        let bars = Tensor::stack(&[mean_a, below, above], 0);
        all.push(charts::usage_bars(
            name(&format!("sel_counts/{side}")),
            &bars,
        ));
        for head in 0..counts_lha.size()[1] {
            let what = format!("moe_per_layer_100/{side}_h{head}");
            let of_head_la = counts_lha.select(1, head);
            all.push(charts::heatmap(
                name(&what),
                ["expert", "layer"],
                None,
                &of_head_la,
            ));
        }
    }
    if !perplexities.is_empty() {
        let perplexity = Tensor::stack(&perplexities, 0).mean(None);
        all.push(charts::number(name("usag_rel_perplexity_100"), &perplexity));
    }
    all
}
