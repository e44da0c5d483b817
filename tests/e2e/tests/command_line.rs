//! What the program says when it is asked, or asked wrongly.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, TASK};
use std::fs;

#[test]
fn plugins_list_follows_the_folder() {
    let sandbox = Sandbox::new();
    let list = || sandbox.run(&["plugins", "list"]);
    let full = list().to_string();
    assert_snapshot!(full, @"");
    let file = sandbox.installed().join(TASK);
    let bytes = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();
    assert_snapshot!(list(), @"");
    fs::write(&file, bytes).unwrap();
    assert_eq!(list().to_string(), full);
}

#[test]
fn no_plugins() {
    assert_snapshot!(Sandbox::bare().run(&["plugins", "list"]), @"");
}

#[test]
fn nothing_typed_shows_how_to_use_it() {
    assert_snapshot!(Sandbox::bare().run(&[]), @"");
}

#[test]
fn help_without_plugins_has_the_hosts_arguments() {
    assert_snapshot!(Sandbox::bare().run(&["--help"]), @"");
}

#[test]
fn help_has_a_group_for_each_component() {
    let text = Sandbox::new().run(&["--help"]).ok().stdout;
    for argument in ["-lr ", "-lm.unroll", "-moe.n_experts", "-sentencepiece.n_pieces", "-profile"] {
        assert!(text.contains(argument), "{argument} is missing in\n{text}");
    }
}

#[test]
fn config_show_says_where_each_value_is_from() {
    let text = Sandbox::new()
        .run(&["config", "show", "-task", "moeut_c4", "-profile", "demo", "-lr=1e-4", "--batch_size", "8"])
        .ok()
        .stdout;
    let interesting = |line: &&str| ["lr ", "batch_size ", "lm.unroll ", "wd "].iter().any(|name| line.trim_start_matches('-').starts_with(name));
    let lines: Vec<&str> = text.lines().filter(interesting).collect();
    assert_snapshot!(lines.join("\n"), @"");
}

#[test]
fn a_misspelled_argument() {
    assert_snapshot!(Sandbox::new().run(&["-task", "moeut_c4", "-name", "a", "-batchsize", "4"]), @"");
}

#[test]
fn an_ambiguous_abbreviation() {
    assert_snapshot!(Sandbox::bare().run(&["-lr_sched", "cos", "-name", "a"]), @"");
}

#[test]
fn a_value_of_the_wrong_kind() {
    assert_snapshot!(Sandbox::bare().run(&["-batch_size", "many", "-name", "a"]), @"");
}

#[test]
fn a_value_that_is_no_choice() {
    assert_snapshot!(Sandbox::bare().run(&["-lr_sched.type", "cosine", "-name", "a"]), @"");
}

#[test]
fn a_value_out_of_range() {
    assert_snapshot!(Sandbox::bare().run(&["-batch_size", "0", "-name", "a"]), @"");
}

#[test]
fn an_unknown_profile() {
    assert_snapshot!(Sandbox::new().run(&["-task", "moeut_c4", "-name", "a", "-profile", "dmeo"]), @"");
}

#[test]
fn a_run_without_a_name() {
    assert_snapshot!(Sandbox::bare().run(&["-task", "moeut_c4"]), @"");
}

#[test]
fn a_run_without_a_task() {
    assert_snapshot!(Sandbox::bare().run(&["-name", "a", "-gpu", "none"]), @"");
}

#[test]
fn an_unknown_command() {
    assert_snapshot!(Sandbox::bare().run(&["plugin", "list"]), @"");
}

#[test]
fn a_task_refuses_its_arguments() {
    let sandbox = Sandbox::new();
    let outcome = sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none", "-lm.unroll", "0"]);
    assert_snapshot!(outcome.stderr, @"");
}
