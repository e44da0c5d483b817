//! The grouped matrix product as one node of the graph. The kernel's checks are in the crate's root.

use moeut_torch::grouped::{
    Fanout,
    product_inputs::{GATE, WEIGHT, X},
};
use moeut_torch::padding::{like, padded_weight};
use moeut_torch::{Autocast, Context, Function, FunctionError};
use tch::Tensor;

use crate::mlp::wide;
use crate::ops::{MAX_DOTS, Ops, Order, Rows, Selections, sources};

/// One call as a differentiable function of `x, weight, order, inverse, ends` and perhaps `gate`.
pub(crate) struct Product {
    pub(crate) ops: Ops,
    pub(crate) fanout: Fanout,
}

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
        let Self { ops, fanout } = self;

        let places = sources(order, fanout.per_row)?;
        let x_padded = ops.operand(x)?;
        let weight_padded = padded_weight(weight, x.kind())?;
        let rows = Rows::of(&x_padded, &places);
        let gates = gate.first().map(wide).transpose()?;
        let [d_in, d_out] = [x_padded.size()[1], weight_padded.size()[2]];
        let n_rows = order.size1()?;
        let y = if ops.can_add(d_in, d_out, fanout.n_summed) {
            let targets = sources(order, fanout.n_summed)?;
            let targets = (&targets, n_rows / fanout.n_summed);
            let selections = gates.as_ref().map(|gates| Selections { order, gates });
            ops.added_product(rows, (&weight_padded, false), ends, targets, selections)?
        } else {
            let tiles = ops.tiles(ends, n_rows, Order::reading(rows))?;
            let ys = ops.product(rows, &weight_padded, &tiles)?;
            ops.sum_rows(&ys, inverse, fanout.n_summed, gates.as_ref())?
        };
        Ok(vec![y.f_narrow(1, 0, weight.size()[2])?.f_contiguous()?])
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
    /// `dweight` is summed in fp32, in a fixed order, and rounded once to the type of the weight.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let [x, weight, order, inverse, ends, gate @ ..] = &saved[..] else {
            return Err("too few saved tensors".into());
        };
        let mut input_grads: Vec<_> = saved.iter().map(|_| None).collect();
        let Some(Some(g)) = grads.first() else {
            return Ok(input_grads);
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let Self { ops, fanout } = self;
        let gate = gate.first();
        let gates = gate.map(wide).transpose()?;
        let needs_gate = gate.is_some() && ctx.needs_input_grad(GATE);
        let x_places = sources(order, fanout.per_row)?;
        let g_places = sources(order, fanout.n_summed)?;
        let (x_padded, g) = (ops.operand(x)?, ops.operand(g)?);

        if needs_gate || ctx.needs_input_grad(X) {
            let rows = Rows::of(&g, &g_places);
            let weight = padded_weight(weight, x.kind())?;
            let tiles = ops.tiles(ends, order.size1()?, Order::reading(rows))?;
            let u = ops.product_transposed(rows, &weight, &tiles)?;
            let (dx, dgate) = match &gates {
                // Both read `u`, which is the largest tensor here.
                Some(gates) if fanout.per_row <= MAX_DOTS => {
                    let (dx, dgate) = ops.sum_and_dot_rows(&u, inverse, gates, &x_padded)?;
                    (dx, Some(dgate))
                }
                Some(gates) => (
                    ops.sum_rows(&u, inverse, fanout.per_row, Some(gates))?,
                    Some(ops.dot_rows(&u, &x_padded, &x_places, order)?),
                ),
                None => (ops.sum_rows(&u, inverse, fanout.per_row, None)?, None),
            };
            if ctx.needs_input_grad(X) {
                input_grads[X] = Some(like(&dx, x)?);
            }
            if let (true, Some(gate), Some(dgate)) = (needs_gate, gate, dgate) {
                let dgate = dgate.f_view(&gate.size()[..])?;
                input_grads[GATE] = Some(dgate.f_to_kind(gate.kind())?);
            }
        }
        if ctx.needs_input_grad(WEIGHT) {
            let mut left = Rows::of(&x_padded, &x_places);
            let mut right = Rows::of(&g, &g_places);
            let weighted;
            if let Some(gates) = &gates {
                // Either factor may carry the gate; the narrower is the smaller copy.
                let is_left = x_padded.size()[1] < g.size()[1];
                let narrower = if is_left { &mut left } else { &mut right };
                let places = if is_left { &x_places } else { &g_places };
                weighted = ops.weigh_rows(narrower.x, places, Selections { order, gates })?;
                *narrower = Rows::sorted(&weighted);
            }
            let dweight = ops.outer_product(left, right, ends, weight.kind())?;
            input_grads[WEIGHT] = Some(like(&dweight, weight)?);
        }
        Ok(input_grads)
    }
}
