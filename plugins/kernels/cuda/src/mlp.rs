//! A whole σ-MoE layer as one node of the graph. The kernel's checks are in the crate's root, shapes in `moeut-torch`.
//!
//! Between forward and backward it keeps its inputs and, unless the call wants less, one tensor `[T·K, S]` in the
//! experts' order. No gathered copy of the tokens is ever made.

use moeut_plugin_api::kernel::{Activation, MoeMlpOptions};
use moeut_torch::grouped::mlp_inputs::{B1, GATE, N_INPUTS, W1, W2, X};
use moeut_torch::padding::{like, padded_weight};
use moeut_torch::{Autocast, Context, Function, FunctionError};
use tch::{Kind, Tensor};

use crate::ops::{Ops, Order, Rows, Selections, sources};

/// The activations below.
pub(crate) const ACTIVATIONS: [Activation; 2] = [Activation::Relu, Activation::Gelu];

/// One call as a differentiable function of `x, w1, w2, gate, order, inverse, ends` and perhaps `b1`.
pub(crate) struct Mlp {
    pub(crate) ops: Ops,
    /// Selections of a token.
    pub(crate) top_k: i64,
    /// With one of [`ACTIVATIONS`].
    pub(crate) options: MoeMlpOptions,
}

impl Mlp {
    /// `act(x[t] · w1[expert] (+ b1[expert]))` and what the backward pass needs of it; `x` as the kernels read it.
    fn up(
        &self,
        x: &Tensor,
        w1: &Tensor,
        b1: Option<&Tensor>,
        (tokens, ends): (&Tensor, &Tensor),
    ) -> Result<(Tensor, Tensor), FunctionError> {
        let ops = &self.ops;
        let rows = Rows::of(x, tokens);
        let b1 = b1.map(|b1| ops.operand(b1)).transpose()?;
        let tiles = ops.tiles(ends, tokens.size1()?, Order::reading(rows))?;
        let w1 = padded_weight(w1, ops.kind)?;
        ops.up(rows, &w1, b1.as_ref(), self.options.activation, &tiles)
    }
}

impl Function for Mlp {
    /// Rows are sorted by expert; `t` is the token of a row.
    ///
    /// ```text
    /// a = act(x[t] · w1[expert] (+ b1[expert]))
    /// y = Σ_j gate_j · (a · w2[expert])[inverse]
    /// ```
    ///
    /// The gates meet the results in fp32, on the way into the sum.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [x, w1, w2, gate, order, inverse, ends, b1 @ ..] = inputs else {
            return Err("too few inputs".into());
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let Self { ops, top_k, .. } = self;
        let kind = x.kind();
        let tokens = sources(order, *top_k)?;
        let n_rows = order.size1()?;

        let x_padded = ops.operand(x)?;
        let (a, kept) = self.up(&x_padded, w1, b1.first(), (&tokens, ends))?;
        let (w2, gates) = (padded_weight(w2, kind)?, wide(gate)?);
        let [n_tokens, d_hidden] = [x_padded.size()[0], a.size()[1]];
        let y = if ops.can_add(d_hidden, w2.size()[2], *top_k) {
            let selections = Selections {
                order,
                gates: &gates,
            };
            let targets = (&tokens, n_tokens);
            ops.added_product(
                Rows::sorted(&a),
                (&w2, false),
                ends,
                targets,
                Some(selections),
            )?
        } else {
            let tiles = ops.tiles(ends, n_rows, Order::Experts)?;
            let ys = ops.product(Rows::sorted(&a), &w2, &tiles)?;
            ops.sum_rows(&ys, inverse, *top_k, Some(&gates))?
        };

        // An absent bias leaves its place empty, at the end.
        let mut saved = Vec::new();
        saved.extend((!self.options.keeps_less).then_some(&kept));
        saved.extend(inputs);
        ctx.save(&saved)?;
        Ok(vec![like(&y, x)?])
    }

    /// With `dys = dy[t]`:
    ///
    /// ```text
    /// u     = dys · w2[expert]ᵀ            dgate = Σ_s a · u
    /// dh    = gate · u · act'(h)           dw2 = Σ over the expert's rows of (gate · a)ᵀ · dys
    /// dx    = Σ_j (dh · w1[expert]ᵀ)[inverse]
    /// dw1   = Σ over the expert's rows of x[t]ᵀ · dh,   db1 likewise of dh
    /// ```
    ///
    /// Gradients of weights are summed in fp32, in a fixed order, and rounded once to the type of the weight.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let (kept, inputs) = saved.split_at(usize::from(!self.options.keeps_less).min(saved.len()));
        let [x, w1, w2, gate, order, inverse, ends, b1 @ ..] = inputs else {
            return Err("too few saved tensors".into());
        };
        let n_inputs = N_INPUTS - 1 + b1.len();
        let mut input_grads: Vec<_> = (0..n_inputs).map(|_| None).collect();
        let Some(Some(dy)) = grads.first() else {
            return Ok(input_grads);
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let needs = |index: usize| index < n_inputs && ctx.needs_input_grad(index);
        let Self { ops, top_k, .. } = self;
        let tokens = sources(order, *top_k)?;
        let n_rows = order.size1()?;
        let kept = match kept.first() {
            Some(kept) => kept.shallow_clone(),
            None => {
                self.up(&ops.operand(x)?, w1, b1.first(), (&tokens, ends))?
                    .1
            }
        };
        let dy = ops.operand(dy)?;
        let dys = Rows::of(&dy, &tokens);

        let found = ops.down_backward(
            dys,
            &padded_weight(w2, x.kind())?,
            &kept,
            Selections {
                order,
                gates: &wide(gate)?,
            },
            self.options.activation,
            &ops.tiles(ends, n_rows, Order::reading(dys))?,
        )?;
        drop(kept);
        if needs(GATE) {
            let dgate = found.gate_grads.f_view(&gate.size()[..])?;
            input_grads[GATE] = Some(dgate.f_to_kind(gate.kind())?);
        }
        if needs(W2) {
            let weighted = Rows::sorted(&found.weighted);
            let dw2 = ops.outer_product(weighted, dys, ends, w2.kind())?;
            input_grads[W2] = Some(like(&dw2, w2)?);
        }
        let dh = Rows::sorted(&found.hidden_grads);
        if let (true, Some(b1)) = (needs(B1), b1.first()) {
            // A product with ones: adding at indices would have no fixed order.
            let ones = Tensor::f_ones([n_rows, 8], (x.kind(), x.device()))?;
            let db1 = ops.outer_product(Rows::sorted(&ones), dh, ends, b1.kind())?;
            input_grads[B1] = Some(like(&db1.f_select(1, 0)?, b1)?);
        }
        if needs(W1) {
            let x_padded = ops.operand(x)?;
            let dw1 = ops.outer_product(Rows::of(&x_padded, &tokens), dh, ends, w1.kind())?;
            input_grads[W1] = Some(like(&dw1, w1)?);
        }
        if needs(X) {
            let w1 = padded_weight(w1, x.kind())?;
            let d_hidden = dh.x.size()[1];
            let dx = if ops.can_add(d_hidden, w1.size()[1], *top_k) {
                ops.added_product(dh, (&w1, true), ends, (&tokens, x.size()[0]), None)?
            } else {
                let tiles = ops.tiles(ends, n_rows, Order::Experts)?;
                ops.sum_rows(
                    &ops.product_transposed(dh, &w1, &tiles)?,
                    inverse,
                    *top_k,
                    None,
                )?
            };
            input_grads[X] = Some(like(&dx, x)?);
        }
        Ok(input_grads)
    }
}

/// Gates as the kernels read them: fp32, contiguous.
pub(crate) fn wide(gate: &Tensor) -> Result<Tensor, FunctionError> {
    Ok(gate.f_to_kind(Kind::Float)?.f_contiguous()?)
}
