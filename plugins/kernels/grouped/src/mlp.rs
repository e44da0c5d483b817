//! A whole σ-MoE layer as one node of the graph. The kernel's checks are in the crate's root, shapes in `moeut-torch`.
//!
//! Between forward and backward it keeps its inputs and, unless the call wants less, the pre-activations, in the
//! experts' order. Everything else of size `[T·K, ..]` is made when it is needed: gathered tokens, activations, weighted copies.

use moeut_plugin_api::kernel::{Activation, MoeMlpOptions};
use moeut_torch::grouped::mlp_inputs::{B1, GATE, N_INPUTS, W1, W2, X};
use moeut_torch::padding::{like, padded_rows, padded_weight};
use moeut_torch::{Autocast, Context, Function, FunctionError};
use tch::{Kind, TchError, Tensor};

use crate::ops::{divided, grouped_columns, grouped_mm, grouped_outer, sum_rows};

/// The activations below.
pub(crate) const ACTIVATIONS: [Activation; 2] = [Activation::Relu, Activation::Gelu];

/// One call as a differentiable function of `x, w1, w2, gate, order, inverse, ends` and perhaps `b1`.
pub(crate) struct Mlp {
    /// Selections of a token.
    pub(crate) top_k: i64,
    /// With one of [`ACTIVATIONS`].
    pub(crate) options: MoeMlpOptions,
}

impl Function for Mlp {
    /// Rows are sorted by expert; `t` is the token of a row and `gates` has their gates.
    ///
    /// ```text
    /// h = x[t] · w1[expert] (+ b1[expert])
    /// y = Σ_j (gates · act(h) · w2[expert])[inverse]
    /// ```
    ///
    /// The gates meet the hidden units because those are narrower than the results.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [x, w1, w2, gate, order, inverse, ends, b1 @ ..] = inputs else {
            return Err("too few inputs".into());
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let kind = x.kind();
        let tokens = divided(order, self.top_k)?;

        let h = hidden((x, &tokens), w1, b1.first(), (order, ends))?;
        let mut a = self.act(&h)?;
        let _ = a.f_mul_(&row_gates(gate, order, kind)?)?;
        let ys = grouped_mm(&a, &padded_weight(w2, kind)?, ends)?;
        drop(a);
        let y = like(&sum_rows(&ys, inverse, self.top_k, None)?, x)?;

        // An absent bias leaves its place empty, at the end.
        let mut saved = Vec::new();
        saved.extend((!self.options.keeps_less).then_some(&h));
        saved.extend(inputs);
        ctx.save(&saved)?;
        Ok(vec![y])
    }

    /// With `dys = dy[t]`:
    ///
    /// ```text
    /// a     = act(h)                       u   = dys · w2[expert]ᵀ
    /// dgate = Σ_s a · u                    dw2 = Σ over the expert's rows of (gates · a)ᵀ · dys
    /// dh    = gates · u · act'(h)          dw1 = Σ over the expert's rows of xsᵀ · dh,  db1 likewise of dh
    /// dx    = Σ_j (dh · w1[expert]ᵀ)[inverse]
    /// ```
    ///
    /// Gradients of weights are summed in fp32 and rounded once to the type of `x`: libtorch's grouped product has no
    /// fp32 result for 16-bit operands.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let (h, inputs) = saved.split_at(usize::from(!self.options.keeps_less).min(saved.len()));
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
        let needs_dh = needs(X) || needs(W1) || needs(B1);
        let tokens = divided(order, self.top_k)?;
        let h = &match h.first() {
            Some(h) => h.shallow_clone(),
            None => hidden((x, &tokens), w1, b1.first(), (order, ends))?,
        };

        let dys = padded_rows(dy)?.f_index_select(0, &tokens)?;
        let mut u = if needs_dh || needs(GATE) {
            let w2 = padded_weight(w2, x.kind())?.f_transpose(1, 2)?;
            Some(grouped_mm(&dys, &w2, ends)?)
        } else {
            None
        };
        let gates = row_gates(gate, order, x.kind())?;
        if needs(GATE) || needs(W2) {
            let mut a = self.act(h)?;
            if let (true, Some(u)) = (needs(GATE), &u) {
                let dots = a.f_mul(u)?.f_sum_dim_intlist(-1, false, gate.kind())?;
                let dgate = dots.f_index_select(0, inverse)?;
                input_grads[GATE] = Some(dgate.f_view(&gate.size()[..])?);
            }
            if needs(W2) {
                let _ = a.f_mul_(&gates)?;
                input_grads[W2] = Some(like(&grouped_outer(&a, &dys, ends)?, w2)?);
            }
        }
        drop(dys);

        if let (true, Some(mut u)) = (needs_dh, u.take()) {
            let _ = u.f_mul_(&gates)?;
            let dh = self.act_backward(&u, h)?;
            drop(u);
            if let (true, Some(b1)) = (needs(B1), b1.first()) {
                input_grads[B1] = Some(like(&grouped_columns(&dh, ends)?, b1)?);
            }
            if needs(W1) {
                let xs = padded_rows(x)?.f_index_select(0, &tokens)?;
                input_grads[W1] = Some(like(&grouped_outer(&xs, &dh, ends)?, w1)?);
            }
            if needs(X) {
                let w1 = padded_weight(w1, x.kind())?.f_transpose(1, 2)?;
                let dxs = grouped_mm(&dh, &w1, ends)?;
                input_grads[X] = Some(like(&sum_rows(&dxs, inverse, self.top_k, None)?, x)?);
            }
        }
        Ok(input_grads)
    }
}

impl Mlp {
    fn act(&self, h: &Tensor) -> Result<Tensor, FunctionError> {
        match self.options.activation {
            Activation::Relu => Ok(h.f_relu()?),
            Activation::Gelu => Ok(h.f_gelu("none")?),
            Activation::Unknown => Err("an activation of a newer interface".into()),
        }
    }

    /// `da · act'(h)`.
    fn act_backward(&self, da: &Tensor, h: &Tensor) -> Result<Tensor, FunctionError> {
        match self.options.activation {
            Activation::Relu => Ok(h.f_threshold_backward(da, 0.0)?),
            Activation::Gelu => Ok(h.f_gelu_backward(da, "none")?),
            Activation::Unknown => Err("an activation of a newer interface".into()),
        }
    }
}

/// `x[t] · w1[expert] (+ b1[expert])`.
fn hidden(
    (x, tokens): (&Tensor, &Tensor),
    w1: &Tensor,
    b1: Option<&Tensor>,
    (order, ends): (&Tensor, &Tensor),
) -> Result<Tensor, TchError> {
    let kind = x.kind();
    let xs = padded_rows(x)?.f_index_select(0, tokens)?;
    let mut h = grouped_mm(&xs, &padded_weight(w1, kind)?, ends)?;
    if let Some(b1) = b1 {
        let b1 = padded_rows(&b1.f_to_kind(kind)?)?;
        let _ = h.f_add_(&b1.f_index_select(0, &experts(ends, order)?)?)?;
    }
    Ok(h)
}

/// The gate of each row, `[T·K, 1]`.
fn row_gates(gate: &Tensor, order: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    let gates = gate.f_reshape([-1, 1])?.f_index_select(0, order)?;
    gates.f_to_kind(kind)
}

/// The expert of each row, found without asking the device how many rows an expert has.
fn experts(ends: &Tensor, order: &Tensor) -> Result<Tensor, TchError> {
    let rows = Tensor::f_arange(order.size1()?, (Kind::Int, ends.device()))?;
    rows.f_searchsorted(ends, false, true, "right", None::<Tensor>)
}
