//! Weights to start from, for `-load_pretrained_model`: parameters only, no optimizer and no step.
//!
//! Formats are the business of [`crate::checkpoint`]; here is where to look.

use crate::checkpoint::{CheckpointError, read_model_tensors};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Reads the parameters at `path`: whatever [`read_model_tensors`] takes, or the reference's `<path>/<sweep_id>` with one
/// of these or a `model.pth` in it. A leading `~` is the user's home.
///
/// # Errors
/// If there is none of these, or it cannot be read.
pub fn read(path: &Path, sweep_id: i64) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let path = expand_home(path);
    let below = path.join(sweep_id.to_string());
    let folder = if below.is_dir() { below } else { path };
    let single = folder.join("model.pth");
    read_model_tensors(if single.is_file() { &single } else { &folder })
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
            std::fs::write(folder.join("config.json"), "{}").unwrap();
        };
        write(dir.path(), "outer");
        write(&grid, "inner");
        assert_eq!(names(&dir.path().join("model.safetensors"), 3), ["outer"]);
        assert_eq!(names(dir.path(), 0), ["outer"]);
        assert_eq!(names(dir.path(), 3), ["inner"]);
    }
}
