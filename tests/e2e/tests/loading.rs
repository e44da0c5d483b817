//! Plugin files that cannot or must not be opened, and which of several files wins.

use insta::assert_snapshot;
use moeut_e2e::{DATASET, MODEL, Sandbox, TASK, build_crate, patch, staged_plugins};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

fn staged(name: &str) -> PathBuf {
    staged_plugins().join(name)
}

/// What a user sees who asks for the main task when only `name` in `./plugins` could have it.
fn refusal(bytes: &[u8]) -> String {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", bytes);
    sandbox.run(&["-task", "moeut_c4", "-name", "a"]).to_string()
}

#[test]
fn a_library_that_is_no_plugin() {
    let libtorch = std::env::var_os("LIBTORCH").expect("cargo's configuration sets it");
    let folder = fs::read_dir(PathBuf::from(libtorch).join("lib")).unwrap().flatten();
    let smallest = folder
        .filter(|entry| entry.file_name().to_string_lossy().contains(".so"))
        .min_by_key(|entry| entry.metadata().unwrap().len())
        .unwrap();
    assert_snapshot!(refusal(&fs::read(smallest.path()).unwrap()), @"");
}

#[test]
fn a_truncated_plugin() {
    let bytes = fs::read(staged(TASK)).unwrap();
    assert_snapshot!(refusal(&bytes[..bytes.len() / 2]), @"");
}

#[test]
fn garbage() {
    assert_snapshot!(refusal(b"not a library at all"), @"");
}

#[test]
fn an_empty_file() {
    assert_snapshot!(refusal(b""), @"");
}

#[test]
fn another_abi_major() {
    assert_snapshot!(refusal(&patch(&staged(TASK), r#""abi":"1.0""#, r#""abi":"2.0""#)), @"");
}

#[test]
fn another_target() {
    let bytes = patch(&staged(TASK), r#""target":"x86_64"#, r#""target":"sparc9"#);
    assert_snapshot!(refusal(&bytes), @"");
}

#[test]
fn another_libtorch() {
    let sandbox = Sandbox::new();
    fs::remove_file(sandbox.installed().join(MODEL)).unwrap();
    sandbox.drop_in("plugins", "x.so", &patch(&staged(MODEL), r#""libtorch":"2.11"#, r#""libtorch":"2.12"#));
    let outcome = sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none"]);
    assert_snapshot!(outcome.stderr, @"");
}

#[test]
fn a_manifest_that_is_no_json() {
    let bytes = patch(&staged(TASK), r#"{"record":"plugin""#, r#"{"record";"plugin""#);
    assert_snapshot!(refusal(&bytes), @"");
}

/// A plugin whose file says that its task is `moeut_c5`, while its code says `moeut_c4`.
fn lying() -> Vec<u8> {
    patch(&staged(TASK), r#""kind":"task","name":"moeut_c4""#, r#""kind":"task","name":"moeut_c5""#)
}

#[test]
fn a_lying_manifest() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &lying());
    assert_snapshot!(sandbox.run(&["-task", "moeut_c5", "-name", "a"]), @"");
}

#[test]
fn another_layout_of_the_root_module() {
    let library = build_crate("other-layout", "tests/e2e/fixtures/other-layout", str::to_owned);
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &fs::read(library).unwrap());
    assert_snapshot!(sandbox.run(&["-task", "other_layout", "-name", "a"]), @"");
}

#[test]
fn a_file_that_everybody_may_write() {
    let sandbox = Sandbox::bare();
    let path = sandbox.drop_in("plugins", "x.so", &fs::read(staged(TASK)).unwrap());
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    assert_snapshot!(sandbox.run(&["-task", "moeut_c4", "-name", "a"]), @"");
}

#[test]
fn a_folder_that_everybody_may_write() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &fs::read(staged(TASK)).unwrap());
    fs::set_permissions(sandbox.work().join("plugins"), fs::Permissions::from_mode(0o1777)).unwrap();
    assert_snapshot!(sandbox.run(&["plugins", "list"]), @"");
}

/// Each bad file comes before the good ones, so that whatever it leaves behind could do harm.
#[test]
fn bad_files_never_hide_good_ones() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "a.so", b"garbage");
    sandbox.drop_in("plugins", "b.so", &lying());
    let layout = build_crate("other-layout", "tests/e2e/fixtures/other-layout", str::to_owned);
    sandbox.drop_in("plugins", "c.so", &fs::read(layout).unwrap());
    sandbox.drop_in("plugins", "d.so", &fs::read(staged(DATASET)).unwrap());
    sandbox.drop_in("plugins", "e.so", &fs::read(staged(TASK)).unwrap());
    let table = sandbox.run(&["plugins", "list"]).ok().stdout;
    let good: Vec<&str> = table.lines().take_while(|line| !line.starts_with("problem")).collect();
    assert_snapshot!(good.join("\n"), @"");
    assert_eq!(table.matches("problem: ").count(), 3, "{table}");
}

/// A second plugin with the same task, which differs from the first by its name.
fn namesake() -> Vec<u8> {
    patch(&staged(TASK), r#""name":"moeut-task-moeut-c4""#, r#""name":"moeut-task-moeut-c9""#)
}

#[test]
fn two_files_of_one_folder_with_one_task() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "a.so", &fs::read(staged(TASK)).unwrap());
    sandbox.drop_in("plugins", "b.so", &namesake());
    assert_snapshot!(sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none"]).stderr, @"");
    // Once one is chosen, what is missing is the model.
    let chosen = sandbox.run(&["-task", "moeut_c4@moeut-task-moeut-c9", "-name", "b", "-gpu", "none"]);
    assert_snapshot!(chosen.stderr, @"");
}

#[test]
fn an_earlier_folder_shadows_a_later_one() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("mine", "a.so", &namesake());
    sandbox.drop_in("plugins", "a.so", &fs::read(staged(TASK)).unwrap());
    assert_snapshot!(sandbox.run(&["plugins", "list", "-plugin_dir", "mine"]), @"");
}

#[test]
fn an_identical_file_counts_once() {
    let sandbox = Sandbox::bare();
    for name in ["a.so", "b.so"] {
        sandbox.drop_in("plugins", name, &fs::read(staged(TASK)).unwrap());
    }
    assert_snapshot!(sandbox.run(&["plugins", "list"]), @"");
}

#[test]
fn a_misspelled_task_suggests_the_real_one() {
    let sandbox = Sandbox::new();
    assert_snapshot!(sandbox.run(&["-task", "moeut_c5", "-name", "a", "-gpu", "none"]).stderr, @"");
}
