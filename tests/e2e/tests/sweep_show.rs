//! The sweep files of this repository, and what is said about a file that is wrong, before any run starts.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, read, shared_data};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

type Arguments = BTreeMap<String, String>;

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
    let argv = ["sweep", "show", path.to_str().unwrap(), "--json"];
    let outcome = sandbox.run(&argv).ok();
    let runs: Vec<Value> = serde_json::from_str(&outcome.stdout).unwrap();
    runs.iter()
        .map(|run| {
            let parameters = run["parameters"].as_object().unwrap();
            let parameters = parameters
                .iter()
                .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
                .collect();
            (run["name"].as_str().unwrap().to_owned(), parameters)
        })
        .collect()
}

/// Values equal those of the reference's files, and every argument is one of this program's.
#[test]
fn the_papers_sweeps_are_the_references() {
    let sandbox = Sandbox::full();
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
    let sandbox = Sandbox::full();
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
    assert_snapshot!(text, @r"
    ablation_expert_size-1 moe.expert_size=32
    ablation_expert_size-2 moe.expert_size=64
    ablation_expert_size-3 moe.expert_size=128
    ablation_expert_size-4 moe.expert_size=256
    ablation_group_size-1 transformer.universal.group_size=1
    ablation_group_size-2 transformer.universal.group_size=2
    ablation_group_size-3 transformer.universal.group_size=4
    ablation_k-1 pkm.n_heads=1
    ablation_k-2 pkm.n_heads=2
    ablation_k-3 pkm.n_heads=4
    ablation_k-4 pkm.n_heads=8
    ablation_layernorm-1 moe.nonorm=0
    ablation_layernorm-2 moe.nonorm=1
    dense
    moeut
    moeut_postln
    moeut_preln
    sigma_moe
    sut
    universal
    ");
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
    assert_snapshot!(sandbox.run(&["sweep", "show", "a.yaml"]), @r"
    exit: 0
    --- stdout
    moeut-host -name=a-1 -amp=1 -lr=0.00025 -moe.att.k=2 -stop_after=none -task=c4_transformer
    moeut-host -name=a-2 -amp=1 -lr=0.00025 -moe.att.k=1 -stop_after=none -task=c4_transformer
    moeut-host -name=a-3 -amp=1 -lr=1e-3 -moe.att.k=2 -stop_after=none -task=c4_transformer
    moeut-host -name=a-4 -amp=1 -lr=1e-3 -moe.att.k=1 -stop_after=none -task=c4_transformer
    --- stderr
    warning: a.yaml: line 13: `values` of `task` is no list: read as `value`
    warning: a.yaml: `log` is left out, since no W&B is needed here; with it: `-log wandb`
    warning: a.yaml: `name` has no effect: the runs are called after the sweep, `a`
    ");
    assert_snapshot!(sandbox.run(&["sweep", "show", "a.yaml", "-lr", "0.1", "-name", "b", "-log=wandb", "-wd", "0"]), @r"
    exit: 0
    --- stdout
    moeut-host -name=b-1 -amp=1 -lr=0.1 -moe.att.k=2 -stop_after=none -task=c4_transformer -wd=0
    moeut-host -name=b-2 -amp=1 -lr=0.1 -moe.att.k=1 -stop_after=none -task=c4_transformer -wd=0
    --- stderr
    warning: a.yaml: line 13: `values` of `task` is no list: read as `value`
    ");
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
    assert_snapshot!(first, @r"
    exit: 0
    --- stdout
    moeut-host -name=a-1 -lr=0.005842808016081399 -moe.n_experts=16 -task=moeut_c4
    moeut-host -name=a-2 -lr=0.008745083414077844 -moe.n_experts=7 -task=moeut_c4
    moeut-host -name=a-3 -lr=0.00022270795595344625 -moe.n_experts=26 -task=moeut_c4
    --- stderr
    ");
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
    assert_snapshot!(sandbox.run(&["sweep", "convert", "a.yaml", "-o", "b.yaml"]), @r"
    exit: 0
    --- stdout
    wrote `b.yaml`: start it with `wandb sweep b.yaml`
    --- stderr
    ");
    assert_snapshot!(fs::read_to_string(sandbox.work().join("b.yaml")).unwrap(), @r"
    program: moeut-host
    command:
      - ${env}
      - ${program}
      - ${args}
    method: grid
    metric:
      name: validation/mean_accuracy
      goal: maximize
    parameters:
      task:
        values:
          - c4_transformer
      name:
        value: sut
      log:
        value: wandb
      amp:
        value: 1
      stop_after:
        value: none
      moe.att.k:
        values:
          - 2
          - 1
      lr:
        values:
          - 0.00025
          - 1e-3
    ");
    assert_eq!(
        sandbox
            .run(&["sweep", "show", "b.yaml", "-name", "s"])
            .ok()
            .stdout,
        shown
    );
    assert_snapshot!(sandbox.run(&["sweep", "convert", "a.yaml", "-o", "b.yaml"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `b.yaml` exists
      ╰─▶ it would be lost
      help: choose another `-o`, or remove it
    ");
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
    assert_snapshot!(script, @r#"
    #!/bin/bash
    # Runs of the sweep a; SLURM_ARRAY_TASK_ID says which. Add what your cluster wants: partition, time, memory.
    #SBATCH --job-name=a
    #SBATCH --array=0-3%2
    #SBATCH --requeue
    #SBATCH --signal=USR1@300
    #SBATCH --open-mode=append
    #SBATCH --gpus=1

    case "$SLURM_ARRAY_TASK_ID" in
    0) set -- -name=a-1 -amp=1 -lr=0.00025 -moe.att.k=2 -stop_after=none -task=c4_transformer ;;
    1) set -- -name=a-2 -amp=1 -lr=0.00025 -moe.att.k=1 -stop_after=none -task=c4_transformer ;;
    2) set -- -name=a-3 -amp=1 -lr=1e-3 -moe.att.k=2 -stop_after=none -task=c4_transformer ;;
    3) set -- -name=a-4 -amp=1 -lr=1e-3 -moe.att.k=1 -stop_after=none -task=c4_transformer ;;
    *) echo "no run $SLURM_ARRAY_TASK_ID: submit this file with sbatch" >&2; exit 2 ;;
    esac
    srun --ntasks=1 [sandbox]/bin/moeut-host "$@"
    "#);
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

/// Files with a mistake each, and arguments with one.
const MISTAKES: &[(&str, &[&str])] = &[
    (
        "method: grid\nparameters:\n  task: {value: moeut_c4}\n  lr_warmpu: {value: 4000}\n",
        &[],
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
];

#[test]
fn mistakes_are_found_before_a_run_starts() {
    let sandbox = Sandbox::new();
    let mut text = String::new();
    for (file, more) in MISTAKES {
        write(&sandbox, file);
        let outcome =
            sandbox.run(&[&["sweep", "run", "a.yaml", "-stop_after", "1"], *more].concat());
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert_eq!(outcome.stdout, "");
        let _ = writeln!(text, "{}", outcome.stderr);
    }
    assert!(!sandbox.work().join("save").exists());
    assert_snapshot!(text, @r"
    Error:   × a.yaml, line 4: unknown argument `-lr_warmpu`
      ╰─▶ neither the host nor a component of this task has an argument that begins so
      help: did you mean `-lr_warmup`?

    Error:   × a.yaml, line 4: unknown argument `-lr_warm`
      ╰─▶ neither the host nor a component of this task has an argument that begins so
      help: did you mean `-lr_warmup`?

    Error:   × a.yaml, line 3: invalid value for `-lr`
      ╰─▶ `fast` is not a number
      help: write a number

    Error:   × a.yaml, line 4: `lm.unroll` is 0
      ╰─▶ a sequence needs at least one token
      help: set `-lm.unroll` to 1 or more; the paper uses 1024

    Error:   × a.yaml, line 3: unknown task `moeut_c5`
      ╰─▶ found `moeut_c4`
      help: did you mean `moeut_c4`?

    Error:   × a.yaml, line 4: unknown variant `prelm_moe`
      ╰─▶ the variants are `moe`, `preln_moe`, `moe_universal`, `preln_moe_universal`,
          `preln_moe_parallel`, `rope`, `preln_rope`, `preln_rope_parallel`, `rope_universal`,
          `preln_rope_universal`, `sut_universal`, `preln_sut_universal`, `actsut_universal`,
          `preln_actsut_universal`
      help: set `-transformer.variant` to one of these, or to the name of a model plugin

    Error:   × a.yaml: the sweep has no task
      ╰─▶ neither the file nor the command line has `task`
      help: write `task: {value: moeut_c4}`

    Error:   × a.yaml, line 1: the method `bayes` is not there
      ╰─▶ it chooses runs by the results of earlier ones, which W&B's server does
      help: write `method: grid` or `method: random`, or start it with `wandb sweep` and `wandb agent`

    Error:   × a.yaml, line 1: nobody says how many runs there are
      ╰─▶ a random sweep has no end of its own
      help: add `-n <number>`, or write `run_cap: <number>` into the file

    Error:   × a.yaml, line 4: this is no YAML
      ╰─▶ while parsing a flow mapping, did not find expected ',' or '}'
      help: correct the line; YAML is indented by spaces

    Error:   × unknown argument `-batch_siz`
      ╰─▶ neither the host nor a component of this task has an argument that begins so
      help: did you mean `-batch_size`?

    Error:   × invalid value for `-batch_size`
      ╰─▶ `many` is not a whole number (from: command line)
      help: set `-batch_size` to a whole number

    Error:   × invalid value for `-name`
      ╰─▶ `a/b` is not a plain folder name, without `/` and neither `.` nor `..` (from: command line)
      help: set `-name` to a plain folder name, without `/` and neither `.` nor `..`
    ");
}

#[test]
fn commands_that_are_none() {
    let sandbox = Sandbox::bare();
    assert_snapshot!(sandbox.run(&["sweep"]), @r"
    exit: 0
    --- stdout
    usage: moeut-host sweep show <file> [-<argument> <value> …] [--json]      the runs, as command lines
           moeut-host sweep run <file> [-jobs <n>] [-<argument> <value> …]    train them: one on each free GPU, or n on the CPU
           moeut-host sweep slurm <file> [-jobs <n>] [-<argument> <value> …]  a script for `sbatch`: an array of jobs
           moeut-host sweep results <file> [-<argument> <value> …]            what they have reached so far, however trained
           moeut-host sweep convert <file> [-o <file>]                        the same sweep for `wandb agent`

    A file is a sweep of W&B with `method: grid` or `random`; for the latter `-n <n>` says how many runs, and
    `-draw_seed <n>` (0) which. Arguments replace what the file says about them; `-name` is the name of the sweep, by
    default that of the file. Started again, `run` goes on where it was.
    --- stderr
    ");
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
    assert_snapshot!(text, @r"
    Error:   × the sweep command cannot be read
      ╰─▶ the sweep file is missing
      help: type `moeut-host sweep --help`

    Error:   × the sweep command cannot be read
      ╰─▶ `sweep start a.yaml` is no such command
      help: type `moeut-host sweep --help`

    Error:   × the sweep file `gone.yaml` cannot be read
      ╰─▶ No such file or directory (os error 2)
      help: name a YAML file, for instance one of `sweeps/small`

    Error:   × the sweep command cannot be read
      ╰─▶ `sweep show` has no `-jobs`
      help: type `moeut-host sweep --help`

    Error:   × the sweep command cannot be read
      ╰─▶ `-jobs 0` is no whole number above 0
      help: type `moeut-host sweep --help`

    Error:   × the sweep command cannot be read
      ╰─▶ `sweep convert` has no `-lr`
      help: type `moeut-host sweep --help`
    ");
}
