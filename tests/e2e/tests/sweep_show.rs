//! The sweep files of this repository, and what is said about a file that is wrong, before any run starts.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, read, shared_data, staged_plugins};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

type Arguments = BTreeMap<String, String>;

/// A dataset more is a task more. Until they are all there, their sweeps are shown with the first one's task.
const TASKS_TO_COME: [&str; 3] = [
    "pes2o_transformer",
    "slimpajama_transformer",
    "thestack_transformer",
];

/// A host with every plugin of the workspace: the sweeps are of several tasks and models.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    for entry in fs::read_dir(staged_plugins()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), sandbox.installed().join(entry.file_name())).unwrap();
    }
    sandbox
}

fn sweeps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sweeps")
}

/// Name and path of each sweep file in a folder, sorted.
fn files(folder: &Path) -> BTreeMap<String, PathBuf> {
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let yaml = paths.filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "yaml")
    });
    yaml.map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
        .collect()
}

/// Name and parameters of each run.
fn show(sandbox: &Sandbox, path: &Path) -> Vec<(String, Arguments)> {
    let text = fs::read_to_string(path).unwrap();
    let to_come = TASKS_TO_COME
        .iter()
        .find(|task| text.contains(&format!("  task:\n    value: {task}\n")));
    let mut argv = vec!["sweep", "show", path.to_str().unwrap(), "--json"];
    argv.extend(to_come.iter().flat_map(|_| ["-task", "c4_transformer"]));
    let outcome = sandbox.run(&argv).ok();
    let runs: Vec<Value> = serde_json::from_str(&outcome.stdout).unwrap();
    runs.iter()
        .map(|run| {
            let parameters = run["parameters"].as_object().unwrap();
            let mut parameters: Arguments = parameters
                .iter()
                .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
                .collect();
            if let Some(task) = to_come {
                parameters.insert("task".into(), (*task).into());
            }
            (run["name"].as_str().unwrap().to_owned(), parameters)
        })
        .collect()
}

/// Values equal those of the reference's files, and every argument is one of this program's.
#[test]
fn the_papers_sweeps_are_the_references() {
    let sandbox = sandbox();
    let files = files(&sweeps());
    assert_eq!(files.len(), 43);
    let resolved: BTreeMap<String, Arguments> = files
        .iter()
        .map(|(name, path)| {
            let mut runs = show(&sandbox, path);
            assert_eq!(runs.len(), 1, "{name}");
            let (run, parameters) = runs.remove(0);
            assert_eq!(run, *name);
            (run, parameters)
        })
        .collect();
    assert_snapshot!("papers_sweeps", compact(&resolved));

    let Some(path) = shared_data("sweeps_resolved.json") else {
        return;
    };
    let reference: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_slice(&read(&path)).unwrap();
    assert!(reference.keys().eq(resolved.keys()));
    for (name, values) in &reference {
        assert!(values.keys().eq(resolved[name].keys()), "{name}");
        for (flag, value) in values {
            let own = &resolved[name][flag];
            let is_same = match value {
                Value::Number(number) => own.parse::<f64>().ok() == number.as_f64(),
                Value::String(text) => own == text,
                _ => false,
            };
            assert!(is_same, "{name}: {flag} is {own}, and not {value}");
        }
    }
}

/// What all have in common once, and then what each has besides.
fn compact(sweeps: &BTreeMap<String, Arguments>) -> String {
    let pairs = |arguments: &Arguments| -> BTreeSet<String> {
        arguments
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    };
    let all: Vec<BTreeSet<String>> = sweeps.values().map(pairs).collect();
    let common = all
        .iter()
        .skip(1)
        .fold(all[0].clone(), |common, one| &common & one);
    let joined = |pairs: BTreeSet<String>| pairs.into_iter().collect::<Vec<_>>().join(" ");
    let mut text = format!("all: {}\n", joined(common.clone()));
    for (name, one) in sweeps.keys().zip(&all) {
        let _ = writeln!(text, "{name}: {}", joined(one - &common));
    }
    text
}

#[test]
fn small_sweeps_and_their_runs() {
    let sandbox = sandbox();
    let mut text = String::new();
    for (name, path) in files(&sweeps().join("small")) {
        let runs = show(&sandbox, &path);
        let differs = |flag: &&String| runs.iter().any(|(_, run)| run[*flag] != runs[0].1[*flag]);
        for (run, arguments) in &runs {
            let varied: Vec<String> = arguments
                .keys()
                .filter(differs)
                .map(|flag| format!(" {flag}={}", arguments[flag]))
                .collect();
            assert!(run.starts_with(&name));
            let _ = writeln!(text, "{run}{}", varied.concat());
        }
    }
    assert_snapshot!(text, @"");
}

fn write(sandbox: &Sandbox, text: &str) {
    fs::write(sandbox.work().join("a.yaml"), text).unwrap();
}

/// A file of the reference, with its program, Python's words, a bare value for a list, and a name.
const OF_REFERENCE: &str = "\
program: main.py
command:
  - ${env}
  - python3
  - ${program}
  - ${args}
method: grid
metric:
  name: validation/mean_accuracy
  goal: maximize
parameters:
  task:
    values: c4_transformer
  name:
    value: sut
  log:
    value: wandb
  amp:
    value: True
  stop_after:
    value: null
  moe.att.k:
    values: [2, 1]
  lr:
    values: [0.00025, 1e-3]
";

#[test]
fn a_file_of_the_reference_goes_through_unchanged() {
    let sandbox = Sandbox::new();
    write(&sandbox, OF_REFERENCE);
    assert_snapshot!(sandbox.run(&["sweep", "show", "a.yaml"]), @"");
    assert_snapshot!(sandbox.run(&["sweep", "show", "a.yaml", "-lr", "0.1", "-name", "b", "-log=wandb", "-wd", "0"]), @"");
}

#[test]
fn a_random_sweep_is_fixed_by_its_seed() {
    let sandbox = Sandbox::new();
    write(
        &sandbox,
        "method: random\nparameters:\n  task: {value: moeut_c4}\n  moe:\n    parameters:\n      n_experts: {min: 4, max: 32}\n  \
         lr: {distribution: log_uniform_values, min: 0.0001, max: 0.01}\n",
    );
    let first = sandbox.run(&["sweep", "show", "a.yaml", "-n", "3"]).ok();
    assert_snapshot!(first, @"");
    let longer = sandbox.run(&["sweep", "show", "a.yaml", "-n", "5"]).ok();
    assert!(
        longer.stdout.starts_with(&first.stdout),
        "more runs are the same ones and more"
    );
    let other = sandbox
        .run(&["sweep", "show", "a.yaml", "-n", "3", "-draw_seed", "1"])
        .ok();
    assert_ne!(other.stdout, first.stdout);
}

#[test]
fn a_converted_file_shows_the_same_runs() {
    let sandbox = Sandbox::new();
    write(&sandbox, OF_REFERENCE);
    let shown = sandbox
        .run(&["sweep", "show", "a.yaml", "-name", "s"])
        .ok()
        .stdout;
    assert_snapshot!(sandbox.run(&["sweep", "convert", "a.yaml", "-o", "b.yaml"]), @"");
    assert_snapshot!(fs::read_to_string(sandbox.work().join("b.yaml")).unwrap(), @"");
    assert_eq!(
        sandbox
            .run(&["sweep", "show", "b.yaml", "-name", "s"])
            .ok()
            .stdout,
        shown
    );
    assert_snapshot!(sandbox.run(&["sweep", "convert", "a.yaml", "-o", "b.yaml"]), @"");
}

/// What `bash` hands to `srun` is what the queue would start.
#[test]
fn a_job_of_the_array_starts_its_run() {
    let sandbox = Sandbox::new();
    write(&sandbox, OF_REFERENCE);
    let script = sandbox
        .run(&["sweep", "slurm", "a.yaml", "-jobs", "2"])
        .ok()
        .stdout;
    assert_snapshot!(script, @"");
    let srun = sandbox.drop_in(
        "bin",
        "srun",
        b"#!/bin/sh\nshift 2\nprintf '%s\\n' \"$@\"\n",
    );
    fs::set_permissions(&srun, fs::Permissions::from_mode(0o755)).unwrap();
    let runs = sandbox
        .run(&["sweep", "show", "a.yaml", "--json"])
        .ok()
        .stdout;
    let runs: Vec<Value> = serde_json::from_str(&runs).unwrap();
    let bash = |task: &str| {
        let mut bash = Command::new("bash");
        bash.args(["-c", &script]).env("SLURM_ARRAY_TASK_ID", task);
        bash.env(
            "PATH",
            format!("{}:/usr/bin:/bin", srun.parent().unwrap().display()),
        );
        bash.output().unwrap()
    };
    for (index, run) in runs.iter().enumerate() {
        let output = bash(&index.to_string());
        let started = String::from_utf8(output.stdout).unwrap();
        let wanted: Vec<&str> = run["arguments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap())
            .collect();
        assert_eq!(started.lines().collect::<Vec<_>>(), wanted);
    }
    assert_eq!(bash("4").status.code(), Some(2), "there is no fifth run");
}

#[test]
fn mistakes_are_found_before_a_run_starts() {
    let sandbox = Sandbox::new();
    let mut text = String::new();
    for (file, more) in [
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n  lr_warmpu: {value: 4000}\n",
            &[][..],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n  lr_warm: {value: 4000}\n",
            &[],
        ),
        (
            "method: grid\nparameters:\n  lr: {values: [0.1, fast]}\n  task: {value: moeut_c4}\n",
            &[],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n  lm.unroll: {value: 0}\n",
            &[],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c5}\n",
            &[],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n  transformer.variant: {value: prelm_moe}\n",
            &[],
        ),
        ("method: grid\nparameters:\n  lr: {value: 1}\n", &[]),
        (
            "method: bayes\nparameters:\n  task: {value: moeut_c4}\n",
            &[],
        ),
        (
            "method: random\nparameters:\n  task: {value: moeut_c4}\n",
            &[],
        ),
        ("method: grid\nparameters:\n  task: {value: moeut_c4\n", &[]),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n",
            &["-batch_siz", "3"],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n",
            &["-batch_size", "many"],
        ),
        (
            "method: grid\nparameters:\n  task: {value: moeut_c4}\n",
            &["-name", "a/b"],
        ),
    ] {
        write(&sandbox, file);
        let outcome =
            sandbox.run(&[&["sweep", "run", "a.yaml", "-stop_after", "1"], more].concat());
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert_eq!(outcome.stdout, "");
        let _ = writeln!(text, "{}", outcome.stderr);
    }
    assert!(!sandbox.work().join("save").exists());
    assert_snapshot!(text, @"");
}

#[test]
fn commands_that_are_none() {
    let sandbox = Sandbox::bare();
    assert_snapshot!(sandbox.run(&["sweep"]), @"");
    let mut text = String::new();
    for argv in [
        &["sweep", "show"][..],
        &["sweep", "start", "a.yaml"],
        &["sweep", "show", "gone.yaml"],
        &["sweep", "show", "a.yaml", "-jobs", "2"],
        &["sweep", "run", "a.yaml", "-jobs", "0"],
        &["sweep", "convert", "a.yaml", "-lr", "1"],
    ] {
        let outcome = sandbox.run(argv);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        let _ = writeln!(text, "{}", outcome.stderr);
    }
    assert_snapshot!(text, @"");
}
