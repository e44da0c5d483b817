//! What the residual stream tells about the stack: how much each layer changes it, and how early the answer is there.

use crate::{Context, LmHead, Stream, charts};
use moeut_plugin_api::{Chart, PluginError};
use tch::{Kind, Tensor};

/// How much a layer changes the residual stream: mean norms of update and input, the mean of their ratio, and the mean
/// absolute cosine of input and output at the same position.
///
/// The reference takes the cosine over all pairs of positions, a T×T product per layer for one number; under compat so
/// does this.
pub(super) fn update_stats(
    place: usize,
    x_btd: &Tensor,
    y_btd: &Tensor,
    ctx: &Context,
) -> Result<[(String, Tensor); 4], PluginError> {
    let _exact = ctx.full_precision(x_btd.device())?;
    Ok(tch::no_grad(|| {
        let norm = |x: &Tensor| x.norm_scalaropt_dim(2, -1, false);
        let (update_bt, input_bt) = (norm(&(y_btd - x_btd)), norm(x_btd));
        let ratio_bt = &update_bt / input_bt.clamp_min(f64::from(f32::EPSILON));
        let cosine = if ctx.is_compat {
            cosines(x_btd, y_btd)
        } else {
            Tensor::cosine_similarity(x_btd, y_btd, -1, 1e-8)
        };
        let name = |what: &str| format!("activation_norm/{what}_{place}");
        [
            (name("rel_update_layer"), ratio_bt.mean(Kind::Float)),
            (name("abs_update_layer"), update_bt.mean(Kind::Float)),
            (name("in_layer"), input_bt.mean(Kind::Float)),
            (name("io_cossim"), cosine.abs().mean(Kind::Float)),
        ]
    }))
}

/// The residual stream at the first positions of a batch: behind the embedding, and behind each layer.
#[derive(Debug)]
pub(super) struct Features {
    /// `[N, D]` each; nothing if nobody wants to know.
    of_layers: Option<Vec<Tensor>>,
}

impl Features {
    /// Positions that are looked at, the reference's number.
    const N_POSITIONS: i64 = 1024;
    /// Positions whose distributions are held at a time, to bound the memory they take.
    const PIECE: i64 = 64;

    /// Begins a pass with its embedding `[B, T, D]`.
    pub(super) fn new(x: &Stream, ctx: &Context) -> Self {
        let mut features = Self {
            of_layers: (ctx.wishes.details && ctx.is_training).then(Vec::new),
        };
        features.add(x);
        features
    }

    /// Adds what a layer made, before any token skips it.
    pub(super) fn add(&mut self, y: &Stream) {
        if let Some(of_layers) = &mut self.of_layers {
            let y_nd = y.whole().detach().flatten(0, 1);
            let n = y_nd.size()[0].min(Self::N_POSITIONS);
            of_layers.push(y_nd.narrow(0, 0, n).copy());
        }
    }

    /// Cosines between all layers, mean over positions:
    ///
    /// ```text
    /// feature_cossim     of the residual stream
    /// out_dist_cossim    of the distributions that the model's output makes of it
    /// out_diff_<l>       mean L₁ distance of distribution l from the last; 0 is that of the embedding
    /// ```
    pub(super) fn charts(self, head: &LmHead, ctx: &Context) -> Result<Vec<Chart>, PluginError> {
        let Some(of_layers) = self.of_layers else {
            return Ok(Vec::new());
        };
        tch::no_grad(|| {
            let x_nld = Tensor::stack(&of_layers, 1);
            let n = x_nld.size()[0] as f64;
            let last = x_nld.size()[1] - 1;
            let exact = ctx.full_precision(x_nld.device())?;
            let features_ll = cosines(&x_nld, &x_nld).mean_dim(0i64, false, None);
            drop(exact);
            // Nothing is dropped here, so that no random number is drawn.
            let quiet = Context {
                is_training: false,
                ..ctx.clone()
            };
            let (mut cosines_ll, mut differences_l) = (Vec::new(), Vec::new());
            for x_cld in x_nld.split(Self::PIECE, 0) {
                let logits_lcv = head.forward(&Stream::from(x_cld), &quiet)?;
                let p_clv = logits_lcv.transpose(0, 1).softmax(-1, Kind::Float);
                let _exact = ctx.full_precision(p_clv.device())?;
                cosines_ll.push(cosines(&p_clv, &p_clv).sum_dim_intlist(0i64, false, None));
                let away_clv = p_clv.narrow(1, 0, last) - p_clv.narrow(1, last, 1);
                let away_cl = away_clv.abs().sum_dim_intlist(-1i64, false, None);
                differences_l.push(away_cl.sum_dim_intlist(0i64, false, None));
            }
            let mean = |sums: Vec<Tensor>| sums.into_iter().sum::<Tensor>() / n;
            let differences_l = mean(differences_l);
            let axes = ["layers applied", "layers applied"];
            let range = Some((0.0, 1.0));
            let mut all = vec![
                charts::heatmap("feature_cossim", axes, range, &features_ll),
                charts::heatmap("out_dist_cossim", axes, range, &mean(cosines_ll)),
            ];
            all.extend((0..last).map(|layer| {
                charts::number(format!("out_diff_{layer}"), &differences_l.get(layer))
            }));
            Ok(all)
        })
    }
}

/// Cosines of all rows with all rows, `[N, A, D]` and `[N, B, D]` → `[N, A, B]`.
fn cosines(a: &Tensor, b: &Tensor) -> Tensor {
    let unit = |x: &Tensor| x / x.norm_scalaropt_dim(2, -1, true).clamp_min(1e-12);
    unit(a).bmm(&unit(b).transpose(1, 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::context;
    use tch::Device;

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// `[B, T, D]` as vectors of vectors.
    fn rows(x_btd: &Tensor) -> Vec<Vec<Vec<f64>>> {
        Vec::try_from(x_btd).unwrap()
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    fn norm(a: &[f64]) -> f64 {
        dot(a, a).sqrt()
    }

    #[test]
    fn updates_are_measured_position_by_position() {
        let (x, y) = (
            Tensor::randn([2, 3, 4], DOUBLE),
            Tensor::randn([2, 3, 4], DOUBLE),
        );
        let (xs, ys) = (rows(&x), rows(&y));
        let positions: Vec<(&[f64], &[f64])> = (0..6)
            .map(|i| (&xs[i / 3][i % 3][..], &ys[i / 3][i % 3][..]))
            .collect();
        let mean = |of: &dyn Fn(&[f64], &[f64]) -> f64| {
            positions.iter().map(|(x, y)| of(x, y)).sum::<f64>() / 6.0
        };
        let update =
            |x: &[f64], y: &[f64]| norm(&y.iter().zip(x).map(|(y, x)| y - x).collect::<Vec<f64>>());
        let cosine = |x: &[f64], y: &[f64]| (dot(x, y) / norm(x) / norm(y)).abs();
        // The reference pairs all positions of a sequence with each other.
        let all_pairs = (0..18).map(|i| cosine(&xs[i / 9][i % 3], &ys[i / 9][i / 3 % 3]));
        let all_pairs = all_pairs.sum::<f64>() / 18.0;
        for (is_compat, io_cossim) in [(false, mean(&cosine)), (true, all_pairs)] {
            let mut ctx = context(true);
            ctx.is_compat = is_compat;
            let stats = update_stats(7, &x, &y, &ctx).unwrap();
            for ((name, value), expected) in stats.iter().zip([
                mean(&|x, y| update(x, y) / norm(x)),
                mean(&update),
                mean(&|x, _| norm(x)),
                io_cossim,
            ]) {
                let value = value.double_value(&[]);
                assert!((value - expected).abs() < 1e-6, "{name} {value} {expected}");
            }
        }
    }
}
