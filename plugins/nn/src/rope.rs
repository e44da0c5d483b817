//! Rotary position embedding of a part of the head's channels.

use crate::Context;
use moeut_plugin_api::PluginError;
use serde::Deserialize;
use std::cell::RefCell;
use tch::{Device, Kind, Tensor};

/// How much of a head is rotated, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct RopeConfig {
    /// Share of the channels that is rotated, in `[0, 1]`.
    pub fraction: f64,
    /// Base of the geometric sequence of wavelengths.
    pub base: f64,
}

/// Rotates the first `n = fraction · d` channels (made even) of queries and keys by angles that grow with position.
///
/// ```text
/// angle[t, i] = (t + offset) · base^(-2i / n),   i in 0..n/2
/// (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin),   x₁ = x[..n/2], x₂ = x[n/2..n]
/// ```
///
/// Tables are never in a half type; the reference rounds them to bf16 at the first mixed-precision pass and keeps them so.
///
/// # Source
/// Su et al., arXiv:2104.09864; reference `rotary_pos_encoding.py` (half-split layout).
#[derive(Debug)]
pub struct Rope {
    n_rotated: i64,
    base: f64,
    tables: RefCell<Option<Tables>>,
}

#[derive(Debug)]
struct Tables {
    cos_tn: Tensor,
    sin_tn: Tensor,
}

impl Rope {
    /// For heads of width `d_head`.
    pub fn new(config: RopeConfig, d_head: i64) -> Self {
        Self {
            n_rotated: n_rotated(config.fraction, d_head),
            base: config.base,
            tables: RefCell::new(None),
        }
    }

    /// Rotates `x_bthd`, whose first position is `offset`; `[B, T, H, d]` → `[B, T, H, d]`.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub fn forward(
        &self,
        x_bthd: &Tensor,
        offset: i64,
        ctx: &Context,
    ) -> Result<Tensor, PluginError> {
        if self.n_rotated == 0 {
            return Ok(x_bthd.shallow_clone());
        }
        let size = x_bthd.size();
        let (seq_len, d_head) = (size[1], size[3]);
        self.reserve(offset + seq_len, x_bthd);
        let tables = self.tables.borrow();
        let Some(Tables { cos_tn, sin_tn }) = tables.as_ref() else {
            return Ok(x_bthd.shallow_clone());
        };
        let [cos, sin] = [cos_tn, sin_tn].map(|table| table.narrow(0, offset, seq_len));
        if let Some(y_bthd) = ctx.rotate(x_bthd, &cos, &sin)? {
            return Ok(y_bthd);
        }

        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let half = self.n_rotated / 2;
        let x1 = x_bthd.narrow(3, 0, half);
        let x2 = x_bthd.narrow(3, half, half);
        let rest = x_bthd.narrow(3, self.n_rotated, d_head - self.n_rotated);
        let kind = x_bthd.kind();
        let y1 = (&x1 * &cos - &x2 * &sin).to_kind(kind);
        let y2 = (&x2 * &cos + &x1 * &sin).to_kind(kind);
        Ok(Tensor::cat(&[y1, y2, rest], 3))
    }

    /// Makes tables for positions below `n`, unless there are such for `like`'s device and type.
    fn reserve(&self, n: i64, like: &Tensor) {
        let kind = match like.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let fits = self
            .tables
            .borrow()
            .as_ref()
            .is_some_and(|Tables { cos_tn, .. }| {
                cos_tn.size()[0] >= n && cos_tn.kind() == kind && cos_tn.device() == like.device()
            });
        if fits {
            return;
        }
        let options = (Kind::Double, Device::Cpu);
        let exponent_n =
            Tensor::arange_start_step(0, self.n_rotated, 2, options) / self.n_rotated as f64;
        let frequency_n = (exponent_n * -self.base.ln()).exp();
        let angle_tn = Tensor::arange(n, options).outer(&frequency_n);
        let table = |x: Tensor| x.to_device(like.device()).to_kind(kind);
        *self.tables.borrow_mut() = Some(Tables {
            cos_tn: table(angle_tn.cos()),
            sin_tn: table(angle_tn.sin()),
        });
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a share of a width is a width"
)]
fn n_rotated(fraction: f64, d_head: i64) -> i64 {
    let n = (fraction * d_head as f64) as i64;
    n - n % 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::context;

    #[test]
    fn the_rotated_width_is_even() {
        for (d_head, n) in [(82, 40), (41, 20), (128, 64), (96, 48)] {
            assert_eq!(n_rotated(0.5, d_head), n);
        }
    }

    /// Scores depend on the distance of query and key only: moving both changes nothing.
    #[test]
    fn rope_is_relative() {
        let rope = Rope::new(
            RopeConfig {
                fraction: 0.5,
                base: 10_000.0,
            },
            8,
        );
        let options = (Kind::Double, Device::Cpu);
        let (q, k) = (
            Tensor::randn([2, 5, 3, 8], options),
            Tensor::randn([2, 5, 3, 8], options),
        );
        let ctx = context(false);
        let scores = |offset| {
            let rotated = |x| rope.forward(x, offset, &ctx).unwrap().transpose(1, 2);
            rotated(&q).matmul(&rotated(&k).transpose(2, 3))
        };
        assert!(scores(0).allclose(&scores(100), 1e-9, 1e-9, false));
        let moved = rope.forward(&q, 1, &ctx).unwrap();
        assert!(!moved.allclose(&q, 1e-3, 1e-3, false));
    }
}
