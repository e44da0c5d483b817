//! A panic in a plugin, here one that was built in debug, becomes an error of the released host.

use insta::assert_snapshot;
use moeut_e2e::{Flavor, Sandbox, build_as, build_crate, read};

fn sandbox() -> Sandbox {
    let library = build_crate("panicky", "tests/e2e/fixtures/panicky", str::to_owned);
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "panicky.so", &read(&library));
    sandbox
}

/// What the host says, behind what the panic itself printed.
fn error(task: &str) -> (Option<i32>, String) {
    let outcome = sandbox().run(&["-task", task, "-name", "a", "-gpu", "none"]);
    let start = outcome
        .stderr
        .find("Error:")
        .unwrap_or_else(|| panic!("{outcome}"));
    (outcome.code, outcome.stderr[start..].to_owned())
}

#[test]
fn a_panic_in_new_names_plugin_component_and_call() {
    let (code, text) = error("panics_in_new");
    assert_eq!(code, Some(2));
    assert_snapshot!(text, @r"
    Error:   × `panics_in_new` of plugin `moeut-task-panicky` panicked in `new`
      ╰─▶ index 3 of a list of 2 (at plugins/tasks/panicky/src/lib.rs:19:9)
      help: this is a defect of `moeut-task-panicky`: report it to its authors
    ");
}

#[test]
fn a_panic_in_plan_whose_payload_panics_again_is_an_error_too() {
    let (code, text) = error("panics_in_plan");
    assert_eq!(code, Some(2));
    assert_snapshot!(text, @r"
    Error:   × `panics_in_plan` of plugin `moeut-task-panicky` panicked in `plan`
      ╰─▶ no message (at plugins/tasks/panicky/src/lib.rs:49:9)
      help: this is a defect of `moeut-task-panicky`: report it to its authors
    ");
}

/// Linkers drop what nobody seems to use; the manifest and the registrations must not be among it.
#[test]
fn a_stripped_build_with_fat_lto_keeps_manifest_and_components() {
    let folder = "tests/e2e/fixtures/panicky";
    let library = build_as(Flavor::FatLto, "panicky", folder, str::to_owned);
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "panicky.so", &read(&library));
    let table = sandbox.run(&["plugins", "list"]);
    assert_eq!(table.code, Some(0), "{table}");
    for task in ["panics_in_new", "panics_in_plan"] {
        assert!(table.stdout.contains(task), "{table}");
    }
}

#[test]
fn a_debug_build_is_listed_beside_the_release_builds() {
    let table = sandbox().run(&["plugins", "list"]);
    assert_snapshot!(table, @r"
    exit: 0
    --- stdout
    KIND  NAME            VERSION  ABI  LIBTORCH  FILE
    task  panics_in_new   0.1.0    1.4  -         plugins/panicky.so
    task  panics_in_plan  0.1.0    1.4  -         plugins/panicky.so
    --- stderr
    ");
}
