//! The optimizers over all trainable parameters, fused, one group: weight decay applies to every parameter (as the
//! reference). When an update is dropped is not decided here.

use super::TrainError;
use crate::args::{OptimizerConfig, OptimizerKind};
use moeut_torch::error::OrPluginError;
use moeut_torch::optim::{
    AdagradConfig, AdagradTensors, AdamConfig, AdamTensors, Norms, SgdConfig, SgdTensors,
    clear_grads, clip_grad_norm_, fused_adagrad_, fused_adam_, fused_adamw_, fused_sgd_, norms,
};
use tch::{Kind, Tensor};

/// The reference's constant, which no flag changes.
const SGD_MOMENTUM: f64 = 0.9;
/// PyTorch's default, which the reference takes.
const ADAGRAD_EPS: f64 = 1e-10;

/// Optimizer state beside the parameters that it updates. Its numbers (weight decay, betas, …) are those of the command
/// line, also after a resume.
pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
}

/// One parameter with its state.
struct Slot {
    name: String,
    param: Tensor,
    /// Tensors of the parameter's shape, in the order of [`moments`].
    moments: Vec<Tensor>,
    /// Updates so far, a float on the parameter's device, because the fused kernel counts there.
    step: Option<Tensor>,
}

/// Euclidean norms of the gradients of a step, on the device.
#[derive(Debug)]
pub struct GradNorms {
    /// Of all of them together, before clipping.
    pub total: Tensor,
    /// Of each, after clipping, if asked for: the parameters' names, and one axis of norms.
    pub by_parameter: Option<(Vec<String>, Tensor)>,
}

/// Names of a rule's state tensors, PyTorch's.
fn moments(kind: OptimizerKind) -> &'static [&'static str] {
    match kind {
        OptimizerKind::Adam | OptimizerKind::AdamW => &["exp_avg", "exp_avg_sq"],
        OptimizerKind::Sgd => &["momentum_buffer"],
        OptimizerKind::Adagrad => &["sum"],
    }
}

impl Optimizer {
    /// Fresh state for `params`.
    pub fn new(config: OptimizerConfig, params: &[(String, Tensor)]) -> Self {
        let slots = params
            .iter()
            .map(|(name, param)| Slot {
                name: name.clone(),
                param: param.shallow_clone(),
                moments: moments(config.kind)
                    .iter()
                    .map(|_| param.zeros_like().detach())
                    .collect(),
                step: (config.kind != OptimizerKind::Sgd)
                    .then(|| Tensor::zeros([], (Kind::Float, param.device()))),
            })
            .collect();
        Self { config, slots }
    }

    /// Forgets the gradients of the last step.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn zero_grads(&mut self) -> Result<(), TrainError> {
        let params: Vec<&Tensor> = self.slots.iter().map(|slot| &slot.param).collect();
        Ok(clear_grads(&params).or_plugin_error("gradients cannot be cleared")?)
    }

    /// Limits the norm of all gradients together. The norms stay on the device, nobody waits for them.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn clip_grads(&self, wants_each: bool) -> Result<GradNorms, TrainError> {
        let grads = self.grads();
        let tensors: Vec<&Tensor> = grads.iter().map(|(_, grad)| grad).collect();
        let norms = match self.config.max_grad_norm {
            Some(max_norm) => clip_grad_norm_(&tensors, max_norm),
            None => norms(&tensors),
        };
        let Norms { total, each } = norms.or_plugin_error("gradients cannot be clipped")?;
        let names = || grads.iter().map(|(name, _)| (*name).to_owned()).collect();
        Ok(GradNorms {
            total,
            by_parameter: wants_each.then(|| (names(), each)),
        })
    }

    /// Updates every parameter that has a gradient, unless `skip` (one float on the device) is 1.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn step(&mut self, lr: f64, skip: &Tensor) -> Result<(), TrainError> {
        let active: Vec<(&Slot, Tensor)> = self
            .slots
            .iter()
            .map(|slot| (slot, slot.param.grad()))
            .filter(|(_, grad)| grad.defined())
            .collect();
        let params: Vec<&Tensor> = active.iter().map(|(slot, _)| &slot.param).collect();
        let grads: Vec<&Tensor> = active.iter().map(|(_, grad)| grad).collect();
        let steps: Vec<&Tensor> = active
            .iter()
            .filter_map(|(slot, _)| slot.step.as_ref())
            .collect();
        let moment = |index: usize| -> Vec<&Tensor> {
            let slots = active.iter().map(|(slot, _)| *slot);
            slots.filter_map(|slot| slot.moments.get(index)).collect()
        };
        let (first, second) = (moment(0), moment(1));

        let weight_decay = self.config.weight_decay;
        let adam = AdamConfig {
            lr,
            beta1: self.config.adam.betas[0],
            beta2: self.config.adam.betas[1],
            eps: self.config.adam.eps,
            weight_decay,
        };
        let adam_tensors = AdamTensors {
            params: &params,
            grads: &grads,
            exp_avg: &first,
            exp_avg_sq: &second,
            steps: &steps,
        };
        let stepped = match self.config.kind {
            OptimizerKind::AdamW => fused_adamw_(&adam_tensors, &adam, Some(skip)),
            OptimizerKind::Adam => fused_adam_(&adam_tensors, &adam, Some(skip)),
            OptimizerKind::Sgd => fused_sgd_(
                &SgdTensors {
                    params: &params,
                    grads: &grads,
                    momentum_buffer: &first,
                },
                &SgdConfig {
                    lr,
                    momentum: SGD_MOMENTUM,
                    weight_decay,
                },
                Some(skip),
            ),
            OptimizerKind::Adagrad => fused_adagrad_(
                &AdagradTensors {
                    params: &params,
                    grads: &grads,
                    sum: &first,
                    steps: &steps,
                },
                &AdagradConfig {
                    lr,
                    eps: ADAGRAD_EPS,
                    weight_decay,
                },
                Some(skip),
            ),
        };
        Ok(stepped.or_plugin_error("the optimizer cannot step")?)
    }

    /// The gradients there are, by parameter.
    pub fn grads(&self) -> Vec<(&str, Tensor)> {
        self.slots
            .iter()
            .map(|slot| (slot.name.as_str(), slot.param.grad()))
            .filter(|(_, grad)| grad.defined())
            .collect()
    }

    /// All state by name, sharing storage: for checkpoints, and to copy a checkpoint into.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let names = moments(self.config.kind);
        self.slots
            .iter()
            .flat_map(|slot| {
                let of_moment = |(kind, moment): (&&str, &Tensor)| {
                    (format!("{kind}/{}", slot.name), moment.shallow_clone())
                };
                let step = slot.step.as_ref();
                let step = step.map(|step| (format!("step/{}", slot.name), step.shallow_clone()));
                names.iter().zip(&slot.moments).map(of_moment).chain(step)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;
    use tch::Device;

    fn optimizer(kind: OptimizerKind) -> (Optimizer, Tensor) {
        let config = OptimizerConfig {
            kind,
            weight_decay: 0.1,
            max_grad_norm: None,
            adam: args::AdamConfig {
                betas: [0.9, 0.99],
                eps: 1e-8,
            },
        };
        let param = Tensor::from_slice(&[1.0_f64, -2.0, 3.0]).set_requires_grad(true);
        let optimizer = Optimizer::new(config, &[("w".to_owned(), param.shallow_clone())]);
        (optimizer, param)
    }

    fn step(optimizer: &mut Optimizer, param: &Tensor, skip: f64) {
        optimizer.zero_grads().unwrap();
        (param * param).sum(Kind::Double).backward();
        let skip = Tensor::from(skip).to_kind(Kind::Float);
        optimizer.step(0.1, &skip).unwrap();
    }

    /// `w = [1, -2, 3]`, gradient `2 w`, `lr = wd = 0.1`: worked out with PyTorch's formulas, two steps each.
    #[test]
    fn each_rule_follows_pytorchs_formula() {
        let plain = |kind: OptimizerKind| -> Vec<f64> {
            let lr = 0.1;
            [1.0, -2.0, 3.0_f64]
                .into_iter()
                .map(|mut w| {
                    let (mut mean, mut square, mut momentum, mut sum) = (0.0, 0.0, 0.0, 0.0);
                    for step in 1..=2 {
                        let mut grad = 2.0 * w;
                        if kind == OptimizerKind::AdamW {
                            w -= lr * 0.1 * w;
                        } else {
                            grad += 0.1 * w;
                        }
                        mean = 0.9 * mean + 0.1 * grad;
                        square = 0.99 * square + 0.01 * grad * grad;
                        momentum = 0.9 * momentum + grad;
                        sum += grad * grad;
                        w -= lr
                            * match kind {
                                OptimizerKind::Adam | OptimizerKind::AdamW => {
                                    let mean_hat = mean / (1.0 - 0.9_f64.powi(step));
                                    let square_hat: f64 = square / (1.0 - 0.99_f64.powi(step));
                                    mean_hat / (square_hat.sqrt() + 1e-8)
                                }
                                OptimizerKind::Sgd => momentum,
                                OptimizerKind::Adagrad => grad / (sum.sqrt() + 1e-10),
                            };
                    }
                    w
                })
                .collect()
        };
        for kind in [
            OptimizerKind::Adam,
            OptimizerKind::AdamW,
            OptimizerKind::Sgd,
            OptimizerKind::Adagrad,
        ] {
            let (mut optimizer, param) = optimizer(kind);
            for skip in [0.0, 1.0, 0.0] {
                step(&mut optimizer, &param, skip);
            }
            let got: Vec<f64> = Vec::try_from(&param.detach()).unwrap();
            for (got, want) in got.iter().zip(plain(kind)) {
                assert!((got - want).abs() < 1e-12, "{kind:?}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn state_has_pytorchs_names() {
        let names = |kind| -> Vec<String> {
            let tensors = optimizer(kind).0.tensors();
            tensors.into_iter().map(|(name, _)| name).collect()
        };
        let adam = ["exp_avg/w", "exp_avg_sq/w", "step/w"];
        assert_eq!(names(OptimizerKind::AdamW), adam);
        assert_eq!(names(OptimizerKind::Adam), adam);
        assert_eq!(names(OptimizerKind::Sgd), ["momentum_buffer/w"]);
        assert_eq!(names(OptimizerKind::Adagrad), ["sum/w", "step/w"]);
    }

    #[test]
    fn a_parameter_without_a_gradient_stays() {
        let (mut optimizer, param) = optimizer(OptimizerKind::AdamW);
        step(&mut optimizer, &param, 0.0);
        optimizer.zero_grads().unwrap();
        let before = param.detach().copy();
        let no = Tensor::zeros([], (Kind::Float, Device::Cpu));
        optimizer.step(0.1, &no).unwrap();
        assert_eq!(param, before);
        assert!(optimizer.grads().is_empty());
    }
}
