//! What happens to the residual stream between products, as nodes of the graph: addition with layer normalization, and
//! rotary positions.

use std::ffi::c_void;
use std::ptr;

use moeut_plugin_api::kernel::{ResidualNorm, ResidualNormed, Rotate};
use moeut_plugin_api::{PluginError, TensorHandle};
use moeut_torch::{Context, Function, IntoHandle, IntoTensor, OrPluginError, apply, kind};
use tch::{Kind, Tensor};

use crate::module::{Entry, TILE_SHARED_BYTES};
use crate::ops::{self, Ops, THREADS, aligned, blocks, narrow, optional, pointer};

/// Channels that a thread handles at once, if rows are of whole pieces.
const NORM_PIECE: i64 = 4;
const ROTATION_PIECE: i64 = 8;
/// Blocks that sum up gradients of weights; their number decides the order of the sum, so it is the same on every GPU.
const N_SUMMING_BLOCKS: i64 = 396;

/// See [`moeut_plugin_api::Kernel::residual_norm`].
pub(crate) fn residual_norm(
    call: ResidualNorm,
    open: impl FnOnce(&Tensor, Kind) -> Result<Ops, PluginError>,
) -> Result<ResidualNormed, PluginError> {
    let x = call.x.into_tensor();
    let ops = open(&x, kind(call.options.dtype))?;
    let update = call.update.map(IntoTensor::into_tensor);
    let (weight, bias) = (call.weight.into_tensor(), call.bias.into_tensor());
    let pitch = x.size().last().copied().unwrap_or(0);
    let is_rounded = x.kind() == ops.kind && update.is_none();
    let fits = (is_rounded || x.kind() == Kind::Float)
        && [&weight, &bias].map(Tensor::kind) == [Kind::Float; 2]
        && weight.size() == bias.size()
        && matches!(weight.size()[..], [width] if 0 < width && width <= pitch)
        && update
            .as_ref()
            .is_none_or(|update| update.size() == x.size())
        && Norm::n_warps(pitch, 2) > 0;
    if !fits {
        let update = update.as_ref().map(Tensor::size);
        return Err(PluginError::new("the tensors of a layernorm do not fit")
            .why(format!(
                "x is {:?} of {:?}, update {update:?}, weight {:?}, bias {:?}",
                x.kind(),
                x.size(),
                weight.size(),
                bias.size()
            ))
            .fix("pass x [.., P] in fp32, update as x, or x in the type of the call alone; weight [D], bias [D] in fp32, D up to P, P up to 12288"));
    }
    let node = Norm {
        ops,
        eps: call.options.eps,
        width: weight.size().first().copied().unwrap_or(0),
        is_wide: call.options.is_wide,
        has_update: update.is_some(),
        is_rounded,
    };
    let mut inputs = vec![&x, &weight, &bias];
    inputs.extend(&update);
    let outputs = if is_rounded {
        tch::no_grad(|| apply(node, &inputs))
    } else {
        apply(node, &inputs)
    };
    let outputs = outputs.or_plugin_error("kernel `cuda` cannot compute the layernorm")?;
    let [sum, plain, normed] = [0, 1, 2].map(|index| outputs[index].share());
    Ok(ResidualNormed { sum, plain, normed })
}

/// See [`moeut_plugin_api::Kernel::rotate`].
pub(crate) fn rotate(
    call: Rotate,
    open: impl FnOnce(&Tensor) -> Result<Ops, PluginError>,
) -> Result<TensorHandle, PluginError> {
    let (x, cos, sin) = (
        call.x.into_tensor(),
        call.cos.into_tensor(),
        call.sin.into_tensor(),
    );
    let ops = open(&x)?;
    let sizes = [&x, &cos, &sin].map(Tensor::size);
    let fits = match [&sizes[0][..], &sizes[1][..], &sizes[2][..]] {
        [&[_, seq_len, _, d_head], &[n_rows, n_angles], of_sin] => {
            n_rows == seq_len && sizes[1] == of_sin && 2 * n_angles <= d_head
        }
        _ => false,
    };
    if !fits || cos.kind() != Kind::Float || sin.kind() != Kind::Float {
        return Err(PluginError::new("the tensors of a rotation do not fit")
            .why(format!(
                "x is {:?}, cos {:?} of {:?}, sin {:?} of {:?}",
                sizes[0],
                cos.kind(),
                sizes[1],
                sin.kind(),
                sizes[2]
            ))
            .fix("pass x [B, T, H, d], cos and sin [T, n] in fp32 with 2·n at most d"));
    }
    apply(Rotation { ops }, &[&x, &cos, &sin])
        .map(|mut outputs| outputs.swap_remove(0).into_handle())
        .or_plugin_error("kernel `cuda` cannot rotate")
}

/// `sum, plain, normed` of `x, weight, bias` and perhaps `update`.
struct Norm {
    ops: Ops,
    eps: f64,
    /// Channels that are normalized; rows may have more.
    width: i64,
    is_wide: bool,
    has_update: bool,
    /// Whether `x` is in the type of the call, and there is nothing to be added.
    is_rounded: bool,
}

/// As `Norm` in the source of the kernels.
#[repr(C)]
struct RawNorm {
    x: *const c_void,
    update: *const c_void,
    sum: *mut c_void,
    plain: *mut c_void,
    normed: *mut c_void,
    weight: *const c_void,
    bias: *const c_void,
    means: *mut c_void,
    scales: *mut c_void,
    sum_grads: *const c_void,
    plain_grads: *const c_void,
    normed_grads: *const c_void,
    x_grads: *mut c_void,
    update_grads: *mut c_void,
    parts: *mut c_void,
    n_rows: i64,
    width: i32,
    pitch: i32,
    is_wide: i32,
    rows_per_block: i32,
    eps: f32,
}

impl Norm {
    /// Warps of a block, each of which has `n_rows` rows of fp32 in shared memory; 0 if not even one can.
    fn n_warps(pitch: i64, n_rows: i64) -> i64 {
        let bytes = pitch * n_rows * 4;
        let fits = |n_warps: &i64| n_warps * bytes <= i64::from(TILE_SHARED_BYTES);
        [8, 4, 2, 1].into_iter().find(fits).unwrap_or(0)
    }

    fn launch(
        &self,
        entries: (Entry, Entry),
        n_blocks: i64,
        n_kept: i64,
        raw: &RawNorm,
    ) -> ops::Result<()> {
        let pitch = i64::from(raw.pitch);
        let n_warps = Self::n_warps(pitch, n_kept);
        let shared_bytes = narrow(n_warps * pitch * n_kept * 4)?.cast_unsigned();
        let entry = if pitch % NORM_PIECE == 0 {
            entries.0
        } else {
            entries.1
        };
        let n_threads = narrow(n_warps * 32)?.cast_unsigned();
        self.ops
            .launch(entry, n_blocks, n_threads, shared_bytes, raw)
    }

    /// `weight` is as wide as the rows.
    fn raw(
        &self,
        plain: &Tensor,
        weight: &Tensor,
        means: &Tensor,
        scales: &Tensor,
    ) -> ops::Result<RawNorm> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a small number beside a variance"
        )]
        let eps = self.eps as f32;
        Ok(RawNorm {
            x: ptr::null(),
            update: ptr::null(),
            sum: ptr::null_mut(),
            plain: plain.data_ptr(),
            normed: ptr::null_mut(),
            weight: pointer(weight),
            bias: ptr::null(),
            means: means.data_ptr(),
            scales: scales.data_ptr(),
            sum_grads: ptr::null(),
            plain_grads: ptr::null(),
            normed_grads: ptr::null(),
            x_grads: ptr::null_mut(),
            update_grads: ptr::null_mut(),
            parts: ptr::null_mut(),
            n_rows: means.size1()?,
            width: narrow(self.width)?,
            pitch: narrow(weight.size1()?)?,
            is_wide: i32::from(self.is_wide),
            rows_per_block: 0,
            eps,
        })
    }
}

impl Function for Norm {
    /// See [`ResidualNorm`] for the equation. Keeps `plain`, and two numbers of each row.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> ops::Result<Vec<Tensor>> {
        let [x, weight, bias, update @ ..] = inputs else {
            return Err("too few inputs".into());
        };
        let ops = &self.ops;
        let shape = x.size();
        let pitch = shape.last().copied().unwrap_or(0);
        let of_rows = |parameter: &Tensor| match pitch - self.width {
            0 => aligned(parameter),
            n_more => Ok(parameter.f_constant_pad_nd([0, n_more])?),
        };
        let (x_read, weight, bias) = (aligned(x)?, of_rows(weight)?, of_rows(bias)?);
        let update = match update.first() {
            Some(update) => Some(aligned(&update.f_to_kind(ops.kind)?)?),
            None => None,
        };
        let n_rows = i64::try_from(x.numel()).map_err(|error| error.to_string())? / pitch;
        let plain = if self.is_rounded {
            x_read.shallow_clone()
        } else {
            ops.empty(&shape, ops.kind)?
        };
        let normed = ops.empty(&shape, if self.is_wide { Kind::Float } else { ops.kind })?;
        let sum = match update {
            Some(_) => ops.empty(&shape, Kind::Float)?,
            None => x.shallow_clone(),
        };
        let (means, scales) = (
            ops.empty(&[n_rows], Kind::Float)?,
            ops.empty(&[n_rows], Kind::Float)?,
        );
        let raw = RawNorm {
            x: if self.is_rounded {
                ptr::null()
            } else {
                pointer(&x_read)
            },
            update: optional(update.as_ref()),
            sum: sum.data_ptr(),
            normed: normed.data_ptr(),
            bias: pointer(&bias),
            ..self.raw(&plain, &weight, &means, &scales)?
        };
        let n_warps = Self::n_warps(pitch, 1);
        let n_blocks = (n_rows + n_warps - 1) / n_warps;
        self.launch((Entry::Normalize, Entry::NormalizeOdd), n_blocks, 1, &raw)?;
        ctx.save(&[&plain, &weight, &means, &scales])?;
        Ok(vec![sum, plain, normed])
    }

    /// The gradient of the normalization meets those of the other two readers of the stream in one pass:
    ///
    /// ```text
    /// n = (plain - mean) · scale,  h = dnormed · weight
    /// dx = scale · (h - mean(h) - n · mean(h · n)) + dplain + dsum      dupdate = dx, rounded
    /// dweight = Σ dnormed · n,  dbias = Σ dnormed                       in one fixed order
    /// ```
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> ops::Result<Vec<Option<Tensor>>> {
        let saved = ctx.saved()?;
        let ([plain, weight, means, scales], [dsum, dplain, dnormed]) = (&saved[..], grads) else {
            return Err("saved tensors or gradients are missing".into());
        };
        let ops = &self.ops;
        let read = |grad: &Option<Tensor>| grad.as_ref().map(aligned).transpose();
        let (dsum, dplain, dnormed) = (read(dsum)?, read(dplain)?, read(dnormed)?);
        let dx = ops.empty(&plain.size(), Kind::Float)?;
        let dupdate = if self.has_update {
            Some(ops.empty(&plain.size(), ops.kind)?)
        } else {
            None
        };
        let (n_rows, pitch) = (means.size1()?, weight.size1()?);
        let rows_per_block = ((n_rows + N_SUMMING_BLOCKS - 1) / N_SUMMING_BLOCKS).max(1);
        let n_blocks = (n_rows + rows_per_block - 1) / rows_per_block;
        let parts = ops.empty(&[n_blocks, 2, pitch], Kind::Float)?;
        let raw = RawNorm {
            sum_grads: optional(dsum.as_ref()),
            plain_grads: optional(dplain.as_ref()),
            normed_grads: optional(dnormed.as_ref()),
            x_grads: dx.data_ptr(),
            update_grads: optional(dupdate.as_ref()),
            parts: parts.data_ptr(),
            rows_per_block: narrow(rows_per_block)?,
            ..self.raw(plain, weight, means, scales)?
        };
        self.launch(
            (Entry::NormalizeBackward, Entry::NormalizeBackwardOdd),
            n_blocks,
            2,
            &raw,
        )?;
        let of_parameters = parts.f_sum_dim_intlist(0_i64, false, Kind::Float)?;
        let of_parameter = |index| {
            let of_row = of_parameters.f_select(0, index)?;
            of_row.f_narrow(0, 0, self.width).map(Some)
        };
        let mut input_grads = vec![Some(dx), of_parameter(0)?, of_parameter(1)?];
        if self.has_update {
            input_grads.push(dupdate);
        }
        Ok(input_grads)
    }
}

/// `y` of `x, cos, sin`.
struct Rotation {
    ops: Ops,
}

/// As `Rotation` in the source of the kernels.
#[repr(C)]
struct RawRotation {
    x: *const c_void,
    y: *mut c_void,
    cos: *const c_void,
    sin: *const c_void,
    n_rows: i64,
    seq_len: i32,
    n_heads: i32,
    d_head: i32,
    n_angles: i32,
    direction: f32,
}

impl Rotation {
    fn turn(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> ops::Result<Tensor> {
        let x = aligned(x)?;
        let (cos, sin) = (aligned(cos)?, aligned(sin)?);
        let (n_sequences, seq_len, n_heads, d_head) = x.size4()?;
        let n_angles = cos.size()[1];
        let y = x.f_empty_like()?;
        let n_rows = n_sequences * seq_len * n_heads;
        let raw = RawRotation {
            x: pointer(&x),
            y: y.data_ptr(),
            cos: pointer(&cos),
            sin: pointer(&sin),
            n_rows,
            seq_len: narrow(seq_len)?,
            n_heads: narrow(n_heads)?,
            d_head: narrow(d_head)?,
            n_angles: narrow(n_angles)?,
            direction,
        };
        let (entry, piece) = if d_head % ROTATION_PIECE != 0 {
            (Entry::RotateOdd, 1)
        } else if n_angles % ROTATION_PIECE != 0 {
            (Entry::RotateSplit, ROTATION_PIECE)
        } else {
            (Entry::Rotate, ROTATION_PIECE)
        };
        let n_threads = n_rows * (d_head / piece);
        if u32::try_from(n_threads).is_err() {
            return Err("too many heads to rotate in one call".into());
        }
        self.ops
            .launch(entry, blocks(n_threads), THREADS, 0, &raw)?;
        Ok(y)
    }
}

impl Function for Rotation {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> ops::Result<Vec<Tensor>> {
        let [x, cos, sin] = inputs else {
            return Err("too few inputs".into());
        };
        ctx.save(&[cos, sin])?;
        Ok(vec![self.turn(x, cos, sin, 1.0)?])
    }

    /// The rotation back; angles have no gradient.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> ops::Result<Vec<Option<Tensor>>> {
        let saved = ctx.saved()?;
        let ([cos, sin], Some(Some(dy))) = (&saved[..], grads.first()) else {
            return Ok(vec![None, None, None]);
        };
        Ok(vec![Some(self.turn(dy, cos, sin, -1.0)?), None, None])
    }
}
