//! `grouped`: the grouped matrix product by libtorch's own grouped kernel, with a backward that keeps only the inputs.
//!
//! Rows reach their expert and come back by permutations, so nothing is added atomically and two runs give the same
//! bits. What libtorch's kernel does not take (fp64) is refused; what it takes only in other shapes (rows that are no
//! multiple of 16 bytes) is padded here. It is not the oracle: that is `reference`.

use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, TensorHandle,
};
use moeut_torch::grouped::Fanout;
use moeut_torch::{
    Autocast, Context, Function, FunctionError, IntoHandle, IntoTensor, OrPluginError, apply, dtype,
};
use tch::{Kind, TchError, Tensor};

moeut_plugin_api::export_plugin!(libtorch = moeut_torch::LIBTORCH_VERSION);
moeut_plugin_api::register_kernel!(Grouped);

/// Element types that libtorch's grouped matrix product takes.
const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Rows and base addresses must be multiples of this for libtorch's grouped matrix product.
const ALIGNMENT_BYTES: usize = 16;

/// The kernel; it holds nothing.
#[derive(Debug)]
pub struct Grouped;

impl Kernel for Grouped {
    const NAME: &'static str = "grouped";
    const SUMMARY: &'static str = "libtorch's grouped matrix product, in f32, bf16 and f16";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        Capabilities {
            cpu: DTYPES.to_vec(),
            cuda: DTYPES.to_vec(),
            speed_rank: 10,
            is_deterministic: true,
            // Outside bf16 on recent devices libtorch copies the ends of the runs to the host.
            is_graph_safe: false,
        }
    }

    /// Computes in the element type of `x`, whatever autocast says; gradients have the types of their inputs.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
        if !dtype(x.kind()).is_some_and(|dtype| DTYPES.contains(&dtype)) {
            return Err(PluginError::new("kernel `grouped` cannot compute with this element type")
                .why(format!(
                    "`x` is {:?}, and libtorch's grouped matrix product takes f32, bf16 and f16",
                    x.kind()
                ))
                .fix("set `-moe.kernel reference`, or `-moe.kernel auto`"));
        }
        let order = call.selection.order.into_tensor();
        let inverse = call.selection.inverse.into_tensor();
        let ends = call.selection.ends.into_tensor();
        let gate = call.gate.map(IntoTensor::into_tensor);
        let product = Product(Fanout::of(&x, &weight, &order, gate.as_ref())?);
        let mut inputs = vec![&x, &weight, &order, &inverse, &ends];
        inputs.extend(&gate);
        apply(product, &inputs)
            .map(|mut outputs| outputs.swap_remove(0).into_handle())
            .or_plugin_error("kernel `grouped` cannot compute the grouped matrix product")
    }
}

/// One call as a differentiable function of `x, weight, order, inverse, ends` and perhaps `gate`.
struct Product(Fanout);

/// Positions among the inputs of [`Product`].
const X: usize = 0;
const WEIGHT: usize = 1;
const GATE: usize = 5;

impl Function for Product {
    /// ```text
    /// ys = x[order / f] · weight[expert]      rows sorted by expert
    /// y_m = ys[inverse_m]                     and with a gate, y_i = Σ_j gate[i, j] · ys[inverse_{i·n + j}]
    /// ```
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [x, weight, order, inverse, ends, gate @ ..] = inputs else {
            return Err("too few inputs".into());
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        ctx.save(&inputs.iter().collect::<Vec<_>>())?;

        let xs = padded_rows(x)?.f_index_select(0, &divided(order, self.0.per_row)?)?;
        let ys = grouped_mm(&xs, &padded_weight(weight, x.kind())?, ends)?;
        let y = sum_rows(&ys, inverse, self.0.n_summed, gate.first())?;
        Ok(vec![first_columns(&y, weight.size()[2])?])
    }

    /// With `gs = g[order / n]` and `gate = 1` where there is none:
    ///
    /// ```text
    /// u        = gs · weight[expert]ᵀ
    /// dx_r     = Σ_j gate_{r·f + j} · u[inverse_{r·f + j}]
    /// dgate_m  = (xs · u)[inverse_m]
    /// dweight  = Σ over the expert's selections of xsᵀ · (gate · gs)
    /// ```
    ///
    /// `dweight` is summed in fp32 and rounded once to the type of `x`; the reference keeps it in the weight's type.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let [x, weight, order, inverse, ends, gate @ ..] = &saved[..] else {
            return Err("too few saved tensors".into());
        };
        let gate = gate.first();
        let mut input_grads: Vec<_> = saved.iter().map(|_| None).collect();
        let Some(Some(g)) = grads.first() else {
            return Ok(input_grads);
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let needs_gate = gate.is_some() && ctx.needs_input_grad(GATE);

        let mut gs = padded_rows(g)?.f_index_select(0, &divided(order, self.0.n_summed)?)?;
        let xs = if needs_gate || ctx.needs_input_grad(WEIGHT) {
            Some(padded_rows(x)?.f_index_select(0, &divided(order, self.0.per_row)?)?)
        } else {
            None
        };
        if needs_gate || ctx.needs_input_grad(X) {
            let weight = padded_weight(weight, x.kind())?.f_transpose(1, 2)?;
            let u = grouped_mm(&gs, &weight, ends)?;
            if ctx.needs_input_grad(X) {
                let dx = sum_rows(&u, inverse, self.0.per_row, gate)?;
                input_grads[X] = Some(first_columns(&dx, x.size()[1])?.f_view(&x.size()[..])?);
            }
            if let (true, Some(gate), Some(xs)) = (needs_gate, gate, &xs) {
                let dots = (xs.f_mul(&u)?).f_sum_dim_intlist(-1, false, gate.kind())?;
                input_grads[GATE] =
                    Some(dots.f_index_select(0, inverse)?.f_view(&gate.size()[..])?);
            }
        }
        if let (true, Some(mut xs)) = (ctx.needs_input_grad(WEIGHT), xs) {
            if let Some(gate) = gate {
                let gate = gate.f_reshape([-1, 1])?.f_index_select(0, order)?;
                // Either factor may carry the gate; both were gathered here, so the narrower is scaled in place.
                let factor = if xs.size()[1] < gs.size()[1] {
                    &mut xs
                } else {
                    &mut gs
                };
                let _ = factor.f_mul_(&gate.f_to_kind(factor.kind())?)?;
            }
            let dweight = grouped_outer(&xs, &gs, ends)?;
            let dweight = dweight.f_narrow(1, 0, weight.size()[1])?;
            let dweight = first_columns(&dweight, weight.size()[2])?;
            input_grads[WEIGHT] = Some(dweight.f_to_kind(weight.kind())?);
        }
        Ok(input_grads)
    }
}

/// `rows [M, K] · weight [E, K, N]`, each run of rows with its expert: `[M, N]`.
fn grouped_mm(rows: &Tensor, weight: &Tensor, ends: &Tensor) -> Result<Tensor, TchError> {
    if rows.size()[0] == 0 {
        return rows.f_new_zeros([0, weight.size()[2]], (rows.kind(), rows.device()));
    }
    rows.f_internal_grouped_mm(weight, Some(ends), None::<&Tensor>, None::<Kind>)
}

/// `leftᵀ [K, M] · right [M, N]`, summed over each expert's run of rows: `[E, K, N]`.
fn grouped_outer(left: &Tensor, right: &Tensor, ends: &Tensor) -> Result<Tensor, TchError> {
    if left.size()[0] == 0 {
        let shape = [ends.size1()?, left.size()[1], right.size()[1]];
        return left.f_new_zeros(shape, (left.kind(), left.device()));
    }
    left.f_tr()?
        .f_internal_grouped_mm(right, Some(ends), None::<&Tensor>, None::<Kind>)
}

/// libtorch's codes of an embedding bag that sums, and in which no index means padding.
const SUM: i64 = 0;
const NO_PADDING: i64 = -1;

/// `Σ_j gate_{i·n + j} · rows[index_{i·n + j}]`.
///
/// An embedding bag: on the CPU, permuting the rows and then summing them takes 4 to 9 times as long (2048 tokens,
/// `d_model` 128, k = 4 and 8, fp32, 2 cores).
fn sum_rows(
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
fn divided(order: &Tensor, n: i64) -> Result<Tensor, TchError> {
    if n == 1 {
        Ok(order.shallow_clone())
    } else {
        order.f_divide_scalar_mode(n, "floor")
    }
}

/// Zero columns until a row fills whole multiples of [`ALIGNMENT_BYTES`].
fn padded_rows(rows: &Tensor) -> Result<Tensor, TchError> {
    match missing(rows.size()[1], rows.kind()) {
        0 => Ok(rows.shallow_clone()),
        n_columns => rows.f_constant_pad_nd([0, n_columns]),
    }
}

/// The weight in `kind`, contiguous, aligned, both widths padded with zeros as [`padded_rows`] pads.
fn padded_weight(weight: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let weight = weight.f_to_kind(kind)?.f_contiguous()?;
    match (
        missing(weight.size()[1], kind),
        missing(weight.size()[2], kind),
    ) {
        (0, 0) if (weight.data_ptr() as usize).is_multiple_of(ALIGNMENT_BYTES) => Ok(weight),
        (0, 0) => Ok(weight.copy()),
        (n_rows, n_columns) => weight.f_constant_pad_nd([0, n_columns, 0, n_rows]),
    }
}

/// Columns to add to `width`.
fn missing(width: i64, kind: Kind) -> i64 {
    let multiple = (ALIGNMENT_BYTES / kind.elt_size_in_bytes()).cast_signed() as i64;
    (multiple - width % multiple) % multiple
}

/// Undoes the padding of the last axis.
fn first_columns(tensor: &Tensor, n: i64) -> Result<Tensor, TchError> {
    tensor.f_narrow(-1, 0, n)?.f_contiguous()
}

#[cfg(test)]
mod tests {
    use moeut_plugin_api::abi::client::KernelClient;
    use moeut_torch::testing;
    use tch::Device;

    use super::*;

    #[test]
    fn it_conforms() {
        testing::check_kernel(&KernelClient::in_process(Grouped).unwrap());
    }

    #[test]
    fn fp64_is_refused_with_a_way_out() {
        let kernel = KernelClient::in_process(Grouped).unwrap();
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, Device::Cpu)).into_handle();
        let ids = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
        let error = kernel
            .grouped_matmul(GroupedMatmul {
                x: zeros(&[2, 4]),
                weight: zeros(&[1, 4, 4]),
                selection: testing::selection(&ids, 1),
                gate: None,
            })
            .unwrap_err();
        assert_eq!(
            error.what,
            "kernel `grouped` cannot compute with this element type"
        );
        assert_eq!(
            error.why,
            "`x` is Double, and libtorch's grouped matrix product takes f32, bf16 and f16"
        );
        assert_eq!(
            error.fix,
            "set `-moe.kernel reference`, or `-moe.kernel auto`"
        );
    }

    /// A parameter may be a slice of a larger buffer, which starts anywhere.
    #[test]
    fn a_weight_at_an_odd_address_is_accepted() {
        let options = (Kind::Float, Device::Cpu);
        let weight = Tensor::randn([33], options)
            .narrow(0, 1, 32)
            .view([2, 4, 4]);
        let kernel = KernelClient::in_process(Grouped).unwrap();
        let x = Tensor::eye(4, options);
        let ids = Tensor::from_slice(&[1_i64; 4]);
        let product = kernel
            .grouped_matmul(GroupedMatmul {
                x: x.into_handle(),
                weight: weight.share(),
                selection: testing::selection(&ids, 2),
                gate: None,
            })
            .unwrap();
        assert_eq!(product.into_tensor(), weight.get(1));
    }
}
