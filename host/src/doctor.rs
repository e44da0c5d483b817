//! What is there and what is wrong with it: `plugins list` and `doctor`.

use crate::plugins::listing::{Listed, Listing};
use crate::plugins::{Problem, Registry, folders};
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::{ABI_MAJOR, ABI_MINOR};
use std::collections::BTreeSet;
use std::fmt::Write;

/// One line per component: kind, name, version, ABI, libtorch, file.
pub fn plugin_table(listing: &Listing) -> String {
    let mut rows = vec![["KIND", "NAME", "VERSION", "ABI", "LIBTORCH", "FILE"].map(str::to_owned)];
    let mut seen = BTreeSet::new();
    for component in &listing.components {
        let is_shadowed = !seen.insert((component.name.kind, &component.name.name));
        rows.push(row(component, is_shadowed));
    }
    let mut text = if rows.len() == 1 {
        "no plugins\n".to_owned()
    } else {
        columns(&rows)
    };
    for note in listing.screening.notes() {
        let _ = writeln!(text, "note: {note}");
    }
    text + &problems(listing.screening.problems())
}

fn row(component: &Listed, is_shadowed: bool) -> [String; 6] {
    let Listed { name, plugin, path } = component;
    let file = path.display();
    let or_dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text.to_owned()
        }
    };
    [
        name.kind.to_string(),
        if name.aliases.is_empty() {
            name.name.clone()
        } else {
            format!("{} ({})", name.name, name.aliases.join(", "))
        },
        plugin.version.clone(),
        plugin.abi.clone(),
        or_dash(&plugin.libtorch),
        if is_shadowed {
            format!("{file} (shadowed)")
        } else {
            file.to_string()
        },
    ]
}

fn columns(rows: &[[String; 6]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn problems(problems: &[Problem]) -> String {
    let mut text = String::new();
    for problem in problems {
        let PluginError { what, why, fix } = &problem.error;
        let _ = writeln!(text, "problem: {what}\n    why: {why}\n    fix: {fix}");
    }
    text
}

/// Everything about this machine that a run depends on.
pub fn report(registry: &Registry, cuda: &Result<bool, PluginError>) -> String {
    let mut text = versions() + &hardware(cuda);
    let _ = writeln!(text, "plugin folders, first wins:");
    for folder in registry.folders() {
        let n_files = folders::libraries(&folder.path).map(|files| files.len());
        let state = match n_files {
            Ok(0) if !folder.path.exists() => "not there".to_owned(),
            Ok(n) => format!("{n} libraries"),
            Err(error) => format!("cannot be read: {error}"),
        };
        let _ = writeln!(
            text,
            "    {} ({}): {state}",
            folder.path.display(),
            folder.origin
        );
    }
    let _ = writeln!(
        text,
        "{} components are usable, {} files are not",
        registry.components().count(),
        registry.problems().len()
    );
    text + &problems(registry.problems())
}

/// Of this program, its plugin ABI and libtorch.
pub fn versions() -> String {
    format!(
        "moeut-host   {} (plugin ABI {ABI_MAJOR}.{ABI_MINOR})\n{}",
        env!("CARGO_PKG_VERSION"),
        libtorch()
    )
}

/// libtorch, CUDA and CPU, a line each.
pub fn machine(cuda: &Result<bool, PluginError>) -> String {
    libtorch() + &hardware(cuda)
}

fn libtorch() -> String {
    let found = moeut_torch::version::runtime_version();
    format!(
        "libtorch     {} (needed: {})\n",
        found.as_deref().unwrap_or("of unknown version"),
        moeut_torch::LIBTORCH_VERSION
    )
}

fn hardware(cuda: &Result<bool, PluginError>) -> String {
    let mut text = String::new();
    let n_gpus = if matches!(cuda, Ok(true)) {
        tch::Cuda::device_count()
    } else {
        0
    };
    match cuda {
        Ok(true) => {
            let _ = writeln!(text, "CUDA         {n_gpus} device(s); driver {}", driver());
            let _ = writeln!(text, "GPU          {}", gpus(n_gpus));
        }
        Ok(false) => {
            let _ = writeln!(
                text,
                "CUDA         libraries load, but there is no device; driver {}",
                driver()
            );
        }
        Err(error) => {
            let _ = writeln!(
                text,
                "CUDA         not available: {}\n    fix: {}",
                error.why, error.fix
            );
        }
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let _ = writeln!(
        text,
        "CPU          {}{cores} cores, {} threads for tensors",
        cpu_model(),
        tch::get_num_threads()
    );
    text
}

/// Name of the processor and a comma; nothing if the system does not tell.
fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    model.map_or_else(String::new, |model| {
        format!("{}, ", model.trim_start_matches([' ', '\t', ':']))
    })
}

/// Names of the GPUs, each once.
fn gpus(n_gpus: i64) -> String {
    let indices = (0..n_gpus).filter_map(|index| usize::try_from(index).ok());
    let names: BTreeSet<String> = indices
        .filter_map(|index| moeut_torch::cuda::describe(tch::Device::Cuda(index)).ok())
        .map(|gpu| gpu.name)
        .collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

/// Version of NVIDIA's kernel driver.
pub(crate) fn driver() -> String {
    std::fs::read_to_string("/sys/module/nvidia/version").map_or_else(
        |_| "not found".to_owned(),
        |version| version.trim().to_owned(),
    )
}
