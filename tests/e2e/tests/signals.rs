//! Signals: what is done is saved, the next start goes on as if nothing had happened, and a job is queued again.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use moeut_e2e::{Sandbox, checkpoint_files, losses, steps_seen, tiny, wait_until};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const N_STEPS: &str = "120";

/// Only a signal or the end saves.
fn args(name: &str) -> moeut_e2e::Args {
    tiny(
        name,
        &[
            "-stop_after",
            N_STEPS,
            "-save_interval",
            "none",
            "-test_interval",
            "20",
        ],
    )
}

fn validations(folder: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter_map(|record| {
            Some((
                record["step"].as_u64()?,
                record["validation/val/loss"].as_f64()?,
            ))
        })
        .collect()
}

#[test]
fn runs_ended_by_signals_end_like_the_uninterrupted_one() {
    let sandbox = Sandbox::new();
    sandbox.run(&args("straight").as_strs()).ok();
    let straight = sandbox.run_folder("straight");
    let folder = sandbox.run_folder("stopped");
    // The second one mostly falls into a validation.
    for (signal, at, exit_code) in [("TERM", 3, 0), ("INT", 40, 130), ("TERM", 90, 0)] {
        let mut running = sandbox.start(&args("stopped").as_strs(), &[]);
        wait_until("the step to stop in", || {
            steps_seen(&folder) >= at || running.has_ended()
        });
        running.signal(signal);
        let outcome = running.wait();
        assert_eq!(outcome.code, Some(exit_code), "{outcome}");
        let farewell = format!("stopped by SIG{signal} after step ");
        assert!(outcome.stderr.contains(&farewell), "{outcome}");
        assert!(
            outcome.stderr.contains("type the same command again"),
            "{outcome}"
        );
    }
    let last = sandbox.run(&args("stopped").as_strs()).ok();
    assert!(last.stderr.contains("going on from step"), "{last}");
    assert_eq!(losses(&folder), losses(&straight));
    assert_eq!(validations(&folder), validations(&straight));
    assert!(checkpoint_files(&folder, 120) == checkpoint_files(&straight, 120));
}

/// A step of seconds, so that the second signal comes before its end.
#[test]
fn a_second_signal_does_not_wait_for_the_step() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "2", "-batch_size", "1000"]);
    let mut running = sandbox.start(&args.as_strs(), &[]);
    wait_until("the first step", || running.stderr().contains("ready: "));
    wait_until("the end", || {
        let has_ended = running.has_ended();
        if !has_ended {
            running.signal("TERM");
        }
        has_ended
    });
    assert_eq!(
        running.wait().code,
        Some(128 + 15),
        "0 is that of a run that saves first"
    );
}

#[test]
fn data_that_is_being_prepared_is_no_reason_to_wait() {
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "2",
            "-data.cache_dir",
            "fresh",
            "-sentencepiece.n_pieces",
            "4000",
        ],
    );
    let running = sandbox.start(&args.as_strs(), &[]);
    wait_until("the start", || sandbox.work().join("fresh").exists());
    running.signal("INT");
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(130), "{outcome}");
    assert!(
        outcome
            .stderr
            .contains("stopped by SIGINT before the first step"),
        "{outcome}"
    );
}

#[test]
fn a_user_signal_saves_and_training_goes_on() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "1000000", "-save_interval", "none"]);
    let folder = sandbox.run_folder("a");
    let mut running = sandbox.start(&args.as_strs(), &[]);
    wait_until("a step", || steps_seen(&folder) > 0 || running.has_ended());
    running.signal("USR1");
    wait_until("the checkpoint", || {
        fs::read_dir(folder.join("checkpoint")).is_ok_and(|entries| {
            let names = entries.flatten().map(|entry| entry.file_name());
            names
                .into_iter()
                .any(|name| name.to_string_lossy().starts_with("model-"))
        })
    });
    let seen = steps_seen(&folder);
    wait_until("more steps", || {
        steps_seen(&folder) > seen + 2 || running.has_ended()
    });
    running.signal("TERM");
    let outcome = running.wait().ok();
    assert!(outcome.stderr.contains("SIGUSR1: saving step"), "{outcome}");
}

#[test]
fn a_slurm_job_is_queued_again_and_goes_on_even_if_its_script_resets() {
    let sandbox = Sandbox::new();
    let bin = sandbox.work().join("slurm");
    fs::create_dir(&bin).unwrap();
    let scontrol = bin.join("scontrol");
    fs::write(&scontrol, "#!/bin/sh\necho \"$@\" > requeued\n").unwrap();
    fs::set_permissions(&scontrol, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", bin.display());
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "1000000",
            "-save_interval",
            "none",
            "-reset",
            "1",
        ],
    );
    let folder = sandbox.run_folder("a");

    let job = [("SLURM_JOB_ID", "17"), ("PATH", path.as_str())];
    let mut running = sandbox.start(&args.as_strs(), &job);
    wait_until("a step", || steps_seen(&folder) > 3 || running.has_ended());
    let record = fs::read_to_string(sandbox.work().join("jobs/slurm_17_0")).unwrap();
    assert!(record.trim().ends_with("save/a/checkpoint"), "{record}");
    assert!(
        folder.join("checkpoint/model-0").is_dir(),
        "a job saves at once"
    );
    running.signal("USR1");
    let outcome = running.wait().ok();
    assert!(outcome.stderr.contains("stopped by SIGUSR1"), "{outcome}");
    assert_eq!(
        fs::read_to_string(sandbox.work().join("requeued")).unwrap(),
        "requeue 17\n"
    );

    let stopped_at = steps_seen(&folder);
    let again = [job[0], job[1], ("SLURM_RESTART_COUNT", "1")];
    let mut running = sandbox.start(&args.as_strs(), &again);
    wait_until("another step", || {
        steps_seen(&folder) > stopped_at || running.has_ended()
    });
    running.signal("TERM");
    let outcome = running.wait().ok();
    let expected = format!("going on from step {stopped_at}");
    assert!(outcome.stderr.contains(&expected), "{expected}\n{outcome}");
}
