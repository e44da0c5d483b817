//! What a run leaves behind: its metrics and its checkpoints.

use crate::read;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The training loss of each step in `metrics.jsonl`, whose last line may be half written.
pub fn losses(run_folder: &Path) -> BTreeMap<u64, f64> {
    let text = fs::read_to_string(run_folder.join("metrics.jsonl")).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|record| Some((record["step"].as_u64()?, record["train/loss"].as_f64()?)))
        .collect()
}

/// The last step whose loss is logged.
pub fn steps_seen(run_folder: &Path) -> u64 {
    losses(run_folder).keys().next_back().copied().unwrap_or(0)
}

/// The tensors of the checkpoint of a step, file by file.
pub fn checkpoint_files(run_folder: &Path, step: u64) -> [Vec<u8>; 2] {
    let folder = run_folder.join(format!("checkpoint/model-{step}"));
    ["model.safetensors", "optimizer.safetensors"].map(|name| read(&folder.join(name)))
}
