//! `reproduce`: trains small models of every family, then makes every table and figure from them.
//!
//! ```text
//! <out>/sweeps/     the sweep files
//! <out>/code/       the text of the figure on code; see [`crate::code`]
//! <out>/runs.json   which runs a table or figure is made of
//! <out>/save/       the runs
//! <out>/figures/    every table and figure
//! ```
//! Everything goes on where it was when it is started again; when all is done, nothing is done again. The text of the
//! small scale is the embedded corpus, so that no download is needed; `-text` names another one. The sizes are not the
//! paper's, and neither are the conclusions.

use crate::child::{self, Program};
use crate::code;
use crate::files;
use crate::roster::SMALL;
use crate::words::{Words, misuse};
use moeut_host::error::HostError;
use std::path::Path;

/// Flags of the command.
pub(crate) const FLAGS: [&str; 7] = [
    "out",
    "scale",
    "code",
    "text",
    "data.dir",
    "jobs",
    "plugin_dir",
];

/// The run of the figures about experts.
const TRACED: &str = "small_moeut";
/// The file with the list of runs.
const RUNS: &str = "runs.json";

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

/// Half the width, and with experts as wide as before about half the parameters of the layers.
const NARROW: &[(&str, &str)] = &[
    ("state_size", "64"),
    ("transformer.head_projection_size", "16"),
];
/// The same without experts.
const NARROW_DENSE: &[(&str, &str)] = &[
    ("state_size", "64"),
    ("transformer.head_projection_size", "16"),
    ("transformer.ff_multiplier", "16"),
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
    job("small_dense_xs", "dense.yaml", NARROW_DENSE),
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
    /// Source code to train on.
    code: code::Amount,
    /// Questions of each group of the evaluation sets, if not all.
    limit: Option<u32>,
    /// Tokens whose experts are traced.
    n_traced: u64,
}

const SCALES: [Scale; 3] = [
    // Two CPU cores, half an hour: 300 thousand tokens a run.
    Scale {
        name: "small",
        changes: &[
            ("stop_after", "150"),
            ("test_interval", "150"),
            ("save_interval", "150"),
        ],
        code: code::Amount {
            least: 1_500_000,
            enough: 4_000_000,
        },
        limit: Some(50),
        n_traced: 2048,
    },
    // One GPU: 66 million tokens a run, about twenty for each parameter. An H100 takes 10 to 34 ms a step, half an hour in
    // all. The embedded corpus has 0.8 million tokens, which the models would know by heart; code is to be seen no more
    // than about four times.
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
            ("data.source", "hub"),
            ("lmds.valid_ratio", "0.005"),
        ],
        code: code::Amount {
            least: 60_000_000,
            enough: 240_000_000,
        },
        limit: None,
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
        code: code::Amount {
            least: 100_000,
            enough: 4_000_000,
        },
        limit: Some(1),
        n_traced: 32,
    },
];

/// Trains and makes all of it. Returns 1 if something is missing at the end.
///
/// # Errors
/// If there is too little source code, a file cannot be written, or a program cannot be started.
pub(crate) fn command(words: &Words) -> Result<u8, HostError> {
    if let Some(name) = words.names.first() {
        return Err(misuse(format!("`{name}` is not expected here")));
    }
    let wanted = words.get("scale").unwrap_or("small");
    let scale = SCALES.iter().find(|scale| scale.name == wanted);
    let scale =
        scale.ok_or_else(|| misuse(format!("`-scale {wanted}` is none of small, gpu, smoke")))?;
    let out = words.path("out", "reproduction");
    // Whatever is wrong is found out before the first run.
    let text = folder(words, "text")?.map_or_else(Vec::new, |folder| own_text(&folder));
    let evaluations = folder(words, "data.dir")?;
    for (name, text) in FILES {
        keep(&out.join("sweeps").join(name), text.as_bytes())?;
    }
    keep(&out.join(RUNS), SMALL.as_bytes())?;
    code::write(&words.path("code", "."), &out.join("code"), &scale.code)?;
    // Caches and data of a run are named relative to the folder where it was started.
    let there = |program: Program, line: &[String]| child::run(program, &out, line);
    let line = |line: &str| -> Vec<String> { line.split(' ').map(str::to_owned).collect() };
    let jobs = words.get("jobs").map(|jobs| format!("-jobs={jobs}"));
    let plugins = given_plugins(words)?;
    let mut is_whole = true;
    for job in &JOBS {
        let jobs = jobs.iter().cloned().collect();
        is_whole &= there(
            Program::Host,
            &[sweep(job, scale, &text), jobs, plugins.clone()].concat(),
        )?;
    }
    if let Some(folder) = evaluations {
        let mut tests = line(&format!("run-tests -runs={RUNS} -save_dir=save"));
        tests.push(format!("-data.dir={folder}"));
        tests.extend(scale.limit.map(|limit| format!("-limit={limit}")));
        is_whole &= there(Program::Paper, &[tests, plugins.clone()].concat())?;
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

/// The folders of plugins as they were given, if they were.
fn given_plugins(words: &Words) -> Result<Vec<String>, HostError> {
    let folders = words.list("plugin_dir", "");
    let folders: Result<Vec<String>, HostError> = folders
        .iter()
        .map(|folder| absolute("plugin_dir", folder))
        .collect();
    let folders = folders?.join(",");
    let flag = (!folders.is_empty()).then(|| format!("-plugin_dir={folders}"));
    Ok(flag.into_iter().collect())
}

/// A folder that has to be there, if one is given.
fn folder(words: &Words, flag: &str) -> Result<Option<String>, HostError> {
    let Some(folder) = words.get(flag) else {
        return Ok(None);
    };
    if Path::new(folder).is_dir() {
        return absolute(flag, folder).map(Some);
    }
    Err(HostError::new(
        format!("`-{flag} {folder}` cannot be used"),
        "there is no such folder",
        format!("set `-{flag}` to a folder that is there, or leave it out"),
    ))
}

/// A path that keeps its meaning elsewhere.
fn absolute(flag: &str, path: &str) -> Result<String, HostError> {
    let absolute = std::path::absolute(path).map(|path| path.display().to_string());
    absolute.map_err(|error| misuse(format!("`-{flag} {path}` is no path: {error}")))
}

/// What makes runs train on the files of a folder.
fn own_text(folder: &str) -> Vec<String> {
    vec![
        "-task=moeut_text_files".to_owned(),
        format!("-data.dir={folder}"),
        "-lmds.valid_ratio=1".to_owned(),
    ]
}

/// The command line that trains a sweep; of arguments that stand in it twice the last one counts.
fn sweep(job: &Job, scale: &Scale, text: &[String]) -> Vec<String> {
    let mut arguments = vec![
        "sweep".to_owned(),
        "run".to_owned(),
        format!("sweeps/{}", job.file),
    ];
    arguments.push(format!("-name={}", job.name));
    let flag = |(name, value): &(&str, &str)| format!("-{name}={value}");
    arguments.extend(scale.changes.iter().map(flag));
    arguments.extend(text.iter().cloned());
    arguments.extend(job.changes.iter().map(flag));
    arguments
}

/// Writes a file unless it is as it would be: its time says when it changed.
fn keep(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    if std::fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    files::write(path, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_text_is_for_all_runs_but_those_on_code() {
        let text = own_text("/texts");
        for (scale, job) in SCALES
            .iter()
            .flat_map(|scale| JOBS.iter().map(move |job| (scale, job)))
        {
            let arguments = sweep(job, scale, &text);
            let last = |name: &str| {
                arguments
                    .iter()
                    .rfind(|argument| argument.starts_with(name))
            };
            let folder = if job.name.starts_with("small_code_") {
                "code"
            } else {
                "/texts"
            };
            assert_eq!(last("-data.dir="), Some(&format!("-data.dir={folder}")));
            assert_eq!(last("-task="), Some(&"-task=moeut_text_files".to_owned()));
            assert_eq!(
                last("-lmds.valid_ratio="),
                Some(&"-lmds.valid_ratio=1".to_owned())
            );
        }
    }
}
