//! `moeut-paper run-tests`: runs and bare checkpoints of the reference are scored once, and the tables have the scores.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use moeut_e2e::{ReferenceRun, Sandbox, read, staged_plugins, tiny};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

const N_STEPS: u32 = 4;
const LAMBADA: &str = r#"{"text": "the lamp stood on the table and she lit the lamp"}
{"text": "one stone and another stone"}
"#;
/// Where the reference's scripts look for checkpoints.
const BARE: &str = "paper/moe_universal/checkpoints/bare";

/// The exit code, and what the program said.
fn paper(folder: &Path, args: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(staged_plugins().with_file_name("moeut-paper"))
        .args(args)
        .current_dir(folder)
        .env("NO_COLOR", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), text)
}

fn scores(folder: &Path) -> BTreeMap<String, Option<f64>> {
    serde_json::from_slice(&read(&folder.join("result.json"))).unwrap()
}

#[test]
fn runs_and_bare_checkpoints_are_scored_once() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    sandbox
        .run(&tiny("a", &["-stop_after", "4", "-test_interval", "4"]).as_strs())
        .ok();
    let run = sandbox.run_folder("a");
    let bare = work.join(BARE);
    fs::create_dir_all(&bare).unwrap();
    let checkpoint = run.join(format!("checkpoint/model-{N_STEPS}"));
    let reference = ReferenceRun::of_checkpoint(&checkpoint, N_STEPS);
    fs::write(bare.join("model.ckpt"), reference.to_bytes()).unwrap();
    let runs = r#"{"main_result_table": ["a", "bare"]}"#;
    fs::write(work.join("runs.json"), runs).unwrap();
    fs::create_dir(work.join("sets")).unwrap();
    fs::write(work.join("sets/lambada_test.jsonl"), LAMBADA).unwrap();

    let of_table = || {
        let args = ["main_result_table", "-runs", "runs.json"];
        let (code, said) = paper(&work, &args);
        assert_eq!(code, Some(0), "{said}");
        String::from_utf8(read(&work.join("paper_out/main_result_table.csv"))).unwrap()
    };
    let table = of_table();
    assert!(table.contains(",not scored,a\n"), "{table}");

    let line = [
        "run-tests",
        "a",
        "bare",
        "-sets",
        "val,lambada",
        "-data.dir",
        "sets",
        "-gpu",
        "none",
        "-threads",
        "1",
    ];
    // A set that is asked for later is scored then; fewer are there already.
    let only_val = line.map(|word| if word == "val,lambada" { "val" } else { word });
    let (code, said) = paper(&work, &only_val);
    assert_eq!(code, Some(0), "{said}");
    assert!(!scores(&run).contains_key("lambada/accuracy/total"));
    let (code, said) = paper(&work, &line);
    assert_eq!(code, Some(0), "{said}");
    let (_, said) = paper(&work, &only_val);
    assert!(!said.contains("scoring"), "{said}");
    let of_run = scores(&run);
    assert!(of_run["lambada/accuracy/total"].is_some(), "{of_run:?}");
    assert_eq!(scores(&bare), of_run, "they are the same weights");

    // A file that is torn is made anew, and no other.
    fs::write(bare.join("result.json"), "{\"lambada/acc").unwrap();
    let (code, said) = paper(&work, &line);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("save/a/result.json: nothing has changed"),
        "{said}"
    );
    assert!(said.contains("bare: scoring"), "{said}");
    assert_eq!(scores(&bare), of_run);

    // Of a sample: the table says so, and the scores of all questions are no longer current, nor these later on.
    let sampled = [&line[..], &["-limit", "1"]].concat();
    let (code, said) = paper(&work, &sampled);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the first 1 of each group"), "{said}");
    assert_eq!(scores(&run)["limit"], Some(1.0));
    let table = of_table();
    assert!(
        table.contains(",Average,Questions,Run\n") && table.contains(",first 1 of each group,a\n"),
        "{table}"
    );
    let (_, said) = paper(&work, &sampled);
    assert!(!said.contains("scoring"), "{said}");
    let (code, said) = paper(&work, &line);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(scores(&run), of_run);
    assert!(!of_table().contains("Questions"));
    for limit in ["0", "many"] {
        let (code, said) = paper(&work, &["run-tests", "a", "-limit", limit]);
        assert_eq!(code, Some(2), "{said}");
        let why = format!("`-limit {limit}` is no whole number above 0");
        assert!(said.contains(&why), "{said}");
    }

    let (code, said) = paper(&work, &["run-tests", "a", "none"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("`none` is left out: there is no checkpoint in"),
        "{said}"
    );

    let table = of_table();
    let lambada = 100.0 * of_run["lambada/accuracy/total"].unwrap();
    for name in ["a", "bare"] {
        let row = table
            .lines()
            .find(|line| line.ends_with(&format!(",{name}")));
        let cells: Vec<&str> = row
            .unwrap_or_else(|| panic!("{table}\n{said}"))
            .split(',')
            .collect();
        assert_eq!(cells[4], format!("{lambada:.1}"), "{table}");
    }
}
