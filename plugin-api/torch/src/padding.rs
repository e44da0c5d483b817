//! Operands as the kernels of matrix units want them: contiguous, at aligned addresses, widths padded with zeros; and
//! results without that padding.

use tch::{Kind, TchError, Tensor};

/// Rows and base addresses must be multiples of this.
pub const ALIGNMENT_BYTES: u32 = 16;

/// Zero columns until a row fills whole multiples of [`ALIGNMENT_BYTES`].
///
/// # Errors
/// If libtorch has no memory for it.
pub fn padded_rows(rows: &Tensor) -> Result<Tensor, TchError> {
    match missing(rows.size()[1], rows.kind()) {
        0 => Ok(rows.shallow_clone()),
        n_columns => rows.f_constant_pad_nd([0, n_columns]),
    }
}

/// The weight in `kind`, contiguous, aligned, both widths padded with zeros as [`padded_rows`] pads.
///
/// # Errors
/// If libtorch has no memory for it.
pub fn padded_weight(weight: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let weight = weight.f_to_kind(kind)?.f_contiguous()?;
    match (
        missing(weight.size()[1], kind),
        missing(weight.size()[2], kind),
    ) {
        (0, 0) if (weight.data_ptr() as usize).is_multiple_of(ALIGNMENT_BYTES as usize) => {
            Ok(weight)
        }
        (0, 0) => Ok(weight.copy()),
        (n_rows, n_columns) => weight.f_constant_pad_nd([0, n_columns, 0, n_rows]),
    }
}

/// Columns to add to `width`.
pub fn missing(width: i64, kind: Kind) -> i64 {
    let multiple = (ALIGNMENT_BYTES as usize / kind.elt_size_in_bytes()).cast_signed() as i64;
    (multiple - width % multiple) % multiple
}

/// `padded` without its padding, in the shape and element type of `input`.
///
/// # Errors
/// If libtorch has no memory for it.
pub fn like(padded: &Tensor, input: &Tensor) -> Result<Tensor, TchError> {
    let mut narrowed = padded.shallow_clone();
    for (axis, &width) in (0_i64..).zip(&input.size()) {
        narrowed = narrowed.f_narrow(axis, 0, width)?;
    }
    narrowed.f_contiguous()?.f_to_kind(input.kind())
}
