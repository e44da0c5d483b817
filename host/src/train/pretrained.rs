//! Weights to start from, for `-load_pretrained_model`: parameters only, no optimizer and no step.
//!
//! The one place that decides in which format they are.

use crate::checkpoint::{self, CheckpointError, read_tensors};
use moeut_plugin_api::PluginError;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Reads the parameters at `path`: a `.safetensors` file, a checkpoint's folder, a folder of checkpoints (the newest
/// counts), or a folder in which one of these is called `sweep_id`. A leading `~` is the user's home.
///
/// # Errors
/// If there is none of these, or it cannot be read.
pub fn read(path: &Path, sweep_id: i64) -> Result<Vec<(String, Tensor)>, PluginError> {
    let path = expand_home(path);
    let below = path.join(sweep_id.to_string());
    let path = if below.is_dir() { below } else { path };
    match path.extension().and_then(|extension| extension.to_str()) {
        _ if path.is_dir() => Ok(from_folder(&path)?),
        Some("safetensors") => Ok(read_tensors(&path)?),
        _ => Err(PluginError::new(format!("no weights in `{}`", path.display()))
            .why(match path.try_exists() {
                Ok(true) => "it is neither a folder nor a `.safetensors` file",
                Ok(false) => "there is no such file or folder",
                Err(_) => "it cannot be looked at",
            })
            .fix("give `-load_pretrained_model` a checkpoint such as `save/<name>/checkpoint`, or a `.safetensors` file")),
    }
}

/// An exported model has a single file; what we save ourselves has checksums, too.
fn from_folder(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let single = path.join("model.safetensors");
    if single.is_file() && !path.join("MANIFEST.json").exists() {
        return read_tensors(&single);
    }
    Ok(checkpoint::load(path)?.snapshot.model)
}

fn expand_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::write_tensors;

    fn names(path: &Path, sweep_id: i64) -> Vec<String> {
        let tensors = read(path, sweep_id).unwrap();
        tensors.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn a_file_an_exported_folder_and_a_folder_of_a_grid() {
        let dir = tempfile::tempdir().unwrap();
        let grid = dir.path().join("3");
        std::fs::create_dir(&grid).unwrap();
        let write = |folder: &Path, name: &str| {
            let tensors = [(name.to_owned(), Tensor::from_slice(&[1.0_f32]))];
            let path = folder.join("model.safetensors");
            let mut file = std::fs::File::create(&path).unwrap();
            write_tensors(&mut file, &path, &tensors).unwrap();
        };
        write(dir.path(), "outer");
        write(&grid, "inner");
        assert_eq!(names(&dir.path().join("model.safetensors"), 3), ["outer"]);
        assert_eq!(names(dir.path(), 0), ["outer"]);
        assert_eq!(names(dir.path(), 3), ["inner"]);
    }

    #[test]
    fn what_is_not_there_is_said() {
        let error = read(Path::new("no/such.bin"), 0).unwrap_err();
        assert_eq!(error.why, "there is no such file or folder");
    }
}
