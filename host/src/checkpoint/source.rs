//! Reads the model of any checkpoint, whoever wrote it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::reference::{Named, Reference};
use super::{CheckpointError, Loaded, clean, convert, folder, pytorch, read_tensors};

/// The model of a checkpoint, and what is known about it.
#[derive(Debug)]
pub(super) struct Source {
    /// Where it was found: the newest whole checkpoint of a folder, say.
    pub(super) path: PathBuf,
    /// Optimizer steps, if the checkpoint says.
    pub(super) step: Option<u64>,
    /// Raw arguments of its run, if the checkpoint says.
    pub(super) args: BTreeMap<String, String>,
    /// Parameters and buffers.
    pub(super) model: Named,
    /// For the user.
    pub(super) warnings: Vec<String>,
}

/// Reads `path` to go on with: a checkpoint folder, a folder of them, of which the newest whole one is taken, or a
/// `.pth` or `.ckpt` file of the reference. A folder with files of the reference and nothing of ours means the one
/// of the highest step, as it does there.
///
/// # Errors
/// If it is damaged, or none of these.
pub fn load(path: &Path) -> Result<Loaded, CheckpointError> {
    let file = if pytorch::is_zip(path) {
        path.to_owned()
    } else {
        match (folder::load(path), newest_of_reference(path)) {
            (Err(CheckpointError::None { .. }), Some(file)) => file,
            (loaded, _) => return loaded,
        }
    };
    let (snapshot, notes) = convert::read(&file)?;
    Ok(Loaded {
        snapshot,
        path: file,
        warnings: notes,
    })
}

/// The file `model-<step>.pth` of the highest step.
fn newest_of_reference(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let step = |name: &str| -> Option<u64> {
        let step = name.strip_prefix("model-")?.strip_suffix(".pth")?;
        step.parse().ok()
    };
    let files = entries.filter_map(|entry| {
        let step = step(entry.file_name().to_str()?)?;
        Some((step, entry.path()))
    });
    files.max().map(|(_, path)| path)
}

/// The parameters and buffers in `path` under the training code's names: for `-load_pretrained_model`.
///
/// `path` is one of
/// - a checkpoint of ours, or a folder of such checkpoints, of which the newest whole one is taken;
/// - a folder that `checkpoint export` wrote, in either layout, or a `.safetensors` file;
/// - a `.pth` or `.ckpt` file of the reference, or of `torch.save(model.state_dict(), …)`.
///
/// # Errors
/// If it is none of these, or damaged.
pub fn read_model_tensors(path: &Path) -> Result<Vec<(String, tch::Tensor)>, CheckpointError> {
    Ok(read(path)?.model)
}

/// As [`read_model_tensors`], with step and arguments.
///
/// # Errors
/// The same.
pub(super) fn read(path: &Path) -> Result<Source, CheckpointError> {
    let mut source = read_as_it_is(path)?;
    if clean::is_clean(&source.model) {
        source.model = clean::to_training(source.model);
    }
    Ok(source)
}

fn read_as_it_is(path: &Path) -> Result<Source, CheckpointError> {
    let only_tensors = |file: &Path| {
        Ok(Source {
            path: file.to_owned(),
            step: None,
            args: BTreeMap::new(),
            model: read_tensors(file)?,
            warnings: Vec::new(),
        })
    };
    if path.is_dir() {
        // An exported folder has a model and a `config.json`, and neither state nor checksums.
        if path.join("config.json").is_file() && path.join("model.safetensors").is_file() {
            return only_tensors(&path.join("model.safetensors"));
        }
        let loaded = folder::load(path)?;
        return Ok(Source {
            path: loaded.path,
            step: Some(loaded.snapshot.step),
            args: loaded.snapshot.args,
            model: loaded.snapshot.model,
            warnings: loaded.warnings,
        });
    }
    std::fs::metadata(path).map_err(CheckpointError::io("read", path))?;
    if pytorch::is_zip(path) {
        let reference = Reference::open(path)?;
        return Ok(Source {
            path: path.to_owned(),
            step: reference.has("state").then(|| reference.progress().step),
            args: reference.args()?,
            model: reference.model()?,
            warnings: Vec::new(),
        });
    }
    if path
        .extension()
        .is_some_and(|ending| ending == "safetensors")
    {
        return only_tensors(path);
    }
    Err(CheckpointError::foreign(
        path,
        "it is neither a folder, nor a `.safetensors` file, nor a zip archive of PyTorch",
        "store it again with PyTorch 1.6 or newer: `torch.save(torch.load(path, map_location=\"cpu\"), path)`",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::reference::tests::{assert_digests, run_pth};
    use super::*;

    #[test]
    fn a_folder_of_the_reference_means_its_highest_step() {
        let dir = tempfile::tempdir().unwrap();
        let error = load(dir.path()).unwrap_err();
        assert!(matches!(error, CheckpointError::None { .. }), "{error}");
        std::fs::write(dir.path().join("model-9.pth"), "PK").unwrap();
        std::fs::copy(run_pth(), dir.path().join("model-10.pth")).unwrap();
        let loaded = load(dir.path()).unwrap();
        assert_eq!(loaded.path, dir.path().join("model-10.pth"));
        assert_eq!(loaded.snapshot.step, 3);
        assert_digests(&loaded.snapshot.model, "model");
    }

    #[test]
    fn other_files_are_refused_with_a_fix() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0x80, 2, 0x8a, 10]).unwrap();
        let error = read_model_tensors(file.path()).unwrap_err();
        assert!(
            error.to_string().contains("nor a zip archive of PyTorch"),
            "{error}"
        );
        assert!(error.help().contains("with PyTorch 1.6 or newer"));
        let error = read_model_tensors(Path::new("/absent.pth")).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot read `/absent.pth`"),
            "{error}"
        );
    }
}
