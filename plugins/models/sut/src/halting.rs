//! Adaptive computation time: each token decides after every layer how much of it goes on.
//!
//! Shape letters: `B` batch, `T` `seq_len`, `D` `d_model`, or as wide as [`Context::aligned`] makes it.

use crate::scorer::{Scorer, ScorerPass};
use moeut_nn::lm::Carry;
use moeut_nn::{Context, Cost, Init, Params, Sequence};
use moeut_plugin_api::PluginError;
use tch::{Kind, Tensor};

/// A token of which less is left has halted.
const SMALLEST_SHARE: f64 = 1.0 - 0.999;

/// The halting rule around a layer `f(h; source, alive)`.
///
/// The first layer runs as it is. From the second on, with `h` the previous layer's own output, `n` the share of the
/// token that has not halted (at first 1), and `x` the previous layer's mixture:
///
/// ```text
/// (go, halt) = softmax(W₃ · GELU(W₀ h + b₀))
/// a ← a + n · halt · h          what halted, weighted
/// s ← s + n · halt · i          its depth; i counts layers from 0
/// n ← n · go                    0 for the layer if less than 0.001
/// h' = f(h; x, n)
/// x' = x where n < 0.001, else a + n · h'
/// loss = mean(s + n · (i + 1))
/// ```
///
/// Keys and values come from the mixture `x`, queries from `h`. `W₃` starts at 0, so half of a token goes on at first.
///
/// # Source
/// Tan et al., "Sparse Universal Transformer", arXiv:2310.07096, section 3; reference `sut/halting.py`.
#[derive(Debug)]
pub(crate) struct Halting {
    scorer: Scorer,
}

/// What travels from layer to layer; nothing before the first.
#[derive(Debug, Default)]
pub(crate) struct HaltingState(Option<Running>);

/// The state behind a layer.
#[derive(Debug)]
struct Running {
    /// `i`: layers so far, less one.
    index: u32,
    /// `ln n`, without the cut at 0.001.
    log_share_bt: Tensor,
    /// `a`.
    halted_btd: Tensor,
    /// `s`.
    depth_bt: Tensor,
    /// The last layer's own output, `h`.
    h_btd: Tensor,
}

impl Carry for HaltingState {
    fn share(&self) -> Self {
        Self(self.0.as_ref().map(|running| Running {
            index: running.index,
            log_share_bt: running.log_share_bt.shallow_clone(),
            halted_btd: running.halted_btd.shallow_clone(),
            depth_bt: running.depth_bt.shallow_clone(),
            h_btd: running.h_btd.shallow_clone(),
        }))
    }
}

/// What a layer is given.
pub(crate) struct Entry {
    /// Its input, `[B, T, D]`.
    pub(crate) h_btd: Tensor,
    /// The same in the compute type; nothing in the first layer, where nobody has needed it.
    pub(crate) rounded_btd: Option<Tensor>,
    /// `n` with the cut, `[B, T]`; nothing in the first layer.
    pub(crate) alive_bt: Option<Tensor>,
    /// The state, but for the layer's output.
    index: u32,
    log_share_bt: Tensor,
    halted_btd: Tensor,
    depth_bt: Tensor,
}

impl Halting {
    /// Adds `0.weight`, `0.bias` and `3.weight`.
    pub(crate) fn new(params: &Params, d_model: i64) -> Self {
        Self {
            scorer: Scorer::new(params, d_model, 2, Init::Zeros),
        }
    }

    pub(crate) fn begin(&self, ctx: &Context) -> ScorerPass {
        self.scorer.begin(ctx)
    }

    /// Of one application: `T·D·D + 2·T·D`. The first layer does not ask who halts, which is not worth a case.
    pub(crate) fn cost(d_model: u64, of: Sequence) -> Cost {
        let n = of.n_tokens;
        // The hidden layer before and after its non-linearity; what halted, and the mixture.
        let kept_bytes = 2 * d_model * (of.product_bytes + of.stream_bytes);
        Cost::default()
            .macs("halting", n * d_model * (d_model + 2))
            .kept("halting", n * kept_bytes)
    }

    /// Before the layer: decides how much of each token halts here, with the weights of [`Self::begin`]. `x_btd` is the
    /// mixture so far.
    ///
    /// # Errors
    /// If autocast cannot be suspended.
    pub(crate) fn enter(
        x_btd: &Tensor,
        state: HaltingState,
        scorer: &ScorerPass,
        ctx: &Context,
    ) -> Result<Entry, PluginError> {
        let Some(running) = state.0 else {
            let zeros_bt = x_btd.select(2, 0).zeros_like();
            return Ok(Entry {
                h_btd: x_btd.shallow_clone(),
                rounded_btd: None,
                alive_bt: None,
                index: 0,
                log_share_bt: zeros_bt.shallow_clone(),
                halted_btd: x_btd.zeros_like(),
                depth_bt: zeros_bt,
            });
        };
        let Running {
            index,
            log_share_bt,
            halted_btd,
            depth_bt,
            h_btd,
        } = running;
        let rounded_btd = h_btd.to_kind(ctx.compute);
        let logits_bt2 = scorer.forward(&rounded_btd, |x| x.gelu("none"), 0.0, ctx)?;
        let log_bt2 = logits_bt2.log_softmax(-1, None) + log_share_bt.unsqueeze(-1);
        let halt_bt = log_bt2.select(2, 1).exp();
        let log_share_bt = log_bt2.select(2, 0);
        let share_bt = log_share_bt.exp();
        let alive_bt = share_bt.masked_fill(&share_bt.lt(SMALLEST_SHARE), 0.0);
        Ok(Entry {
            halted_btd: halted_btd.addcmul(&halt_bt.unsqueeze(-1), &h_btd),
            depth_bt: depth_bt + halt_bt * f64::from(index),
            alive_bt: Some(alive_bt),
            index: index + 1,
            log_share_bt,
            h_btd,
            rounded_btd: Some(rounded_btd),
        })
    }
}

impl Entry {
    /// After the layer, whose output is `h_btd`: the new state, the mixture, and from the second layer on the mean
    /// depth of the tokens, a scalar. `x_btd` is the mixture before the layer.
    pub(crate) fn leave(
        self,
        h_btd: Tensor,
        x_btd: &Tensor,
    ) -> (HaltingState, Tensor, Option<Tensor>) {
        let (mixture_btd, depth) = match &self.alive_bt {
            None => (h_btd.shallow_clone(), None),
            Some(alive_bt) => {
                let alive_bt1 = alive_bt.unsqueeze(-1);
                let mixed_btd = self.halted_btd.addcmul(&alive_bt1, &h_btd);
                let mixed_btd = mixed_btd.to_kind(x_btd.kind());
                let depth_bt = &self.depth_bt + alive_bt * f64::from(self.index);
                (
                    x_btd.where_self(&alive_bt1.lt(SMALLEST_SHARE), &mixed_btd),
                    Some(depth_bt.mean(None::<Kind>)),
                )
            }
        };
        let running = Running {
            index: self.index,
            log_share_bt: self.log_share_bt,
            halted_btd: self.halted_btd,
            depth_bt: self.depth_bt,
            h_btd,
        };
        (HaltingState(Some(running)), mixture_btd, depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use tch::Device;

    const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
    const D_MODEL: i64 = 3;

    fn halting() -> (Halting, Params) {
        let params = Params::new(Kind::Double, Device::Cpu);
        (Halting::new(&params, D_MODEL), params)
    }

    /// Runs `n_layers` layers that add 1; gives the mixtures, the shares and the depths.
    fn run(halting: &Halting, x: &Tensor, n_layers: usize) -> Vec<(Tensor, Option<Tensor>, f64)> {
        let ctx = testing::context(true);
        let scorer = halting.begin(&ctx);
        let (mut x, mut state) = (x.shallow_clone(), HaltingState::default());
        let mut seen = Vec::new();
        for _ in 0..n_layers {
            let entry = Halting::enter(&x, state, &scorer, &ctx).unwrap();
            let (alive, h) = (
                entry.alive_bt.as_ref().map(Tensor::shallow_clone),
                &entry.h_btd + 1.0,
            );
            let (next, mixture, depth) = entry.leave(h, &x);
            (x, state) = (mixture.shallow_clone(), next);
            seen.push((mixture, alive, depth.map_or(0.0, |d| d.double_value(&[]))));
        }
        seen
    }

    /// With W₃ = 0 half of what is left halts each time: h = x + 1, x + 2, x + 3 with shares 1/2, 1/4, 1/4.
    #[test]
    fn half_of_a_token_halts_at_first() {
        let x = Tensor::zeros([1, 2, D_MODEL], DOUBLE);
        let seen = run(&halting().0, &x, 3);
        let value = |layer: usize| seen[layer].0.double_value(&[0, 1, 2]);
        assert!((value(0) - 1.0).abs() < 1e-12);
        assert!((value(1) - (0.5 * 1.0 + 0.5 * 2.0)).abs() < 1e-12);
        assert!((value(2) - (0.5 * 1.0 + 0.25 * 2.0 + 0.25 * 3.0)).abs() < 1e-12);
        let share = |layer: usize| seen[layer].1.as_ref().unwrap().double_value(&[0, 0]);
        assert!((share(1) - 0.5).abs() < 1e-12 && (share(2) - 0.25).abs() < 1e-12);
        // Depths: 0 · 1/2 + 1 · 1/2, then 0 · 1/2 + 1 · 1/4 + 2 · 1/4.
        assert!((seen[1].2 - 0.5).abs() < 1e-12 && (seen[2].2 - 0.75).abs() < 1e-12);
    }

    /// GELU(1) = 0.84 makes logits of ∓30: of a token e^-60 is left, and its mixture stays what it was.
    #[test]
    fn a_token_that_has_halted_keeps_its_mixture() {
        let (halting, params) = halting();
        let set = |name, value: &Tensor| testing::set(&params, name, value);
        set("0.weight", &Tensor::zeros([3, 3], DOUBLE));
        set("0.bias", &Tensor::ones([3], DOUBLE));
        let logits = Tensor::from_slice(&[-12.0, 12.0]).view([2, 1]);
        set("3.weight", &logits.expand([2, 3], false));
        let seen = run(&halting, &Tensor::randn([1, 2, D_MODEL], DOUBLE), 3);
        assert_eq!(
            seen[1]
                .1
                .as_ref()
                .unwrap()
                .abs()
                .max()
                .double_value(&[])
                .to_bits(),
            0
        );
        assert!(seen[1].0.equal(&seen[0].0) && seen[2].0.equal(&seen[0].0));
        assert!(seen[2].2.abs() < 1e-6);
    }

    #[test]
    fn gradients_agree_with_differences() {
        let (halting, params) = halting();
        testing::set(&params, "3.weight", &Tensor::randn([2, D_MODEL], DOUBLE));
        let parameter = |name| testing::parameter(&params, name);
        let x = Tensor::randn([2, 3, D_MODEL], DOUBLE).set_requires_grad(true);
        let cotangent = Tensor::randn([2, 3, D_MODEL], DOUBLE);
        let ctx = testing::context(true);
        testing::check_gradients(
            &[
                ("x", &x),
                ("w0", &parameter("0.weight")),
                ("b0", &parameter("0.bias")),
                ("w3", &parameter("3.weight")),
            ],
            &|| {
                let scorer = halting.begin(&ctx);
                let (mut mixture, mut state) = (x.shallow_clone(), HaltingState::default());
                let mut loss = Tensor::zeros([0i64; 0], DOUBLE);
                for _ in 0..4 {
                    let entry = Halting::enter(&mixture, state, &scorer, &ctx).unwrap();
                    let h = (&entry.h_btd + &mixture).tanh();
                    let (next, x, depth) = entry.leave(h, &mixture);
                    (mixture, state) = (x, next);
                    loss += depth.unwrap_or_else(|| Tensor::zeros([0i64; 0], DOUBLE));
                }
                loss + (mixture * &cotangent).sum(None)
            },
        );
    }
}
