//! `moeut-host checkpoint`: to and from the reference's files, and for Python.

use moeut_e2e::{Outcome, ReferenceRun, Sandbox, checkpoint_files, losses, read, tiny};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const N_STEPS: u64 = 12;
const SAVED_AT: u32 = 6;

/// Without dropout: the reference stores no random state.
fn train(sandbox: &Sandbox, name: &str, more: &[&str]) -> Outcome {
    let mut all = vec![
        "-stop_after",
        "12",
        "-save_interval",
        "6",
        "-keep_last",
        "3",
    ];
    all.extend(["-dropout", "0"]);
    all.extend(more);
    sandbox.run(&tiny(name, &all).as_strs()).ok()
}

/// Trained here, handed over as the reference's file, converted, gone on with: the same losses and parameters.
#[test]
fn a_run_goes_on_from_a_checkpoint_of_the_reference_bit_for_bit() {
    let sandbox = Sandbox::new();
    train(&sandbox, "a", &[]);
    let a = sandbox.run_folder("a");
    let run =
        ReferenceRun::of_checkpoint(&a.join(format!("checkpoint/model-{SAVED_AT}")), SAVED_AT);
    fs::write(sandbox.work().join("model-6.pth"), run.to_bytes()).unwrap();

    let converted = sandbox
        .run(&["checkpoint", "convert", "model-6.pth", "converted"])
        .ok();
    insta::assert_snapshot!(converted.to_string(), @r"
    exit: 0
    --- stdout
    wrote `converted/model-6`: 17 tensors of the model, step 6
    note: it has no random state: dropout goes on as if started with `-seed 1`
    go on with `moeut-host -restore converted -name <name>`
    --- stderr
    ");
    let later: BTreeMap<u64, f64> = losses(&a).split_off(&(u64::from(SAVED_AT) + 1));
    for (name, from) in [("b", "converted"), ("c", "model-6.pth")] {
        let more = train(&sandbox, name, &["-restore", from]);
        assert!(more.stderr.contains("going on from step 6"), "{more}");
        let folder = sandbox.run_folder(name);
        assert_eq!(losses(&folder), later, "{from}");
        let [model, _] = checkpoint_files(&folder, N_STEPS);
        assert!(model == checkpoint_files(&a, N_STEPS)[0], "{from}");
    }
}

#[test]
fn a_checkpoint_is_described_and_exported_for_python() {
    let sandbox = Sandbox::new();
    train(&sandbox, "a", &[]);
    let info = sandbox
        .run(&["checkpoint", "info", "save/a/checkpoint"])
        .ok();
    for line in [
        "save/a/checkpoint/model-12\n",
        "  step        12\n",
        "  checksums   SHA-256 of every file agrees\n",
        "              -task moeut_c4\n",
    ] {
        assert!(info.stdout.contains(line), "{info}");
    }

    let exported = sandbox
        .run(&["checkpoint", "export", "save/a/checkpoint", "out"])
        .ok();
    assert!(
        exported.stdout.contains("tokenizer.model.model"),
        "{exported}"
    );
    let out = sandbox.work().join("out");
    assert!(
        read(&out.join("model.safetensors")) == checkpoint_files(&sandbox.run_folder("a"), 12)[0]
    );
    let config: Value = serde_json::from_slice(&read(&out.join("config.json"))).unwrap();
    assert_eq!(config["layout"], "training");
    assert_eq!(config["step"], 12);
    assert_eq!(config["vocab_size"], 500);
    assert_eq!(config["args"]["moe.n_experts"], "4");
    assert!(out.join("tokenizer.model.model").metadata().unwrap().len() > 1000);
}

/// The tiny model is not the paper's; the clean package has no such blocks.
#[test]
fn what_the_clean_layout_lacks_is_an_error_that_says_so() {
    let sandbox = Sandbox::new();
    train(&sandbox, "a", &[]);
    let args = [
        "checkpoint",
        "export",
        "save/a/checkpoint",
        "out",
        "--layout",
        "clean",
    ];
    insta::assert_snapshot!(sandbox.run(&args), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × cannot use `save/a/checkpoint/model-12`
      ╰─▶ `moe.nonorm` is 0, and the clean package computes as with 1
      help: export it with `--layout training`, which takes every model
    ");
}

/// The file that PyTorch wrote, see `fixtures/pytorch/make.py`.
#[test]
fn hostile_and_broken_files_are_errors_with_a_fix() {
    let sandbox = Sandbox::bare();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pytorch");
    let copy = |name: &str, n_bytes: usize| {
        let mut bytes = read(&fixtures.join(name));
        bytes.truncate(n_bytes);
        fs::write(sandbox.work().join(name), bytes).unwrap();
    };
    copy("hostile.pth", usize::MAX);
    copy("run.pth", 20_000);
    insta::assert_snapshot!(sandbox.run(&["checkpoint", "info", "hostile.pth"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × cannot use `hostile.pth`
      ╰─▶ at byte 189 of its pickle: it wants to call `posix.system`, which is not among the allowed
          functions and classes
      help: only if you trust where it is from, load it in Python, which runs what it names, and store
            its parameters alone: `torch.save({"model": model.state_dict()}, path)`
    "#);
    insta::assert_snapshot!(sandbox.run(&["checkpoint", "convert", "run.pth", "out"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × cannot use `run.pth`
      ╰─▶ it is no zip archive, or its end is missing
      help: copy it again, or store it again with `torch.save` of PyTorch 1.6 or newer
    ");
    insta::assert_snapshot!(sandbox.run(&["checkpoint", "list"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the checkpoint command cannot be read
      ╰─▶ `checkpoint list` is no such command
      help: type `moeut-host checkpoint --help`
    ");
    assert!(!sandbox.work().join("out").exists());
}
