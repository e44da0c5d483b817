//! `-profile_steps`: a trace of some steps, with the host's phases and libtorch's operators.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, read, tiny};
use serde_json::Value;
use std::collections::BTreeMap;

/// Name, beginning and end, µs.
type Event = (String, f64, f64);

fn events(trace: &Value, category: &str) -> Vec<Event> {
    let all = trace["traceEvents"].as_array().unwrap().iter();
    let mut events: Vec<Event> = all
        .filter(|event| event["ph"] == "X" && event["cat"] == category)
        .map(|event| {
            let (start, length) = (
                event["ts"].as_f64().unwrap(),
                event["dur"].as_f64().unwrap(),
            );
            assert!(length >= 0.0, "{event}");
            (
                event["name"].as_str().unwrap().to_owned(),
                start,
                start + length,
            )
        })
        .collect();
    events.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.2.total_cmp(&a.2)));
    events
}

fn is_in(inner: &Event, outer: &Event) -> bool {
    outer.1 <= inner.1 && inner.2 <= outer.2
}

#[test]
fn the_trace_has_the_phases_and_the_operators_in_them() {
    let sandbox = Sandbox::new();
    let more = [
        "-stop_after",
        "8",
        "-profile_steps",
        "3:4",
        "-n_microbatch",
        "2",
        "-test_interval",
        "4",
    ];
    let outcome = sandbox.run(&tiny("a", &more).as_strs()).ok();
    assert!(
        outcome
            .stderr
            .contains("profile of steps 3 to 4: `save/a/profile-3-4.json`"),
        "{outcome}"
    );
    assert!(
        outcome
            .stderr
            .contains("self time on the CPU   share    calls  operator"),
        "{outcome}"
    );

    let folder = sandbox.run_folder("a");
    let trace: Value = serde_json::from_slice(&read(&folder.join("profile-3-4.json"))).unwrap();
    let spans = events(&trace, "user_annotation");
    let named =
        |name: &str| -> Vec<&Event> { spans.iter().filter(|span| span.0 == name).collect() };
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (name, _, _) in &spans {
        *counts.entry(name).or_default() += 1;
    }
    for (name, n) in [
        ("step 3", 1),
        ("step 4", 1),
        ("load", 2),
        ("forward_backward", 2),
        ("optimizer", 2),
        ("microbatch", 4),
        ("backward", 4),
        ("validate", 1),
    ] {
        assert_eq!(counts.get(name), Some(&n), "{name} in {counts:?}");
    }
    assert!(
        !counts.contains_key("step 2") && !counts.contains_key("step 5"),
        "{counts:?}"
    );

    // Spans nest: each lies in those that are open when it begins.
    let mut open: Vec<&Event> = Vec::new();
    for span in &spans {
        open.retain(|outer| outer.2 > span.1);
        for outer in &open {
            assert!(is_in(span, outer), "{span:?} in {outer:?}");
        }
        open.push(span);
    }
    assert!(named("microbatch").iter().all(|span| {
        let phases = named("forward_backward");
        phases.iter().filter(|phase| is_in(span, phase)).count() == 1
    }));

    // Each pass has its products, and every operator is in a step.
    let operators = events(&trace, "cpu_op");
    for pass in ["forward", "backward"] {
        for span in named(pass) {
            let is_product =
                |op: &&Event| op.0.starts_with("aten::") && op.0.contains("mm") && is_in(op, span);
            assert!(
                operators.iter().any(|op| is_product(&op)),
                "{span:?} has no product"
            );
        }
    }
    let steps = [named("step 3")[0], named("step 4")[0]];
    assert!(steps[0].2 <= steps[1].1);
    for operator in &operators {
        assert!(
            steps.iter().any(|step| is_in(operator, step)),
            "{operator:?}"
        );
    }
}

#[test]
fn steps_that_are_not_made_are_said_and_a_profile_is_of_one_start() {
    let sandbox = Sandbox::new();
    let more = ["-stop_after", "3", "-profile_steps", "5:6"];
    let outcome = sandbox.run(&tiny("a", &more).as_strs()).ok();
    let said = "`-profile_steps 5:6` has no effect: none of these steps was made";
    assert!(outcome.stderr.contains(said), "{outcome}");
    // The next start has not inherited it, and one that ends in between records what there is.
    let outcome = sandbox
        .run(&tiny("a", &["-stop_after", "6"]).as_strs())
        .ok();
    assert!(!outcome.stderr.contains("profile"), "{outcome}");
    let more = ["-stop_after", "8", "-profile_steps", "2:100"];
    let outcome = sandbox.run(&tiny("a", &more).as_strs()).ok();
    assert!(
        outcome.stderr.contains("profile of steps 7 to 8"),
        "{outcome}"
    );
    assert!(sandbox.run_folder("a").join("profile-7-8.json").is_file());
}

#[test]
fn a_range_is_two_steps_in_order() {
    let sandbox = Sandbox::new();
    for range in ["5", "0:3", "4:3", "a:b"] {
        let outcome = sandbox.run(&tiny("a", &["-profile_steps", range]).as_strs());
        assert_eq!(outcome.code, Some(2), "{outcome}");
    }
    assert_snapshot!(sandbox.run(&tiny("a", &["-profile_steps", "4:3"]).as_strs()), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × invalid value for `-profile_steps`
      ╰─▶ `4:3` is not a first and a last step, as in `10:12` (from: command line)
      help: set `-profile_steps` to a first and a last step, as in `10:12`
    ");
}
