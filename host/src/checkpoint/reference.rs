//! What the reference's checkpoints mean: the entries of the dictionary that it hands to `torch.save`.
//!
//! ```text
//! model            parameters and buffers by name, in the order of the modules
//! optimizer        {state: {i: {step, exp_avg, exp_avg_sq}}, param_groups: [{params: [0, 1, …], …}]}
//! state            {iter, epoch, best_losses: {set: {iter, loss, accuracy}}, best_accuracies}
//! run_invariants   {args: {flag: value}, wandb_id}
//! sampler          {pos}
//! scaler           of the loss, empty with bfloat16
//! ```
//!
//! Every entry but `model` may be missing (published checkpoints have no optimizer). A file that is nothing but a
//! dictionary of tensors, as `torch.save(model.state_dict(), …)` makes it, counts as `model`.
//!
//! Source: reference `framework/helpers/saver.py`, `training_helper.py`; `torch.optim.Optimizer.state_dict`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use tch::{Kind, Tensor};

use super::CheckpointError;
use super::pytorch::{PyTorchFile, TensorRef, Value};

/// Names of the tensors that the reference saves with a model and does not train.
const BUFFERS: [&str; 2] = ["pkm.iter", "pkm.kv_sel_counts_100"];
/// What `DistributedDataParallel` and `torch.compile` put before every name.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];
/// Of all arguments together; the reference's are 5 kB.
const MAX_ARGUMENT_BYTES: usize = 1 << 20;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 1024;

/// Tensors by name.
pub(super) type Named = Vec<(String, Tensor)>;

/// An opened checkpoint of the reference.
#[derive(Debug)]
pub(super) struct Reference {
    file: PyTorchFile,
}

/// What it says about a run besides tensors.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Progress {
    /// Optimizer steps.
    pub(super) step: u64,
    /// Complete passes over the data.
    pub(super) epoch: u64,
    /// Batches that its sampler has handed out in this pass: more than were consumed.
    pub(super) sampler_position: Option<u64>,
    /// Lowest loss of each validation set, and its step.
    pub(super) best_losses: BTreeMap<String, (f64, u64)>,
}

/// Whether the optimizer trains the tensor of this name.
pub(super) fn is_trained(name: &str, tensor: &Tensor) -> bool {
    let is_buffer = |buffer: &&str| {
        name.strip_suffix(*buffer)
            .is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    tensor.is_floating_point() && !BUFFERS.iter().any(is_buffer)
}

impl Reference {
    /// Opens a file and checks that it has a model.
    ///
    /// # Errors
    /// As [`PyTorchFile::open`], and if there is no model in it.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let reference = Self {
            file: PyTorchFile::open(path)?,
        };
        reference.state_dict()?;
        Ok(reference)
    }

    /// The file.
    pub(super) fn file(&self) -> &PyTorchFile {
        &self.file
    }

    /// Whether it holds more than a model.
    pub(super) fn has(&self, entry: &str) -> bool {
        self.entry(entry).is_some()
    }

    /// Whether an entry is there and is not an empty dictionary.
    pub(super) fn has_filled(&self, entry: &str) -> bool {
        self.entry(entry)
            .is_some_and(|value| value.entries().next().is_some())
    }

    /// Names and descriptions of the model's tensors, in the order of the file.
    ///
    /// # Errors
    /// If there is no model, or something in it is no tensor or has no usable name.
    pub(super) fn state_dict(&self) -> Result<Vec<(&str, &TensorRef)>, CheckpointError> {
        let root = self.file.root();
        let model = root.get("model").unwrap_or(root);
        let no_model = |why: String| {
            CheckpointError::foreign(
                self.file.path(),
                why,
                "give a file of the reference, or one made by `torch.save(model.state_dict(), …)`",
            )
        };
        if !model.is_dict() {
            return Err(no_model(format!(
                "it holds a {} and no model",
                model.kind()
            )));
        }
        let mut names = BTreeSet::new();
        let mut found = Vec::new();
        for (key, value) in model.entries() {
            let (Some(name), Some(tensor)) = (key.as_str(), value.as_tensor()) else {
                let name = key.to_argument().unwrap_or_else(|| key.kind().to_owned());
                return Err(no_model(format!(
                    "it has no entry `model`, and `{name}` is a {} and no parameter",
                    value.kind()
                )));
            };
            if name.len() > MAX_NAME_BYTES || !names.insert(name) {
                return Err(no_model(
                    "a parameter's name is too long or used twice".to_owned(),
                ));
            }
            found.push((name, tensor));
        }
        if found.is_empty() {
            return Err(no_model("its model has no parameters".to_owned()));
        }
        for wrapper in WRAPPERS {
            let inner: Option<Vec<_>> = found
                .iter()
                .map(|&(name, tensor)| Some((name.strip_prefix(wrapper)?, tensor)))
                .collect();
            found = inner.unwrap_or(found);
        }
        Ok(found)
    }

    /// Reads the model.
    ///
    /// # Errors
    /// As [`Self::state_dict`], and if data is damaged.
    pub(super) fn model(&self) -> Result<Named, CheckpointError> {
        self.state_dict()?
            .into_iter()
            .map(|(name, tensor)| Ok((name.to_owned(), self.file.tensor(tensor)?)))
            .collect()
    }

    /// The raw arguments of the run; none if it does not say.
    ///
    /// # Errors
    /// If one of them is nothing that could stand on a command line.
    pub(super) fn args(&self) -> Result<BTreeMap<String, String>, CheckpointError> {
        let mut args = BTreeMap::new();
        let mut n_bytes = 0;
        let stored = self
            .entry("run_invariants")
            .and_then(|value| value.get("args"));
        for (key, value) in stored.into_iter().flat_map(Value::entries) {
            let refuse = |why: String| {
                let fix = "convert its model alone: store `{\"model\": …}` with `torch.save`";
                CheckpointError::foreign(self.file.path(), why, fix)
            };
            let name = key.as_str().filter(|name| name.len() <= MAX_NAME_BYTES);
            let name = name.ok_or_else(|| refuse("an argument has no name".to_owned()))?;
            let raw = value
                .to_argument()
                .ok_or_else(|| refuse(format!("its argument `{name}` is a {}", value.kind())))?;
            n_bytes += name.len() + raw.len();
            if n_bytes > MAX_ARGUMENT_BYTES {
                return Err(refuse(format!(
                    "its arguments have more than {MAX_ARGUMENT_BYTES} bytes"
                )));
            }
            args.insert(name.to_owned(), raw);
        }
        Ok(args)
    }

    /// How far the run is.
    pub(super) fn progress(&self) -> Progress {
        let number = |entry: &str, key: &str| self.entry(entry)?.get(key)?.as_u64();
        let best = self
            .entry("state")
            .and_then(|state| state.get("best_losses"));
        let marker = |(name, marker): (Value<'_>, Value<'_>)| {
            let loss = marker.get("loss")?.as_f64()?;
            let name = name.to_argument()?;
            Some((name, (loss, marker.get("iter")?.as_u64()?)))
        };
        Progress {
            step: number("state", "iter").unwrap_or(0),
            epoch: number("state", "epoch").unwrap_or(0),
            sampler_position: number("sampler", "pos"),
            best_losses: best
                .into_iter()
                .flat_map(Value::entries)
                .filter_map(marker)
                .collect(),
        }
    }

    /// The optimizer's state as ours names it, `exp_avg/<parameter>` and so on, or why it cannot be used. PyTorch
    /// numbers the parameters in the order of the modules, which is that of `model` without its buffers; numbers and
    /// shapes have to agree. A parameter that never had a gradient has no state; it gets zeros.
    ///
    /// # Errors
    /// If data is damaged. A state that does not fit the model is no error: training can start its averages anew.
    pub(super) fn optimizer(
        &self,
        model: &Named,
    ) -> Result<Result<Named, String>, CheckpointError> {
        let trained: Vec<&(String, Tensor)> = model
            .iter()
            .filter(|(name, tensor)| is_trained(name, tensor))
            .collect();
        let slots = match self.slots(trained.len()) {
            Ok(slots) => slots,
            Err(why) => return Ok(Err(why)),
        };
        let keys: BTreeSet<&str> = slots
            .values()
            .flat_map(|slot| slot.keys().copied())
            .collect();
        let mut tensors = Vec::with_capacity(trained.len() * keys.len());
        for (index, (name, parameter)) in (0..).zip(trained) {
            for &key in &keys {
                let stored = slots.get(&index).and_then(|slot| slot.get(key));
                let tensor = match (stored, key) {
                    (Some(Stored::Number(step)), _) => scalar(*step),
                    (Some(Stored::Tensor(tensor)), "step") if tensor.shape.is_empty() => {
                        self.file.tensor(tensor)?.to_kind(Kind::Float)
                    }
                    (Some(Stored::Tensor(tensor)), key) => {
                        if key == "step" || tensor.shape != parameter.size() {
                            return Ok(Err(format!(
                                "`{key}` of parameter {index} has shape {:?}, `{name}` is {:?}",
                                tensor.shape,
                                parameter.size()
                            )));
                        }
                        self.file.tensor(tensor)?.to_kind(parameter.kind())
                    }
                    (None, "step") => scalar(0.0),
                    (None, _) => parameter.zeros_like(),
                };
                tensors.push((format!("{key}/{name}"), tensor));
            }
        }
        Ok(Ok(tensors))
    }

    /// The state of each parameter by its number.
    fn slots(&self, n_trained: usize) -> Result<HashMap<u64, Slot<'_>>, String> {
        let optimizer = self.entry("optimizer").ok_or("the file has none")?;
        let groups = optimizer.get("param_groups");
        let order: Vec<Option<u64>> = groups
            .into_iter()
            .flat_map(Value::items)
            .filter_map(|group| group.get("params"))
            .flat_map(Value::items)
            .map(Value::as_u64)
            .collect();
        let expected = u64::try_from(n_trained).unwrap_or(u64::MAX);
        if !order.iter().copied().eq((0..expected).map(Some)) {
            return Err(format!(
                "it is for {} parameters, the model has {n_trained}",
                order.len()
            ));
        }
        let mut slots = HashMap::new();
        for (index, slot) in optimizer.get("state").into_iter().flat_map(Value::entries) {
            let index = index.as_u64().filter(|&index| index < expected);
            let index = index.ok_or("it has the state of a parameter that it does not list")?;
            slots.insert(index, tensors_of(slot));
        }
        if slots.values().all(BTreeMap::is_empty) {
            return Err("it has made no step yet".to_owned());
        }
        Ok(slots)
    }

    fn entry(&self, name: &str) -> Option<Value<'_>> {
        // Otherwise the dictionary is a model, and `optimizer` could be the name of a parameter.
        self.file.root().get("model")?;
        self.file.root().get(name)
    }
}

/// State of one parameter by its name in PyTorch.
type Slot<'a> = BTreeMap<&'a str, Stored<'a>>;

#[derive(Debug, Clone, Copy)]
enum Stored<'a> {
    Tensor(&'a TensorRef),
    /// Older versions count steps in a Python number.
    Number(f64),
}

fn tensors_of(slot: Value<'_>) -> Slot<'_> {
    let known =
        |name: &&str| ["step", "exp_avg", "exp_avg_sq", "momentum_buffer", "sum"].contains(name);
    slot.entries()
        .filter_map(|(key, value)| {
            let key = key.as_str().filter(known)?;
            let stored = match value.as_tensor() {
                Some(tensor) => Stored::Tensor(tensor),
                None if key == "step" => Stored::Number(value.as_f64()?),
                None => return None,
            };
            Some((key, stored))
        })
        .collect()
}

/// A step counter as the fused optimizer wants it.
pub(super) fn scalar(step: f64) -> Tensor {
    Tensor::from(step).to_kind(Kind::Float)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use serde_json::Value as Json;
    use tch::Device;

    use super::*;

    /// A checkpoint that PyTorch wrote; `make.py` beside it says how.
    pub(in crate::checkpoint) fn run_pth() -> PathBuf {
        fixture("run.pth")
    }

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/e2e/fixtures/pytorch")
            .join(name)
    }

    /// Shape, and Σ i·xᵢ, which Python computed in the same order.
    pub(in crate::checkpoint) fn assert_digests(tensors: &Named, part: &str) {
        let text = std::fs::read(fixture("run.json")).unwrap();
        let json: Json = serde_json::from_slice(&text).unwrap();
        let expected = json[part].as_object().unwrap();
        for (name, digest) in expected {
            let (_, tensor) = tensors
                .iter()
                .find(|(found, _)| found == name)
                .unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(serde_json::json!(tensor.size()), digest[0], "{name}");
            let flat = tensor.to_kind(Kind::Double).flatten(0, -1);
            let weights = flat.ones_like().cumsum(0, Kind::Double);
            let sum = (flat * weights).sum(Kind::Double).double_value(&[]);
            let expected = digest[1].as_f64().unwrap();
            // The order of a sum in double precision.
            assert!(
                (sum - expected).abs() <= 1e-12 * expected.abs().max(1.0),
                "{name}"
            );
        }
    }

    #[test]
    fn a_run_of_the_reference_is_understood() {
        let reference = Reference::open(&run_pth()).unwrap();
        let model = reference.model().unwrap();
        assert_eq!(model.len(), 20);
        assert_eq!(model[0].0, "embedding.weight");
        assert_digests(&model, "model");

        let args = reference.args().unwrap();
        assert_eq!(args.len(), 40);
        for (flag, raw) in [
            ("lr", "0.00025"),
            ("moe.nonorm", "1"),
            ("stop_after", "100"),
            ("profile", "none"),
            ("restore", ""),
        ] {
            assert_eq!(args[flag], raw, "{flag}");
        }
        assert_eq!(
            reference.progress(),
            Progress {
                step: 3,
                epoch: 0,
                sampler_position: Some(9),
                best_losses: BTreeMap::from([("val".to_owned(), (2.375, 2))]),
            }
        );
        assert!(!reference.has_filled("scaler"));
    }

    #[test]
    fn the_optimizer_is_matched_by_the_order_of_the_parameters() {
        let reference = Reference::open(&run_pth()).unwrap();
        let model = reference.model().unwrap();
        let state = reference.optimizer(&model).unwrap().unwrap();
        let n_trained = model
            .iter()
            .filter(|(name, tensor)| is_trained(name, tensor))
            .count();
        assert_eq!((n_trained, state.len()), (18, 18 * 3));
        assert_digests(&state, "optimizer");
        let get = |name: &str| &state.iter().find(|(found, _)| found == name).unwrap().1;
        assert_eq!(get("step/embedding.weight"), &scalar(3.0));
        // It never had a gradient, so PyTorch has no state for it.
        assert_eq!(get("step/out_norm.bias"), &scalar(0.0));
        assert_eq!(get("exp_avg/out_norm.bias").size(), [4]);
    }

    #[test]
    fn an_optimizer_of_another_model_is_not_taken() {
        let reference = Reference::open(&run_pth()).unwrap();
        let mut model = reference.model().unwrap();
        model.swap(0, 3);
        let why = reference.optimizer(&model).unwrap().unwrap_err();
        assert!(why.contains("of parameter 0 has shape [7, 4]"), "{why}");
        model.pop();
        let why = reference.optimizer(&model).unwrap().unwrap_err();
        assert_eq!(why, "it is for 18 parameters, the model has 17");
    }

    #[test]
    fn buffers_are_known_by_their_names() {
        let float = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        let int = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
        for (name, tensor, expected) in [
            ("unique_layers.0.pkm.keys", &float, true),
            ("unique_layers.0.pkm.kv_sel_counts_100", &float, false),
            ("unique_layers.0.pkm.iter", &int, false),
            ("unique_layers.0.other", &int, false),
            ("my_pkm.iter", &float, true),
        ] {
            assert_eq!(is_trained(name, tensor), expected, "{name}");
        }
    }

    #[test]
    fn a_file_without_a_model_says_so() {
        let error = Reference::open(&fixture("hostile.pth")).unwrap_err();
        assert!(error.to_string().contains("posix.system"), "{error}");
    }
}
