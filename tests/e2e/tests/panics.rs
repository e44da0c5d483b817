//! A panic in a plugin, here one that was built in debug, becomes an error of the released host.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, build_crate};
use std::fs;

fn sandbox() -> Sandbox {
    let library = build_crate("panicky", "tests/e2e/fixtures/panicky", str::to_owned);
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "panicky.so", &fs::read(library).unwrap());
    sandbox
}

/// What the host says, behind what the panic itself printed.
fn error(task: &str) -> (Option<i32>, String) {
    let outcome = sandbox().run(&["-task", task, "-name", "a", "-gpu", "none"]);
    let start = outcome.stderr.find("Error:").unwrap_or_else(|| panic!("{outcome}"));
    (outcome.code, outcome.stderr[start..].to_owned())
}

#[test]
fn a_panic_in_new_names_plugin_component_and_call() {
    let (code, text) = error("panics_in_new");
    assert_eq!(code, Some(2));
    assert_snapshot!(text, @"");
}

#[test]
fn a_panic_in_plan_whose_payload_panics_again_is_an_error_too() {
    let (code, text) = error("panics_in_plan");
    assert_eq!(code, Some(2));
    assert_snapshot!(text, @"");
}

#[test]
fn a_debug_build_is_listed_beside_the_release_builds() {
    let table = sandbox().run(&["plugins", "list"]);
    assert_snapshot!(table, @"");
}
