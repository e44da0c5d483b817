//! A recorded run: arguments, initial parameters, three batches, and what the reference made of them.

use crate::Result;
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
#[derive(Debug, Deserialize)]
pub struct Meta {
    /// Number of distinct tokens.
    pub vocab: u64,
    /// Flags and values.
    pub args_effective: BTreeMap<String, Value>,
    /// Flags whose defaults mattered.
    pub defaults_used: BTreeMap<String, Value>,
    /// Whether each step sees the states that the one before left.
    pub state_carry: bool,
    /// What happened in double precision.
    pub fp64: Recorded,
}

/// Scalars of the run.
#[derive(Debug, Deserialize)]
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

    /// A number among the arguments, given or default.
    ///
    /// # Errors
    /// If it is not there.
    pub fn number(&self, flag: &str) -> Result<f64> {
        let value = self
            .meta
            .args_effective
            .get(flag)
            .or_else(|| self.meta.defaults_used.get(flag));
        let missing = || format!("{} has no number {flag}", self.name);
        Ok(value.and_then(Value::as_f64).ok_or_else(missing)?)
    }
}

/// The fixtures in the folder `fixtures` of the shared data, sorted by name; nothing if there is no such folder.
///
/// The shared data is at `$MOEUT_SHARED`, or beside the repository.
///
/// # Errors
/// If there is none, but `CI` is `true`: a test that sees nothing must not pass there.
pub fn all() -> Result<Vec<PathBuf>> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let shared = std::env::var_os("MOEUT_SHARED").map_or_else(beside, PathBuf::from);
    let folder = shared.join("fixtures");
    if !folder.is_dir() {
        return if std::env::var_os("CI").is_some_and(|ci| ci == "true") {
            Err(format!("no fixtures at {}; set MOEUT_SHARED", folder.display()).into())
        } else {
            Ok(Vec::new())
        };
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
