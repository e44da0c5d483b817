//! What a run's arguments describe: values with their defaults, sizes and cost, asked from the plugins themselves.
//!
//! Multiply-accumulates are those of a forward pass over one sequence, without embedding and output, as the paper
//! counts them:
//!
//! ```text
//! attention    2·H·d·T²·(1 + c) + 4·D·H·d·T                                             dense
//!              2·H·d·T²·(1 + c) + P·D·H·d·T + X·H·k·T·d + n_sel·A·D·T·(1 + c)           SwitchHead
//! feed-forward 2·D·F·T                                                                  dense
//!              2·T·D·S·K + T·D·E                                                        σ-MoE
//! ```
//! `T` tokens, `c` context blocks, `A` attention experts of which `k` are used, `X` projections with experts,
//! `P = X·k + 4 − X`, `n_sel` selections. The sum over layers comes from `Model::summary` of the model's plugin, so that
//! there is one account of it. The paper has none for SUT: its plugin counts attention, experts, routers (a hidden layer
//! of width `D` each) and halting of every layer, as if no token halted early.

use moeut_host::error::HostError;
use moeut_host::log::{Terminal, Verbosity};
use moeut_host::model_show::overview;
use moeut_host::plan::{candidates, resolve};
use moeut_host::plugins::{Gate, Registry, search_path};
use moeut_host::sweep::file::SweepFile;
use moeut_host::sweep::runs::{Sweep, Wish};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

/// Families of models in the order of tables and legends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    /// Dense layers, none shared.
    Dense,
    /// Dense layers, shared: the naive Universal Transformer.
    Universal,
    /// Experts in layers that are not shared.
    SigmaMoe,
    /// Experts in shared layers.
    Moeut,
    /// Sparse Universal Transformer.
    Sut,
}

impl Family {
    /// As in the paper's legends.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dense => "Baseline",
            Self::Universal => "UT",
            Self::SigmaMoe => "σ-MoE",
            Self::Moeut => "MoEUT",
            Self::Sut => "SUT",
        }
    }
}

/// A model that arguments describe.
#[derive(Debug)]
pub(crate) struct Model {
    /// Values of all arguments that mean something to this run.
    values: BTreeMap<String, Value>,
    /// Name of the training dataset.
    pub(crate) dataset: String,
    /// Trained numbers.
    pub(crate) n_params: u64,
    /// Those of the distinct layers.
    pub(crate) n_model_weights: u64,
    /// Multiply-accumulates of a forward pass, one sequence.
    pub(crate) macs: u64,
}

impl Model {
    /// A whole number, if it has one.
    pub(crate) fn integer(&self, name: &str) -> Option<u64> {
        self.values.get(name)?.as_u64()
    }

    /// A number, if it has one.
    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        self.values.get(name)?.as_f64()
    }

    fn text(&self, name: &str) -> &str {
        self.values
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    fn is_set(&self, name: &str) -> bool {
        self.values
            .get(name)
            .and_then(Value::as_bool)
            .unwrap_or_default()
    }

    pub(crate) fn family(&self) -> Family {
        let variant = self.text("transformer.variant");
        let is_shared = variant.contains("universal") && self.n_groups() < self.n_layers();
        match (variant.contains("sut"), variant.contains("moe")) {
            (true, _) => Family::Sut,
            (false, true) if is_shared => Family::Moeut,
            (false, true) => Family::SigmaMoe,
            (false, false) if is_shared => Family::Universal,
            (false, false) => Family::Dense,
        }
    }

    /// Layers of the unrolled stack.
    pub(crate) fn n_layers(&self) -> u64 {
        self.integer("transformer.encoder_n_layers")
            .unwrap_or_default()
    }

    /// Distinct layers that are shared.
    pub(crate) fn n_groups(&self) -> u64 {
        self.integer("transformer.universal.group_size")
            .unwrap_or(1)
    }

    /// Width of a head.
    pub(crate) fn d_head(&self) -> Option<u64> {
        let split = || {
            let n_heads = self.integer("transformer.n_heads")?;
            self.integer("state_size")?.checked_div(n_heads)
        };
        self.integer("transformer.head_projection_size")
            .or_else(split)
    }

    /// Hidden units of a dense layer, rounded down as the reference does.
    pub(crate) fn d_ff(&self) -> Option<u64> {
        let d_ff = self.number("state_size")? * self.number("transformer.ff_multiplier")?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the model was built with this width"
        )]
        Some(d_ff as u64)
    }

    /// Layer norm scheme.
    pub(crate) fn norm(&self) -> &'static str {
        match (
            self.text("transformer.variant").contains("preln"),
            self.is_set("moe.nonorm"),
        ) {
            (true, true) => "Peri",
            (true, false) => "Pre",
            (false, _) => "Post",
        }
    }

    /// Whether it was to be trained without a GPU.
    pub(crate) fn is_for_cpu(&self) -> bool {
        self.text("gpu").eq_ignore_ascii_case("none")
    }

    /// How distinct layers make the stack: `abab` or `aabb`.
    pub(crate) fn group_type(&self) -> &str {
        self.text("transformer.universal.group_type")
    }

    /// Multiply-accumulates of the whole training, counted by forward passes as in the paper.
    pub(crate) fn training_macs(&self) -> Option<f64> {
        let steps = self.number("stop_after")?;
        Some(self.macs as f64 * steps * self.number("batch_size")?)
    }

    /// The paper's name for its size: one of its own sizes within 10M, or else two digits.
    pub(crate) fn size(&self) -> String {
        const SIZES: [u64; 6] = [44, 126, 244, 319, 728, 1040];
        let millions = self.n_params as f64 / 1e6;
        let own = SIZES
            .iter()
            .find(|&&size| (millions - size as f64).abs() < 10.0);
        match own {
            Some(size) if millions > 30.0 => format!("{size}M"),
            _ if millions < 10.0 => format!("{millions:.1}M"),
            _ => format!("{millions:.0}M"),
        }
    }

    /// Whether it is compared with the other one: within 10M as in the paper, and small ones within a sixth.
    pub(crate) fn is_as_large_as(&self, other: &Self) -> bool {
        let (a, b) = (self.n_params as f64, other.n_params as f64);
        let room = if a.min(b) > 30e6 {
            10e6
        } else {
            a.max(b) / 6.0
        };
        (a - b).abs() < room
    }

    /// The paper's name of the dataset; of own text the name of its folder.
    pub(crate) fn dataset_title(&self) -> &str {
        match self.dataset.as_str() {
            "c4" => "C4",
            "pes2o" => "peS2o",
            "slimpajama" => "SlimPajama",
            "thestack" => "The Stack",
            "text_files" => {
                let name = Path::new(self.text("data.dir")).file_name();
                name.and_then(OsStr::to_str).unwrap_or("Own text")
            }
            other => other,
        }
    }
}

/// All plugins that are installed.
pub(crate) struct Catalog {
    pub(crate) registry: Arc<Registry>,
    pub(crate) terminal: Arc<Terminal>,
}

impl Catalog {
    /// Opens the plugins beside the program and those of `-plugin_dir`.
    ///
    /// # Errors
    /// If the lock file of the plugins cannot be read.
    pub(crate) fn open(plugin_dirs: &[String]) -> Result<Self, HostError> {
        let registry = Registry::open(search_path(plugin_dirs), Gate::from_args(&[])?);
        Ok(Self {
            registry: Arc::new(registry),
            terminal: Arc::new(Terminal::new(Verbosity::Normal)),
        })
    }

    /// Names of all arguments that a run of this task may have.
    ///
    /// # Errors
    /// If there is no such task.
    pub(crate) fn known(&self, task: &str) -> Result<BTreeSet<String>, HostError> {
        let owners = candidates(&[format!("-task={task}")], &self.registry)?;
        let names = owners
            .iter()
            .flat_map(|owner| owner.defs.iter().map(|def| def.name.clone()));
        Ok(names.collect())
    }

    /// The runs of a sweep file.
    ///
    /// # Errors
    /// If an argument is wrong, or a plugin is missing.
    pub(crate) fn sweep(&self, file: &SweepFile) -> Result<Sweep, HostError> {
        Sweep::new(file, &Wish::default(), &self.registry, &self.terminal)
    }

    /// The model that arguments as typed describe. Nothing is read but plugins.
    ///
    /// # Errors
    /// If they are wrong, or a plugin is missing.
    pub(crate) fn model(&self, args: &BTreeMap<String, String>) -> Result<Model, HostError> {
        let words: Vec<String> = args
            .iter()
            .map(|(name, value)| format!("-{name}={value}"))
            .collect();
        let resolved = resolve(&words, None, &self.registry, &self.terminal)?;
        let overview = overview(&words, &self.registry, &self.terminal)?;
        let dataset = resolved.plan.map(|plan| plan.train.dataset);
        Ok(Model {
            values: resolved.arguments.values,
            dataset: dataset.unwrap_or_default(),
            n_params: overview.n_params,
            n_model_weights: overview.n_model_weights,
            macs: overview.summary.macs.iter().map(|(_, macs)| macs).sum(),
        })
    }
}
