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
    assert_snapshot!(new(&["task", "verses"]), @r"
    exit: 0
    --- stdout
    wrote `moeut-task-verses`: Cargo.toml, .gitignore, src/lib.rs

    build, test and use it:
      cd moeut-task-verses
      cargo test && cargo build --release
      install -D -m 755 target/release/libmoeut_task_verses.so ~/.local/share/moeut/plugins/libmoeut_task_verses.so
      moeut-host -task verses -profile demo -name first
    --- stderr
    ");
    let again = new(&["task", "verses"]);
    assert_snapshot!(again, @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `moeut-task-verses` is there already
      ╰─▶ what is in it is not touched
      help: choose another name, or another folder to start from
    ");
    assert_snapshot!(new(&["task", "Two-Words"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `Two-Words` is no name for a task
      ╰─▶ `T` is none of `a` to `z`, `0` to `9` and `_`
      help: type for instance `moeut-host plugins new task two_words`
    ");
    assert_snapshot!(new(&["optimizer", "lion"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown kind of plugin `optimizer`
      ╰─▶ kinds are `task`, `dataset`, `model` and `kernel`
      help: type `moeut-host plugins new task lion`
    ");
    assert_snapshot!(new(&["task", "other", "--api", "plugins"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `plugins` is no checkout of moeut-host
      ╰─▶ it holds no `plugin-api/Cargo.toml`
      help: add `--api <folder>` with the folder that holds `plugin-api` and `plugins`
    ");
    assert!(!sandbox.work().join("moeut-task-other").exists());
}
