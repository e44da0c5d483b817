//! What a checkpoint holds, as a text.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use tch::{Kind, Tensor};

use super::reference::{Reference, is_trained};
use super::tensors::dtype_of;
use super::{CheckpointError, folder, pytorch, read_tensors};

/// What is shown of a tensor.
struct Line {
    name: String,
    shape: Vec<i64>,
    kind: Kind,
    is_trained: bool,
}

/// What is shown of a checkpoint.
struct Report {
    path: String,
    kind: &'static str,
    step: Option<u64>,
    /// Bytes of each part.
    parts: Vec<(String, u64)>,
    checksums: &'static str,
    args: BTreeMap<String, String>,
    model: Vec<Line>,
    others: Vec<Line>,
    warnings: Vec<String>,
}

/// Describes `path`: a checkpoint of ours, a folder of them (the newest whole one), a `.safetensors` file, or one of
/// the reference. All data is read and compared with its checksums. `with_tensors` lists every tensor.
///
/// # Errors
/// If it cannot be read or is damaged.
pub fn info(path: &Path, with_tensors: bool) -> Result<String, CheckpointError> {
    let report = if path.is_dir() && !path.join("config.json").is_file() {
        of_folder(path)?
    } else if pytorch::is_zip(path) {
        of_pytorch(path)?
    } else if path.is_dir() {
        of_safetensors(&path.join("model.safetensors"))?
    } else {
        of_safetensors(path)?
    };
    Ok(report.text(with_tensors))
}

fn of_folder(path: &Path) -> Result<Report, CheckpointError> {
    let loaded = folder::load(path)?;
    let files =
        std::fs::read_dir(&loaded.path).map_err(CheckpointError::io("read", &loaded.path))?;
    let mut parts: Vec<(String, u64)> = files
        .flatten()
        .filter_map(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            Some((name, file.metadata().ok()?.len()))
        })
        .collect();
    parts.sort();
    let snapshot = loaded.snapshot;
    Ok(Report {
        path: loaded.path.display().to_string(),
        kind: "checkpoint of moeut-host",
        step: Some(snapshot.step),
        parts,
        checksums: "SHA-256 of every file agrees",
        args: snapshot.args,
        model: lines(&snapshot.model),
        others: lines(&snapshot.optimizer),
        warnings: loaded.warnings,
    })
}

fn of_safetensors(path: &Path) -> Result<Report, CheckpointError> {
    let tensors = read_tensors(path)?;
    let bytes = std::fs::metadata(path).map_or(0, |found| found.len());
    Ok(Report {
        path: path.display().to_string(),
        kind: "safetensors file",
        step: None,
        parts: vec![("all".to_owned(), bytes)],
        checksums: "the format has none",
        args: BTreeMap::new(),
        model: lines(&tensors),
        others: Vec::new(),
        warnings: Vec::new(),
    })
}

fn of_pytorch(path: &Path) -> Result<Report, CheckpointError> {
    let reference = Reference::open(path)?;
    let file = reference.file();
    file.verify()?;
    let mut model = Vec::new();
    for (name, tensor) in reference.state_dict()? {
        // Which names are buffers is known for tensors; an empty one of the same type stands in.
        let stand_in = Tensor::zeros([0], (tensor.storage.kind, tch::Device::Cpu));
        model.push(Line {
            name: name.to_owned(),
            shape: tensor.shape.clone(),
            kind: tensor.storage.kind,
            is_trained: is_trained(name, &stand_in),
        });
    }
    let is_part_of_model = |name: &str| !reference.has("model") || name.starts_with("model.");
    let others = file
        .root()
        .tensors()
        .into_iter()
        .filter(|(name, _)| !is_part_of_model(name))
        .map(|(name, tensor)| Line {
            name,
            shape: tensor.shape.clone(),
            kind: tensor.storage.kind,
            is_trained: false,
        })
        .collect();
    Ok(Report {
        path: path.display().to_string(),
        kind: if reference.has("state") {
            "checkpoint of the reference"
        } else {
            "parameters stored by PyTorch"
        },
        step: reference.has("state").then(|| reference.progress().step),
        parts: vec![("all".to_owned(), file.n_bytes())],
        checksums: "CRC-32 of every entry agrees",
        args: reference.args()?,
        model,
        others,
        warnings: Vec::new(),
    })
}

fn lines(tensors: &[(String, Tensor)]) -> Vec<Line> {
    let line = |(name, tensor): &(String, Tensor)| Line {
        name: name.clone(),
        shape: tensor.size(),
        kind: tensor.kind(),
        is_trained: is_trained(name, tensor),
    };
    tensors.iter().map(line).collect()
}

impl Line {
    fn numel(&self) -> u64 {
        self.shape.iter().map(|&dim| dim.unsigned_abs()).product()
    }
}

impl Report {
    fn text(&self, with_tensors: bool) -> String {
        let mut text = format!("{}\n", self.path);
        let mut row = |name: &str, value: &str| {
            let _ = writeln!(text, "  {name:<11} {value}");
        };
        for warning in &self.warnings {
            row("warning", warning);
        }
        row("kind", self.kind);
        if let Some(step) = self.step {
            row("step", &step.to_string());
        }
        let trained = self.model.iter().filter(|line| line.is_trained);
        let n_params: u64 = trained.map(Line::numel).sum();
        row(
            "model",
            &format!("{n_params} parameters, {} tensors", self.model.len()),
        );
        row("other state", &format!("{} tensors", self.others.len()));
        let total: u64 = self.parts.iter().map(|(_, bytes)| bytes).sum();
        row("size", &format!("{total} bytes"));
        if self.parts.len() > 1 {
            for (name, bytes) in &self.parts {
                row("", &format!("{bytes:>12} {name}"));
            }
        }
        row("checksums", self.checksums);
        row("arguments", &self.args.len().to_string());
        for (flag, value) in &self.args {
            row("", &format!("-{flag} {value}"));
        }
        if with_tensors {
            row("tensors", "");
            let width = self.model.iter().chain(&self.others);
            let width = width.map(|line| line.name.len()).max().unwrap_or(0);
            for Line {
                name, shape, kind, ..
            } in self.model.iter().chain(&self.others)
            {
                let dtype = dtype_of(*kind).unwrap_or("?");
                row("", &format!("{name:<width$} {dtype:<4} {shape:?}"));
            }
        }
        text
    }
}
