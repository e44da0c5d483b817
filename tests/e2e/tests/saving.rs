//! Saves that fail: training goes on, and who reads the screen learns what to do. Many more faults, at random moments,
//! are in `cargo xtask faults`.

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, checkpoint_files, losses, read, tiny};
use std::fs;
use std::os::unix::fs::symlink;

/// A link to a volume that is not mounted refuses writes for root as well.
#[test]
fn a_folder_that_cannot_be_made_costs_warnings_and_the_final_save_an_error() {
    let sandbox = Sandbox::new();
    let args = |name| tiny(name, &["-stop_after", "9", "-save_interval", "4"]);
    sandbox.run(&args("whole").as_strs()).ok();
    let run = sandbox.run_folder("a");
    let volume = sandbox.work().join("volume");
    fs::create_dir_all(&run).unwrap();
    symlink(&volume, run.join("checkpoint")).unwrap();

    let outcome = sandbox.run(&args("a").as_strs());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    let (before, error) = outcome.stderr.split_once("Error:").unwrap();
    for step in [4, 8] {
        let warning =
            format!("warning: step {step} is not saved: cannot create `save/a/checkpoint`");
        assert!(before.contains(&warning), "{outcome}");
    }
    assert_snapshot!(error.trim_start(), @r"
    × the checkpoint of step 9 is not saved
      ╰─▶ cannot create `save/a/checkpoint`: File exists (os error 17)
      help: move away what is in the folder's place: `ls -ld save/a/checkpoint` shows it; then type
            the same command again: it goes on from the newest whole checkpoint
    ");

    fs::create_dir(volume).unwrap();
    sandbox.run(&args("a").as_strs()).ok();
    let whole = sandbox.run_folder("whole");
    assert!(checkpoint_files(&run, 9) == checkpoint_files(&whole, 9));
    assert_eq!(losses(&run), losses(&whole));
}

#[test]
fn the_time_of_a_save_is_logged_when_the_next_one_starts() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "9", "-save_interval", "4"]);
    sandbox.run(&args.as_strs()).ok();
    let metrics = read(&sandbox.run_folder("a").join("metrics.jsonl"));
    let text = String::from_utf8(metrics).unwrap();
    let steps: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("\"timing/s_per_save\":"))
        .filter_map(|line| line.strip_prefix("{\"step\":")?.split(',').next())
        .collect();
    assert_eq!(steps, ["8", "9"]);
}
