//! The load-balancing regularizer: routers should use all experts alike on average, not for each token.

use crate::Context;
use moeut_plugin_api::{Host, PluginError, Reduction};
use moeut_torch::function::{Function, FunctionError, apply};
use moeut_torch::{IntoHandle, OrPluginError};
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
    /// Sequence, applications and batch, and all processes if [`BalanceConfig::is_everywhere`].
    Global,
}

/// Weight and mode.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct BalanceConfig {
    /// What the term is multiplied by; 0 turns it off.
    pub weight: f64,
    /// What is averaged.
    pub mode: BalanceMode,
    /// [`BalanceMode::Global`] averages over all processes that train, too.
    pub is_everywhere: bool,
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
    /// All processes, if the mean is over them.
    everyone: Option<Host>,
    /// Distributions in each mean of this process.
    n_averaged: i64,
    log_means: Vec<Tensor>,
    terms: Vec<Tensor>,
}

impl Balance {
    /// Nothing gathered yet.
    pub fn new(config: BalanceConfig, applications: Applications, ctx: &Context) -> Self {
        let everyone = ctx.everyone.as_ref();
        let is_everywhere = config.is_everywhere && config.mode == BalanceMode::Global;
        Self {
            config,
            applications,
            everyone: everyone
                .filter(|_| is_everywhere && ctx.is_training)
                .cloned(),
            n_averaged: 0,
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
            BalanceMode::Global => {
                self.n_averaged = log_p.size()[0] * log_p.size()[1];
                self.log_means.push(log_mean_exp(&log_p, &[0, 1]));
            }
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
            BalanceMode::Global => {
                self.n_averaged = log_means.size()[0];
                self.log_means.push(log_mean_exp(log_means, &[0]));
            }
        }
    }

    /// The weighted term, a scalar; nothing if the weight is 0 or nothing was added.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn finish(self) -> Result<Option<Tensor>, PluginError> {
        let term = if !self.log_means.is_empty() {
            let log_p = log_mean_exp(&Tensor::stack(&self.log_means, 0), &[0]);
            let log_p = match &self.everyone {
                None => log_p,
                Some(host) => {
                    let n = self.n_averaged * i64::try_from(self.log_means.len()).unwrap_or(1);
                    log_mean_exp_everywhere(host, &log_p, n)?
                }
            };
            negative_entropy(&log_p)
        } else if !self.terms.is_empty() {
            let terms = Tensor::stack(&self.terms, 0);
            match self.applications {
                Applications::Summed => terms.sum(None),
                Applications::Averaged => terms.mean(None),
            }
        } else {
            return Ok(None);
        };
        Ok(Some(term * self.config.weight))
    }
}

/// The mean over all processes of a distribution that is a mean of `n` distributions in this one.
///
/// ```text
/// log p̄ = m + log Σ_ranks n_r exp(log p̄_r − m) − log Σ_ranks n_r,    m = max_ranks log p̄_r
/// ```
///
/// # Source
/// Reference `framework/utils/distributed_ops.py`, `logmean`.
fn log_mean_exp_everywhere(host: &Host, log_p: &Tensor, n: i64) -> Result<Tensor, PluginError> {
    let largest = log_p.detach().copy();
    host.all_reduce(largest.share(), Reduction::Max)?;
    let n_all = Tensor::full([], n as f64, (log_p.kind(), log_p.device()));
    host.all_reduce(n_all.share(), Reduction::Sum)?;
    let own = (log_p - &largest).exp() * n as f64;
    let sum = apply(Sum(host.clone()), &[&own]);
    let sum = sum
        .or_plugin_error("the mean over all processes cannot be taken")?
        .swap_remove(0);
    Ok(largest + sum.log() - n_all.log())
}

/// The sum over all processes. Each of them has the gradient of its own share of the loss, and the sum's is all of
/// theirs together.
struct Sum(Host);

impl Sum {
    fn over_all(&self, tensor: &Tensor) -> Result<Tensor, FunctionError> {
        let sum = tensor.contiguous().copy();
        let summed = self.0.all_reduce(sum.share(), Reduction::Sum);
        summed.map_err(|error| FunctionError::from(error.to_string()))?;
        Ok(sum)
    }
}

impl Function for Sum {
    fn forward(
        &self,
        _: &mut moeut_torch::function::Context,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, FunctionError> {
        Ok(vec![self.over_all(&inputs[0])?])
    }

    fn backward(
        &self,
        _: &moeut_torch::function::Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let grad = grads[0].as_ref().ok_or("the sum has a gradient")?;
        Ok(vec![Some(self.over_all(grad)?)])
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
    use crate::testing::context;
    use moeut_plugin_api::abi::client::{HostServices, KernelClient, host_in_process};
    use moeut_plugin_api::{DType, HostInfo, LogLevel, TensorHandle};
    use moeut_torch::IntoTensor;
    use std::sync::{Arc, Barrier, Mutex};
    use tch::Device;

    fn balance(mode: BalanceMode) -> Balance {
        let config = BalanceConfig {
            weight: 1.0,
            mode,
            is_everywhere: true,
        };
        Balance::new(config, Applications::Summed, &context(true))
    }

    fn term(mode: BalanceMode, applications: &[&Tensor]) -> f64 {
        let mut balance = balance(mode);
        for logits in applications {
            balance.add(logits);
        }
        balance.finish().unwrap().unwrap().double_value(&[])
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
            let mut balance = balance(mode);
            balance.add_log_means(&means.log());
            let from_means = balance.finish().unwrap().unwrap().double_value(&[]);
            assert!((from_means - term(mode, &[&logits])).abs() < 1e-12);
        }
    }

    /// Two processes, as threads that wait for each other.
    struct Pair {
        values: Mutex<Vec<Tensor>>,
        meeting: Barrier,
    }

    impl HostServices for Pair {
        fn info(&self) -> HostInfo {
            HostInfo {
                cache_dir: std::path::PathBuf::new(),
                n_threads: 1,
                compat: false,
                n_ranks: 2,
            }
        }

        fn log(&self, _: LogLevel, _: &str) {}

        fn progress(&self, _: &str, _: u64, _: u64) {}

        fn is_cancelled(&self) -> bool {
            false
        }

        fn kernel(
            &self,
            _: &str,
            _: moeut_plugin_api::Device,
            _: DType,
        ) -> Result<KernelClient, PluginError> {
            Err(PluginError::new("no kernel"))
        }

        fn all_reduce(&self, tensor: TensorHandle, how: Reduction) -> Result<(), PluginError> {
            let mut tensor = tensor.into_tensor();
            self.values.lock().unwrap().push(tensor.copy());
            self.meeting.wait();
            let values: Vec<Tensor> = {
                let values = self.values.lock().unwrap();
                values.iter().map(Tensor::shallow_clone).collect()
            };
            tensor.copy_(&match how {
                Reduction::Sum => &values[0] + &values[1],
                Reduction::Max => values[0].maximum(&values[1]),
            });
            if self.meeting.wait().is_leader() {
                self.values.lock().unwrap().clear();
            }
            self.meeting.wait();
            Ok(())
        }
    }

    /// Two sequences here and one there are three, for the term and for the gradient of what is before it.
    #[test]
    fn a_mean_over_processes_is_that_of_all_their_sequences() {
        moeut_torch::rng::seed(5).unwrap();
        let options = (Kind::Double, Device::Cpu);
        let x = Tensor::randn([3, 5, 6], options);
        let weight = Tensor::randn([6, 4], options);
        // The share of a process, as a loss that counts by its sequences.
        let pass = |x: Tensor, weight: &Tensor, everyone: Option<Host>| {
            let weight = weight.detach().set_requires_grad(true);
            let config = BalanceConfig {
                weight: 2.0,
                mode: BalanceMode::Global,
                is_everywhere: true,
            };
            let mut ctx = context(true);
            ctx.everyone = everyone;
            let mut balance = Balance::new(config, Applications::Summed, &ctx);
            for scale in [1.0, 0.5] {
                balance.add(&(x.matmul(&weight) * scale));
            }
            let term = balance.finish().unwrap().unwrap();
            (&term * (x.size()[0] as f64 / 3.0)).backward();
            (term.double_value(&[]), weight.grad())
        };
        let (term, grad) = pass(x.shallow_clone(), &weight, None);

        let services: Arc<dyn HostServices> = Arc::new(Pair {
            values: Mutex::default(),
            meeting: Barrier::new(2),
        });
        let pass = &pass;
        let parts: Vec<(f64, Tensor)> = std::thread::scope(|scope| {
            let start = |(first, n)| {
                let (x, weight) = (x.narrow(0, first, n), weight.shallow_clone());
                let host = host_in_process(&services).unwrap();
                scope.spawn(move || pass(x, &weight, Some(host)))
            };
            let threads = [(0, 2), (2, 1)].map(start);
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        for (part, _) in &parts {
            assert!((part - term).abs() < 1e-12, "{part}, not {term}");
        }
        let sum = &parts[0].1 + &parts[1].1;
        assert!((sum - grad).abs().max().double_value(&[]) < 1e-12);
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
