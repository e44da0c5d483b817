//! Training from the command line to the files that a run leaves.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, checkpoint_files, losses, shared_data, steps_seen, tiny, wait_until};
use std::fs;

/// Two ways to sum the same gradients differ by rounding only.
const ROUNDING: f64 = 1e-5;

#[test]
fn the_loss_falls_and_the_files_are_there() {
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "80",
            "-n_samples",
            "1",
            "-sample_length",
            "5",
        ],
    );
    let outcome = sandbox.run(&args.as_strs()).ok();
    assert!(outcome.stderr.contains("bits per UTF-8 byte"), "{outcome}");
    assert!(outcome.stderr.contains("sample 0: The"), "{outcome}");

    let folder = sandbox.run_folder("a");
    let losses: Vec<f64> = losses(&folder).into_values().collect();
    assert_eq!(losses.len(), 80);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[70..]));
    assert!(last < first - 0.3, "{first} fell to {last} only");

    checkpoint_files(&folder, 80);
    for name in [
        "args.json",
        "startup_log.txt",
        "checkpoint/model-80/state.json",
        "checkpoint/model-80/MANIFEST.json",
    ] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    let mut events = fs::read_dir(folder.join("tensorboard")).unwrap().flatten();
    assert!(events.any(|file| {
        file.file_name()
            .to_string_lossy()
            .starts_with("events.out.tfevents.")
    }));
}

#[test]
fn microbatches_change_nothing_but_rounding() {
    let sandbox = Sandbox::new();
    // Dropout draws other numbers for other batch shapes.
    let run = |name: &str, n_microbatches: &str| {
        let args = tiny(
            name,
            &[
                "-stop_after",
                "20",
                "-dropout",
                "0",
                "-n_microbatch",
                n_microbatches,
            ],
        );
        sandbox.run(&args.as_strs()).ok();
        losses(&sandbox.run_folder(name))
    };
    let (whole, parts) = (run("whole", "1"), run("parts", "4"));
    assert_eq!((whole.len(), parts.len()), (20, 20));
    for (step, loss) in whole {
        assert!(
            (loss - parts[&step]).abs() <= ROUNDING,
            "step {step}: {loss}, in parts {}",
            parts[&step]
        );
    }
}

#[test]
fn one_seed_is_one_run_and_reset_starts_it_anew() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "12"]);
    sandbox.run(&args.as_strs()).ok();
    let folder = sandbox.run_folder("a");
    let (first, files) = (losses(&folder), checkpoint_files(&folder, 12));
    fs::write(folder.join("notes.txt"), "mine").unwrap();

    let anew = sandbox
        .run(&tiny("a", &["-stop_after", "12", "-reset", "1"]).as_strs())
        .ok();
    assert!(!anew.stderr.contains("going on"), "{anew}");
    assert_eq!(losses(&folder), first);
    assert!(
        checkpoint_files(&folder, 12) == files,
        "a repeated run ends elsewhere"
    );
    assert!(
        folder.join("notes.txt").is_file(),
        "what is not the host's stays"
    );
}

#[test]
fn another_seed_is_another_run() {
    let sandbox = Sandbox::new();
    let run = |name: &str, seed: &str| {
        sandbox
            .run(&tiny(name, &["-stop_after", "3", "-seed", seed]).as_strs())
            .ok();
        losses(&sandbox.run_folder(name))
    };
    assert_ne!(run("one", "1"), run("two", "2"));
}

#[test]
fn two_processes_cannot_train_one_run() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "1000000"]);
    let mut first = sandbox.spawn(&args.as_strs());
    wait_until("the first process trains", || {
        steps_seen(&sandbox.run_folder("a")) > 0
    });
    let second = sandbox.run(&args.as_strs()).to_string();
    let holder = format!("process {} on ", first.id());
    first.kill().unwrap();
    first.wait().unwrap();
    let (before, after) = second.split_once(&holder).expect(&second);
    let (_machine, after) = after.split_once(' ').expect(&second);
    assert_snapshot!(format!("{before}process [id] on [machine] {after}"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the run `save/a` is being trained
      ╰─▶ process [id] on [machine] holds its lock
      help: wait for it, end it with `kill <process>` (it saves first), or choose another `-name`
    ");
}

#[test]
fn a_folder_with_shards_of_c4() {
    let Some(data) = shared_data("data/lm/c4_like") else {
        return;
    };
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &["-stop_after", "3", "-data.dir", data.to_str().unwrap()],
    );
    sandbox.run(&args.as_strs()).ok();
    assert_eq!(steps_seen(&sandbox.run_folder("a")), 3);
}

#[test]
fn a_folder_without_shards() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.work().join("empty")).unwrap();
    let outcome = sandbox.run(&tiny("a", &["-stop_after", "3", "-data.dir", "empty"]).as_strs());
    assert_eq!(outcome.code, Some(2));
    // The real path is in the text, and where that wraps depends on its length.
    for part in [
        "× the dataset has no text",
        "/here/empty` has no file like",
        "help: put at least one train shard there",
    ] {
        assert!(outcome.stderr.contains(part), "{outcome}");
    }
}
