//! `reproduce`: trains small models of every family, then makes every table and figure from them.
//!
//! ```text
//! <out>/sweeps/     the sweep files
//! <out>/code/       source files, the text of the figure on code
//! <out>/runs.json   which runs a table or figure is made of
//! <out>/save/       the runs
//! <out>/figures/    every table and figure
//! ```
//! Everything goes on where it was when it is started again; when all is done, nothing is done again. The text is the
//! embedded corpus, so that no download is needed; the sizes are not the paper's, and neither are the conclusions.

use crate::child::{self, Program};
use crate::files;
use crate::roster::SMALL;
use crate::words::{Words, misuse};
use moeut_host::error::HostError;
use std::path::{Path, PathBuf};

/// Flags of the command.
pub(crate) const FLAGS: [&str; 6] = ["out", "scale", "code", "data.dir", "jobs", "plugin_dir"];

/// The run of the figures about experts.
const TRACED: &str = "small_moeut";
/// The file with the list of runs.
const RUNS: &str = "runs.json";
/// Endings of source files.
const SOURCES: [&str; 8] = ["rs", "py", "c", "h", "cpp", "java", "js", "go"];
/// Bytes of source that are enough.
const ENOUGH_CODE: usize = 4_000_000;

macro_rules! sweep_file {
    ($name:literal) => {
        ($name, include_str!(concat!("../../sweeps/small/", $name)))
    };
}

/// The sweep files of this repository for small machines.
const FILES: [(&str, &str); 10] = [
    sweep_file!("dense.yaml"),
    sweep_file!("universal.yaml"),
    sweep_file!("moeut.yaml"),
    sweep_file!("sigma_moe.yaml"),
    sweep_file!("moeut_postln.yaml"),
    sweep_file!("moeut_preln.yaml"),
    sweep_file!("sut.yaml"),
    sweep_file!("ablation_group_size.yaml"),
    sweep_file!("ablation_k.yaml"),
    sweep_file!("ablation_expert_size.yaml"),
];

/// A sweep to train: its name, its file, and what differs from the file. `runs/small.json` names the runs.
struct Job {
    name: &'static str,
    file: &'static str,
    changes: &'static [(&'static str, &'static str)],
}

/// Half the width, a quarter of the parameters of the layers.
const NARROW: &[(&str, &str)] = &[
    ("state_size", "64"),
    ("transformer.head_projection_size", "16"),
];
const ON_CODE: &[(&str, &str)] = &[
    ("task", "moeut_text_files"),
    ("data.dir", "code"),
    ("lmds.valid_ratio", "1"),
];

const fn job(
    name: &'static str,
    file: &'static str,
    changes: &'static [(&'static str, &'static str)],
) -> Job {
    Job {
        name,
        file,
        changes,
    }
}

const JOBS: [Job; 15] = [
    job("small_dense", "dense.yaml", &[]),
    job("small_universal", "universal.yaml", &[]),
    job("small_moeut", "moeut.yaml", &[]),
    job("small_sigma_moe", "sigma_moe.yaml", &[]),
    job("small_dense_xs", "dense.yaml", NARROW),
    job("small_moeut_xs", "moeut.yaml", NARROW),
    job("small_sigma_moe_xs", "sigma_moe.yaml", NARROW),
    job("small_moeut_postln", "moeut_postln.yaml", &[]),
    job("small_moeut_preln", "moeut_preln.yaml", &[]),
    job("small_sut", "sut.yaml", &[]),
    job("small_group_size", "ablation_group_size.yaml", &[]),
    job("small_k", "ablation_k.yaml", &[]),
    job("small_expert_size", "ablation_expert_size.yaml", &[]),
    job("small_code_dense", "dense.yaml", ON_CODE),
    job("small_code_moeut", "moeut.yaml", ON_CODE),
];

/// How much is trained.
struct Scale {
    name: &'static str,
    /// What differs from the sweep files, in all runs.
    changes: &'static [(&'static str, &'static str)],
    /// Tokens whose experts are traced.
    n_traced: u64,
}

const SCALES: [Scale; 3] = [
    // Two CPU cores, half an hour.
    Scale {
        name: "small",
        changes: &[
            ("stop_after", "150"),
            ("test_interval", "150"),
            ("save_interval", "150"),
        ],
        n_traced: 2048,
    },
    // One GPU, some hours.
    Scale {
        name: "gpu",
        changes: &[
            ("stop_after", "4000"),
            ("test_interval", "1000"),
            ("save_interval", "1000"),
            ("batch_size", "64"),
            ("lm.unroll", "256"),
            ("amp", "1"),
            ("lr_warmup", "200"),
        ],
        n_traced: 4096,
    },
    // A minute: whether everything works, not what comes of it.
    Scale {
        name: "smoke",
        changes: &[
            ("stop_after", "2"),
            ("test_interval", "2"),
            ("save_interval", "2"),
            ("batch_size", "2"),
            ("lm.unroll", "16"),
            ("lr_warmup", "1"),
            ("sentencepiece.n_pieces", "500"),
            ("threads", "1"),
            ("lmds.valid_ratio", "1e-6"),
            ("log_interval", "1"),
        ],
        n_traced: 32,
    },
];

/// Trains and makes all of it. Returns 1 if something is missing at the end.
///
/// # Errors
/// If there is no source code, a file cannot be written, or a program cannot be started.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    if let Some(name) = words.names.first() {
        return Err(misuse(format!("`{name}` is not expected here")));
    }
    let wanted = words.get("scale").unwrap_or("small");
    let scale = SCALES.iter().find(|scale| scale.name == wanted);
    let scale =
        scale.ok_or_else(|| misuse(format!("`-scale {wanted}` is none of small, gpu, smoke")))?;
    let out = words.path("out", "reproduction");
    for (name, text) in FILES {
        keep(&out.join("sweeps").join(name), text.as_bytes())?;
    }
    keep(&out.join(RUNS), SMALL.as_bytes())?;
    write_code(&words.path("code", "."), &out)?;
    // Caches and data of a run are named relative to the folder where it was started.
    let there = |program: Program, line: &[String]| child::run(program, &out, line);
    let line = |line: &str| -> Vec<String> { line.split(' ').map(str::to_owned).collect() };
    let plugins = given(words, "plugin_dir")?;
    let mut is_whole = true;
    for job in &JOBS {
        is_whole &= there(
            Program::Host,
            &[sweep(job, scale), given(words, "jobs")?, plugins.clone()].concat(),
        )?;
    }
    let evaluations = given(words, "data.dir")?;
    if !evaluations.is_empty() {
        let tests = line(&format!("run-tests -runs={RUNS} -save_dir=save"));
        is_whole &= there(
            Program::Paper,
            &[tests, evaluations, plugins.clone()].concat(),
        )?;
    }
    let trace = line(&format!(
        "trace {TRACED} -save_dir=save -n_tokens={}",
        scale.n_traced
    ));
    is_whole &= there(Program::Paper, &[trace, plugins.clone()].concat())?;
    let all = line(&format!("all -runs={RUNS} -save_dir=save -out=figures"));
    is_whole &= there(Program::Paper, &[all, plugins].concat())?;
    Ok(u8::from(!is_whole))
}

/// A flag as it was given. Paths keep their meaning elsewhere.
fn given(words: &Words, flag: &str) -> Result<Vec<String>, HostError> {
    let Some(value) = words.get(flag) else {
        return Ok(Vec::new());
    };
    if flag == "jobs" {
        return Ok(vec![format!("-{flag}={value}")]);
    }
    let absolute = |part: &str| std::path::absolute(part).map(|path| path.display().to_string());
    let parts: Result<Vec<String>, _> = value.split(',').map(absolute).collect();
    let parts = parts.map_err(|error| misuse(format!("`-{flag} {value}` is no path: {error}")))?;
    Ok(vec![format!("-{flag}={}", parts.join(","))])
}

/// The command line that trains a sweep.
fn sweep(job: &Job, scale: &Scale) -> Vec<String> {
    let mut arguments = vec![
        "sweep".to_owned(),
        "run".to_owned(),
        format!("sweeps/{}", job.file),
    ];
    arguments.push(format!("-name={}", job.name));
    let changes = scale.changes.iter().chain(job.changes);
    arguments.extend(changes.map(|(name, value)| format!("-{name}={value}")));
    arguments
}

/// Writes a file unless it is as it would be: its time says when it changed.
fn keep(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    if std::fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    files::write(path, bytes)
}

/// Copies source files as text, unless that was done.
fn write_code(from: &Path, out: &Path) -> Result<(), HostError> {
    let folder = out.join("code");
    if folder.is_dir() {
        return Ok(());
    }
    let mut found = Vec::new();
    find_code(from, &mut found);
    found.sort();
    let mut n_bytes = 0;
    for (index, path) in found.iter().enumerate() {
        let Ok(text) = std::fs::read_to_string(path) else {
            continue;
        };
        n_bytes += text.len();
        files::write(&folder.join(format!("{index:05}.txt")), text.as_bytes())?;
        if n_bytes > ENOUGH_CODE {
            break;
        }
    }
    if n_bytes > 0 {
        return Ok(());
    }
    Err(HostError::new(
        "there is no code for the figure on code",
        format!("there are no source files below `{}`", from.display()),
        "set `-code` to a folder with some, a clone of this repository say",
    ))
}

/// Source files below a folder; not hidden ones, nor those that were built.
fn find_code(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if !name.starts_with('.') && name != "target" {
                find_code(&path, found);
            }
        } else if path
            .extension()
            .is_some_and(|ending| SOURCES.iter().any(|known| ending == *known))
        {
            found.push(path);
        }
    }
}
