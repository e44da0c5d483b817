//! Causal attention whose logits have a bias for near keys, without ever holding the logits of far ones.
//!
//! Shape letters: `G` sequences times heads, `T` tokens, `K` queries of a token, `d` width of a head, `M` near keys of
//! a query, `C` tokens of a block, `L` blocks.

use moeut_plugin_api::PluginError;
use moeut_torch::{Autocast, Context, Function, FunctionError, OrPluginError, apply};
use tch::{Device, Kind, Tensor};

type Result<T> = std::result::Result<T, FunctionError>;

/// Fused kernels want rows that begin at multiples of 16 bytes.
const ALIGNMENT: i64 = 8;

/// `C`, if queries have a bias for `n_near` keys: those of a block and of the one before are enough.
pub(crate) fn block_len(n_near: i64) -> i64 {
    (n_near + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT
}

/// Attends causally:
///
/// ```text
/// a_tk = softmax over s ≤ t of (scale · q_tk · k_s + (near_tk[M - 1 - (t - s)] where t - s < M))
/// y_tk = Σ_s a_tk[s] · v_s
/// ```
///
/// # Shapes
/// - `q` and the result `[G, T, K, d]`; `k` and `v` `[G, T, d]`
/// - `near` `[G, T, K, M]`, the farthest key first, `M` at least 1
///
/// # Errors
/// If libtorch has no memory.
pub(crate) fn attention(
    [q, k, v, near]: [&Tensor; 4],
    scale: f64,
) -> std::result::Result<Tensor, PluginError> {
    let (seq_len, n_near) = (q.size()[1], near.size()[3]);
    let block_len = block_len(n_near);
    let missing = (block_len - seq_len % block_len) % block_len;
    let of_whole_blocks = |x: &Tensor| match (missing, x.dim()) {
        (0, _) => x.shallow_clone(),
        (_, 3) => x.constant_pad_nd([0, 0, 0, missing]),
        _ => x.constant_pad_nd([0, 0, 0, 0, 0, missing]),
    };
    let inputs = [q, k, v, near].map(of_whole_blocks);
    let y = apply(Banded { scale, n_near }, &inputs.each_ref())
        .or_plugin_error("cannot attend with a bias for near keys")?
        .swap_remove(0);
    Ok(y.narrow(1, 0, seq_len))
}

/// The function above, for whole blocks.
///
/// Keys at distances below `M` lie in the block of their query or in the one before. Each block attends to those `2·C`
/// keys with a bias that is -∞ for all others. To the keys at distances of `M` and more, which have no bias, it is
/// plain causal attention, once the first `M` queries and the last `M` keys are left out. The two softmaxes are joined
/// by their sums.
///
/// The backward pass of either part needs of the other only what both gave together: with that result `y` and the
/// logarithm of that sum, the gradient of a logit is `a · (dy · v - dy · y)`.
struct Banded {
    scale: f64,
    n_near: i64,
}

impl Function for Banded {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [q, k, v, near] = inputs else {
            return Err("too few inputs".into());
        };
        let _full_precision = Autocast::new(q.device(), None)?;
        let sizes = Sizes::of(q, self.n_near);
        let bias = sizes.bias(near)?;

        let (y, lse) = self.near(&sizes, [q, k, v], &bias)?.forward()?;
        let y = y.f_reshape(q.size())?;
        let lse = lse.f_reshape(&q.size()[..3])?;
        if let Some(far) = self.far(&sizes, [q, k, v])? {
            let (far_y, far_lse) = far.forward()?;
            let (far_y, far_lse) = (far_y.f_transpose(1, 2)?, far_lse.f_transpose(1, 2)?);
            let (mut y, mut lse) = (sizes.late(&y)?, sizes.late(&lse)?);
            let share = far_lse.f_sub(&lse)?.f_sigmoid()?.f_unsqueeze(-1)?;
            let _ = y.f_lerp_tensor_(&far_y, &share.f_to_kind(y.kind())?)?;
            lse.f_copy_(&lse.f_logaddexp(&far_lse)?)?;
        }
        ctx.save(&[q, k, v, &bias, &y, &lse])?;
        Ok(vec![y])
    }

    fn backward(&self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let saved = ctx.saved()?;
        let ([q, k, v, bias, y, lse], Some(Some(dy))) = (&saved[..], grads.first()) else {
            return Ok(vec![None, None, None, None]);
        };
        let _full_precision = Autocast::new(q.device(), None)?;
        let sizes = Sizes::of(q, self.n_near);
        let dy = dy.f_contiguous()?;

        let near = self.near(&sizes, [q, k, v], bias)?;
        let in_blocks = |x: &Tensor| x.f_view(&near.q.size()[..]);
        let lse_in_blocks = lse.f_view(&near.q.size()[..3])?;
        let grads = near.backward(&in_blocks(y)?, &lse_in_blocks, &in_blocks(&dy)?)?;
        let dq = grads.q.f_reshape(q.size())?;
        let (dk, dv) = (sizes.of_keys(&grads.k)?, sizes.of_keys(&grads.v)?);
        let dnear = grads.bias.map(|dbias| sizes.of_bias(&dbias)).transpose()?;
        if let Some(far) = self.far(&sizes, [q, k, v])? {
            let late = |x: &Tensor| sizes.late(x)?.f_transpose(1, 2);
            let grads = far.backward(&late(y)?, &late(lse)?, &late(&dy)?)?;
            let _ = sizes.late(&dq)?.f_add_(&grads.q.f_transpose(1, 2)?)?;
            for (sum, of_query) in [(&dk, &grads.k), (&dv, &grads.v)] {
                let of_far = of_query.f_sum_dim_intlist(1i64, false, of_query.kind())?;
                let _ = sum.f_narrow(1, 0, sizes.n_late())?.f_add_(&of_far)?;
            }
        }
        Ok(vec![Some(dq), Some(dk), Some(dv), dnear])
    }
}

impl Banded {
    /// Blocks and their `2·C` keys, `[G, L, C·K | 2·C, d]`.
    fn near(&self, sizes: &Sizes, [q, k, v]: [&Tensor; 3], bias: &Tensor) -> Result<Part> {
        let rows = sizes.block_len * sizes.n_queries;
        Ok(Part {
            q: q.f_view([sizes.n_sequences, -1, rows, q.size()[3]])?,
            k: sizes.windows(k)?,
            v: sizes.windows(v)?,
            bias: Some(bias.shallow_clone()),
            scale: self.scale,
        })
    }

    /// Late queries and early keys, `[G, K, T - M, d]`; nothing if all keys are near.
    fn far(&self, sizes: &Sizes, [q, k, v]: [&Tensor; 3]) -> Result<Option<Part>> {
        let n_late = sizes.n_late();
        if n_late == 0 {
            return Ok(None);
        }
        let for_all_queries = |x: &Tensor| {
            let size = [sizes.n_sequences, sizes.n_queries, n_late, x.size()[2]];
            x.f_narrow(1, 0, n_late)?
                .f_unsqueeze(1)?
                .f_expand(size, false)
        };
        Ok(Some(Part {
            q: sizes.late(q)?.f_transpose(1, 2)?,
            k: for_all_queries(k)?,
            v: for_all_queries(v)?,
            bias: None,
            scale: self.scale,
        }))
    }
}

/// How many there are of what.
struct Sizes {
    n_sequences: i64,
    seq_len: i64,
    n_queries: i64,
    n_near: i64,
    block_len: i64,
}

impl Sizes {
    fn of(q: &Tensor, n_near: i64) -> Self {
        let size = q.size();
        Self {
            n_sequences: size[0],
            seq_len: size[1],
            n_queries: size[2],
            n_near,
            block_len: block_len(n_near),
        }
    }

    fn n_blocks(&self) -> i64 {
        self.seq_len / self.block_len
    }

    /// Tokens that have far keys.
    fn n_late(&self) -> i64 {
        (self.seq_len - self.n_near).max(0)
    }

    /// Those of `[G, T, ..]`.
    fn late(&self, x: &Tensor) -> std::result::Result<Tensor, tch::TchError> {
        x.f_narrow(1, self.n_near, self.n_late())
    }

    /// `near` where a block has its keys, -∞ elsewhere: `[G, T, K, M]` → `[G, L, C·K, 2·C]`.
    ///
    /// Before the first block there are no keys.
    fn bias(&self, near: &Tensor) -> Result<Tensor> {
        let (rows, width) = (self.block_len * self.n_queries, 2 * self.block_len);
        let size = [self.n_sequences, self.n_blocks(), rows, width];
        let bias = Tensor::f_full(size, f64::NEG_INFINITY, (near.kind(), near.device()))?;
        self.band(&bias)?.f_copy_(&near.f_view(self.of_band())?)?;
        let _ = bias
            .f_narrow(1, 0, 1)?
            .f_narrow(3, 0, self.block_len)?
            .f_fill_(f64::NEG_INFINITY)?;
        Ok(bias)
    }

    /// The opposite: what of `[G, L, C·K, 2·C]` belongs to `near`.
    fn of_bias(&self, bias: &Tensor) -> Result<Tensor> {
        let size = [self.n_sequences, self.seq_len, self.n_queries, self.n_near];
        Ok(self.band(&bias.f_contiguous()?)?.f_reshape(size)?)
    }

    /// The near keys of `[G, L, C·K, 2·C]`, as `[G·L, C, K, M]`. Query `c` of a block has its own key in column
    /// `C + c`, so that the columns move on by one with each token.
    fn band(&self, bias: &Tensor) -> Result<Tensor> {
        let width = 2 * self.block_len;
        let of_token = self.n_queries * width;
        let strides = [self.block_len * of_token, of_token + 1, width, 1];
        Ok(bias.f_as_strided(self.of_band(), strides, self.block_len - self.n_near + 1)?)
    }

    fn of_band(&self) -> [i64; 4] {
        let n_blocks = self.n_sequences * self.n_blocks();
        [n_blocks, self.block_len, self.n_queries, self.n_near]
    }

    /// Each block's keys and those before: `[G, T, d]` → `[G, L, 2·C, d]`, overlapping in memory.
    fn windows(&self, x: &Tensor) -> Result<Tensor> {
        let padded = x.f_constant_pad_nd([0, 0, self.block_len, 0])?;
        let windows = padded.f_unfold(1, 2 * self.block_len, self.block_len)?;
        Ok(windows.f_transpose(2, 3)?)
    }

    /// The opposite for gradients, which are added up.
    fn of_keys(&self, windows: &Tensor) -> Result<Tensor> {
        let n_blocks = self.n_blocks();
        let own = windows.f_narrow(2, self.block_len, self.block_len)?;
        let earlier = windows.f_narrow(2, 0, self.block_len)?;
        let sum = own.f_contiguous()?;
        let _ =
            sum.f_narrow(1, 0, n_blocks - 1)?
                .f_add_(&earlier.f_narrow(1, 1, n_blocks - 1)?)?;
        Ok(sum.f_view([self.n_sequences, self.seq_len, -1])?)
    }
}

/// Softmax attention `[A, B, m, d]` to `[A, B, s, d]`, which is causal if it has no bias `[A, B, m, s]`.
///
/// On a GPU libtorch's memory-efficient kernels do it, of which also the sum of the softmax can be had.
struct Part {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
    scale: f64,
}

/// Gradients of a part's inputs.
struct PartGrads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
}

impl Part {
    fn is_fused(&self) -> bool {
        let widths = [&self.q, &self.v].map(|x| x.size()[3]);
        matches!(self.q.device(), Device::Cuda(_))
            && self.q.kind() != Kind::Double
            && widths.iter().all(|width| width % ALIGNMENT == 0)
    }

    /// The result `[A, B, m, d]`, and the logarithm of the sum of the exponentials of all logits, `[A, B, m]`.
    fn forward(&self) -> Result<(Tensor, Tensor)> {
        if !self.is_fused() {
            let logits = self.logits()?;
            let lse = logits.f_logsumexp(-1i64, false)?;
            let a = logits.f_sub(&lse.f_unsqueeze(-1)?)?.f_exp()?;
            let y = a.f_matmul(&self.v.f_to_kind(a.kind())?)?;
            return Ok((y.f_to_kind(self.q.kind())?, lse));
        }
        let (y, lse, _, _) = Tensor::f_internal_scaled_dot_product_efficient_attention(
            &self.q,
            &self.k,
            &self.v,
            self.bias.as_ref(),
            true,
            0.0,
            self.bias.is_none(),
            self.scale,
        )?;
        // The kernel rounds the number of rows up.
        Ok((y, lse.f_narrow(2, 0, self.q.size()[2])?))
    }

    /// From the gradient of a result and what [`Banded`] says of it.
    fn backward(&self, y: &Tensor, lse: &Tensor, dy: &Tensor) -> Result<PartGrads> {
        if !self.is_fused() {
            return self.plain_backward(y, lse, dy);
        }
        let n_rows = self.q.size()[2];
        let rows_first = |x: &Tensor| x.f_transpose(1, 2);
        // Rows of the result are taken to be those of a contiguous tensor.
        let y = rows_first(y)?.f_contiguous()?;
        let n_missing = (LSE_ROWS - n_rows % LSE_ROWS) % LSE_ROWS;
        let lse = lse.f_constant_pad_nd([0, n_missing])?.f_contiguous()?;
        let no_random = Tensor::f_empty(0i64, (Kind::Int64, self.q.device()))?;
        let (q, k, v, bias) = Tensor::f_internal_efficient_attention_backward(
            &rows_first(dy)?,
            &rows_first(&self.q)?,
            &rows_first(&self.k)?,
            &rows_first(&self.v)?,
            self.bias.as_ref(),
            &y,
            None,
            None,
            n_rows,
            self.k.size()[2],
            &lse,
            0.0,
            &no_random,
            &no_random,
            i64::from(self.bias.is_none()),
            self.bias.is_some(),
            self.scale,
            None,
            None,
            false,
        )?;
        Ok(PartGrads {
            q: rows_first(&q)?,
            k: rows_first(&k)?,
            v: rows_first(&v)?,
            bias: self.bias.is_some().then_some(bias),
        })
    }

    fn plain_backward(&self, y: &Tensor, lse: &Tensor, dy: &Tensor) -> Result<PartGrads> {
        let kind = self.wide();
        let [q, k, v, y, dy] = [&self.q, &self.k, &self.v, y, dy].map(|x| x.to_kind(kind));
        let shares = self.logits()?.f_sub(&lse.f_unsqueeze(-1)?)?.f_exp()?;
        let of_result = dy.f_mul(&y)?.f_sum_dim_intlist(-1i64, true, kind)?;
        let da = dy.f_matmul(&v.f_transpose(2, 3)?)?;
        let dlogits = da.f_sub(&of_result)?.f_mul(&shares)?;
        let narrow = |x: Tensor| x.f_to_kind(self.q.kind());
        Ok(PartGrads {
            q: narrow(dlogits.f_matmul(&k)?.f_mul_scalar(self.scale)?)?,
            k: narrow(
                dlogits
                    .f_transpose(2, 3)?
                    .f_matmul(&q)?
                    .f_mul_scalar(self.scale)?,
            )?,
            v: narrow(shares.f_transpose(2, 3)?.f_matmul(&dy)?)?,
            bias: match &self.bias {
                Some(_) => Some(narrow(dlogits)?),
                None => None,
            },
        })
    }

    /// `[A, B, m, s]`, -∞ where a key is hidden.
    fn logits(&self) -> Result<Tensor> {
        let [q, k] = [&self.q, &self.k].map(|x| x.to_kind(self.wide()));
        let logits = q
            .f_matmul(&k.f_transpose(2, 3)?)?
            .f_mul_scalar(self.scale)?;
        if let Some(bias) = &self.bias {
            return Ok(logits.f_add(bias)?);
        }
        let is_later = Tensor::f_ones(&logits.size()[2..], (Kind::Bool, logits.device()))?;
        Ok(logits.f_masked_fill(&is_later.f_triu(1)?, f64::NEG_INFINITY)?)
    }

    /// What sums of exponentials are made in.
    fn wide(&self) -> Kind {
        match self.q.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        }
    }
}

/// The kernels' logarithms of sums are rows of whole multiples of this.
const LSE_ROWS: i64 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: (Kind, Device) = (Kind::Double, Device::Cpu);
    const SCALE: f64 = 0.4;

    /// The formula, with all logits and a matrix of zeros and ones for each distance.
    fn oracle([q, k, v, near]: [&Tensor; 4]) -> Tensor {
        let (seq_len, n_near) = (q.size()[1], near.size()[3]);
        let tokens = Tensor::arange(seq_len, CPU);
        let distances = tokens.unsqueeze(1) - &tokens;
        let mut logits = q.matmul(&k.unsqueeze(1).transpose(2, 3)) * SCALE;
        for distance in 0..n_near {
            let is_there = distances.eq(distance).to_kind(Kind::Double);
            let bias = near.narrow(3, n_near - 1 - distance, 1);
            logits += bias * is_there.unsqueeze(1);
        }
        let is_later = distances.lt(0.0).unsqueeze(1);
        let a = logits.masked_fill(&is_later, f64::NEG_INFINITY);
        a.softmax(-1, None).matmul(&v.unsqueeze(1))
    }

    /// Result and gradients.
    fn outcome(attend: impl Fn([&Tensor; 4]) -> Tensor, inputs: &[Tensor; 4]) -> Vec<Tensor> {
        let y = attend(inputs.each_ref());
        let index = Tensor::arange(y.size().iter().product::<i64>(), CPU);
        let cotangent = (index * 0.7)
            .sin()
            .view_as(&y)
            .to_device(y.device())
            .to_kind(y.kind());
        let loss = (&y * cotangent).sum(Kind::Double);
        let mut found = vec![y.detach()];
        found.extend(Tensor::run_backward(&[loss], inputs, false, false));
        found
    }

    fn inputs(n_near: i64, seq_len: i64, spread: f64) -> [Tensor; 4] {
        const WIDTH: i64 = 8;
        let normal = |shape: &[i64]| Tensor::randn(shape, CPU) * spread;
        [
            normal(&[3, seq_len, 2, WIDTH]),
            normal(&[3, seq_len, WIDTH]),
            normal(&[3, seq_len, WIDTH]),
            normal(&[3, seq_len, 2, n_near]),
        ]
        .map(|input| input.set_requires_grad(true))
    }

    /// Shorter and longer than a block, whole blocks and not, with no far key, one and many.
    #[test]
    fn results_and_gradients_are_those_of_the_formula() {
        let attend = |inputs: [&Tensor; 4]| attention(inputs, SCALE).unwrap();
        for (n_near, seq_len) in [
            (1, 1),
            (1, 2),
            (1, 19),
            (5, 5),
            (5, 6),
            (8, 8),
            (8, 9),
            (8, 32),
            (11, 16),
            (11, 50),
        ] {
            for spread in [1.0, 20.0] {
                let inputs = inputs(n_near, seq_len, spread);
                let (found, expected) = (outcome(attend, &inputs), outcome(oracle, &inputs));
                for (name, (found, expected)) in ["y", "dq", "dk", "dv", "dnear"]
                    .iter()
                    .zip(found.iter().zip(&expected))
                {
                    // A logit of size `spread²` is rounded by its own size, and gradients are sums of terms of that
                    // size, of which little may be left.
                    let tolerance = 1e-11 * spread * spread;
                    assert!(
                        found.allclose(expected, 1e-9, tolerance, false),
                        "{name} with {n_near} near keys, {seq_len} tokens, spread {spread}: off by {}",
                        (found - expected).abs().max().double_value(&[])
                    );
                }
            }
        }
    }

    /// In single and half precision, on the CPU and where there is a GPU, the errors are those of rounding.
    #[test]
    fn narrow_types_only_round() {
        let has_cuda = moeut_torch::cuda::load().unwrap_or(false);
        let devices = [Device::Cpu, Device::Cuda(0)];
        let exact = inputs(16, 150, 1.0);
        let expected = outcome(oracle, &exact);
        for &device in devices.iter().take(1 + usize::from(has_cuda)) {
            for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 3e-2)] {
                let inputs = exact.each_ref().map(|input| {
                    let narrow = input.detach().to_device(device).to_kind(kind);
                    narrow.set_requires_grad(true)
                });
                let found = outcome(|inputs| attention(inputs, SCALE).unwrap(), &inputs);
                for (found, expected) in found.iter().zip(&expected) {
                    let found = found.to_device(Device::Cpu).to_kind(Kind::Double);
                    let error = (found - expected).norm() / expected.norm();
                    let error = error.double_value(&[]);
                    assert!(error < tolerance, "{device:?} {kind:?}: {error}");
                }
            }
        }
    }
}
