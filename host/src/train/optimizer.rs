//! AdamW over all trainable parameters, fused, with decoupled decay on every one of them (as the reference).

use super::TrainError;
use crate::args::OptimizerConfig;
use moeut_torch::error::OrPluginError;
use moeut_torch::optim::{AdamConfig, AdamTensors, clip_grad_norm_, fused_adamw_, global_norm};
use tch::{Kind, Tensor};

/// Optimizer state beside the parameters that it updates.
pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
}

/// One parameter with its moments.
struct Slot {
    name: String,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    /// Updates so far, a float on the parameter's device, because the fused kernel counts there.
    step: Tensor,
}

impl Optimizer {
    /// Fresh state for `params`.
    pub fn new(config: OptimizerConfig, params: &[(String, Tensor)]) -> Self {
        let slots = params
            .iter()
            .map(|(name, param)| Slot {
                name: name.clone(),
                param: param.shallow_clone(),
                exp_avg: param.zeros_like().detach(),
                exp_avg_sq: param.zeros_like().detach(),
                step: Tensor::zeros([], (Kind::Float, param.device())),
            })
            .collect();
        Self { config, slots }
    }

    /// Forgets the gradients of the last step.
    pub fn zero_grads(&mut self) {
        for slot in &mut self.slots {
            slot.param.zero_grad();
        }
    }

    /// Limits the norm of all gradients together and returns what it was; a scalar on the device, no sync.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn clip_grads(&self) -> Result<Tensor, TrainError> {
        let grads = self.grads();
        let grads: Vec<&Tensor> = grads.iter().collect();
        let norm = match self.config.max_grad_norm {
            Some(max_norm) => clip_grad_norm_(&grads, max_norm),
            None => global_norm(&grads),
        };
        Ok(norm.or_plugin_error("gradients cannot be clipped")?)
    }

    /// Updates every parameter that has a gradient.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn step(&mut self, lr: f64) -> Result<(), TrainError> {
        let active: Vec<(&Slot, Tensor)> = self
            .slots
            .iter()
            .map(|slot| (slot, slot.param.grad()))
            .filter(|(_, grad)| grad.defined())
            .collect();
        let column = |pick: fn(&Slot) -> &Tensor| active.iter().map(move |(slot, _)| pick(slot));
        let config = AdamConfig {
            lr,
            beta1: self.config.adam.betas[0],
            beta2: self.config.adam.betas[1],
            eps: self.config.adam.eps,
            weight_decay: self.config.weight_decay,
        };
        let tensors = AdamTensors {
            params: &column(|slot| &slot.param).collect::<Vec<_>>(),
            grads: &active.iter().map(|(_, grad)| grad).collect::<Vec<_>>(),
            exp_avg: &column(|slot| &slot.exp_avg).collect::<Vec<_>>(),
            exp_avg_sq: &column(|slot| &slot.exp_avg_sq).collect::<Vec<_>>(),
            steps: &column(|slot| &slot.step).collect::<Vec<_>>(),
        };
        Ok(fused_adamw_(&tensors, &config).or_plugin_error("the optimizer cannot step")?)
    }

    fn grads(&self) -> Vec<Tensor> {
        self.slots
            .iter()
            .map(|slot| slot.param.grad())
            .filter(Tensor::defined)
            .collect()
    }

    /// All state by name, sharing storage: for checkpoints, and to copy a checkpoint into.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        self.slots
            .iter()
            .flat_map(|slot| {
                [
                    (
                        format!("exp_avg/{}", slot.name),
                        slot.exp_avg.shallow_clone(),
                    ),
                    (
                        format!("exp_avg_sq/{}", slot.name),
                        slot.exp_avg_sq.shallow_clone(),
                    ),
                    (format!("step/{}", slot.name), slot.step.shallow_clone()),
                ]
            })
            .collect()
    }
}
