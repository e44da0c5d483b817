//! Routing as one node of the graph: router logits, gates, the selections in the order of the experts, and the mean
//! probability of each expert.
//!
//! Logits are a product of cuBLAS. Of a step it keeps them, unless the call wants less, the router's input, and some
//! numbers for each selection.

use std::ffi::c_void;
use std::ptr;

use moeut_plugin_api::kernel::{Select, SelectOptions, Selected};
use moeut_plugin_api::{PluginError, Selection};
use moeut_torch::padding::missing;
use moeut_torch::tf32::Tf32;
use moeut_torch::{Autocast, Context, Function, IntoHandle, IntoTensor, OrPluginError, apply};
use tch::{Kind, Tensor};

use crate::module::Entry;
use crate::ops::{self, Ops, THREADS, aligned, narrow, optional, pointer};

/// Tokens of a chunk, words of its mask, and warps that work on it.
const CHUNK: i64 = 128;
const MASK_WORDS: i64 = 4;
const WARPS: i64 = 8;

/// See [`moeut_plugin_api::Kernel::select`].
pub(crate) fn select(
    call: Select,
    open: impl FnOnce(&Tensor) -> Result<Ops, PluginError>,
) -> Result<Selected, PluginError> {
    let (x, weight, options) = (
        call.x.into_tensor(),
        call.weight.into_tensor(),
        call.options,
    );
    let ops = open(&x)?;
    let Some(shape) = Shape::of(&x.size(), &weight.size(), options) else {
        return Err(PluginError::new("the shapes of a selection do not fit")
            .why(format!("x is {:?}, weight {:?}, {options:?}", x.size(), weight.size()))
            .fix(format!(
                "pass x [T, D], weight [G·E, D], T a multiple of the sequences; k at most E and {}, E at most {}, \
                 G·E at most {}",
                Select::MAX_SELECTED,
                Select::MAX_EXPERTS,
                Select::MAX_IDS
            )));
    };
    let node = Choice {
        ops,
        shape,
        options,
    };
    let outputs =
        apply(node, &[&x, &weight]).or_plugin_error("kernel `cuda` cannot select experts")?;
    let [gate, log_means, ids, order, inverse, ends] =
        [0, 1, 2, 3, 4, 5].map(|index| outputs[index].share());
    Ok(Selected {
        gate,
        log_means,
        ids,
        selection: Selection {
            order,
            inverse,
            ends,
        },
    })
}

/// The sizes of a call, which fit each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    n_tokens: i64,
    n_sequences: i64,
    n_groups: i64,
    /// Of a group.
    n_experts: i64,
    top_k: i64,
}

impl Shape {
    fn of(x: &[i64], weight: &[i64], options: SelectOptions) -> Option<Self> {
        let (&[n_tokens, d_in], &[n_ids, d_weight]) = (x, weight) else {
            return None;
        };
        let SelectOptions {
            n_groups,
            top_k,
            n_sequences,
            ..
        } = options;
        let fits = d_in == d_weight
            && n_tokens > 0
            && n_sequences > 0
            && n_tokens % n_sequences == 0
            && n_groups > 0
            && n_ids % n_groups == 0
            && n_ids <= Select::MAX_IDS
            && n_ids / n_groups <= Select::MAX_EXPERTS
            && (1..=Select::MAX_SELECTED.min(n_ids / n_groups)).contains(&top_k);
        fits.then(|| Self {
            n_tokens,
            n_sequences,
            n_groups,
            n_experts: n_ids / n_groups,
            top_k,
        })
    }

    fn n_ids(self) -> i64 {
        self.n_groups * self.n_experts
    }

    fn seq_len(self) -> i64 {
        self.n_tokens / self.n_sequences
    }

    fn chunks_per_sequence(self) -> i64 {
        (self.seq_len() + CHUNK - 1) / CHUNK
    }
}

/// `gate, log_means, ids, order, inverse, ends` of `x, weight`.
struct Choice {
    ops: Ops,
    shape: Shape,
    options: SelectOptions,
}

/// As `Selection` in the source of the kernels.
#[repr(C)]
struct RawSelection {
    logits: *const c_void,
    ids: *mut c_void,
    gates: *mut c_void,
    log_sums: *mut c_void,
    parts: *mut c_void,
    masks: *mut c_void,
    counts: *mut c_void,
    totals: *mut c_void,
    ends: *mut c_void,
    order: *mut c_void,
    inverse: *mut c_void,
    gate_grads: *const c_void,
    probability_grads: *const c_void,
    logit_grads: *mut c_void,
    n_tokens: i64,
    pitch: i32,
    seq_len: i32,
    chunks_per_sequence: i32,
    n_groups: i32,
    n_experts: i32,
    top_k: i32,
    is_wide: i32,
}

impl Choice {
    fn raw(
        &self,
        logits: &Tensor,
        [ids, gates, log_sums]: [&Tensor; 3],
    ) -> ops::Result<RawSelection> {
        let shape = self.shape;
        Ok(RawSelection {
            logits: pointer(logits),
            ids: ids.data_ptr(),
            gates: gates.data_ptr(),
            log_sums: log_sums.data_ptr(),
            parts: ptr::null_mut(),
            masks: ptr::null_mut(),
            counts: ptr::null_mut(),
            totals: ptr::null_mut(),
            ends: ptr::null_mut(),
            order: ptr::null_mut(),
            inverse: ptr::null_mut(),
            gate_grads: ptr::null(),
            probability_grads: ptr::null(),
            logit_grads: ptr::null_mut(),
            n_tokens: shape.n_tokens,
            pitch: narrow(logits.size()[1])?,
            seq_len: narrow(shape.seq_len())?,
            chunks_per_sequence: narrow(shape.chunks_per_sequence())?,
            n_groups: narrow(shape.n_groups)?,
            n_experts: narrow(shape.n_experts)?,
            top_k: narrow(shape.top_k)?,
            is_wide: 0,
        })
    }

    /// The weight in the type of the call, with rows of zeros until logits fill whole pieces of 16 bytes: cuBLAS is
    /// slow without, and numbers of experts are seldom even.
    fn operand(weight: &Tensor, kind: Kind) -> ops::Result<Tensor> {
        let n_missing = missing(weight.size()[0], kind);
        Ok(weight
            .f_to_kind(kind)?
            .f_constant_pad_nd([0, 0, 0, n_missing])?)
    }

    /// In fp32, `[T, G·E]`, with columns of zeros.
    fn logits(&self, x: &Tensor, weight: &Tensor) -> ops::Result<Tensor> {
        self.product(x, &Self::operand(weight, x.kind())?.f_tr()?)
    }

    /// `a · b`, summed and left in fp32.
    fn product(&self, a: &Tensor, b: &Tensor) -> ops::Result<Tensor> {
        if a.kind() != Kind::Float {
            return Ok(a.f_mm_dtype(b, Kind::Float)?);
        }
        let _tf32 = self.options.allows_tf32.then(Tf32::new).transpose()?;
        Ok(a.f_mm(b)?)
    }
}

impl Function for Choice {
    /// See [`Select`] for the equation.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> ops::Result<Vec<Tensor>> {
        let [x, weight] = inputs else {
            return Err("too few inputs".into());
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let (ops, shape) = (&self.ops, self.shape);
        let (n_ids, n_chunks) = (
            shape.n_ids(),
            shape.n_sequences * shape.chunks_per_sequence(),
        );
        let n_rows = shape.n_tokens * shape.n_groups;
        let n_selections = n_rows * shape.top_k;
        let logits = self.logits(x, weight)?;

        let ids = ops.empty(&[n_rows, shape.top_k], Kind::Int)?;
        let gates = ops.empty(&[n_rows, shape.top_k], Kind::Float)?;
        let log_sums = ops.empty(&[n_rows], Kind::Float)?;
        let parts = ops.empty(&[n_chunks, n_ids], Kind::Float)?;
        let masks = ops.empty(&[n_chunks, n_ids, MASK_WORDS], Kind::Int)?;
        let counts = ops.empty(&[n_ids, n_chunks], Kind::Int)?;
        let (totals, ends) = (
            ops.empty(&[n_ids], Kind::Int)?,
            ops.empty(&[n_ids], Kind::Int)?,
        );
        let order = ops.empty(&[n_selections], Kind::Int64)?;
        let inverse = ops.empty(&[n_selections], Kind::Int64)?;
        let raw = RawSelection {
            parts: parts.data_ptr(),
            masks: masks.data_ptr(),
            counts: counts.data_ptr(),
            totals: totals.data_ptr(),
            ends: ends.data_ptr(),
            order: order.data_ptr(),
            inverse: inverse.data_ptr(),
            ..self.raw(&logits, [&ids, &gates, &log_sums])?
        };
        let entry = match shape.n_experts {
            ..33 => Entry::Select32,
            33..257 => Entry::Select256,
            257..513 => Entry::Select512,
            _ => Entry::Select1024,
        };
        let masks_and_sums = narrow(n_ids * (MASK_WORDS + WARPS) * 4)?.cast_unsigned();
        let starts = narrow(n_ids * 4)?.cast_unsigned();
        ops.launch(entry, n_chunks, THREADS, masks_and_sums, &raw)?;
        ops.launch(Entry::ScanChunks, n_ids, THREADS, 0, &raw)?;
        ops.launch(Entry::PlaceSelections, n_chunks, THREADS, starts, &raw)?;

        let size = [
            shape.n_sequences,
            shape.chunks_per_sequence(),
            shape.n_groups,
            shape.n_experts,
        ];
        // An expert whose probability vanishes everywhere has a logarithm nevertheless.
        let means = (parts.f_view(size)?)
            .f_sum_dim_intlist(1_i64, false, Kind::Float)?
            .f_div_scalar(shape.seq_len() as f64)?
            .f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
        let mut saved = vec![x, weight, &ids, &gates, &log_sums, &means];
        saved.extend((!self.options.keeps_less).then_some(&logits));
        ctx.save(&saved)?;
        Ok(vec![gates, means.f_log()?, ids, order, inverse, ends])
    }

    /// With `p = softmax(z)` and `P = dm / (T/B · mean p)`:
    ///
    /// ```text
    /// dz = p · (P − Σ_e p · P) + dgate · gate · (1 − gate) where selected
    /// dx = dz · weight        dweight = dzᵀ · x
    /// ```
    ///
    /// `dz` is rounded to the type of the call once.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> ops::Result<Vec<Option<Tensor>>> {
        let saved = ctx.saved()?;
        let ([x, weight, ids, gates, log_sums, means, logits @ ..], [dgate, dmeans, ..]) =
            (&saved[..], grads)
        else {
            return Err("saved tensors or gradients are missing".into());
        };
        let _full_precision = Autocast::new(x.device(), None)?;
        let (ops, shape) = (&self.ops, self.shape);
        let logits = match logits.first() {
            Some(logits) => logits.shallow_clone(),
            None => self.logits(x, weight)?,
        };
        let dgate = dgate.as_ref().map(aligned).transpose()?;
        let of_probabilities = match dmeans {
            Some(dmeans) => {
                let of_means = dmeans.f_div(means)?;
                Some(aligned(&of_means.f_div_scalar(shape.seq_len() as f64)?)?)
            }
            None => None,
        };
        let dlogits = ops.empty(&logits.size(), x.kind())?;
        let raw = RawSelection {
            gate_grads: optional(dgate.as_ref()),
            probability_grads: optional(of_probabilities.as_ref()),
            logit_grads: dlogits.data_ptr(),
            is_wide: i32::from(x.kind() == Kind::Float),
            ..self.raw(&logits, [ids, gates, log_sums])?
        };
        let n_blocks = (shape.n_tokens * shape.n_groups + WARPS - 1) / WARPS;
        let shared_bytes = narrow(shape.n_experts * WARPS * 4)?.cast_unsigned();
        ops.launch(Entry::SelectBackward, n_blocks, THREADS, shared_bytes, &raw)?;

        let dx = if ctx.needs_input_grad(0) {
            let weight = Self::operand(weight, x.kind())?;
            let _tf32 = self.options.allows_tf32.then(Tf32::new).transpose()?;
            Some(dlogits.f_mm(&weight)?)
        } else {
            None
        };
        let dweight = if ctx.needs_input_grad(1) {
            let dweight = self.product(&dlogits.f_tr()?, x)?;
            Some(
                dweight
                    .f_narrow(0, 0, shape.n_ids())?
                    .f_to_kind(weight.kind())?,
            )
        } else {
            None
        };
        Ok(vec![dx, dweight])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_and_what_does_not_fit() {
        let options = |n_groups, top_k, n_sequences| SelectOptions {
            n_groups,
            top_k,
            n_sequences,
            allows_tf32: false,
            keeps_less: false,
        };
        let of = |x: [i64; 2], weight: [i64; 2], options| Shape::of(&x, &weight, options);
        let shape = of([300, 8], [40, 8], options(4, 2, 2)).unwrap();
        assert_eq!(
            (
                shape.n_experts,
                shape.seq_len(),
                shape.chunks_per_sequence()
            ),
            (10, 150, 2)
        );
        assert_eq!(of([300, 8], [40, 7], options(4, 2, 2)), None);
        assert_eq!(of([301, 8], [40, 8], options(4, 2, 2)), None);
        assert_eq!(of([300, 8], [40, 8], options(3, 2, 2)), None);
        assert_eq!(of([300, 8], [40, 8], options(4, 11, 2)), None);
        assert_eq!(of([300, 8], [1025, 8], options(1, 2, 2)), None);
        assert_eq!(of([300, 8], [2400, 8], options(4, 2, 2)), None);
        assert_eq!(of([0, 8], [40, 8], options(4, 2, 2)), None);
    }
}
