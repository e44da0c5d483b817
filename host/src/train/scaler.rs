//! Dynamic loss scaling for float16, whose gradients underflow otherwise. Off in every other precision.
//!
//! ```text
//! loss' = scale · loss;  gradients are divided by scale again
//! a gradient that is not finite: the update is dropped, scale ← scale / 2
//! 2000 updates without one:      scale ← scale · 2
//! ```
//!
//! All of it stays on the device: no step waits to learn whether its gradients overflowed.
//!
//! Source: PyTorch, `torch.amp.GradScaler`, with its defaults.

use super::TrainError;
use super::run::Named;
use crate::distributed::Group;
use moeut_torch::OrPluginError;
use moeut_torch::optim::unscale_;
use tch::{Device, Kind, Tensor};

const START: f64 = 65536.0;
const GROWTH: f64 = 2.0;
const BACKOFF: f64 = 0.5;
const GROWTH_INTERVAL: i64 = 2000;

/// Scales losses, and gradients back.
#[derive(Debug)]
pub struct Scaler {
    state: Option<State>,
}

#[derive(Debug)]
struct State {
    /// One float.
    scale: Tensor,
    /// Updates since the scale changed, one int.
    growth_tracker: Tensor,
    /// 1 if a gradient of this step is not finite.
    found: Tensor,
}

impl Scaler {
    /// A scaler, or one that does nothing.
    pub fn new(is_on: bool, device: Device) -> Self {
        let number = |value| Tensor::full([], value, (Kind::Float, device));
        Self {
            state: is_on.then(|| State {
                scale: number(START),
                growth_tracker: Tensor::zeros([], (Kind::Int, device)),
                found: number(0.0),
            }),
        }
    }

    /// Scales a loss before its backward pass.
    pub fn scale(&self, loss: Tensor) -> Tensor {
        match &self.state {
            Some(state) => loss * &state.scale,
            None => loss,
        }
    }

    /// Divides gradients by the scale; the flag on the device is 1 if one of them, in any process, is not finite.
    ///
    /// # Errors
    /// If libtorch refuses, or another process has ended.
    pub fn unscale(
        &mut self,
        grads: &[(&str, Tensor)],
        group: &Group,
    ) -> Result<Option<Tensor>, TrainError> {
        let Some(state) = &mut self.state else {
            return Ok(None);
        };
        let grads: Vec<&Tensor> = grads.iter().map(|(_, grad)| grad).collect();
        state.found = state.found.zeros_like();
        unscale_(&grads, &state.scale.reciprocal(), &state.found)
            .or_plugin_error("gradients cannot be unscaled")?;
        group.max(&[&state.found])?;
        Ok(Some(state.found.shallow_clone()))
    }

    /// Adapts the scale after an update.
    ///
    /// # Errors
    /// If libtorch refuses.
    pub fn update(&mut self) -> Result<(), TrainError> {
        if let Some(state) = &mut self.state {
            let _same_tensor = state
                .scale
                .f_internal_amp_update_scale_(
                    &state.growth_tracker,
                    &state.found,
                    GROWTH,
                    BACKOFF,
                    GROWTH_INTERVAL,
                )
                .or_plugin_error("the loss scale cannot be adapted")?;
        }
        Ok(())
    }

    /// Whether losses are scaled.
    pub fn is_on(&self) -> bool {
        self.state.is_some()
    }

    /// The scale, for the logs: a copy on the device.
    pub fn current(&self) -> Option<Tensor> {
        self.state.as_ref().map(|state| state.scale.copy())
    }

    /// State by name, sharing storage: for checkpoints, and to copy a checkpoint into. A checkpoint of a run without a
    /// scaler has none; then the scaler starts afresh.
    pub fn tensors(&self) -> Named {
        self.state.as_ref().map_or_else(Vec::new, |state| {
            vec![
                ("scaler/scale".to_owned(), state.scale.shallow_clone()),
                (
                    "scaler/growth_tracker".to_owned(),
                    state.growth_tracker.shallow_clone(),
                ),
            ]
        })
    }
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "powers of two are exact")]
mod tests {
    use super::*;

    /// One step with a gradient; returns the scale after it, and whether the update is dropped.
    fn step(scaler: &mut Scaler, gradient: f64) -> (f64, bool) {
        let grad = Tensor::from(gradient).to_kind(Kind::Float);
        let found = scaler
            .unscale(&[("w", grad)], &Group::single())
            .unwrap()
            .unwrap();
        scaler.update().unwrap();
        let scale = scaler.current().unwrap().double_value(&[]);
        (scale, found.double_value(&[]) == 1.0)
    }

    #[test]
    fn the_scale_falls_at_once_and_rises_after_2000_steps() {
        let mut scaler = Scaler::new(true, Device::Cpu);
        assert_eq!(step(&mut scaler, f64::INFINITY), (32768.0, true));
        assert_eq!(step(&mut scaler, f64::NAN), (16384.0, true));
        for _ in 0..1999 {
            assert_eq!(step(&mut scaler, 1.0), (16384.0, false));
        }
        assert_eq!(step(&mut scaler, 1.0), (32768.0, false));
        assert_eq!(step(&mut scaler, 1.0), (32768.0, false));
    }

    #[test]
    fn gradients_come_back_in_their_own_size() {
        let mut scaler = Scaler::new(true, Device::Cpu);
        let w = Tensor::from(3.0_f32).set_requires_grad(true);
        scaler.scale(&w * &w).backward();
        assert_eq!(w.grad().double_value(&[]), 6.0 * START);
        scaler
            .unscale(&[("w", w.grad())], &Group::single())
            .unwrap();
        assert_eq!(w.grad().double_value(&[]), 6.0);
    }

    #[test]
    fn without_float16_nothing_is_scaled_and_nothing_saved() {
        let mut scaler = Scaler::new(false, Device::Cpu);
        assert_eq!(scaler.scale(Tensor::from(2.0)).double_value(&[]), 2.0);
        assert!(scaler.unscale(&[], &Group::single()).unwrap().is_none());
        scaler.update().unwrap();
        assert!(scaler.tensors().is_empty() && scaler.current().is_none());
    }

    #[test]
    fn a_restored_scaler_goes_on() {
        let mut scaler = Scaler::new(true, Device::Cpu);
        for _ in 0..1500 {
            step(&mut scaler, 1.0);
        }
        let restored = Scaler::new(true, Device::Cpu);
        for ((_, mut into), (_, from)) in restored.tensors().into_iter().zip(scaler.tensors()) {
            into.copy_(&from);
        }
        let mut restored = restored;
        for _ in 0..499 {
            assert_eq!(step(&mut restored, 1.0), (START, false));
        }
        assert_eq!(step(&mut restored, 1.0), (2.0 * START, false));
    }
}
