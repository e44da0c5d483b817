//! Runs a fixture: the recorded steps with the model in its plugin, and the error of every recorded quantity.

use crate::fixture::{Fixture, Step};
use crate::plugins::KernelPlugin;
use crate::subject::Subject;
use crate::{Result, error_of};
use moeut_plugin_api::{DType, Past};
use moeut_torch::optim::{AdamConfig, AdamTensors, clip_grad_norm_, fused_adamw_};
use std::collections::BTreeMap;
use std::fmt;
use tch::{Kind, Reduction, Tensor};

/// Rounding of a single-precision gradient, as a share of the tensor's largest; up to 1.1e-6 was measured.
const GRAD_ROUNDING: f64 = 1e-6;
/// Optimizer steps that a fixture records.
const N_STEPS: f64 = 3.0;
/// What is shown, but has no bound: see [`without_adam_rounding`].
const ONLY_SHOWN: &str = "after3_raw";
/// What has no slack for rounding, ‖a − b‖ / ‖b‖ of a parameter, and how much wider its bound is: a single element whose
/// gradient is near Adam's epsilon makes up 9.5e-6 of it in fixture 01.
const BY_NORM: (&str, f64) = ("after3_norm", 5.0);

/// The largest error of each quantity, and where it is.
#[derive(Debug, Default)]
pub struct Errors {
    /// Parameters and buffers that were found by their recorded names.
    n_found: usize,
    by_quantity: BTreeMap<&'static str, (f64, String)>,
}

impl Errors {
    fn add(&mut self, quantity: &'static str, at: &str, error: f64) {
        let worst = self
            .by_quantity
            .entry(quantity)
            .or_insert((0.0, String::new()));
        if error >= worst.0 {
            *worst = (error, at.to_owned());
        }
    }

    /// Where each error above its bound is: `tolerance`, but see [`BY_NORM`] and [`ONLY_SHOWN`].
    pub fn above(&self, tolerance: f64) -> Vec<String> {
        let bound = |quantity| match quantity {
            ONLY_SHOWN => f64::INFINITY,
            _ if quantity == BY_NORM.0 => tolerance * BY_NORM.1,
            _ => tolerance,
        };
        let quantities = self.by_quantity.iter();
        let too_large = quantities.filter(|(quantity, (error, _))| *error > bound(**quantity));
        too_large
            .map(|(quantity, (error, at))| format!("{quantity} of {at}: {error:.1e}"))
            .collect()
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  params {}", self.n_found)?;
        for (quantity, (error, _)) in &self.by_quantity {
            write!(f, "  {quantity} {error:.1e}")?;
        }
        Ok(())
    }
}

/// Repeats the recorded steps in `dtype` and compares everything with the reference's double-precision run.
///
/// # Errors
/// If the fixture is not one of the model's, and whatever model or kernel say.
pub fn replay(fixture: &Fixture, dtype: DType, kernel: &KernelPlugin) -> Result<Errors> {
    let mut subject = Subject::of(fixture, dtype, kernel)?;
    let mut adam = Adam::new(fixture, &subject)?;
    let mut errors = Errors {
        n_found: fixture.below("param").count(),
        ..Errors::default()
    };
    for (index, expected) in fixture.meta.fp64.steps.iter().enumerate() {
        let pass = Pass::run(fixture, index, &mut subject)?;
        if index == 0 {
            pass.compare(fixture, &subject, &mut errors)?;
        }
        let norm = adam.step(&subject)?;
        pass.compare_scalars(index, *expected, &norm, &mut errors);
    }
    for (name, expected) in fixture.below("after3") {
        let parameter = trained(&subject, name)?.detach();
        errors.add(BY_NORM.0, name, error_of::norm(&parameter, expected));
        let raw = error_of::tensor(&parameter, expected);
        if dtype == DType::F64 {
            errors.add("after3", name, raw);
        } else {
            let first_grad = fixture.tensor(&format!("grad.{name}"))?;
            let parameter = without_adam_rounding(&parameter, expected, first_grad, adam.config.lr);
            errors.add("after3", name, error_of::tensor(&parameter, expected));
            errors.add(ONLY_SHOWN, name, raw);
        }
    }
    Ok(errors)
}

/// One forward and backward pass.
struct Pass {
    logits: Tensor,
    regularizers: BTreeMap<String, Tensor>,
    loss: Tensor,
    reg_loss: Tensor,
    total: Tensor,
}

impl Pass {
    fn run(fixture: &Fixture, index: usize, subject: &mut Subject) -> Result<Self> {
        let tokens = fixture
            .tensor(&format!("input.tokens.step{index}"))?
            .to_kind(Kind::Int64);
        let seq_len = tokens.size()[0] - 1;
        let past = if fixture.meta.state_carry {
            Past::Segments {
                slot: 0,
                is_reset: index == 0,
            }
        } else {
            Past::None
        };
        let (logits, regularizers) = subject.forward(&tokens.narrow(0, 0, seq_len), past)?;
        let targets = tokens.narrow(0, 1, seq_len).reshape([-1]);
        let loss = logits.reshape([-1, logits.size()[2]]).cross_entropy_loss(
            &targets,
            None::<&Tensor>,
            Reduction::Mean,
            -100,
            0.0,
        );
        let weight = fixture.number("reg")?.unwrap_or(1.0);
        let reg_loss = regularizers.values().sum::<Tensor>() * weight;
        let total = &loss + &reg_loss;
        for parameter in subject.trainable.values_mut() {
            parameter.zero_grad();
        }
        total.backward();
        Ok(Self {
            logits,
            regularizers,
            loss,
            reg_loss,
            total,
        })
    }

    /// What is recorded of the first step only.
    fn compare(&self, fixture: &Fixture, subject: &Subject, errors: &mut Errors) -> Result<()> {
        let logits = error_of::tensor(&self.logits, fixture.tensor("expected.logits")?);
        errors.add("logits", "step 0", logits);
        let recorded = &fixture.meta.fp64.reg;
        let zero = Tensor::from(0.0);
        for name in recorded.keys().chain(self.regularizers.keys()) {
            let own = self.regularizers.get(name).unwrap_or(&zero);
            let expected = recorded.get(name).copied().unwrap_or(0.0);
            let error = error_of::scalar(own.double_value(&[]), expected);
            errors.add("reg", name, error);
        }
        for (name, expected) in fixture.below("grad") {
            let grad = trained(subject, name)?.grad();
            let grad = if grad.defined() {
                grad
            } else {
                expected.zeros_like()
            };
            errors.add("grad", name, error_of::tensor(&grad, expected));
        }
        Ok(())
    }

    fn compare_scalars(&self, index: usize, expected: Step, norm: &Tensor, errors: &mut Errors) {
        let at = format!("step {index}");
        for (quantity, value, expected) in [
            ("loss", &self.loss, expected.loss),
            ("reg", &self.reg_loss, expected.reg_loss),
            ("total", &self.total, expected.total_loss),
            ("grad_norm", norm, expected.grad_norm_before_clip),
        ] {
            let error = error_of::scalar(value.double_value(&[]), expected);
            errors.add(quantity, &at, error);
        }
    }
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
            steps: names.iter().map(|_| Tensor::from(0f32)).collect(),
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
