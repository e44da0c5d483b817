//! `configurations`: what sweep files describe, without a single run: parameters and multiply-accumulates.

use crate::files;
use crate::model::{Catalog, Model};
use crate::run::one_line;
use crate::table::{Column, Table};
use crate::words::{Words, misuse};
use moeut_host::error::HostError;
use moeut_host::sweep::file::SweepFile;
use std::path::{Path, PathBuf};

/// Flags of the command.
pub(crate) const FLAGS: [&str; 2] = ["out", "plugin_dir"];

const COLUMNS: [&str; 9] = [
    "Run",
    "Dataset",
    "Model",
    "Size",
    "Parameters",
    "Parameters of the layers",
    "MACs, forward",
    "MACs, training",
    "Norm",
];

/// Prints a table of the runs of sweep files, or of all files in a folder, and writes it.
///
/// # Errors
/// If a file or a configuration is wrong.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    if words.names.is_empty() {
        return Err(misuse("no sweep files are named, nor folders with some"));
    }
    let catalog = Catalog::open(&words.list("plugin_dir", ""))?;
    let mut rows = Vec::new();
    for path in sweep_files(&words.names)? {
        let sweep = catalog.sweep(&SweepFile::read(&path)?)?;
        for run in sweep.runs {
            let args = run.parameters.iter().cloned().collect();
            let model = catalog.model(&args).map_err(|error| {
                HostError::new(format!("`{}` is wrong", run.name), one_line(&error), "")
            })?;
            rows.push(row(run.name, &model));
        }
    }
    let table = Table {
        columns: COLUMNS.map(Column::new).to_vec(),
        rows,
        n_headings: 0,
    };
    let out = words.path("out", "paper_out");
    for (ending, text) in [
        ("tex", table.latex()),
        ("md", table.markdown()),
        ("csv", table.csv()),
    ] {
        files::write(
            &out.join(format!("configurations.{ending}")),
            text.as_bytes(),
        )?;
    }
    crate::print(&table.csv());
    Ok(0)
}

fn row(name: String, model: &Model) -> Vec<String> {
    vec![
        name,
        model.dataset_title().to_owned(),
        model.family().name().to_owned(),
        model.size(),
        model.n_params.to_string(),
        model.n_model_weights.to_string(),
        model.macs.to_string(),
        model
            .training_macs()
            .map(|macs| format!("{macs:.4e}"))
            .unwrap_or_default(),
        model.norm().to_owned(),
    ]
}

/// The files as named, and those of folders, sorted.
fn sweep_files(names: &[String]) -> Result<Vec<PathBuf>, HostError> {
    let mut files = Vec::new();
    for name in names {
        let path = Path::new(name);
        if !path.is_dir() {
            files.push(path.to_owned());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|error| {
            HostError::new(
                format!("`{name}` cannot be read"),
                error.to_string(),
                "check its permissions",
            )
        })?;
        let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
        let mut of_folder: Vec<PathBuf> = paths
            .filter(|path| path.extension().is_some_and(|ending| ending == "yaml"))
            .collect();
        of_folder.sort();
        files.append(&mut of_folder);
    }
    Ok(files)
}
