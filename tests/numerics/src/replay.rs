//! Runs a fixture: the recorded steps with the model in its plugin, and the error of every recorded quantity.

use crate::errors::{Errors, MixedBounds, tolerance};
use crate::fixture::{Fixture, Step};
use crate::placement::Placement;
use crate::plugins::KernelPlugin;
use crate::subject::Subject;
use crate::{Result, error_of, untied};
use moeut_plugin_api::{DType, Past};
use moeut_torch::optim::{AdamConfig, AdamTensors, clip_grad_norm_, fused_adamw_};
use std::collections::BTreeMap;
use tch::{Device, Kind, Reduction, Tensor};

/// Rounding of a single-precision gradient, as a share of the tensor's largest; up to 1.1e-6 was measured.
const GRAD_ROUNDING: f64 = 1e-6;
/// Optimizer steps that a fixture records.
const N_STEPS: f64 = 3.0;
/// How much wider the bound of ‖a − b‖ / ‖b‖ of a parameter is, which has no slack for rounding: a single element whose
/// gradient is near Adam's epsilon makes up 9.5e-6 of it in fixture 01.
const BY_NORM: f64 = 5.0;
/// The token whose logits count in mixed precision: of a quarter the error is smaller.
const QUARTILE: f64 = 0.25;

/// Repeats the recorded steps and compares with the reference's double-precision run: everything in full precision, in
/// mixed precision what [`MixedBounds`] names.
///
/// Parameters after the steps are not compared in mixed precision. They are in fp32, and Adam makes their first changes
/// from the signs of gradients, so that what rounding does to small gradients would count as much as all else.
///
/// On GPUs, of a fixture that [`Fixture::balances_by_order`] only what its regularizer does not reach: logits and loss of
/// the first step.
///
/// # Errors
/// If the fixture is not one of the model's, and whatever model or kernel say.
pub fn replay(fixture: &Fixture, placement: Placement, kernel: &KernelPlugin) -> Result<Errors> {
    let mut subject = Subject::of(fixture, placement, kernel)?;
    let mut adam = Adam::new(fixture, &subject)?;
    let mut errors = Errors::new(fixture.below("param").count());
    let bounds = ScalarBounds::new(placement);
    if placement.device != moeut_plugin_api::Device::Cpu && fixture.balances_by_order()? {
        let pass = Pass::run(fixture, 0, &mut subject, placement)?;
        pass.compare_logits(fixture, placement, &mut errors)?;
        let expected = fixture.meta.fp64.steps.first();
        let expected = expected.ok_or("no step is recorded")?.loss;
        let error = error_of::scalar(pass.loss.double_value(&[]), expected);
        errors.add("loss", "step 0", error, bounds.loss);
        return Ok(errors);
    }
    for (index, expected) in fixture.meta.fp64.steps.iter().enumerate() {
        let pass = Pass::run(fixture, index, &mut subject, placement)?;
        if index == 0 {
            pass.compare_regularizers(fixture, bounds.reg, &mut errors);
            pass.compare_logits(fixture, placement, &mut errors)?;
            compare_grads(fixture, &subject, placement, &mut errors)?;
        }
        let norm = adam.step(&subject)?;
        pass.compare_scalars(index, *expected, &norm, bounds, &mut errors);
    }
    if placement.is_mixed() {
        untied::compare(fixture, placement, kernel, &mut errors)?;
    } else {
        compare_after(fixture, &subject, placement, adam.config.lr, &mut errors)?;
    }
    Ok(errors)
}

/// Compares the parameters after all steps.
fn compare_after(
    fixture: &Fixture,
    subject: &Subject,
    placement: Placement,
    lr: f64,
    errors: &mut Errors,
) -> Result<()> {
    let bound = tolerance(placement.dtype);
    for (name, expected) in fixture.below("after3") {
        let parameter = trained(subject, name)?.detach().to_device(Device::Cpu);
        let by_norm = error_of::norm(&parameter, expected);
        errors.add("after3_norm", name, by_norm, bound * BY_NORM);
        let raw = error_of::tensor(&parameter, expected);
        if placement.dtype == DType::F64 {
            errors.add("after3", name, raw, bound);
        } else {
            let first_grad = fixture.tensor(&format!("grad.{name}"))?;
            let parameter = without_adam_rounding(&parameter, expected, first_grad, lr);
            let error = error_of::tensor(&parameter, expected);
            errors.add("after3", name, error, bound);
            // Shown, but without a bound: see `without_adam_rounding`.
            errors.add("after3_raw", name, raw, f64::INFINITY);
        }
    }
    Ok(())
}

/// What errors of a step's scalars may be.
#[derive(Debug, Clone, Copy)]
struct ScalarBounds {
    loss: f64,
    reg: f64,
    grad_norm: f64,
}

impl ScalarBounds {
    fn new(placement: Placement) -> Self {
        let dtype = placement.dtype;
        let [loss, reg, grad_norm] = if placement.is_mixed() {
            let bounds = MixedBounds::new(placement);
            [bounds.loss, bounds.reg, bounds.grad_norm]
        } else {
            [tolerance(dtype); 3]
        };
        Self {
            loss,
            reg,
            grad_norm,
        }
    }
}

/// One forward and backward pass.
pub(crate) struct Pass {
    /// `[seq_len, batch, vocab_size]`.
    pub(crate) logits: Tensor,
    /// By name.
    pub(crate) regularizers: BTreeMap<String, Tensor>,
    loss: Tensor,
    reg_loss: Tensor,
    total: Tensor,
}

impl Pass {
    /// Runs the recorded step of this number, and leaves its gradients in the subject.
    pub(crate) fn run(
        fixture: &Fixture,
        index: usize,
        subject: &mut Subject,
        placement: Placement,
    ) -> Result<Self> {
        let tokens = fixture
            .tensor(&format!("input.tokens.step{index}"))?
            .to_kind(Kind::Int64)
            .to_device(moeut_torch::device(placement.device));
        let seq_len = tokens.size()[0] - 1;
        let past = if fixture.meta.state_carry {
            Past::Segments {
                slot: 0,
                is_reset: index == 0,
            }
        } else {
            Past::None
        };
        let (logits, regularizers) = {
            let _mixed = placement.autocast()?;
            subject.forward(&tokens.narrow(0, 0, seq_len), past)?
        };
        let loss = mean_loss(&logits, &tokens.narrow(0, 1, seq_len));
        let weight = fixture.number("reg")?.unwrap_or(1.0);
        let sum = |sum, value| sum + value;
        let reg_loss = regularizers.values().fold(loss.zeros_like(), sum) * weight;
        let total = &loss + &reg_loss;
        for parameter in subject.trainable.values_mut() {
            parameter.zero_grad();
        }
        let scale = placement.loss_scale();
        (&total * scale).backward();
        // A gradient that overflowed is not finite after this either, which no bound lets pass.
        let grads = subject.trainable.values().map(Tensor::grad);
        for mut grad in grads.filter(Tensor::defined) {
            let _ = grad.g_div_scalar_(scale);
        }
        Ok(Self {
            logits,
            regularizers,
            loss,
            reg_loss,
            total,
        })
    }

    /// A regularizer's value; 0 if the model has none of this name.
    pub(crate) fn regularizer(&self, name: &str) -> f64 {
        let value = self.regularizers.get(name);
        value.map_or(0.0, |value| value.double_value(&[]))
    }

    fn compare_regularizers(&self, fixture: &Fixture, bound: f64, errors: &mut Errors) {
        let recorded = &fixture.meta.fp64.reg;
        for name in recorded.keys().chain(self.regularizers.keys()) {
            let expected = recorded.get(name).copied().unwrap_or(0.0);
            let error = error_of::scalar(self.regularizer(name), expected);
            errors.add("reg", name, error, bound);
        }
    }

    /// Compares logits, which are recorded of the first step only: each of them, in mixed precision what selections that
    /// differ leave of them.
    fn compare_logits(
        &self,
        fixture: &Fixture,
        placement: Placement,
        errors: &mut Errors,
    ) -> Result<()> {
        let expected = fixture.tensor("expected.logits")?;
        let (error, bound) = if placement.is_mixed() {
            let bound = MixedBounds::new(placement).logits;
            let error = error_of::quantile_of_rows(&self.logits, expected, QUARTILE);
            (error, bound)
        } else {
            let error = error_of::tensor(&self.logits, expected);
            (error, tolerance(placement.dtype))
        };
        errors.add("logits", "step 0", error, bound);
        Ok(())
    }

    fn compare_scalars(
        &self,
        index: usize,
        expected: Step,
        norm: &Tensor,
        bounds: ScalarBounds,
        errors: &mut Errors,
    ) {
        let at = format!("step {index}");
        let norm_expected = expected.grad_norm_before_clip;
        for (quantity, value, expected, bound) in [
            ("loss", &self.loss, expected.loss, bounds.loss),
            ("reg", &self.reg_loss, expected.reg_loss, bounds.reg),
            ("total", &self.total, expected.total_loss, bounds.loss),
            ("grad_norm", norm, norm_expected, bounds.grad_norm),
        ] {
            let error = error_of::scalar(value.double_value(&[]), expected);
            errors.add(quantity, &at, error, bound);
        }
    }
}

/// Compares gradients, which are recorded of the first step only: each of them, in mixed precision all together, for
/// selections that differ leave no more.
fn compare_grads(
    fixture: &Fixture,
    subject: &Subject,
    placement: Placement,
    errors: &mut Errors,
) -> Result<()> {
    let (mut grads, mut recorded) = (Vec::new(), Vec::new());
    for (name, expected) in fixture.below("grad") {
        let grad = grad_like(subject, name, expected)?;
        if !placement.is_mixed() {
            let error = error_of::tensor(&grad, expected);
            errors.add("grad", name, error, tolerance(placement.dtype));
        }
        grads.push(grad);
        recorded.push(expected.shallow_clone());
    }
    if placement.is_mixed() {
        let error = error_of::norm_of_all(&grads, &recorded);
        let bound = MixedBounds::new(placement).grads;
        errors.add("grads", "step 0", error, bound);
    }
    Ok(())
}

/// Mean cross-entropy of the next tokens, in nats; at least in fp32, whatever the logits are, as the host's.
fn mean_loss(logits_tbv: &Tensor, targets_tb: &Tensor) -> Tensor {
    let kind = match logits_tbv.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let logits_nv = logits_tbv.reshape([-1, logits_tbv.size()[2]]).to_kind(kind);
    let targets_n = targets_tb.reshape([-1]);
    logits_nv.cross_entropy_loss(&targets_n, None::<&Tensor>, Reduction::Mean, -100, 0.0)
}

/// The gradient of a parameter; zeros like what is expected if none reaches it.
pub(crate) fn grad_like(subject: &Subject, name: &str, expected: &Tensor) -> Result<Tensor> {
    let grad = trained(subject, name)?.grad();
    Ok(if grad.defined() {
        grad
    } else {
        expected.zeros_like()
    })
}

fn trained<'a>(subject: &'a Subject, name: &str) -> Result<&'a Tensor> {
    let parameter = subject.trainable.get(name);
    Ok(parameter.ok_or_else(|| format!("the model does not train `{name}`"))?)
}

/// `parameter`, moved towards `expected` by at most what rounding of the gradient explains.
///
/// ```text
/// slack = n_steps · lr · min(2, GRAD_ROUNDING · max|g| / |g|),   0 where g = 0
/// ```
///
/// Adam's first step is `lr · g / |g|`: an element whose gradient is 1e-6 of its tensor's largest moves as far as all
/// others, in a direction that is mostly rounding (one or two elements in a thousand; without this, the worst of them
/// is off by 1.9e-4, in fixture 01). For a gradient of a tenth of the largest the slack is 3e-8. Double precision gets none.
fn without_adam_rounding(
    parameter: &Tensor,
    expected: &Tensor,
    first_grad: &Tensor,
    lr: f64,
) -> Tensor {
    let size = first_grad.abs();
    let noise = (size.max() * GRAD_ROUNDING / &size).clamp_max(2.0);
    let slack = (noise * (N_STEPS * lr)).where_self(&size.gt(0.0), &size);
    let difference = parameter - expected;
    let excess = (difference.abs() - slack).clamp_min(0.0) * difference.sign();
    expected + excess
}

/// The fixture's optimizer.
struct Adam {
    config: AdamConfig,
    max_norm: f64,
    names: Vec<String>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl Adam {
    fn new(fixture: &Fixture, subject: &Subject) -> Result<Self> {
        let optimizer = fixture.meta.args_effective.get("optimizer");
        if optimizer.is_some_and(|optimizer| optimizer != "adamw") {
            return Err(format!("{} was not recorded with AdamW", fixture.name).into());
        }
        let number = |flag: &str| -> Result<f64> {
            let missing = || format!("{} has no {flag}", fixture.name);
            Ok(fixture.number(flag)?.ok_or_else(missing)?)
        };
        let [beta1, beta2] = fixture.betas()?;
        let without_grad = &fixture.meta.fp64.params_without_grad;
        let names = subject
            .trainable
            .keys()
            .filter(|&name| !without_grad.contains(name));
        let names: Vec<String> = names.cloned().collect();
        let zeros = || {
            names
                .iter()
                .map(|name| subject.trainable[name].detach().zeros_like())
        };
        Ok(Self {
            config: AdamConfig {
                lr: number("lr")?,
                beta1,
                beta2,
                eps: number("adam.eps")?,
                weight_decay: number("wd")?,
            },
            max_norm: fixture.number("grad_clip")?.unwrap_or(f64::INFINITY),
            exp_avg: zeros().collect(),
            exp_avg_sq: zeros().collect(),
            steps: zeros()
                .map(|like| Tensor::zeros([], (Kind::Float, like.device())))
                .collect(),
            names,
        })
    }

    /// Clips and steps; gives the norm before clipping.
    fn step(&mut self, subject: &Subject) -> Result<Tensor> {
        let params: Vec<&Tensor> = self
            .names
            .iter()
            .map(|name| &subject.trainable[name])
            .collect();
        let grads: Vec<Tensor> = params.iter().map(|param| param.grad()).collect();
        let grads: Vec<&Tensor> = grads.iter().collect();
        let norm = clip_grad_norm_(&grads, self.max_norm)?.total;
        let tensors = AdamTensors {
            params: &params,
            grads: &grads,
            exp_avg: &self.exp_avg.iter().collect::<Vec<_>>(),
            exp_avg_sq: &self.exp_avg_sq.iter().collect::<Vec<_>>(),
            steps: &self.steps.iter().collect::<Vec<_>>(),
        };
        tch::no_grad(|| fused_adamw_(&tensors, &self.config, None))?;
        Ok(norm)
    }
}
