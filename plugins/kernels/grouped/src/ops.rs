//! What both functions are made of: libtorch's grouped product, the way to the experts' order and back.

use moeut_torch::padding::missing;
use tch::{Kind, TchError, Tensor};

/// `rows [M, K] · weight [E, K, N]`, each run of rows with its expert: `[M, N]`.
pub(crate) fn grouped_mm(
    rows: &Tensor,
    weight: &Tensor,
    ends: &Tensor,
) -> Result<Tensor, TchError> {
    if rows.size()[0] == 0 {
        return rows.f_new_zeros([0, weight.size()[2]], (rows.kind(), rows.device()));
    }
    rows.f_internal_grouped_mm(weight, Some(ends), None::<&Tensor>, None::<Kind>)
}

/// `leftᵀ [K, M] · right [M, N]`, summed over each expert's run of rows: `[E, K, N]`.
pub(crate) fn grouped_outer(
    left: &Tensor,
    right: &Tensor,
    ends: &Tensor,
) -> Result<Tensor, TchError> {
    if left.size()[0] == 0 {
        let shape = [ends.size1()?, left.size()[1], right.size()[1]];
        return left.f_new_zeros(shape, (left.kind(), left.device()));
    }
    left.f_tr()?
        .f_internal_grouped_mm(right, Some(ends), None::<&Tensor>, None::<Kind>)
}

/// `Σ rows [M, N]` over each expert's run: `[E, N]`.
///
/// A product with ones: adding at indices would have no fixed order on CUDA.
pub(crate) fn grouped_columns(rows: &Tensor, ends: &Tensor) -> Result<Tensor, TchError> {
    let n_equal = missing(1, rows.kind()) + 1;
    let ones = rows.f_new_ones([rows.size()[0], n_equal], (rows.kind(), rows.device()))?;
    grouped_outer(&ones, rows, ends)?.f_select(1, 0)
}

/// libtorch's codes of an embedding bag that sums, and in which no index means padding.
const SUM: i64 = 0;
const NO_PADDING: i64 = -1;

/// `Σ_j gate_{i·n + j} · rows[index_{i·n + j}]`.
///
/// An embedding bag: on the CPU, permuting the rows and then summing them takes 4 to 9 times as long (2048 tokens,
/// `d_model` 128, k = 4 and 8, fp32, 2 cores).
pub(crate) fn sum_rows(
    rows: &Tensor,
    index: &Tensor,
    n: i64,
    gate: Option<&Tensor>,
) -> Result<Tensor, TchError> {
    if (n == 1 && gate.is_none()) || rows.size()[0] == 0 {
        return rows.f_index_select(0, index);
    }
    let starts = Tensor::f_arange_start_step(0, index.size1()?, n, (Kind::Int64, index.device()))?;
    let gate = match gate {
        Some(gate) => Some(gate.f_to_kind(rows.kind())?.f_reshape([-1])?),
        None => None,
    };
    let (sums, ..) = Tensor::f_internal_embedding_bag_forward_only(
        rows, index, &starts, false, SUM, false, gate, false, NO_PADDING,
    )?;
    Ok(sums)
}

/// The source row of each selection.
pub(crate) fn divided(order: &Tensor, n: i64) -> Result<Tensor, TchError> {
    if n == 1 {
        Ok(order.shallow_clone())
    } else {
        order.f_divide_scalar_mode(n, "floor")
    }
}

/// Undoes the padding of the last axis.
pub(crate) fn first_columns(tensor: &Tensor, n: i64) -> Result<Tensor, TchError> {
    tensor.f_narrow(-1, 0, n)?.f_contiguous()
}
