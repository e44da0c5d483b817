//! How far a value is from the expected one.

use tch::{Device, Kind, Tensor};

/// Below this magnitude a scalar's error is absolute: regularizers can be 0.
const SMALLEST_SCALE: f64 = 1e-3;

/// `max|a − b| / max|b|`; absolute where `b` is all zero.
///
/// Infinite if the shapes differ or a value is not a number.
pub fn tensor(a: &Tensor, b: &Tensor) -> f64 {
    if a.size() != b.size() {
        return f64::INFINITY;
    }
    tch::no_grad(|| {
        let (a, b) = (comparable(a), comparable(b));
        let scale = b.abs().max().double_value(&[]);
        let error = (a - b).abs().max().double_value(&[]);
        or_infinite(if scale > 0.0 { error / scale } else { error })
    })
}

/// `‖a − b‖ / ‖b‖`, which one element of many does not decide; absolute where `b` is all zero.
///
/// Infinite if the shapes differ or a value is not a number.
pub fn norm(a: &Tensor, b: &Tensor) -> f64 {
    if a.size() != b.size() {
        return f64::INFINITY;
    }
    tch::no_grad(|| {
        let (a, b) = (comparable(a), comparable(b));
        let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
        let (scale, error) = (norm(&b), norm(&(a - &b)));
        or_infinite(if scale > 0.0 { error / scale } else { error })
    })
}

/// [`norm`] of lists of tensors, each as if it were one vector.
pub fn norm_of_all(a: &[Tensor], b: &[Tensor]) -> f64 {
    let vector = |tensors: &[Tensor]| {
        let parts = tensors.iter().map(|part| comparable(part).reshape([-1]));
        tch::no_grad(|| Tensor::cat(&parts.collect::<Vec<_>>(), 0))
    };
    norm(&vector(a), &vector(b))
}

/// `‖a − b‖ / ‖b‖` of each row of the last axis; of this share of the rows it is not larger.
///
/// Infinite if the shapes differ or a value is not a number.
pub fn quantile_of_rows(a: &Tensor, b: &Tensor, share: f64) -> f64 {
    if a.size() != b.size() {
        return f64::INFINITY;
    }
    tch::no_grad(|| {
        let (a, b) = (comparable(a), comparable(b));
        let norm = |x: &Tensor| x.norm_scalaropt_dim(2, -1, false).reshape([-1]);
        let errors = norm(&(a - &b)) / norm(&b);
        let quantile = errors.quantile_scalar(share, 0, false, "linear");
        or_infinite(quantile.double_value(&[]))
    })
}

/// `|a − b| / max(|b|, 1e-3)`.
pub fn scalar(a: f64, b: f64) -> f64 {
    or_infinite((a - b).abs() / b.abs().max(SMALLEST_SCALE))
}

/// In double precision in main memory, wherever it was computed.
fn comparable(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// A comparison with "not a number" is false, which would let it pass as small.
fn or_infinite(error: f64) -> f64 {
    if error.is_nan() { f64::INFINITY } else { error }
}
