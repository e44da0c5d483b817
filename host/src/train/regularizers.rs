//! How much each regularizer of a model counts. What they compute is the model's matter.

use crate::args::HostConfig;
use moeut_plugin_api::PluginError;
use std::collections::{BTreeMap, BTreeSet};
use tch::{Kind, Tensor};

/// Weights of the regularizers.
///
/// ```text
/// total = reg · Σ_name scale[name] · decay[name] · contribution[name]
/// decay[name] = 1 - step / n_steps for the names of `-reg_lin_decay`, else 1
/// ```
///
/// # Source
/// Reference code `framework/layers/regularized_layer.py`.
#[derive(Debug, Clone)]
pub struct Regularizers {
    weight: f64,
    scales: BTreeMap<String, f64>,
    decaying: BTreeSet<String>,
    n_steps: Option<u64>,
}

impl Regularizers {
    /// The weights of a configuration; `n_steps` is the length of the training.
    ///
    /// # Errors
    /// If a weight decays and the training has no end.
    pub fn new(config: &HostConfig, n_steps: Option<u64>) -> Result<Self, PluginError> {
        let decaying: BTreeSet<String> = config.reg_lin_decay.iter().cloned().collect();
        if !decaying.is_empty() && n_steps.is_none() {
            return Err(
                PluginError::new("no length for the decay of the regularizers")
                    .why("`-reg_lin_decay` falls to 0 over the whole training, and `-stop_after` is not given")
                    .fix("set `-stop_after <steps>`, or drop `-reg_lin_decay`"),
            );
        }
        Ok(Self {
            weight: config.reg_weight,
            scales: config.reg_scales.clone(),
            decaying,
            n_steps,
        })
    }

    /// Whether the weights change from step to step.
    pub(super) fn are_decaying(&self) -> bool {
        !self.decaying.is_empty()
    }

    /// What is added to the loss at `step`, the first of which is 0; nats.
    ///
    /// # Errors
    /// If `-reg_scales` or `-reg_lin_decay` names a regularizer that the model does not have.
    pub fn total(
        &self,
        contributions: &[(String, Tensor)],
        step: u64,
    ) -> Result<Tensor, PluginError> {
        self.check(contributions)?;
        let left = self.n_steps.map_or(1.0, |n| 1.0 - step as f64 / n as f64);
        let sum = contributions
            .iter()
            .map(|(name, value)| {
                let decay = if self.decaying.contains(name) {
                    left
                } else {
                    1.0
                };
                value * (self.scales.get(name).copied().unwrap_or(1.0) * decay)
            })
            .reduce(|sum, value| sum + value);
        Ok(sum.map_or_else(
            || Tensor::from(0.0).to_kind(Kind::Float),
            |sum| sum * self.weight,
        ))
    }

    /// A weight for a name that nobody contributes is a typing error, which would go unnoticed.
    fn check(&self, contributions: &[(String, Tensor)]) -> Result<(), PluginError> {
        let is_known = |name: &String| contributions.iter().any(|(known, _)| known == name);
        for (flag, name) in self
            .scales
            .keys()
            .map(|name| ("-reg_scales", name))
            .chain(self.decaying.iter().map(|name| ("-reg_lin_decay", name)))
        {
            if !is_known(name) {
                let known: BTreeSet<String> = contributions
                    .iter()
                    .map(|(name, _)| format!("`{name}`"))
                    .collect();
                let why = if known.is_empty() {
                    "with these arguments the model has none".to_owned()
                } else {
                    let known: Vec<String> = known.into_iter().collect();
                    format!("the model has {}", known.join(", "))
                };
                return Err(PluginError::new(format!("no regularizer `{name}`"))
                    .why(why)
                    .fix(format!("name one of them in `{flag}`, or drop the flag")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Owner, parse};

    fn regularizers(line: &str, n_steps: Option<u64>) -> Result<Regularizers, PluginError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let arguments = parse(&argv, &[Owner::host()], None).unwrap();
        Regularizers::new(&HostConfig::new(&arguments).unwrap(), n_steps)
    }

    fn contributions() -> Vec<(String, Tensor)> {
        let one = |name: &str, value: f64| (name.to_owned(), Tensor::from(value));
        vec![one("moe", 2.0), one("act_loss", 10.0)]
    }

    #[test]
    fn weights_scales_and_decays_multiply() {
        let line = "-reg 0.5 -reg_scales act_loss=0.1 -reg_lin_decay moe";
        let regularizers = regularizers(line, Some(100)).unwrap();
        for (step, want) in [(0, 1.5), (25, 1.25), (99, 0.51)] {
            let total = regularizers.total(&contributions(), step).unwrap();
            assert!(
                (total.double_value(&[]) - want).abs() < 1e-12,
                "step {step}"
            );
        }
    }

    #[test]
    fn by_default_they_are_summed() {
        let plain = regularizers("", None).unwrap();
        let sum = plain.total(&contributions(), 7).unwrap();
        assert!((sum.double_value(&[]) - 12.0).abs() < 1e-12);
        assert!(plain.total(&[], 7).unwrap().double_value(&[]).abs() < 1e-12);
    }

    #[test]
    fn a_decay_needs_an_end() {
        let error = regularizers("-reg_lin_decay moe", None).unwrap_err();
        assert_eq!(
            error.fix,
            "set `-stop_after <steps>`, or drop `-reg_lin_decay`"
        );
    }

    #[test]
    fn a_name_that_nobody_contributes_is_an_error() {
        for (line, flag) in [
            ("-reg_lin_decay mo", "`-reg_lin_decay`"),
            ("-reg_scales mo=1", "`-reg_scales`"),
        ] {
            let regularizers = regularizers(line, Some(1)).unwrap();
            let error = regularizers.total(&contributions(), 0).unwrap_err();
            assert_eq!(error.what, "no regularizer `mo`");
            assert_eq!(error.why, "the model has `act_loss`, `moe`");
            assert!(error.fix.contains(flag));
            let error = regularizers.total(&[], 0).unwrap_err();
            assert_eq!(error.why, "with these arguments the model has none");
        }
    }
}
