//! The optimizers over all trainable parameters, fused, one group: weight decay applies to every parameter (as the
//! reference). When an update is dropped is not decided here.
//!
//! Of several processes each updates every parameter, or its shard of them (`-shard_optimizer`); the rules work on single
//! elements, so that both give the same.

use super::TrainError;
use super::run::Named;
use crate::args::{OptimizerConfig, OptimizerKind};
use crate::distributed::{Gradients, Group, elements};
use moeut_plugin_api::PluginError;
use moeut_torch::error::OrPluginError;
use moeut_torch::optim::{
    AdagradConfig, AdagradTensors, AdamConfig, AdamTensors, Norms, SgdConfig, SgdTensors,
    clear_grads, clip_grad_norm_, fused_adagrad_, fused_adam_, fused_adamw_, fused_sgd_, norms,
    set_grads,
};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The reference's constant, which no flag changes.
const SGD_MOMENTUM: f64 = 0.9;
/// PyTorch's default, which the reference takes.
const ADAGRAD_EPS: f64 = 1e-10;

/// Optimizer state beside the parameters that it updates. Its numbers (weight decay, betas, …) are those of the command
/// line, also after a resume.
pub struct Optimizer {
    config: OptimizerConfig,
    params: Named,
    slots: Vec<Slot>,
    gradients: Gradients,
    group: Group,
}

/// A parameter with its state, or the part of it that this process updates.
struct Slot {
    name: String,
    /// Index of the parameter.
    index: usize,
    /// Shares storage with the parameter.
    param: Tensor,
    /// Of the whole batch, from all processes.
    grad: Option<Tensor>,
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
    /// Fresh state for `params`, or for a shard of them.
    ///
    /// # Errors
    /// If their gradients cannot be watched.
    pub fn new(config: OptimizerConfig, params: Named, group: &Group) -> Result<Self, PluginError> {
        let tensors = params.iter().map(|(_, param)| param.shallow_clone());
        let tensors: Vec<Tensor> = tensors.collect();
        let gradients = Gradients::new(group, &tensors, config.is_sharded)?;
        let slots = gradients
            .pieces()
            .into_iter()
            .map(|piece| {
                let (name, param) = &params[piece.param];
                let param = if gradients.is_sharded() {
                    elements(param, &piece)
                } else {
                    param.shallow_clone()
                };
                Slot {
                    name: name.clone(),
                    index: piece.param,
                    grad: None,
                    moments: moments(config.kind)
                        .iter()
                        .map(|_| param.zeros_like().detach())
                        .collect(),
                    step: (config.kind != OptimizerKind::Sgd)
                        .then(|| Tensor::zeros([], (Kind::Float, param.device()))),
                    param,
                }
            })
            .collect();
        Ok(Self {
            config,
            params,
            slots,
            gradients,
            group: group.clone(),
        })
    }

    /// Forgets the gradients of the last step.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn zero_grads(&mut self) -> Result<(), TrainError> {
        for slot in &mut self.slots {
            slot.grad = None;
        }
        let params: Vec<&Tensor> = self.params.iter().map(|(_, param)| param).collect();
        Ok(clear_grads(&params).or_plugin_error("gradients cannot be cleared")?)
    }

    /// A backward pass begins; during the step's last one gradients are exchanged.
    pub fn expect(&self, is_last: bool) {
        self.gradients.expect(is_last);
    }

    /// From now on gradients are not exchanged: a step is repeated to look at it.
    pub fn isolate(&mut self) {
        self.gradients.isolate();
    }

    /// Takes in the gradients of the whole batch.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn collect(&mut self) -> Result<(), TrainError> {
        let grads = self.gradients.finish()?;
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            slot.grad = grad;
        }
        Ok(())
    }

    /// Limits the norm of all gradients together. The norms stay on the device, nobody waits for them.
    ///
    /// # Errors
    /// If libtorch refuses, or another process has ended.
    pub fn clip_grads(&self, wants_each: bool) -> Result<GradNorms, TrainError> {
        let grads = self.grads();
        let tensors: Vec<&Tensor> = grads.iter().map(|(_, grad)| grad).collect();
        if self.gradients.is_sharded() {
            return self.clip_shards(&tensors, wants_each);
        }
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

    /// A norm is the root of the sum of all processes' squares.
    fn clip_shards(&self, grads: &[&Tensor], wants_each: bool) -> Result<GradNorms, TrainError> {
        let _no_grad = tch::no_grad_guard();
        let Norms { each, .. } = norms(grads).or_plugin_error("gradients cannot be measured")?;
        let n_params = i64::try_from(self.params.len()).unwrap_or(i64::MAX);
        let with_grad = self.slots.iter().filter(|slot| slot.grad.is_some());
        let indices: Vec<i64> = with_grad
            .map(|slot| i64::try_from(slot.index).unwrap_or_default())
            .collect();
        let indices = Tensor::from_slice(&indices).to_device(each.device());
        let squares = Tensor::zeros([n_params], (Kind::Double, each.device()));
        let squares = squares.index_add(0, &indices, &each.to_kind(Kind::Double).square());
        self.group.sum(&[&squares])?;
        let total = squares.sum(Kind::Double).sqrt();
        let mut factor = total.ones_like();
        if let Some(max_norm) = self.config.max_grad_norm {
            // As libtorch's own clipping.
            factor = (max_norm / (&total + 1e-6)).clamp_max(1.0);
            for grad in grads {
                let mut grad = grad.shallow_clone();
                let factor = factor.to_kind(grad.kind());
                let _ = grad
                    .f_mul_(&factor)
                    .or_plugin_error("gradients cannot be clipped")?;
            }
        }
        let each = squares.sqrt() * factor;
        let names = || self.params.iter().map(|(name, _)| name.clone()).collect();
        Ok(GradNorms {
            total: total.to_kind(Kind::Float),
            by_parameter: wants_each.then(|| (names(), each)),
        })
    }

    /// Updates every parameter that has a gradient, unless `skip` (one float on the device) is 1.
    ///
    /// # Errors
    /// If libtorch refuses, or another process has ended.
    pub fn step(&mut self, lr: f64, skip: &Tensor) -> Result<(), TrainError> {
        let active: Vec<(&Slot, &Tensor)> = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot, slot.grad.as_ref()?)))
            .collect();
        let params: Vec<&Tensor> = active.iter().map(|(slot, _)| &slot.param).collect();
        let grads: Vec<&Tensor> = active.iter().map(|(_, grad)| *grad).collect();
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
        stepped.or_plugin_error("the optimizer cannot step")?;
        Ok(self.gradients.spread()?)
    }

    /// The gradients of the whole batch, by parameter; in a sharded run those of this process' parts.
    pub fn grads(&self) -> Vec<(&str, Tensor)> {
        let of_slot = |slot: &Slot| Some(slot.grad.as_ref()?.shallow_clone());
        self.slots
            .iter()
            .filter_map(|slot| Some((slot.name.as_str(), of_slot(slot)?)))
            .collect()
    }

    /// The gradients of this process' own microbatches so far, by parameter.
    pub fn own_grads(&self) -> Vec<(&str, Tensor)> {
        self.params
            .iter()
            .map(|(name, param)| (name.as_str(), param.grad()))
            .filter(|(_, grad)| grad.defined())
            .collect()
    }

    /// The same by the parameters' indices, for [`Self::set_grads`].
    pub(super) fn own_grads_by_index(&self) -> Vec<(usize, Tensor)> {
        let grads = self.params.iter().map(|(_, param)| param.grad());
        grads
            .enumerate()
            .filter(|(_, grad)| grad.defined())
            .collect()
    }

    /// Gives parameters gradients, shared, as a backward pass would.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub(super) fn set_grads(&self, grads: &[(usize, Tensor)]) -> Result<(), TrainError> {
        let params: Vec<&Tensor> = grads.iter().map(|(i, _)| &self.params[*i].1).collect();
        let grads: Vec<&Tensor> = grads.iter().map(|(_, grad)| grad).collect();
        Ok(set_grads(&params, &grads).or_plugin_error("gradients cannot be set")?)
    }

    /// Bytes of the state in this process.
    pub fn n_bytes(&self) -> u64 {
        let of_slot = |slot: &Slot| -> usize {
            let tensors = slot.moments.iter().chain(&slot.step);
            tensors
                .map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes())
                .sum()
        };
        self.slots.iter().map(of_slot).sum::<usize>() as u64
    }

    /// All state by name, for a checkpoint: in a sharded run that of all processes, put together.
    ///
    /// # Errors
    /// If another process has ended, or memory does not suffice.
    pub fn tensors(&self) -> Result<Named, PluginError> {
        if !self.gradients.is_sharded() {
            return Ok(self.own_tensors());
        }
        let mut all = Vec::new();
        for (index, kind) in moments(self.config.kind).iter().enumerate() {
            let own: Vec<Tensor> = self
                .slots
                .iter()
                .map(|slot| slot.moments[index].shallow_clone())
                .collect();
            let whole: Vec<Tensor> = self
                .params
                .iter()
                .map(|(_, param)| param.zeros_like().detach())
                .collect();
            self.gradients
                .gather(&own, &whole.iter().collect::<Vec<_>>())?;
            let names = self.params.iter().map(|(name, _)| format!("{kind}/{name}"));
            all.extend(names.zip(whole));
        }
        if self.config.kind != OptimizerKind::Sgd {
            // Of the parts of one parameter all have made as many updates.
            let steps = self.steps();
            self.group.max(&[&steps])?;
            let names = self.params.iter().map(|(name, _)| format!("step/{name}"));
            all.extend(names.zip(steps.unbind(0)));
        }
        Ok(all)
    }

    /// Updates of each parameter, 0 where this process has no part of it.
    fn steps(&self) -> Tensor {
        let device = self
            .params
            .first()
            .map_or(Device::Cpu, |(_, param)| param.device());
        let n_params = i64::try_from(self.params.len()).unwrap_or(i64::MAX);
        let steps = Tensor::zeros([n_params], (Kind::Float, device));
        for slot in &self.slots {
            if let Some(step) = &slot.step {
                let index = i64::try_from(slot.index).unwrap_or_default();
                steps.get(index).copy_(step);
            }
        }
        steps
    }

    /// Puts a checkpoint's state in place of what is there. The first process has it, the others get it.
    ///
    /// # Errors
    /// If the checkpoint does not fit, or another process has ended.
    pub fn restore(
        &self,
        load: impl FnOnce(&Named) -> Result<(), PluginError>,
    ) -> Result<(), PluginError> {
        let _no_grad = tch::no_grad_guard();
        let whole = if self.gradients.is_sharded() {
            self.fresh()
        } else {
            self.own_tensors()
        };
        if self.group.is_first() {
            load(&whole)?;
        }
        let tensors: Vec<&Tensor> = whole.iter().map(|(_, tensor)| tensor).collect();
        self.group.broadcast(&tensors, 0)?;
        if !self.gradients.is_sharded() {
            return Ok(());
        }
        let whole: BTreeMap<&str, &Tensor> = whole
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
            .collect();
        let of = |kind: &str, slot: &Slot| {
            whole[format!("{kind}/{}", slot.name).as_str()].shallow_clone()
        };
        for (slot, piece) in self.slots.iter().zip(self.gradients.pieces()) {
            for (kind, moment) in moments(self.config.kind).iter().zip(&slot.moments) {
                moment
                    .shallow_clone()
                    .copy_(&elements(&of(kind, slot), &piece));
            }
            if let Some(step) = &slot.step {
                step.shallow_clone().copy_(&of("step", slot));
            }
        }
        Ok(())
    }

    /// State of whole parameters, before the first update.
    fn fresh(&self) -> Named {
        let names = moments(self.config.kind);
        let has_steps = self.config.kind != OptimizerKind::Sgd;
        let of_param = |(name, param): &(String, Tensor)| -> Named {
            let moments = names
                .iter()
                .map(|kind| (format!("{kind}/{name}"), param.zeros_like().detach()));
            let step = has_steps.then(|| {
                (
                    format!("step/{name}"),
                    Tensor::zeros([], (Kind::Float, param.device())),
                )
            });
            moments.chain(step).collect()
        };
        self.params.iter().flat_map(of_param).collect()
    }

    /// State by name, sharing storage.
    fn own_tensors(&self) -> Named {
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

    fn optimizer(kind: OptimizerKind) -> (Optimizer, Tensor) {
        let config = OptimizerConfig {
            kind,
            weight_decay: 0.1,
            max_grad_norm: None,
            is_sharded: false,
            adam: args::AdamConfig {
                betas: [0.9, 0.99],
                eps: 1e-8,
            },
        };
        let param = Tensor::from_slice(&[1.0_f64, -2.0, 3.0]).set_requires_grad(true);
        let params = vec![("w".to_owned(), param.shallow_clone())];
        let optimizer = Optimizer::new(config, params, &Group::single()).unwrap();
        (optimizer, param)
    }

    fn step(optimizer: &mut Optimizer, param: &Tensor, skip: f64) {
        optimizer.zero_grads().unwrap();
        (param * param).sum(Kind::Double).backward();
        optimizer.collect().unwrap();
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
            let tensors = optimizer(kind).0.tensors().unwrap();
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
        optimizer.collect().unwrap();
        let before = param.detach().copy();
        let no = Tensor::zeros([], (Kind::Float, Device::Cpu));
        optimizer.step(0.1, &no).unwrap();
        assert_eq!(param, before);
        assert!(optimizer.grads().is_empty());
    }
}
