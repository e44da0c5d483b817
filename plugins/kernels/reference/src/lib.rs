//! `reference`: the grouped matrix product in plain tensor operations, one expert at a time.
//!
//! It is the oracle that other kernels are compared with, so it is short, runs everywhere in every element type
//! (exact in fp64) and leaves the gradient to libtorch. It is not fast: it copies the length of each expert's run to
//! the host, and keeps every intermediate result for the backward pass.

use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle,
};
use moeut_torch::grouped::Fanout;
use moeut_torch::{Autocast, IntoHandle, IntoTensor, OrPluginError, dtype};
use tch::{TchError, Tensor};

moeut_plugin_api::export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);
moeut_plugin_api::register_kernel!(Reference);

/// The kernel; it holds nothing.
#[derive(Debug)]
pub struct Reference;

impl Kernel for Reference {
    const NAME: &'static str = "reference";
    const SUMMARY: &'static str = "Plain tensor operations, exact in fp64, everywhere; slow";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        let all = vec![DType::F64, DType::F32, DType::Bf16, DType::F16];
        Capabilities {
            cpu: all.clone(),
            cuda: all,
            is_deterministic: true,
            ..Capabilities::default()
        }
    }

    /// Computes in the element type of `x`, whatever autocast says; gradients have the types of their inputs.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let gate = call.gate.map(IntoTensor::into_tensor);
        let (x_rk, weight_ekn) = (call.x.into_tensor(), call.weight.into_tensor());
        if dtype(x_rk.kind()).is_none() {
            return Err(PluginError::new(
                "kernel `reference` cannot compute with this element type",
            )
            .why(format!("`x` is {:?}", x_rk.kind()))
            .fix("convert `x` to f32, f64, bf16 or f16"));
        }
        let order = call.selection.order.into_tensor();
        let fanout = Fanout::of(&x_rk, &weight_ekn, &order, gate.as_ref())?;
        let ends = call.selection.ends.into_tensor();
        let inverse = call.selection.inverse.into_tensor();
        product(
            &x_rk,
            &weight_ekn,
            [&order, &inverse, &ends],
            gate.as_ref(),
            fanout,
        )
        .map(IntoHandle::into_handle)
        .or_plugin_error("kernel `reference` cannot compute the grouped matrix product")
    }
}

fn product(
    x_rk: &Tensor,
    weight_ekn: &Tensor,
    [order, inverse, ends]: [&Tensor; 3],
    gate: Option<&Tensor>,
    fanout: Fanout,
) -> Result<Tensor, TchError> {
    let _full_precision = Autocast::new(x_rk.device(), None)?;
    let (n_rows, d_in) = x_rk.size2()?;

    // Repeating before permuting lets libtorch sum a row's gradients in a fixed order, also on CUDA.
    let repeated = x_rk
        .f_unsqueeze(1)?
        .f_expand([n_rows, fanout.per_row, d_in], false)?;
    let sorted_mk = repeated.f_reshape([-1, d_in])?.f_index_select(0, order)?;

    let runs = sorted_mk.f_split_with_sizes(run_lengths(ends)?, 0)?;
    let experts = weight_ekn.f_to_kind(x_rk.kind())?.f_unbind(0)?;
    let products: Result<Vec<_>, _> = runs
        .iter()
        .zip(&experts)
        .map(|(run, expert)| run.f_matmul(expert))
        .collect();
    let y_mn = Tensor::f_cat(&products?, 0)?.f_index_select(0, inverse)?;

    let Some(gate) = gate else { return Ok(y_mn) };
    let (n_sums, n_summed) = gate.size2()?;
    let y = y_mn.f_reshape([n_sums, n_summed, weight_ekn.size()[2]])?;
    let gate = gate.f_to_kind(x_rk.kind())?.f_unsqueeze(1)?;
    gate.f_matmul(&y)?.f_squeeze_dim(1)
}

/// Selections of each expert.
fn run_lengths(ends: &Tensor) -> Result<Vec<i64>, TchError> {
    let ends = Vec::<i64>::try_from(ends.f_to_kind(tch::Kind::Int64)?)?;
    let starts = std::iter::once(0).chain(ends.iter().copied());
    Ok(ends
        .iter()
        .zip(starts)
        .map(|(end, start)| end - start)
        .collect())
}

#[cfg(test)]
mod tests {
    use moeut_plugin_api::abi::client::KernelClient;
    use moeut_torch::testing;

    use super::*;

    #[test]
    fn it_conforms() {
        testing::check_kernel(&KernelClient::in_process(Reference).unwrap());
    }

    #[test]
    fn its_gradients_equal_finite_differences() {
        testing::check_finite_differences(&KernelClient::in_process(Reference).unwrap());
    }
}
