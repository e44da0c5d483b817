//! The program behind `cargo xtask fixtures` tells a recorded run that agrees from one that does not.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where it is allowed")]

use moeut_numerics::fixture;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use tch::Tensor;

/// The smallest one with experts.
const FIXTURE: &str = "15_moeut_g1";

/// What `change` may do to a copy of the fixture.
struct Run {
    meta: Value,
    tensors: Vec<(String, Tensor)>,
}

impl Run {
    fn tensor(&mut self, name: &str) -> &Tensor {
        let found = self.tensors.iter().find(|(own, _)| own == name);
        &found.unwrap_or_else(|| panic!("no {name}")).1
    }
}

/// Exit code and output for a folder.
fn run(folder: &Path) -> (Option<i32>, String) {
    run_with(folder, &["--kernel", "grouped"])
}

fn run_with(folder: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_moeut-numerics"))
        .arg(folder)
        .args(flags)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Exit code and output for a folder with a changed copy of the fixture; nothing if there are no fixtures.
fn run_changed(change: impl FnOnce(&mut Run)) -> Option<(Option<i32>, String)> {
    let all = fixture::all().unwrap();
    let name = format!("{FIXTURE}.json");
    let json = all.into_iter().find(|path| path.ends_with(&name))?;
    let mut copy = Run {
        meta: serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap(),
        tensors: Tensor::read_safetensors(json.with_extension("safetensors")).unwrap(),
    };
    change(&mut copy);
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join(name);
    std::fs::write(&json, copy.meta.to_string()).unwrap();
    Tensor::write_safetensors(&copy.tensors, json.with_extension("safetensors")).unwrap();
    Some(run(folder.path()))
}

#[test]
fn an_unchanged_copy_agrees() {
    let Some((code, text)) = run_changed(|_| ()) else {
        return;
    };
    assert_eq!(code, Some(0), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(
        lines[0].starts_with("15_moeut_g1 f32 grouped:  params 20  after3 "),
        "{text}"
    );
    assert_eq!(
        lines[1],
        "1 runs of 1 fixtures: 1 agree with the reference, 0 do not"
    );
}

/// Each fault ends with exit code 1 and a line that says what it is.
#[test]
fn each_fault_is_named() {
    type Fault = (&'static str, fn(&mut Run));
    let faults: [Fault; 6] = [
        ("grad of output.bias: ", |copy| {
            let _ = copy.tensor("grad.output.bias").get(3).g_add_scalar_(1e-3);
        }),
        ("logits of step 0: ", |copy| {
            let logits = copy.tensor("expected.logits");
            let _ = logits.get(0).get(0).get(0).g_add_scalar_(1e-3);
        }),
        ("not recorded: [\"output.bias\"]", |copy| {
            copy.tensors.retain(|(name, _)| name != "param.output.bias");
        }),
        ("15_moeut_g1 has no tensor expected.logits", |copy| {
            copy.tensors.retain(|(name, _)| name != "expected.logits");
        }),
        ("model `moeut` has no argument `moe.n_expert`", |copy| {
            copy.meta["args_effective"]["moe.n_expert"] = 8.into();
        }),
        ("loss of step 0: ", |copy| {
            copy.meta["fp64"]["steps"][0]["loss"] = 4.7.into();
        }),
    ];
    for (message, fault) in faults {
        let Some((code, text)) = run_changed(fault) else {
            return;
        };
        let found = text.lines().find(|line| {
            line.starts_with("FAILED 15_moeut_g1 f32 grouped: ") && line.contains(message)
        });
        assert!(found.is_some(), "{message}: {text}");
        assert_eq!(code, Some(1), "{message}: {text}");
    }
}

/// A folder that looks as if it had a recorded run: what is wrong with arguments shows before one is read.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("run.json"), "{}").unwrap();
    folder
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let (code, text) = run_with(folder().path(), &["--device", "cuda:99"]);
    assert_eq!(code, Some(2), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0], "Error: there is no device `cuda:99`");
    // Why is the machine's matter: it may have no GPU, fewer, or no libraries for them.
    assert!(lines[1].starts_with("  why: "), "{text}");
    assert!(lines[2].contains("`--device cpu`"), "{text}");
}

#[test]
fn a_kernel_for_gpus_is_not_run_on_the_cpu() {
    let (code, text) = run_with(folder().path(), &["--kernel", "cuda", "--dtype", "bf16"]);
    assert_eq!(code, Some(2), "{text}");
    assert_eq!(
        text,
        "Error: nothing can be run on `cpu`\n  why: of the kernels `cuda` none computes there in `bf16`\n  fix: name \
         another `--device` or `--dtype`, or leave out `--kernel` to run all\n"
    );
}

#[test]
fn with_a_folder_of_plugins_nothing_is_built() {
    let empty = tempfile::tempdir().unwrap();
    let plugins = empty.path().to_str().unwrap();
    let (code, text) = run_with(folder().path(), &["--plugins", plugins]);
    assert_eq!(code, Some(2), "{text}");
    let library = empty.path().join("libmoeut_kernel_reference.so");
    assert!(text.contains(library.to_str().unwrap()), "{text}");
}

#[test]
fn a_folder_without_recorded_runs_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (code, text) = run(folder.path());
    assert_eq!(code, Some(2), "{text}");
    let shown = folder.path().display();
    assert_eq!(
        text,
        format!(
            "Error: there are no recorded runs in `{shown}`\n  why: it has no `*.json`\n  fix: name a folder with \
             pairs of `<name>.json` and `<name>.safetensors`\n"
        )
    );
}
