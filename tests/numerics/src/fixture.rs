//! A recorded run: arguments, initial parameters, three batches, and what the reference made of them.

use crate::Result;
use moeut_plugin_api::PluginError;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// One pair of `<name>.json` and `<name>.safetensors`.
#[derive(Debug)]
pub struct Fixture {
    /// The files' stem.
    pub name: String,
    /// The JSON file.
    pub meta: Meta,
    /// `param.*`, `input.tokens.step*`, `expected.logits`, `grad.*` (before clipping), `after3.*`.
    pub tensors: BTreeMap<String, Tensor>,
}

/// The JSON file, as far as it is used.
#[derive(Debug, Clone, Deserialize)]
pub struct Meta {
    /// Number of distinct tokens.
    pub vocab: u64,
    /// Whether each step sees what the one before it left in the model's memory.
    pub state_carry: bool,
    /// Flags and values.
    pub args_effective: BTreeMap<String, Value>,
    /// Flags whose defaults mattered.
    pub defaults_used: BTreeMap<String, Value>,
    /// What happened in double precision.
    pub fp64: Recorded,
}

/// Scalars of the run.
#[derive(Debug, Clone, Deserialize)]
pub struct Recorded {
    /// Weighted regularizers of the first step.
    pub reg: BTreeMap<String, f64>,
    /// All steps.
    pub steps: Vec<Step>,
    /// Parameters that no gradient reaches.
    pub params_without_grad: Vec<String>,
}

/// Scalars of one step.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Step {
    /// Cross-entropy, nats per token.
    pub loss: f64,
    /// Sum of the regularizers.
    pub reg_loss: f64,
    /// Sum of both.
    pub total_loss: f64,
    /// L2 norm over all gradients.
    pub grad_norm_before_clip: f64,
}

impl Fixture {
    /// Reads the pair that `json` belongs to.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn read(json: &Path) -> Result<Self> {
        let stem = json.file_stem().unwrap_or_default();
        Ok(Self {
            name: stem.to_string_lossy().into_owned(),
            meta: serde_json::from_slice(&std::fs::read(json)?)?,
            tensors: Tensor::read_safetensors(json.with_extension("safetensors"))?
                .into_iter()
                .collect(),
        })
    }

    /// The tensors below `prefix.`, by the rest of their names.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        self.tensors.iter().filter_map(move |(name, tensor)| {
            let rest = name.strip_prefix(prefix)?.strip_prefix('.')?;
            Some((rest, tensor))
        })
    }

    /// One tensor.
    ///
    /// # Errors
    /// If it is not there.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let missing = || format!("{} has no tensor {name}", self.name);
        Ok(self.tensors.get(name).ok_or_else(missing)?)
    }

    /// A value among the arguments, given or default.
    fn argument(&self, flag: &str) -> Option<&Value> {
        let given = self.meta.args_effective.get(flag);
        given.or_else(|| self.meta.defaults_used.get(flag))
    }

    /// A number among the arguments; nothing for `none`.
    ///
    /// # Errors
    /// If it is not there, or something else.
    pub fn number(&self, flag: &str) -> Result<Option<f64>> {
        let value = self.argument(flag);
        let value = value.ok_or_else(|| format!("{} has no argument {flag}", self.name))?;
        if value
            .as_str()
            .is_some_and(|text| text.eq_ignore_ascii_case("none"))
            || value.is_null()
        {
            return Ok(None);
        }
        let number = value.as_f64();
        Ok(Some(number.ok_or_else(|| {
            format!("{flag} of {} is {value}, no number", self.name)
        })?))
    }

    /// Whether its regularizer depends on the order in which libtorch leaves the selected experts, which is another on
    /// GPUs than on CPUs, where the runs are recorded: with `moe.activation_after_topk` the reference averages selected
    /// logits by their place in what `topk(sorted=False)` returns.
    ///
    /// # Errors
    /// If a weight is not a number.
    pub fn balances_by_order(&self) -> Result<bool> {
        let is_after = self.argument("moe.activation_after_topk");
        let is_after = is_after.is_some_and(|flag| flag != 0 && flag != false);
        Ok(is_after && self.number("moe.perplexity_reg")?.unwrap_or(0.0) > 0.0)
    }

    /// Adam's two decays.
    ///
    /// # Errors
    /// If they are not there.
    pub fn betas(&self) -> Result<[f64; 2]> {
        let betas = self.argument("adam.betas").and_then(Value::as_array);
        let betas: Vec<f64> = betas
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect();
        let betas = betas.try_into();
        betas.map_err(|_| format!("{} has no adam.betas", self.name).into())
    }
}

/// The JSON files of a folder, sorted by name.
///
/// # Errors
/// If the folder cannot be read or has none: who sees nothing must not conclude that all is well.
pub fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let shown = folder.display();
    let fix = "name a folder with pairs of `<name>.json` and `<name>.safetensors`";
    let entries = std::fs::read_dir(folder).map_err(|error| {
        PluginError::new(format!("the recorded runs in `{shown}` cannot be read"))
            .why(error.to_string())
            .fix(fix)
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            found.push(path);
        }
    }
    if found.is_empty() {
        let error = PluginError::new(format!("there are no recorded runs in `{shown}`"));
        return Err(error.why("it has no `*.json`").fix(fix).into());
    }
    found.sort();
    Ok(found)
}

/// A file or folder of the shared data, which is at `$MOEUT_SHARED`, or beside the repository; nothing if it is not there.
///
/// # Errors
/// If it is not there, but `CI` is `true`: a test that sees nothing must not pass there.
pub fn shared(name: &str) -> Result<Option<PathBuf>> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let path = std::env::var_os("MOEUT_SHARED")
        .map_or_else(beside, PathBuf::from)
        .join(name);
    if path.exists() {
        Ok(Some(path))
    } else if std::env::var_os("CI").is_some_and(|ci| ci == "true") {
        Err(format!("{} is missing; set MOEUT_SHARED", path.display()).into())
    } else {
        Ok(None)
    }
}

/// The recorded runs in the folder `fixtures` of the shared data; nothing if there is no such folder.
///
/// # Errors
/// As [`shared`] and [`in_folder`].
pub fn all() -> Result<Vec<PathBuf>> {
    match shared("fixtures")? {
        Some(folder) => in_folder(&folder),
        None => Ok(Vec::new()),
    }
}
