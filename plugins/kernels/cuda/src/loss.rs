//! The loss of next-token prediction as one node of the graph, which keeps the logits and two numbers of each row.

use std::ffi::c_void;
use std::ptr;

use moeut_plugin_api::kernel::CrossEntropy;
use moeut_plugin_api::{PluginError, TensorHandle};
use moeut_torch::{Context, Function, IntoHandle, IntoTensor, OrPluginError, apply};
use tch::{Kind, Tensor};

use crate::module::Entry;
use crate::ops::{self, Ops, THREADS, aligned, blocks, narrow, pointer};

/// Threads that work on a row.
const WARP: i64 = 32;

/// See [`moeut_plugin_api::Kernel::cross_entropy`].
pub(crate) fn cross_entropy(
    call: CrossEntropy,
    open: impl FnOnce(&Tensor) -> Result<Ops, PluginError>,
) -> Result<TensorHandle, PluginError> {
    let (logits, targets) = (call.logits.into_tensor(), call.targets.into_tensor());
    let ops = open(&logits)?;
    let fits = matches!(
        (&logits.size()[..], &targets.size()[..]),
        (&[n_rows, width], &[n_targets]) if n_rows == n_targets && width > 0
    );
    if !fits || targets.kind() != Kind::Int64 || targets.device() != logits.device() {
        return Err(PluginError::new("the tensors of a loss do not fit")
            .why(format!(
                "logits are {:?} on {:?}, targets {:?} of {:?} on {:?}",
                logits.size(),
                logits.device(),
                targets.kind(),
                targets.size(),
                targets.device()
            ))
            .fix("pass logits [N, V] and targets [N] in int64, on the same GPU"));
    }
    apply(Losses { ops }, &[&logits, &targets])
        .map(|mut outputs| outputs.swap_remove(0).into_handle())
        .or_plugin_error("kernel `cuda` cannot compute the loss")
}

/// `losses` of `logits, targets`.
struct Losses {
    ops: Ops,
}

/// As `Losses` in the source of the kernels.
#[repr(C)]
struct RawLosses {
    logits: *const c_void,
    targets: *const c_void,
    losses: *mut c_void,
    largest: *mut c_void,
    sums: *mut c_void,
    loss_grads: *const c_void,
    logit_grads: *mut c_void,
    n_rows: i64,
    width: i32,
}

impl Losses {
    fn launch(&self, entry: Entry, raw: &RawLosses) -> ops::Result<()> {
        let n_blocks = blocks(raw.n_rows * WARP);
        self.ops.launch(entry, n_blocks, THREADS, 0, raw)
    }

    fn raw([logits, targets, largest, sums]: [&Tensor; 4]) -> ops::Result<RawLosses> {
        let (n_rows, width) = logits.size2()?;
        Ok(RawLosses {
            logits: pointer(logits),
            targets: pointer(targets),
            losses: ptr::null_mut(),
            largest: largest.data_ptr(),
            sums: sums.data_ptr(),
            loss_grads: ptr::null(),
            logit_grads: ptr::null_mut(),
            n_rows,
            width: narrow(width)?,
        })
    }
}

impl Function for Losses {
    /// See [`CrossEntropy`] for the equation.
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> ops::Result<Vec<Tensor>> {
        let [logits, targets] = inputs else {
            return Err("too few inputs".into());
        };
        let (logits, targets) = (aligned(logits)?, aligned(targets)?);
        let of_rows = || self.ops.empty(&targets.size(), Kind::Float);
        let (losses, largest, sums) = (of_rows()?, of_rows()?, of_rows()?);
        let kept = [&logits, &targets, &largest, &sums];
        let raw = RawLosses {
            losses: losses.data_ptr(),
            ..Self::raw(kept)?
        };
        self.launch(Entry::CrossEntropy, &raw)?;
        ctx.save(&kept)?;
        Ok(vec![losses])
    }

    /// `dlogits = (softmax(logits) − one-hot(target)) · dloss`, rounded once.
    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> ops::Result<Vec<Option<Tensor>>> {
        let saved = ctx.saved()?;
        let ([logits, targets, largest, sums], Some(Some(dlosses))) = (&saved[..], grads.first())
        else {
            return Ok(vec![None, None]);
        };
        let dlosses = aligned(dlosses)?;
        // Not in place: others may hold the logits.
        let dlogits = self.ops.empty(&logits.size(), logits.kind())?;
        let raw = RawLosses {
            loss_grads: pointer(&dlosses),
            logit_grads: dlogits.data_ptr(),
            ..Self::raw([logits, targets, largest, sums])?
        };
        self.launch(Entry::CrossEntropyBackward, &raw)?;
        Ok(vec![Some(dlogits), None])
    }
}
