//! The paper's 43 sweeps are command lines that the program takes; whether they train is not asked here.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, shared_data};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Every argument counts or is named in a warning; none disappears.
#[test]
fn every_argument_of_every_sweep_is_accounted_for() {
    let Some(path) = shared_data("sweeps_resolved.json") else {
        return;
    };
    let sweeps: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(sweeps.len(), 43);
    let sandbox = Sandbox::full();
    let mut warnings = BTreeSet::new();
    for (sweep, arguments) in &sweeps {
        let mut argv = vec!["config".to_owned(), "show".to_owned()];
        for (flag, value) in arguments {
            let raw = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            argv.extend([format!("-{flag}"), raw]);
        }
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let outcome = sandbox.run(&argv);
        assert_eq!(outcome.code, Some(0), "{sweep}: {outcome}");
        for pair in argv[2..].chunks(2) {
            let flag = pair[0].trim_start_matches('-');
            let line = format!("{flag} = {}  # command line", pair[1]);
            let counts = outcome.stdout.lines().any(|shown| shown == line);
            let is_named = outcome.stderr.contains(&format!("`-{flag}`"));
            assert!(counts || is_named, "{sweep}: {line}: {outcome}");
        }
        warnings.extend(outcome.stderr.lines().map(str::to_owned));
    }
    let warnings: Vec<String> = warnings.into_iter().collect();
    assert_snapshot!(warnings.join("\n"), @r"
    warning: `-moe.att.expert_dropout` has no effect: the reference never reads it; the live one is `moe.att.drop_expert`
    warning: `-moe.layer_encoding` has no effect: the reference no longer has it; its sweeps set it to `none`
    ");
}
