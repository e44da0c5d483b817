//! The ways to start a run: from a checkpoint, from weights, for one validation, or to try it out.
#![expect(
    clippy::expect_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, checkpoint_files, losses, tiny, wait_until};
use serde_json::Value;
use std::fs;
use std::process::Stdio;

/// What a script does that reads `-test_only`.
fn scores(stdout: &str) -> Value {
    let (_, rest) = stdout.split_once("Validate returned:\n").expect(stdout);
    let (json, _) = rest.split_once("\n-----").expect(stdout);
    serde_json::from_str(json).expect(stdout)
}

#[test]
fn test_only_prints_what_training_logged_and_changes_nothing() {
    let sandbox = Sandbox::new();
    let trained = sandbox
        .run(&tiny("a", &["-stop_after", "6"]).as_strs())
        .ok();
    let folder = sandbox.run_folder("a");
    let (args, files) = (
        fs::read(folder.join("args.json")).unwrap(),
        checkpoint_files(&folder, 6),
    );

    let tested = sandbox
        .run(&[
            "-task",
            "moeut_c4",
            "-name",
            "a",
            "-gpu",
            "none",
            "-stop_after",
            "0",
            "-test_only",
            "1",
        ])
        .ok();
    let scores = scores(&tested.stdout);
    let names: Vec<&str> = scores
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_snapshot!(names.join(" "), @"val/loss val/accuracy val/perplexity val/bits_per_byte mean_loss mean_accuracy val/time_since_best_loss val/time_since_best_accuracy");
    let loss = format!("val loss {:.4}", scores["val/loss"].as_f64().unwrap());
    assert!(trained.stderr.contains(&loss), "{loss}\n{trained}");
    assert_eq!(fs::read(folder.join("args.json")).unwrap(), args);
    assert!(checkpoint_files(&folder, 6) == files);
    assert_eq!(fs::read_dir(folder.join("checkpoint")).unwrap().count(), 1);
}

#[test]
fn a_checkpoint_brings_its_arguments_and_typed_ones_override_them() {
    let sandbox = Sandbox::new();
    sandbox
        .run(
            &tiny(
                "a",
                &["-stop_after", "6", "-keep_last", "2", "-save_interval", "3"],
            )
            .as_strs(),
        )
        .ok();
    let checkpoints = sandbox.run_folder("a").join("checkpoint");
    for (name, from, step) in [("file", "model-3", 3), ("folder", "", 6)] {
        let restore = checkpoints.join(from);
        let restored = sandbox
            .run(&[
                "-task",
                "moeut_c4",
                "-gpu",
                "none",
                "-name",
                name,
                "-stop_after",
                "8",
                "-restore",
                restore.to_str().unwrap(),
            ])
            .ok();
        let expected = format!("going on from step {step}");
        assert!(
            restored.stderr.contains(&expected),
            "{expected}\n{restored}"
        );
        let folder = sandbox.run_folder(name);
        assert_eq!(
            losses(&folder).keys().copied().collect::<Vec<_>>(),
            (step + 1..=8).collect::<Vec<_>>()
        );
        let args: Value =
            serde_json::from_slice(&fs::read(folder.join("args.json")).unwrap()).unwrap();
        assert_eq!(
            (&args["state_size"], &args["stop_after"], &args["name"]),
            (&"32".into(), &"8".into(), &name.into())
        );
    }
    let own = "save/a/checkpoint/model-3";
    assert_snapshot!(sandbox.run(&tiny("a", &["-reset", "1", "-restore", own]).as_strs()), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `-reset 1` and `-restore` contradict each other
      ╰─▶ `save/a/checkpoint/model-3` would be removed, and the run starts from it
      help: leave out `-reset`, or choose another `-name`
    ");
}

#[test]
fn weights_from_elsewhere_are_validated_and_trained_from_step_0() {
    let sandbox = Sandbox::new();
    let trained = sandbox
        .run(&tiny("a", &["-stop_after", "6"]).as_strs())
        .ok();
    let weights = sandbox.run_folder("a").join("checkpoint/model-6");
    let line = trained
        .stderr
        .lines()
        .find(|line| line.contains("val loss"))
        .expect(&trained.stderr);
    let scores = line.split_once(": ").unwrap().1;
    for (name, path) in [
        ("folder", weights.clone()),
        ("file", weights.join("model.safetensors")),
    ] {
        let args = tiny(
            name,
            &[
                "-stop_after",
                "2",
                "-load_pretrained_model",
                path.to_str().unwrap(),
            ],
        );
        let outcome = sandbox.run(&args.as_strs()).ok();
        assert!(
            outcome.stderr.contains(&format!("step 0: {scores}")),
            "{scores}\n{outcome}"
        );
        let metrics = fs::read_to_string(sandbox.run_folder(name).join("metrics.jsonl")).unwrap();
        assert!(metrics.contains("load_validation/val/loss"), "{metrics}");
        assert_eq!(losses(&sandbox.run_folder(name)).len(), 2);
        let again = sandbox.run(&args.as_strs()).ok();
        assert!(
            again.stderr.contains("going on from step 2"),
            "a checkpoint of its own counts more\n{again}"
        );
    }
    let other = tiny(
        "other",
        &[
            "-state_size",
            "64",
            "-load_pretrained_model",
            weights.to_str().unwrap(),
        ],
    );
    assert_eq!(sandbox.run(&other.as_strs()).code, Some(2));
    let missing = tiny("b", &["-load_pretrained_model", "no/such.pth"]);
    let outcome = sandbox.run(&missing.as_strs());
    assert_eq!(outcome.code, Some(2));
    assert!(
        outcome.stderr.contains("cannot read `no/such.pth`"),
        "{outcome}"
    );
}

#[test]
fn a_dry_run_says_what_would_be_and_writes_nothing() {
    let sandbox = Sandbox::new();
    let outcome = sandbox
        .run(
            &tiny(
                "a",
                &["-stop_after", "6", "-n_microbatch", "3", "-dry_run", "1"],
            )
            .as_strs(),
        )
        .ok();
    for line in [
        "steps        from 0 to 6",
        "batch        4 sequences of 32 tokens, 128 tokens a step; microbatches of 2, 1, 1",
        "memory       parameters 0.",
        "first step   ",
    ] {
        assert!(outcome.stdout.contains(line), "{line}\n{outcome}");
    }
    assert!(!sandbox.work().join("save").exists());
}

#[test]
fn the_first_batches_again_and_again() {
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "60",
            "-dropout",
            "0",
            "-overfit_batches",
            "2",
        ],
    );
    sandbox.run(&args.as_strs()).ok();
    let losses: Vec<f64> = losses(&sandbox.run_folder("a")).into_values().collect();
    let last = losses[58..].iter().sum::<f64>() / 2.0;
    assert!(
        last < 2.0,
        "two batches of 128 tokens are not learnt by heart: {last}"
    );
}

#[test]
fn arguments_without_effect_are_accepted_and_say_why() {
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "1",
            "-log",
            "tb",
            "-wandb_save_interval",
            "None",
        ],
    );
    let outcome = sandbox.run(&args.as_strs()).ok();
    let warnings: Vec<&str> = outcome
        .stderr
        .lines()
        .filter(|line| line.contains("warning"))
        .collect();
    assert_snapshot!(warnings.join("\n"), @r"
    warning: `-wandb_save_interval` has no effect: the reference never reads it; see `-save_interval`
    ");
    assert!(sandbox.run_folder("a").join("tensorboard").is_dir());
}

#[test]
fn the_start_is_on_record() {
    let sandbox = Sandbox::new();
    sandbox
        .run(&tiny("it's a", &["-stop_after", "1"]).as_strs())
        .ok();
    let log = fs::read_to_string(sandbox.run_folder("it's a").join("startup_log.txt")).unwrap();
    for part in [
        "command      moeut-host -seed 1 ",
        " -task moeut_c4 ",
        r" -name 'it'\''s a' ",
        "\nmoeut-host   0.1.0, commit ",
        "\nlibtorch     2.11.0",
        "\nCPU          ",
        "\nplugin       moeut-model-moeut 0.1.0, commit ",
        ", sha256 ",
    ] {
        assert!(log.contains(part), "{part}\n{log}");
    }
}

/// It starts itself once more with a variable that libtorch's threads read before `main`, unless somebody set one.
#[test]
fn threads_that_wait_do_not_spin_for_long() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "1000000"]);
    let variables = |own: Option<(&str, &str)>| {
        let mut command = sandbox.foreign(&sandbox.program());
        command.args(args.as_strs()).env_remove("GOMP_SPINCOUNT");
        command.envs(own).arg("-reset=1");
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let metrics = sandbox.run_folder("a").join("metrics.jsonl");
        wait_until("the first step", || metrics.exists());
        let environ = fs::read(format!("/proc/{}/environ", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(metrics).unwrap();
        String::from_utf8(environ).unwrap()
    };
    assert!(variables(None).contains("GOMP_SPINCOUNT=10000\0"));
    for own in [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active")] {
        let environ = variables(Some(own));
        assert!(!environ.contains("GOMP_SPINCOUNT=10000\0"), "{environ}");
    }
}
