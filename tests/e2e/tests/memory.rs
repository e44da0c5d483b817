//! Segment memory (`-lm.trafo.context_blocks`) through the whole program: what it changes, and what does not change it.

use moeut_e2e::{
    Args, Sandbox, checkpoint_files, losses, read_safetensors, steps_seen, tiny, wait_until,
};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;

const SIGKILL: i32 = 9;

/// A tiny run in two microbatches whose model attends to one earlier segment.
fn with_memory(name: &str, more: &[&str]) -> Args {
    let own = ["-lm.trafo.context_blocks", "1", "-n_microbatch", "2"];
    tiny(name, &[&own, more].concat())
}

/// The losses of such a run.
fn losses_with_memory(sandbox: &Sandbox, name: &str, more: &[&str]) -> BTreeMap<u64, f64> {
    sandbox.run(&with_memory(name, more).as_strs()).ok();
    losses(&sandbox.run_folder(name))
}

#[test]
fn killed_runs_end_bit_for_bit_with_their_memory() {
    let sandbox = Sandbox::new();
    let args = |name: &str| {
        let more = [
            "-stop_after",
            "120",
            "-save_interval",
            "7",
            "-test_interval",
            "30",
            "-lm.state_drop_probability",
            "0.1",
        ];
        with_memory(name, &more)
    };
    sandbox.run(&args("straight").as_strs()).ok();
    let straight = sandbox.run_folder("straight");
    let folder = sandbox.run_folder("killed");
    for kill_at in [8, 40] {
        let mut child = sandbox.spawn(&args("killed").as_strs());
        wait_until("the step to be killed in", || {
            steps_seen(&folder) >= kill_at || child.try_wait().unwrap().is_some()
        });
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            status.signal(),
            Some(SIGKILL),
            "it ended before it was killed"
        );
    }
    let last = sandbox.run(&args("killed").as_strs()).ok();
    assert!(last.stderr.contains("going on from step"), "{last}");
    assert_eq!(losses(&folder), losses(&straight));
    assert!(
        checkpoint_files(&folder, 120) == checkpoint_files(&straight, 120),
        "the tensors differ"
    );
}

/// Two layers and two microbatches of two sequences, 32 tokens, 32 wide; the validation leaves nothing.
#[test]
fn a_checkpoint_holds_the_memory_of_the_training() {
    let sandbox = Sandbox::new();
    let remembered = |args: &Args, name: &str| -> Vec<(String, Vec<usize>)> {
        sandbox.run(&args.as_strs()).ok();
        let [_, optimizer] = checkpoint_files(&sandbox.run_folder(name), 3);
        read_safetensors(&optimizer)
            .into_iter()
            .filter(|(name, _)| name.starts_with("memory/"))
            .map(|(name, tensor)| (name, tensor.shape))
            .collect()
    };
    let states = remembered(
        &with_memory("a", &["-stop_after", "3", "-test_interval", "3"]),
        "a",
    );
    assert_eq!(states.len(), 4, "{states:?}");
    for (name, shape) in &states {
        assert_eq!(shape, &[2, 32, 32], "{name}");
    }
    assert_eq!(remembered(&tiny("b", &["-stop_after", "3"]), "b"), []);
}

/// With `-lm.state_drop_probability 1` every segment is the first.
#[test]
fn the_second_step_sees_the_first_unless_its_memory_is_dropped() {
    let sandbox = Sandbox::new();
    let steps = ["-stop_after", "2", "-dropout", "0"];
    let kept = losses_with_memory(&sandbox, "kept", &steps);
    let drop = [&steps[..], &["-lm.state_drop_probability", "1"]].concat();
    let dropped = losses_with_memory(&sandbox, "dropped", &drop);
    assert_eq!(kept[&1].to_bits(), dropped[&1].to_bits());
    assert_ne!(kept[&2].to_bits(), dropped[&2].to_bits());
}

/// Seven windows in batches of three: the last row runs out before the others.
#[test]
fn a_validation_between_two_steps_changes_neither() {
    let sandbox = Sandbox::new();
    let run = |name: &str, interval: &str| {
        let more = [
            "-stop_after",
            "9",
            "-test_interval",
            interval,
            "-lmds.valid_ratio",
            "1.1e-6",
            "-test_batch_size",
            "3",
        ];
        losses_with_memory(&sandbox, name, &more)
    };
    assert_eq!(run("often", "2"), run("once", "9"));
}

/// Its rows are other places in the text.
#[test]
fn memory_of_other_microbatches_is_forgotten() {
    let sandbox = Sandbox::new();
    sandbox
        .run(&with_memory("a", &["-stop_after", "3"]).as_strs())
        .ok();
    let args = with_memory("a", &["-stop_after", "6", "-n_microbatch", "4"]);
    sandbox.run(&args.as_strs()).ok();
    assert_eq!(steps_seen(&sandbox.run_folder("a")), 6);
}
