//! `plugins new`: what it writes builds, passes its own tests, is opened by the real host, and trains.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, build_new, read, steps_seen, tiny};
use std::fs;

/// Writes a crate with the host, builds and tests it as its author would, and trains three steps with it.
fn builds_and_trains(kind: &str, name: &str, args: &[&str]) {
    let sandbox = Sandbox::new();
    sandbox.run(&["plugins", "new", kind, name]).ok();
    let library = build_new(&sandbox.work().join(format!("moeut-{kind}-{name}")));
    sandbox.drop_in("plugins", "mine.so", &read(&library));
    let args = tiny(name, &[args, &["-stop_after", "3"]].concat());
    sandbox.run(&args.as_strs()).ok();
    assert_eq!(steps_seen(&sandbox.run_folder(name)), 3);
}

#[test]
fn a_new_task_trains() {
    builds_and_trains("task", "verses", &["-task", "verses"]);
}

#[test]
fn a_new_dataset_trains() {
    let args = ["-task", "diary", "-lmds.valid_ratio", "1"];
    builds_and_trains("dataset", "diary", &args);
}

#[test]
fn a_new_model_trains() {
    builds_and_trains("model", "guess", &["-transformer.variant", "guess"]);
}

#[test]
fn a_new_kernel_trains() {
    builds_and_trains("kernel", "plain", &["-moe.kernel", "plain"]);
}

#[test]
fn a_task_is_short() {
    let sandbox = Sandbox::bare();
    sandbox.run(&["plugins", "new", "task", "short"]).ok();
    let source = fs::read_to_string(sandbox.work().join("moeut-task-short/src/lib.rs")).unwrap();
    assert!(source.lines().count() < 60, "{source}");
}

#[test]
fn what_cannot_be_written() {
    let sandbox = Sandbox::bare();
    let new = |words: &[&str]| sandbox.run(&[&["plugins", "new"], words].concat());
    assert_snapshot!(new(&["task", "verses"]), @"");
    let again = new(&["task", "verses"]);
    assert_snapshot!(again, @"");
    assert_snapshot!(new(&["task", "Two-Words"]), @"");
    assert_snapshot!(new(&["optimizer", "lion"]), @"");
    assert_snapshot!(new(&["task", "other", "--api", "plugins"]), @"");
    assert!(!sandbox.work().join("moeut-task-other").exists());
}
