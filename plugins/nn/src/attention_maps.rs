//! Attention maps of one pass: who looks where, and which experts help.
//!
//! Maps are computed beside the fused attention, which keeps no weights, for the batch's first sequence and the
//! positions that are shown. So the layers' results are the same with and without; the reference takes another path
//! through the layer instead.

use crate::past::Mask;
use crate::{Context, charts};
use moeut_plugin_api::{AxisPart, Chart, ChartAxis, ChartKind, MapWish, PluginError, TokenRange};
use tch::{Kind, Tensor};

/// The maps of all applications of one layer in one forward pass; none if nobody wishes for them.
#[derive(Debug)]
pub struct AttentionMaps {
    wish: Option<MapWish>,
    frames: Vec<Frame>,
    queries: Span,
    keys: Span,
}

/// One application.
#[derive(Debug)]
struct Frame {
    /// Softmax over all keys, `[H, queries, keys]` of those shown.
    weights_hqk: Tensor,
    of_queries: Vec<Gates>,
    of_keys: Vec<Gates>,
}

/// Which experts a projection has selected for the batch's first sequence.
#[derive(Debug)]
pub struct Gates {
    /// Of the projection: `q`, `k`, `v` or `o`.
    pub side: &'static str,
    /// Whether it belongs to what is attended to.
    pub is_attended: bool,
    /// 0 where an expert is not selected, `[T or S, H, A]`.
    pub gates_tha: Tensor,
}

/// Positions that are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Span {
    first: i64,
    n: i64,
    of: i64,
}

impl Span {
    /// See [`MapWish::n_steps`].
    fn new(n_steps: i64, of: i64) -> Self {
        let n = match n_steps {
            0 => of,
            _ => n_steps.abs().min(of),
        };
        let first = if n_steps < 0 { of - n } else { 0 };
        Self { first, n, of }
    }

    fn tokens(self) -> TokenRange {
        TokenRange {
            from_end: (self.of - self.first).unsigned_abs(),
            n: self.n.unsigned_abs(),
        }
    }
}

impl AttentionMaps {
    /// None yet.
    pub fn new(ctx: &Context) -> Self {
        Self {
            wish: ctx.wishes.maps,
            frames: Vec::new(),
            queries: Span::default(),
            keys: Span::default(),
        }
    }

    /// Whether anybody wishes for maps.
    pub fn is_on(&self) -> bool {
        self.wish.is_some()
    }

    /// Adds an application: queries `[B, T, H, d]` and keys `[B, S, H, d]` as the attention sees them, perhaps with
    /// zeros behind their `d_head` channels, and what is selected for the first sequence.
    ///
    /// # Errors
    /// If autocast cannot be suspended.
    pub fn add(
        &mut self,
        q_bthd: &Tensor,
        k_bshd: &Tensor,
        d_head: i64,
        mask: &Mask,
        gates: &[Gates],
        ctx: &Context,
    ) -> Result<(), PluginError> {
        let Some(wish) = self.wish else {
            return Ok(());
        };
        let _exact = ctx.full_precision(q_bthd.device())?;
        let (n_queries, n_keys) = (q_bthd.size()[1], k_bshd.size()[1]);
        let (queries, keys) = (
            Span::new(wish.n_steps, n_queries),
            Span::new(wish.n_steps, n_keys),
        );
        (self.queries, self.keys) = (queries, keys);
        let heads_first = |x: &Tensor| x.get(0).transpose(0, 1).to_kind(Kind::Float);
        tch::no_grad(|| {
            let q_hqd = heads_first(q_bthd).narrow(1, queries.first, queries.n);
            let k_hsd = heads_first(k_bshd);
            let scale = (d_head as f64).sqrt().recip();
            let scores = q_hqd.bmm(&k_hsd.transpose(1, 2)) * scale;
            let visible = mask.tensor(n_queries, n_keys, q_bthd.device());
            let hidden = visible.narrow(0, queries.first, queries.n).logical_not();
            let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY);
            let weights = weights.softmax(-1, None);
            let shown = |gates: &Gates| {
                let span = if gates.is_attended { keys } else { queries };
                Gates {
                    side: gates.side,
                    is_attended: gates.is_attended,
                    gates_tha: gates
                        .gates_tha
                        .narrow(0, span.first, span.n)
                        .to_kind(Kind::Float),
                }
            };
            let (of_keys, of_queries) = if wish.has_heads {
                gates.iter().map(shown).partition(|gates| gates.is_attended)
            } else {
                (Vec::new(), Vec::new())
            };
            self.frames.push(Frame {
                weights_hqk: weights.narrow(2, keys.first, keys.n).contiguous(),
                of_queries,
                of_keys,
            });
        });
        Ok(())
    }

    /// Ends the pass; `places` are those of the applications in the stack.
    ///
    /// ```text
    /// attention_max    a frame for each application: the largest weight of all heads
    /// head_<h>         a frame for each application: its weights; left of them the gates of its queries' experts
    ///                  (q, o), below them the gates of its keys' (k, v)
    /// ```
    pub fn finish(self, places: &[usize]) -> Vec<Chart> {
        let (Some(wish), Some(first)) = (self.wish, self.frames.first()) else {
            return Vec::new();
        };
        let titles: Vec<String> = places
            .iter()
            .map(|place| format!("layer {place}"))
            .collect();
        let chart = |name: String, frames: Vec<Tensor>, of_queries: &[Gates], of_keys: &[Gates]| {
            let mut x = vec![AxisPart::Inputs(self.keys.tokens())];
            let mut y = vec![AxisPart::Targets(self.queries.tokens())];
            x.splice(0..0, expert_names(of_queries));
            y.extend(expert_names(of_keys));
            let axis = |label: &str, parts| ChartAxis {
                label: label.to_owned(),
                parts,
            };
            let kind = ChartKind::Frames {
                x: axis("src", x),
                y: axis("dest", y),
                range: (!of_queries.is_empty() || !of_keys.is_empty()).then_some((0.0, 1.0)),
                titles: titles.clone(),
            };
            charts::chart(name, kind, &Tensor::stack(&frames, 0))
        };
        let largest = self
            .frames
            .iter()
            .map(|frame| frame.weights_hqk.amax(0i64, false));
        let mut all = vec![chart(
            "attention_max".to_owned(),
            largest.collect(),
            &[],
            &[],
        )];
        if wish.has_heads {
            all.extend((0..first.weights_hqk.size()[0]).map(|head| {
                let frames = self
                    .frames
                    .iter()
                    .map(|frame| frame.of_head(head))
                    .collect();
                chart(
                    format!("head_{head}"),
                    frames,
                    &first.of_queries,
                    &first.of_keys,
                )
            }));
        }
        all
    }
}

impl Frame {
    /// The weights of a head, framed by gates. Where rows of experts meet columns of experts there is nothing.
    fn of_head(&self, head: i64) -> Tensor {
        let weights_qk = self.weights_hqk.get(head);
        let of_head = |gates: &Gates| gates.gates_tha.select(1, head);
        let mut columns: Vec<Tensor> = self.of_queries.iter().map(of_head).collect();
        columns.push(weights_qk);
        let above = Tensor::cat(&columns, 1);
        let n_keys = self.weights_hqk.size()[2];
        let mut rows = vec![above.shallow_clone()];
        rows.extend(self.of_keys.iter().map(|gates| {
            let gates_as = of_head(gates).tr();
            gates_as.constant_pad_nd([above.size()[1] - n_keys, 0])
        }));
        Tensor::cat(&rows, 0)
    }
}

/// `o 0`, `o 1`, … for every side.
fn expert_names(all: &[Gates]) -> Option<AxisPart> {
    let of_side = |gates: &Gates| {
        let side = gates.side;
        (0..gates.gates_tha.size()[2]).map(move |expert| format!("{side} {expert}"))
    };
    (!all.is_empty()).then(|| AxisPart::Names(all.iter().flat_map(of_side).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::context;
    use moeut_torch::IntoTensor;
    use tch::Device;

    #[test]
    fn positions_are_counted_from_either_end() {
        let span = |n_steps, of| {
            let span = Span::new(n_steps, of);
            (span.first, span.n, span.tokens().from_end)
        };
        assert_eq!(span(-3, 10), (7, 3, 3));
        assert_eq!(span(3, 10), (0, 3, 10));
        assert_eq!(span(0, 10), (0, 10, 10));
        assert_eq!(span(-128, 10), (0, 10, 10));
    }

    /// Weights, by hand, of four queries behind two remembered keys; the last three positions are shown.
    #[test]
    fn maps_are_softmax_weights_over_all_keys() {
        tch::manual_seed(3);
        let options = (Kind::Double, Device::Cpu);
        let (n_heads, d_head) = (2, 3);
        let q = Tensor::randn([2, 4, n_heads, d_head], options);
        let k = Tensor::randn([2, 6, n_heads, d_head], options);
        let mut ctx = context(true);
        ctx.wishes.maps = Some(MapWish {
            n_steps: -3,
            has_heads: false,
        });
        let mut maps = AttentionMaps::new(&ctx);
        let mask = Mask::after(2, 4, Device::Cpu);
        maps.add(&q, &k, d_head, &mask, &[], &ctx).unwrap();
        let charts = maps.finish(&[7]);
        assert_eq!(charts.len(), 1);
        let ChartKind::Frames { x, y, titles, .. } = &charts[0].kind else {
            panic!("{:?}", charts[0].kind);
        };
        let range = TokenRange { from_end: 3, n: 3 };
        assert_eq!(x.parts, [AxisPart::Inputs(range)]);
        assert_eq!(y.parts, [AxisPart::Targets(range)]);
        assert_eq!(titles, &["layer 7"]);

        let shown = charts[0].values.tensor();
        let at = |x: &Tensor, index: [i64; 4]| x.double_value(&index);
        for query in 1..4 {
            let weights = |head| -> Vec<f64> {
                let score = |key| {
                    let products = (0..d_head)
                        .map(|i| at(&q, [0, query, head, i]) * at(&k, [0, key, head, i]));
                    (products.sum::<f64>() / (d_head as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = (0..=query + 2).map(score).collect();
                let sum: f64 = scores.iter().sum();
                scores.iter().map(|score| score / sum).collect()
            };
            let (a, b) = (weights(0), weights(1));
            for key in 3..6 {
                let index = usize::try_from(key).unwrap();
                let expected = a.get(index).map_or(0.0, |a| a.max(b[index]));
                let value = shown.double_value(&[0, query - 1, key - 3]);
                assert!(
                    (value - expected).abs() < 1e-6,
                    "{query} {key}: {value} {expected}"
                );
            }
        }
    }
}
