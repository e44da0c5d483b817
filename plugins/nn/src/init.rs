//! Initial values. Each function draws from libtorch's generator, which the host has seeded.

use tch::{Device, Kind, Tensor};

type Options = (Kind, Device);

/// `N(0, std)`.
pub fn normal(shape: &[i64], std: f64, options: Options) -> Tensor {
    Tensor::randn(shape, options) * std
}

/// `U(-bound, bound)`.
pub fn uniform(shape: &[i64], bound: f64, options: Options) -> Tensor {
    Tensor::empty(shape, options).uniform_(-bound, bound)
}

/// Xavier-uniform of a weight `[out, in]`: `U(±√(6 / (in + out)))`.
///
/// # Source
/// Glorot and Bengio 2010, eq. 16.
pub fn xavier_uniform(shape: [i64; 2], options: Options) -> Tensor {
    let [fan_out, fan_in] = shape;
    uniform(&shape, (6.0 / (fan_in + fan_out) as f64).sqrt(), options)
}

/// PyTorch's default of a linear layer with weight `[out, in]`, and of its bias: `U(±1/√in)`.
pub fn linear_default(shape: &[i64], fan_in: i64, options: Options) -> Tensor {
    uniform(shape, 1.0 / (fan_in as f64).sqrt(), options)
}

/// A normal distribution cut at ±2 standard deviations and then rescaled to the *empirical* deviation `std`.
///
/// # Source
/// Reference `layers/transformer/transformer_preln.py`, `reset_prenorm_params`: there std = √(2 / (L · `fan_in`)).
pub fn truncated_normal(shape: &[i64], std: f64, options: Options) -> Tensor {
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
pub fn equal_rows(weight: &Tensor) -> Tensor {
    rescaled(weight, 1)
}

/// Projections `[H·A, in, out]` whose coordinates `(in, out)` have unit norm over the experts, scaled back.
///
/// # Source
/// Reference `full_moe_relative_attention.py`, argument `norm_init`.
pub fn equal_coordinates(weight: &Tensor) -> Tensor {
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
    fn equal_rows_keep_the_deviation() {
        let before = normal(&[50, 20], 0.3, OPTIONS);
        let after = equal_rows(&before);
        let norms = after.norm_scalaropt_dim(2, 1, false);
        assert!((norms.max() - norms.min()).double_value(&[]) < 1e-12);
        assert!((std(&after) - std(&before)).abs() < 1e-12);
    }
}
