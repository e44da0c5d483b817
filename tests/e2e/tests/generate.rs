//! `moeut-host generate`: a trained model continues a text.

use insta::assert_snapshot;
use moeut_e2e::{Outcome, Sandbox, read, tiny};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The context of the tiny model is 32 tokens; texts shorter than that are never cut.
const SHORT: &str = "12";

/// A sandbox with a run `a` of a few steps, and what the run said.
fn trained(more: &[&str]) -> (Sandbox, Outcome) {
    let sandbox = Sandbox::new();
    let args = tiny("a", &[&["-stop_after", "30"], more].concat());
    let outcome = sandbox.run(&args.as_strs()).ok();
    (sandbox, outcome)
}

fn generate(sandbox: &Sandbox, more: &[&str]) -> Outcome {
    let args = ["generate", "-gpu", "none", "-prompt", "In order to"];
    sandbox.run(&[&args, more].concat())
}

/// All files below `folder`.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let Ok(entries) = fs::read_dir(folder) else {
        return found;
    };
    for entry in entries.flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.insert(entry.path(), read(&entry.path()));
        }
    }
    found
}

#[test]
fn a_seed_fixes_the_text_and_stdout_has_nothing_else() {
    let (sandbox, _) = trained(&[]);
    let before = files(&sandbox.run_folder("a"));
    assert!(before.len() > 5, "{:?}", before.keys());
    let text = |more: &[&str]| {
        let length = ["-sample_length", SHORT];
        generate(&sandbox, &[&length, more].concat()).ok().stdout
    };

    let one = text(&["-name", "a", "-seed", "1"]);
    assert!(one.starts_with("In order to"), "{one}");
    assert!(
        one.len() > "In order to\n".len() && one.ends_with('\n'),
        "{one}"
    );
    assert_eq!(text(&["-name", "a", "-seed", "1"]), one);
    assert_eq!(text(&["-restore", "save/a", "-seed", "1"]), one);
    let checkpoint = "save/a/checkpoint/model-30";
    assert_eq!(text(&["-restore", checkpoint, "-seed", "1"]), one);
    assert_ne!(text(&["-name", "a", "-seed", "2"]), one);

    let likeliest = text(&["-name", "a", "-sample_temperature", "0"]);
    for one_choice in [["-sample_top_k", "1"], ["-sample_top_p", "1e-9"]] {
        assert_eq!(
            text(&[&["-name", "a"], &one_choice[..]].concat()),
            likeliest
        );
    }

    let outcome = generate(&sandbox, &["-name", "a", "-sample_length", SHORT]).ok();
    let speed = outcome.stderr.trim_end();
    assert_eq!(speed.lines().count(), 1, "{outcome}");
    assert!(speed.contains("tokens/s, 12 drawn at "), "{outcome}");
    assert!(
        files(&sandbox.run_folder("a")) == before,
        "the run is changed"
    );
}

#[test]
fn a_training_ends_with_what_generate_says() {
    let sampling = ["-sample_temperature", "0", "-sample_length", SHORT];
    let (sandbox, trained) = trained(
        &[
            &["-n_samples", "1", "-prompt", "In order to"],
            &sampling[..],
        ]
        .concat(),
    );
    // Length and temperature come back from the checkpoint.
    let text = generate(&sandbox, &["-name", "a"]).ok().stdout;
    let sample = format!("sample 0: {}", text.trim_end());
    assert!(trained.stderr.contains(&sample), "{trained}\n{sample}");
}

#[test]
fn a_text_may_be_longer_than_the_context() {
    let (sandbox, _) = trained(&[]);
    let outcome = generate(&sandbox, &["-name", "a", "-sample_length", "100"]).ok();
    assert!(
        outcome.stderr.contains("100 more exceed the context of 32"),
        "{outcome}"
    );
    assert!(outcome.stderr.contains("100 drawn at"), "{outcome}");
}

#[test]
fn what_is_missing_is_said() {
    let (sandbox, _) = trained(&[]);
    assert_snapshot!(sandbox.run(&["generate", "-prompt", "x"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no model is named
      ╰─▶ trained weights are needed, and neither `-restore` nor `-name` is given
      help: add `-name <name of a run>` or `-restore <checkpoint>`
    "#);
    assert_snapshot!(sandbox.run(&["generate", "-name", "a"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × there is nothing to continue
      ╰─▶ `-prompt` is missing or blank
      help: add a text: `-prompt "Once upon a time"`
    "#);
    assert_snapshot!(sandbox.run(&["generate", "-name", "b", "-prompt", "x"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no checkpoint in `save/b`
      ╰─▶ No such file or directory (os error 2)
      help: give `-restore` a `model-<step>` folder or that of a run: `-restore save/<name>`
    "#);
    assert_snapshot!(generate(&sandbox, &["-name", "a", "-state_size", "64"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the checkpoint does not fit the model
      ╰─▶ `embedding.weight` is [500, 32], and [500, 64] is needed
      help: use the arguments that the checkpoint was made with; they are in its `args.json`
    "#);
    assert_snapshot!(generate(&sandbox, &["-name", "a", "-sample_top_p", "0"]), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × invalid value for `-sample_top_p`
      ╰─▶ `0` is not a number above 0 and at most 1 (from: command line)
      help: set `-sample_top_p` to a number above 0 and at most 1
    "#);
}
