//! A run that was killed, or whose newest checkpoint is torn, ends as if nothing had happened.

use moeut_e2e::{Sandbox, checkpoint_files, losses, steps_seen, tiny, wait_until};
use std::fs;
use std::os::unix::process::ExitStatusExt;

const N_STEPS: u64 = 240;
const SIGKILL: i32 = 9;

/// The arguments of all runs here; a checkpoint falls between the kills, not on them.
fn args(name: &str) -> moeut_e2e::Args {
    tiny(
        name,
        &[
            "-stop_after",
            "240",
            "-save_interval",
            "7",
            "-test_interval",
            "50",
        ],
    )
}

/// `kill -9` at whatever step the run is in soon after it has logged the named one.
#[test]
fn killed_runs_end_bit_for_bit_like_the_uninterrupted_one() {
    let sandbox = Sandbox::new();
    sandbox.run(&args("straight").as_strs()).ok();
    let straight = sandbox.run_folder("straight");

    let folder = sandbox.run_folder("killed");
    let mut resumed_from = Vec::new();
    for kill_at in [2, 40, 41, 130] {
        let mut child = sandbox.spawn(&args("killed").as_strs());
        wait_until("the step to be killed in", || {
            steps_seen(&folder) >= kill_at || child.try_wait().unwrap().is_some()
        });
        child.kill().unwrap();
        assert_eq!(
            child.wait().unwrap().signal(),
            Some(SIGKILL),
            "it ended before it was killed"
        );
        resumed_from.push(steps_seen(&folder));
    }
    let last = sandbox.run(&args("killed").as_strs()).ok();

    assert!(last.stderr.contains("going on from step"), "{last}");
    assert_eq!(losses(&folder).len() as u64, N_STEPS);
    assert_eq!(
        losses(&folder),
        losses(&straight),
        "killed at {resumed_from:?}"
    );
    let [model, optimizer] = checkpoint_files(&folder, N_STEPS);
    let [expected_model, expected_optimizer] = checkpoint_files(&straight, N_STEPS);
    assert!(
        model == expected_model,
        "other parameters; killed at {resumed_from:?}"
    );
    assert!(
        optimizer == expected_optimizer,
        "other optimizer state; killed at {resumed_from:?}"
    );
}

#[test]
fn a_torn_checkpoint_is_passed_over_for_the_one_before() {
    let sandbox = Sandbox::new();
    let args = tiny(
        "a",
        &[
            "-stop_after",
            "30",
            "-save_interval",
            "10",
            "-keep_last",
            "3",
        ],
    );
    sandbox.run(&args.as_strs()).ok();
    let folder = sandbox.run_folder("a");
    let (loss, files) = (losses(&folder), checkpoint_files(&folder, 30));

    let torn = folder.join("checkpoint/model-30/model.safetensors");
    fs::write(&torn, &files[0][..files[0].len() / 2]).unwrap();
    let again = sandbox.run(&args.as_strs()).ok();

    assert!(
        again.stderr.contains("warning") && again.stderr.contains("model-30"),
        "{again}"
    );
    assert!(again.stderr.contains("going on from step 20"), "{again}");
    assert_eq!(losses(&folder), loss);
    assert!(
        checkpoint_files(&folder, 30) == files,
        "the run ends elsewhere"
    );
}

#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "5"]);
    sandbox.run(&args.as_strs()).ok();
    let files = checkpoint_files(&sandbox.run_folder("a"), 5);
    sandbox.run(&args.as_strs()).ok();
    assert!(checkpoint_files(&sandbox.run_folder("a"), 5) == files);
}
