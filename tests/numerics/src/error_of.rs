//! How far a value is from the expected one.

use tch::{Kind, Tensor};

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
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
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
        let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
        let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
        let (scale, error) = (norm(&b), norm(&(a - &b)));
        or_infinite(if scale > 0.0 { error / scale } else { error })
    })
}

/// `|a − b| / max(|b|, 1e-3)`.
pub fn scalar(a: f64, b: f64) -> f64 {
    or_infinite((a - b).abs() / b.abs().max(SMALLEST_SCALE))
}

/// A comparison with "not a number" is false, which would let it pass as small.
fn or_infinite(error: f64) -> f64 {
    if error.is_nan() { f64::INFINITY } else { error }
}
