//! The load-balancing regularizer: routers should use all experts alike on average, not for each token.

use serde::Deserialize;
use tch::{Kind, Tensor};

/// Over what the distribution is averaged before its entropy is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalanceMode {
    /// Nothing: the entropy of each token's own distribution.
    Step,
    /// The sequence.
    Time,
    /// The sequence and all applications of a shared layer: the paper's choice.
    LayersTime,
    /// Sequence, applications and batch.
    Global,
}

/// Weight and mode.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct BalanceConfig {
    /// What the term is multiplied by; 0 turns it off.
    pub weight: f64,
    /// What is averaged.
    pub mode: BalanceMode,
}

/// What becomes of the terms of several applications in the modes that do not average distributions over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applications {
    /// The reference's σ-MoE.
    Summed,
    /// The reference's SwitchHead.
    Averaged,
}

/// Gathers the logits of all applications of one layer in one forward pass and gives one term at its end.
///
/// ```text
/// log p = log_softmax(logits)                 over experts, never in a half type
/// log p̄ = log mean exp(log p)                 over what the mode says
/// term  = weight · mean Σ_e p̄_e log p̄_e       over the axes that are left (batch, heads)
/// ```
///
/// The term is minus an entropy in nats: lower is more even. Only `[B, .., E]` is kept per application in the averaging
/// modes, because means of equal-sized groups can be combined.
///
/// # Source
/// Csordás et al., arXiv:2405.16039, section 2.1; reference `layers/moe_layer.py`, `entropy_reg`.
#[derive(Debug)]
pub struct Balance {
    config: BalanceConfig,
    applications: Applications,
    log_means: Vec<Tensor>,
    terms: Vec<Tensor>,
}

impl Balance {
    /// Nothing gathered yet.
    pub fn new(config: BalanceConfig, applications: Applications) -> Self {
        Self {
            config,
            applications,
            log_means: Vec::new(),
            terms: Vec::new(),
        }
    }

    /// Adds one application: logits `[B, T, .., E]`.
    pub fn add(&mut self, logits: &Tensor) {
        if self.config.weight <= 0.0 {
            return;
        }
        let kind = match logits.kind() {
            Kind::Half | Kind::BFloat16 => Kind::Float,
            wide => wide,
        };
        let log_p = logits.log_softmax(-1, kind);
        match self.config.mode {
            BalanceMode::Step => self.terms.push(negative_entropy(&log_p)),
            BalanceMode::Time => self
                .terms
                .push(negative_entropy(&log_mean_exp(&log_p, &[1]))),
            BalanceMode::LayersTime => self.log_means.push(log_mean_exp(&log_p, &[1])),
            BalanceMode::Global => self.log_means.push(log_mean_exp(&log_p, &[0, 1])),
        }
    }

    /// Whether [`Self::add_log_means`] serves the mode.
    pub fn takes_log_means(&self) -> bool {
        self.config.weight <= 0.0 || self.config.mode != BalanceMode::Step
    }

    /// Adds one application whose distributions were averaged over the sequence already: logarithms `[B, .., E]`.
    ///
    /// # Panics
    /// If the mode averages over nothing.
    pub fn add_log_means(&mut self, log_means: &Tensor) {
        if self.config.weight <= 0.0 {
            return;
        }
        match self.config.mode {
            BalanceMode::Step => panic!("`step` needs each token's distribution"),
            BalanceMode::Time => self.terms.push(negative_entropy(log_means)),
            BalanceMode::LayersTime => self.log_means.push(log_means.shallow_clone()),
            BalanceMode::Global => self.log_means.push(log_mean_exp(log_means, &[0])),
        }
    }

    /// The weighted term, a scalar; nothing if the weight is 0 or nothing was added.
    pub fn finish(self) -> Option<Tensor> {
        let term = if !self.log_means.is_empty() {
            let log_p = Tensor::stack(&self.log_means, 0);
            negative_entropy(&log_mean_exp(&log_p, &[0]))
        } else if !self.terms.is_empty() {
            let terms = Tensor::stack(&self.terms, 0);
            match self.applications {
                Applications::Summed => terms.sum(None),
                Applications::Averaged => terms.mean(None),
            }
        } else {
            return None;
        };
        Some(term * self.config.weight)
    }
}

fn log_mean_exp(log_p: &Tensor, dims: &[i64]) -> Tensor {
    let size = log_p.size();
    let count: i64 = dims
        .iter()
        .filter_map(|&dim| size.get(usize::try_from(dim).ok()?))
        .product();
    log_p.logsumexp(dims, false) - (count as f64).ln()
}

fn negative_entropy(log_p: &Tensor) -> Tensor {
    (log_p.exp() * log_p)
        .sum_dim_intlist(-1, false, None)
        .mean(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn term(mode: BalanceMode, applications: &[&Tensor]) -> f64 {
        let config = BalanceConfig { weight: 1.0, mode };
        let mut balance = Balance::new(config, Applications::Summed);
        for logits in applications {
            balance.add(logits);
        }
        balance.finish().unwrap().double_value(&[])
    }

    /// Even use gives −ln E in every mode, one term per application where distributions are not averaged over them.
    #[test]
    fn even_use_reaches_the_minimum() {
        let even = Tensor::zeros([2, 3, 4], (Kind::Double, Device::Cpu));
        let minimum = -4f64.ln();
        for (mode, expected) in [
            (BalanceMode::Step, 2.0 * minimum),
            (BalanceMode::Time, 2.0 * minimum),
            (BalanceMode::LayersTime, minimum),
            (BalanceMode::Global, minimum),
        ] {
            assert!(
                (term(mode, &[&even, &even]) - expected).abs() < 1e-12,
                "{mode:?}"
            );
        }
    }

    /// Experts that take turns over time are balanced over the sequence, but not at any step.
    #[test]
    fn taking_turns_counts_as_even_over_time() {
        let turns = Tensor::eye(4, (Kind::Double, Device::Cpu)).unsqueeze(0) * 100.0;
        assert!(term(BalanceMode::Step, &[&turns]).abs() < 1e-12);
        assert!((term(BalanceMode::Time, &[&turns]) + 4f64.ln()).abs() < 1e-12);
    }

    /// Means that somebody else took over the sequence give the same term.
    #[test]
    fn means_over_the_sequence_may_come_from_outside() {
        let logits = Tensor::randn([2, 3, 4], (Kind::Double, Device::Cpu));
        let means = logits.softmax(-1, None).mean_dim(1_i64, false, None);
        for mode in [
            BalanceMode::Time,
            BalanceMode::LayersTime,
            BalanceMode::Global,
        ] {
            let config = BalanceConfig { weight: 1.0, mode };
            let mut balance = Balance::new(config, Applications::Summed);
            balance.add_log_means(&means.log());
            let from_means = balance.finish().unwrap().double_value(&[]);
            assert!((from_means - term(mode, &[&logits])).abs() < 1e-12);
        }
    }

    /// The term of stacked logits equals the one of separately added applications.
    #[test]
    fn applications_combine_like_one_long_sequence() {
        let options = (Kind::Double, Device::Cpu);
        let (a, b) = (
            Tensor::randn([2, 3, 4], options),
            Tensor::randn([2, 3, 4], options),
        );
        let long = Tensor::cat(&[&a, &b], 1);
        for mode in [BalanceMode::LayersTime, BalanceMode::Global] {
            assert!((term(mode, &[&a, &b]) - term(mode, &[&long])).abs() < 1e-12);
        }
    }
}
