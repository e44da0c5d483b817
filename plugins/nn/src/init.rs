//! Initial values. Each function draws from libtorch's generator, which the host has seeded.

use tch::{Device, Kind, Tensor};

type Options = (Kind, Device);

/// How a parameter starts. What a parameter is for can be read off it, so that [`Init::transformer_xl`] needs no list
/// of names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Additive: zeros.
    Zeros,
    /// Multiplicative, a norm's weight: ones.
    Ones,
    /// Multiplicative: `N(1, std)`.
    NearOne(f64),
    /// `N(0, std)`.
    Normal(f64),
    /// `U(-bound, bound)`.
    Uniform(f64),
    /// A normal distribution cut at ±2 standard deviations and then rescaled to this *empirical* deviation.
    TruncatedNormal(f64),
    /// A bias that starts as its weight does, `U(-bound, bound)`.
    Bias(f64),
    /// A router that starts as `N(0, std)`.
    Router(f64),
    /// A router whose rows start with equal norms: `N(0, std)`, each row divided by its norm, the whole scaled back to
    /// its former deviation.
    EqualRows(f64),
    /// Projections `[H·A, in, out]` whose coordinates `(in, out)` start with unit norm over the experts, scaled back.
    EqualCoordinates(f64),
}

/// Initial deviation of every weight with `lm.trafo.xl_init`.
const XL_STD: f64 = 0.02;

impl Init {
    /// `U(±√(6 / (in + out)))` of a weight `[out, in]`.
    ///
    /// # Source
    /// Glorot and Bengio 2010, eq. 16.
    pub fn xavier_uniform([fan_out, fan_in]: [i64; 2]) -> Self {
        Self::Uniform((6.0 / (fan_in + fan_out) as f64).sqrt())
    }

    /// `N(0, gain · √(2 / (in + out)))` of a weight `[out, in]`.
    ///
    /// # Source
    /// Glorot and Bengio 2010, eq. 12 with the mean of both fans.
    pub fn xavier_normal([fan_out, fan_in]: [i64; 2], gain: f64) -> Self {
        Self::Normal(gain * (2.0 / (fan_in + fan_out) as f64).sqrt())
    }

    /// PyTorch's default of a linear layer's weight: `U(±1/√in)`.
    pub fn linear_weight(fan_in: i64) -> Self {
        Self::Uniform(1.0 / (fan_in as f64).sqrt())
    }

    /// PyTorch's default of a linear layer's bias: `U(±1/√in)`.
    pub fn linear_bias(fan_in: i64) -> Self {
        Self::Bias(1.0 / (fan_in as f64).sqrt())
    }

    /// The same parameter in a model that starts as Transformer-XL: weights `N(0, 0.02)`, norms `N(1, 0.02)`,
    /// biases 0, routers with equal rows.
    ///
    /// The reference gives the rows of attention routers equal norms over the other axis here, experts for each input
    /// coordinate; equal rows are what its own rule for routers says.
    ///
    /// # Source
    /// Reference `transformer_lm_mixin.py`, `fix_init`.
    #[must_use]
    pub fn transformer_xl(self) -> Self {
        match self {
            Self::Zeros | Self::Bias(_) => Self::Zeros,
            Self::Ones | Self::NearOne(_) => Self::NearOne(XL_STD),
            Self::Normal(_)
            | Self::Uniform(_)
            | Self::TruncatedNormal(_)
            | Self::EqualCoordinates(_) => Self::Normal(XL_STD),
            Self::Router(_) | Self::EqualRows(_) => Self::EqualRows(XL_STD),
        }
    }

    /// Draws it.
    pub fn tensor(self, shape: &[i64], options: Options) -> Tensor {
        match self {
            Self::Zeros => Tensor::zeros(shape, options),
            Self::Ones => Tensor::ones(shape, options),
            Self::NearOne(std) => normal(shape, std, options) + 1.0,
            Self::Normal(std) | Self::Router(std) => normal(shape, std, options),
            Self::Uniform(bound) | Self::Bias(bound) => uniform(shape, bound, options),
            Self::TruncatedNormal(std) => truncated_normal(shape, std, options),
            Self::EqualRows(std) => equal_rows(&normal(shape, std, options)),
            Self::EqualCoordinates(std) => equal_coordinates(&normal(shape, std, options)),
        }
    }
}

/// `N(0, std)`.
fn normal(shape: &[i64], std: f64, options: Options) -> Tensor {
    Tensor::randn(shape, options) * std
}

/// `U(-bound, bound)`.
fn uniform(shape: &[i64], bound: f64, options: Options) -> Tensor {
    Tensor::empty(shape, options).uniform_(-bound, bound)
}

/// A normal distribution cut at ±2 standard deviations and then rescaled to the *empirical* deviation `std`.
///
/// # Source
/// Reference `layers/transformer/transformer_preln.py`, `reset_prenorm_params`: there std = √(2 / (L · `fan_in`)).
fn truncated_normal(shape: &[i64], std: f64, options: Options) -> Tensor {
    // Φ(±2): uniform numbers between them become the cut distribution through the inverse of Φ.
    const PHI_2: f64 = 0.977_249_868_051_820_8;
    let sample = Tensor::empty(shape, options)
        .uniform_(1.0 - PHI_2, PHI_2)
        .special_ndtri();
    let empirical = sample.std(true);
    sample / empirical * std
}

/// Router rows `[rows, D]` of equal length: each row is divided by its norm, the whole scaled back to its former
/// deviation.
fn equal_rows(weight: &Tensor) -> Tensor {
    rescaled(weight, 1)
}

/// Projections `[H·A, in, out]` whose coordinates `(in, out)` have unit norm over the experts, scaled back.
///
/// # Source
/// Reference `full_moe_relative_attention.py`, argument `norm_init`.
fn equal_coordinates(weight: &Tensor) -> Tensor {
    rescaled(weight, 0)
}

fn rescaled(weight: &Tensor, dim: i64) -> Tensor {
    let std = weight.std(true);
    let normed = weight / weight.norm_scalaropt_dim(2, dim, true);
    let normed_std = normed.std(true);
    normed * (std / normed_std)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = (Kind::Double, Device::Cpu);

    fn std(x: &Tensor) -> f64 {
        x.std(true).double_value(&[])
    }

    #[test]
    fn truncated_normal_has_the_deviation_and_the_cut() {
        let x = truncated_normal(&[100, 100], 0.1, OPTIONS);
        assert!((std(&x) - 0.1).abs() < 1e-12);
        // The cut distribution has deviation 0.88, so the cut moves from 2 to 2.27.
        assert!(x.abs().max().double_value(&[]) < 0.1 * 2.4);
    }

    #[test]
    fn transformer_xl_draws_everything_alike() {
        for init in [
            Init::Normal(3.0),
            Init::Uniform(3.0),
            Init::TruncatedNormal(3.0),
            Init::Router(3.0),
            Init::EqualRows(3.0),
        ] {
            let x = init.transformer_xl().tensor(&[300, 300], OPTIONS);
            assert!((std(&x) - XL_STD).abs() < 2e-4, "{init:?}: {}", std(&x));
        }
        let norm = Init::Ones.transformer_xl().tensor(&[90_000], OPTIONS);
        assert!((norm.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 1e-3);
        assert_eq!(Init::Bias(1.0).transformer_xl(), Init::Zeros);
    }

    #[test]
    fn equal_rows_keep_the_deviation() {
        let before = normal(&[50, 20], 0.3, OPTIONS);
        let after = equal_rows(&before);
        let norms = after.norm_scalaropt_dim(2, 1, false);
        assert!((norms.max() - norms.min()).double_value(&[]) < 1e-12);
        assert!((std(&after) - std(&before)).abs() < 1e-12);
    }
}
