//! The grouped matrix product as one node of the graph. The kernel's checks are in the crate's root.

use moeut_torch::grouped::{
    Fanout,
    product_inputs::{GATE, WEIGHT, X},
};
use moeut_torch::padding::{padded_rows, padded_weight};
use moeut_torch::{Autocast, Context, Function, FunctionError};
use tch::Tensor;

use crate::ops::{divided, first_columns, grouped_mm, grouped_outer, sum_rows};

/// One call as a differentiable function of `x, weight, order, inverse, ends` and perhaps `gate`.
pub(crate) struct Product(pub(crate) Fanout);

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
