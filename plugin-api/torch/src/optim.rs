//! Optimizer steps and gradient clipping as one kernel over many tensors. No schedule, no parameter groups, no state:
//! the caller owns the moments and the step counters.
//!
//! Nothing here waits for the device: norms and factors stay tensors.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use tch::{TchError, Tensor};
use torch_sys::C_tensor;

use crate::ffi::{self, check};
use crate::list::List;

/// What one Adam step works on: entry `i` of each list belongs to parameter `i`.
#[derive(Debug, Clone, Copy)]
pub struct AdamTensors<'a> {
    /// Parameters, changed in place. Devices and element types may be mixed.
    pub params: &'a [&'a Tensor],
    /// Gradients, of the shape, type and device of their parameters.
    pub grads: &'a [&'a Tensor],
    /// First moments, changed in place; of the parameters' shape, type, device and strides.
    pub exp_avg: &'a [&'a Tensor],
    /// Second moments, as `exp_avg`.
    pub exp_avg_sq: &'a [&'a Tensor],
    /// Steps done so far, one `Float` on the parameter's device each; incremented by one before it is used.
    pub steps: &'a [&'a Tensor],
}

/// The numbers of Adam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment per step, in `[0, 1)`.
    pub beta1: f64,
    /// Decay of the second moment per step, in `[0, 1)`.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled (AdamW) or added to the gradient (Adam).
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        }
    }
}

impl AdamConfig {
    fn check(&self) -> Result<(), TchError> {
        let is_size = |x: f64| x.is_finite() && x >= 0.0;
        let is_decay = |x: f64| (0.0..1.0).contains(&x);
        let are_valid = is_size(self.lr)
            && is_size(self.eps)
            && is_size(self.weight_decay)
            && is_decay(self.beta1)
            && is_decay(self.beta2);
        if are_valid {
            Ok(())
        } else {
            Err(TchError::Convert(format!(
                "{self:?} needs betas in [0, 1) and nothing below 0"
            )))
        }
    }
}

/// One step of AdamW over all parameters.
///
/// ```text
/// t ← t + 1;  p ← p · (1 - lr · wd)
/// m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²
/// p ← p - lr / (1 - β₁ᵗ) · m / (√(v / (1 - β₂ᵗ)) + eps)
/// ```
///
/// Where `skip`, a `Float` of one element, is 1 on the device, nothing changes, whatever the gradients are.
///
/// # Errors
/// If the lists do not match, or if a number of `config` is out of range; then nothing was changed.
///
/// # Source
/// Loshchilov and Hutter, arXiv:1711.05101; the kernel is libtorch's `_fused_adamw_`.
pub fn fused_adamw_(
    tensors: &AdamTensors,
    config: &AdamConfig,
    skip: Option<&Tensor>,
) -> Result<(), TchError> {
    fused(tensors, config, skip, true)
}

/// One step of Adam: as [`fused_adamw_`], with `g ← g + wd · p` instead of the decay of `p`.
///
/// # Errors
/// As [`fused_adamw_`].
///
/// # Source
/// Kingma and Ba, arXiv:1412.6980; the kernel is libtorch's `_fused_adam_`.
pub fn fused_adam_(
    tensors: &AdamTensors,
    config: &AdamConfig,
    skip: Option<&Tensor>,
) -> Result<(), TchError> {
    fused(tensors, config, skip, false)
}

fn fused(
    tensors: &AdamTensors,
    config: &AdamConfig,
    skip: Option<&Tensor>,
    is_decoupled: bool,
) -> Result<(), TchError> {
    config.check()?;
    let params = List::of(tensors.params)?;
    let grads = List::of(tensors.grads)?;
    let exp_avg = List::of(tensors.exp_avg)?;
    let exp_avg_sq = List::of(tensors.exp_avg_sq)?;
    let steps = List::of(tensors.steps)?;
    // SAFETY: lists and flag outlive the call; the shim checks that their tensors match.
    unsafe {
        check(ffi::moeut_fused_adam(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avg.as_ptr(),
            exp_avg_sq.as_ptr(),
            steps.as_ptr(),
            config.lr,
            config.beta1,
            config.beta2,
            config.weight_decay,
            config.eps,
            is_decoupled,
            optional(skip),
        ))
    }
}

/// What one step of gradient descent with momentum works on: entry `i` of each list belongs to parameter `i`.
#[derive(Debug, Clone, Copy)]
pub struct SgdTensors<'a> {
    /// Parameters, changed in place. Devices and element types may be mixed.
    pub params: &'a [&'a Tensor],
    /// Gradients, of the shape, type and device of their parameters.
    pub grads: &'a [&'a Tensor],
    /// Velocities, changed in place; of the parameters' shape, type, device and strides, zero before the first step.
    pub momentum_buffer: &'a [&'a Tensor],
}

/// The numbers of gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity per step.
    pub momentum: f64,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
}

/// One step of gradient descent with momentum over all parameters.
///
/// ```text
/// g ← g + wd · p;  b ← momentum · b + g;  p ← p - lr · b
/// ```
///
/// `skip` as in [`fused_adamw_`].
///
/// # Errors
/// If the lists do not match, or if a number of `config` is negative or not finite; then nothing was changed.
///
/// # Source
/// PyTorch, `torch.optim.SGD` without dampening; the kernel is libtorch's `_fused_sgd_`.
pub fn fused_sgd_(
    tensors: &SgdTensors,
    config: &SgdConfig,
    skip: Option<&Tensor>,
) -> Result<(), TchError> {
    check_sizes(config, &[config.lr, config.momentum, config.weight_decay])?;
    let params = List::of(tensors.params)?;
    let grads = List::of(tensors.grads)?;
    let buffers = List::of(tensors.momentum_buffer)?;
    // SAFETY: lists and flag outlive the call; the shim checks that their tensors match.
    unsafe {
        check(ffi::moeut_fused_sgd(
            params.as_ptr(),
            grads.as_ptr(),
            buffers.as_ptr(),
            config.lr,
            config.momentum,
            config.weight_decay,
            optional(skip),
        ))
    }
}

/// What one Adagrad step works on: entry `i` of each list belongs to parameter `i`.
#[derive(Debug, Clone, Copy)]
pub struct AdagradTensors<'a> {
    /// Parameters, changed in place. Devices and element types may be mixed.
    pub params: &'a [&'a Tensor],
    /// Gradients, of the shape, type and device of their parameters.
    pub grads: &'a [&'a Tensor],
    /// Sums of squared gradients, changed in place; of the parameters' shape, type, device and strides.
    pub sum: &'a [&'a Tensor],
    /// Steps done so far, one `Float` on the parameter's device each; incremented by one.
    pub steps: &'a [&'a Tensor],
}

/// The numbers of Adagrad.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdagradConfig {
    /// Learning rate.
    pub lr: f64,
    /// Added to the root of the sum.
    pub eps: f64,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f64,
}

/// One step of Adagrad over all parameters.
///
/// ```text
/// g ← g + wd · p;  s ← s + g²;  p ← p - lr · g / (√s + eps)
/// ```
///
/// `skip` as in [`fused_adamw_`].
///
/// # Errors
/// If the lists do not match, or if a number of `config` is negative or not finite; then nothing was changed.
///
/// # Source
/// Duchi, Hazan and Singer, JMLR 12 (2011); the kernel is libtorch's `_fused_adagrad_`.
pub fn fused_adagrad_(
    tensors: &AdagradTensors,
    config: &AdagradConfig,
    skip: Option<&Tensor>,
) -> Result<(), TchError> {
    check_sizes(config, &[config.lr, config.eps, config.weight_decay])?;
    let params = List::of(tensors.params)?;
    let grads = List::of(tensors.grads)?;
    let sums = List::of(tensors.sum)?;
    let steps = List::of(tensors.steps)?;
    // SAFETY: lists and flag outlive the call; the shim checks that their tensors match.
    unsafe {
        check(ffi::moeut_fused_adagrad(
            params.as_ptr(),
            grads.as_ptr(),
            sums.as_ptr(),
            steps.as_ptr(),
            config.lr,
            config.weight_decay,
            config.eps,
            optional(skip),
        ))
    }
}

fn check_sizes(config: &impl std::fmt::Debug, numbers: &[f64]) -> Result<(), TchError> {
    if numbers.iter().all(|x| x.is_finite() && *x >= 0.0) {
        Ok(())
    } else {
        Err(TchError::Convert(format!(
            "{config:?} needs finite numbers, none below 0"
        )))
    }
}

fn optional(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

/// Makes the tensors forget their gradients, whose memory is free then.
///
/// # Errors
/// If a tensor is undefined.
pub fn clear_grads(tensors: &[&Tensor]) -> Result<(), TchError> {
    let tensors = List::of(tensors)?;
    // SAFETY: the list outlives the call.
    unsafe { check(ffi::moeut_clear_grads(tensors.as_ptr())) }
}

/// Gives each tensor a gradient, which is shared, not copied.
///
/// # Errors
/// If there are not as many gradients as tensors, or one does not have its tensor's shape, type and device.
pub fn set_grads(tensors: &[&Tensor], grads: &[&Tensor]) -> Result<(), TchError> {
    let (tensors, grads) = (List::of(tensors)?, List::of(grads)?);
    // SAFETY: the lists outlive the call, and the shim compares them.
    unsafe { check(ffi::moeut_set_grads(tensors.as_ptr(), grads.as_ptr())) }
}

/// Euclidean norms of tensors, on the first one's device.
#[derive(Debug)]
pub struct Norms {
    /// Over the elements of all tensors: a tensor without axes.
    pub total: Tensor,
    /// Of each tensor, in their order: one axis.
    pub each: Tensor,
}

impl Norms {
    fn read(list: &List) -> Result<Self, TchError> {
        let [total, each] = <[Tensor; 2]>::try_from(list.to_tensors()?).map_err(|tensors| {
            TchError::Torch(format!("the shim returned {} norms", tensors.len()))
        })?;
        Ok(Self { total, each })
    }
}

/// The norm of all tensors together, and of each.
///
/// An empty list has norm 0. The result has the tensors' element type, the widest one where they are mixed.
///
/// # Errors
/// If a tensor is undefined, sparse or not floating-point.
pub fn norms(tensors: &[&Tensor]) -> Result<Norms, TchError> {
    let tensors = List::of(tensors)?;
    let mut norms = List::new()?;
    // SAFETY: both lists outlive the call.
    unsafe { check(ffi::moeut_norms(tensors.as_ptr(), norms.as_mut_ptr())) }?;
    Norms::read(&norms)
}

/// Multiplies gradients in place by `inverse_scale` and sets `found` to 1 if one of them is not finite.
///
/// Both are `Float`s of one element, on the device of all gradients; `found` stays as it is where all are finite.
///
/// # Errors
/// If a tensor is undefined, sparse or not floating-point, or on another device.
///
/// # Source
/// PyTorch, `torch.amp.GradScaler.unscale_`.
pub fn unscale_(grads: &[&Tensor], inverse_scale: &Tensor, found: &Tensor) -> Result<(), TchError> {
    let grads = List::of(grads)?;
    // SAFETY: list and tensors outlive the call.
    unsafe {
        check(ffi::moeut_unscale(
            grads.as_ptr(),
            inverse_scale.as_ptr(),
            found.as_ptr(),
        ))
    }
}

/// Multiplies all gradients in place by `factor`, a tensor without axes on any device.
///
/// # Errors
/// If `factor` has axes, or if a gradient is undefined, sparse or not floating-point.
pub fn scale_grads_(grads: &[&Tensor], factor: &Tensor) -> Result<(), TchError> {
    let grads = List::of(grads)?;
    // SAFETY: list and tensor outlive the call.
    unsafe { check(ffi::moeut_scale(grads.as_ptr(), factor.as_ptr())) }
}

/// Scales gradients in place by `min(1, max_norm / (norm + 1e-6))`; returns the norm of all before, of each after.
///
/// A norm that is not finite makes the gradients so, too, as in PyTorch: the caller looks at the norm.
///
/// # Errors
/// If `max_norm` is negative or not a number, else as [`norms`].
///
/// # Source
/// PyTorch, `torch.nn.utils.clip_grad_norm_`.
pub fn clip_grad_norm_(grads: &[&Tensor], max_norm: f64) -> Result<Norms, TchError> {
    if max_norm.is_nan() || max_norm < 0.0 {
        return Err(TchError::Convert(format!(
            "`max_norm` is {max_norm}, it must be at least 0"
        )));
    }
    let grads = List::of(grads)?;
    let mut norms = List::new()?;
    // SAFETY: both lists outlive the call.
    unsafe {
        check(ffi::moeut_clip_grad_norm(
            grads.as_ptr(),
            max_norm,
            norms.as_mut_ptr(),
        ))
    }?;
    Norms::read(&norms)
}

#[cfg(test)]
mod tests;
