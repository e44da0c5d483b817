//! A sweep as a queue of processes: what is done stays done, what is interrupted goes on, what fails is named.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Outcome, Sandbox, checkpoint_files, losses, read, steps_seen, tiny, wait_until};
use std::fmt::Write as _;
use std::fs;
use std::process::Command;

const N_STEPS: u64 = 60;

/// Writes `<name>.yaml`: tiny runs of which `varied` says what differs.
fn write_sweep(sandbox: &Sandbox, name: &str, varied: &[(&str, &str)]) -> String {
    let n_steps = N_STEPS.to_string();
    let more = [
        "-stop_after",
        &n_steps,
        "-test_interval",
        "30",
        "-save_interval",
        "10",
    ];
    let mut text = String::from("program: moeut-host\nmethod: grid\nparameters:\n");
    let args = tiny("-", &more);
    for pair in args.as_strs().chunks(2) {
        let flag = pair[0].trim_start_matches('-');
        if flag != "name" && varied.iter().all(|(name, _)| *name != flag) {
            let _ = writeln!(text, "  {flag}: {{value: '{}'}}", pair[1]);
        }
    }
    for (flag, values) in varied {
        let _ = writeln!(text, "  {flag}: {{values: [{values}]}}");
    }
    let file = format!("{name}.yaml");
    fs::write(sandbox.work().join(&file), text).unwrap();
    file
}

const FOUR: &[(&str, &str)] = &[("lr", "1e-3, 3e-3"), ("pkm.n_heads", "1, 2")];

/// The table without the name of the sweep; names of one length make columns of one width.
fn table(outcome: &Outcome, name: &str) -> String {
    outcome.stdout.replace(name, "[sweep]")
}

/// Kills the process that trains a run, as a machine that runs out of memory would.
fn kill(sandbox: &Sandbox, run: &str) {
    let lock = fs::read_to_string(sandbox.run_folder(run).join("lock")).unwrap();
    let id = lock.split_whitespace().nth(1).unwrap();
    let status = Command::new("sh")
        .args(["-c", &format!("kill -KILL {id}")])
        .status();
    assert!(status.unwrap().success(), "{lock}");
}

#[test]
fn a_killed_run_goes_on_when_the_sweep_is_started_again_and_the_table_is_the_same() {
    let sandbox = Sandbox::new();
    let calm_file = write_sweep(&sandbox, "quiet", FOUR);
    let rough_file = write_sweep(&sandbox, "rough", FOUR);
    let calm = sandbox
        .run(&["sweep", "run", &calm_file, "-jobs", "2"])
        .ok();

    let mut running = sandbox.start(&["sweep", "run", &rough_file], &[]);
    let [first, victim] = ["rough-1", "rough-2"].map(|name| sandbox.run_folder(name));
    for (what, folder, step) in [
        ("the first run", first, N_STEPS),
        ("the second run", victim, 25),
    ] {
        wait_until(what, || steps_seen(&folder) >= step || running.has_ended());
    }
    kill(&sandbox, "rough-2");
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(
        outcome
            .stderr
            .contains("rough-2 failed (killed by signal 9)"),
        "{outcome}"
    );
    assert!(
        outcome.stderr.contains("save/rough.sweep/rough-2.log"),
        "{outcome}"
    );
    let states: Vec<&str> = outcome
        .stdout
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(7))
        .collect();
    assert_eq!(states, ["done", "failed:", "done", "done"], "{outcome}");

    let again = sandbox.run(&["sweep", "run", &rough_file]).ok();
    assert_eq!(table(&again, "rough"), table(&calm, "quiet"));
    assert!(again.stderr.contains("2 of 4: rough-2 starts"), "{again}");
    for index in 1..=4 {
        let [rough, calm] =
            ["rough", "quiet"].map(|name| sandbox.run_folder(&format!("{name}-{index}")));
        assert_eq!(losses(&rough), losses(&calm), "{index}");
        assert!(
            checkpoint_files(&rough, N_STEPS) == checkpoint_files(&calm, N_STEPS),
            "{index}"
        );
    }
    let log = fs::read_to_string(sandbox.work().join("save/rough.sweep/rough-2.log")).unwrap();
    assert!(log.contains("going on from step "), "{log}");

    // Nothing is left to do, and nothing is done; a broken result is written anew from the runs' own folders.
    let results = sandbox.work().join("save/rough.sweep/results.json");
    let (whole, starts) = (read(&results), starts(&sandbox));
    fs::write(&results, "{\"runs\": [").unwrap();
    let third = sandbox.run(&["sweep", "run", &rough_file]).ok();
    assert_eq!(
        third.to_string().replace(&third.stdout, ""),
        "exit: 0\n--- stdout\n--- stderr\n"
    );
    assert_eq!(third.stdout, again.stdout);
    assert_eq!(read(&results), whole);
    assert_eq!(self::starts(&sandbox), starts, "no run was started");
    let csv = fs::read_to_string(sandbox.work().join("save/rough.sweep/results.csv")).unwrap();
    assert_eq!(
        csv.lines().next(),
        Some("run,lr,pkm.n_heads,step,val_loss,perplexity,accuracy,state")
    );
    assert_eq!(csv.lines().count(), 5);
}

/// What each start of a run adds to.
fn starts(sandbox: &Sandbox) -> Vec<Vec<u8>> {
    (1..=4)
        .map(|index| {
            read(
                &sandbox
                    .run_folder(&format!("rough-{index}"))
                    .join("startup_log.txt"),
            )
        })
        .collect()
}

#[test]
fn a_signal_is_handed_on_and_the_sweep_goes_on_later() {
    let sandbox = Sandbox::new();
    let file = write_sweep(&sandbox, "s", &[("lr", "1e-3, 3e-3")]);
    for (signal, exit_code) in [("TERM", 0), ("INT", 130)] {
        let mut running = sandbox.start(&["sweep", "run", &file], &[]);
        let folder = sandbox.run_folder("s-1");
        let earlier = steps_seen(&folder);
        wait_until("a step", || {
            steps_seen(&folder) > earlier + 3 || running.has_ended()
        });
        running.signal(signal);
        let outcome = running.wait();
        assert_eq!(outcome.code, Some(exit_code), "{outcome}");
        assert!(
            outcome
                .stderr
                .contains("the sweep ends: 1 runs are told to save and end"),
            "{outcome}"
        );
        assert!(outcome.stderr.contains("s-1 stopped; step "), "{outcome}");
        assert!(!sandbox.run_folder("s-2").exists(), "no further run starts");
    }
    let last = sandbox.run(&["sweep", "run", &file]).ok();
    let straight = write_sweep(&sandbox, "t", &[("lr", "1e-3, 3e-3")]);
    let straight = sandbox.run(&["sweep", "run", &straight, "-jobs", "2"]).ok();
    assert_eq!(table(&last, "s-"), table(&straight, "t-"));
}

#[test]
fn a_run_that_fails_does_not_hold_up_the_others() {
    let sandbox = Sandbox::new();
    let file = write_sweep(
        &sandbox,
        "f",
        &[("load_pretrained_model", "gone.safetensors, ''")],
    );
    let outcome = sandbox.run(&[
        "sweep",
        "run",
        &file,
        "-stop_after",
        "2",
        "-test_pretrained",
        "0",
    ]);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(
        lines[1].starts_with("f-1  gone.safetensors") && lines[1].ends_with("failed: exit code 2"),
        "{outcome}"
    );
    assert!(
        lines[2].starts_with("f-2 ") && lines[2].ends_with("done"),
        "{outcome}"
    );
    assert_snapshot!(outcome.stderr.lines().next().unwrap(), @"1 of 2: f-1 starts");
    let errors: Vec<&str> = outcome
        .stderr
        .lines()
        .filter(|line| line.starts_with("error:"))
        .collect();
    assert_snapshot!(errors.join("\n"), @"error: f-1 failed (exit code 2): cannot read `gone.safetensors`; see `save/f.sweep/f-1.log`");
}

#[test]
fn a_changed_sweep_is_not_mixed_with_the_runs_of_the_old_one() {
    let sandbox = Sandbox::new();
    let file = write_sweep(&sandbox, "c", &[("lr", "1e-3")]);
    sandbox
        .run(&["sweep", "run", &file, "-stop_after", "2"])
        .ok();
    assert!(
        sandbox.run_folder("c").exists(),
        "one run is called as the sweep"
    );
    write_sweep(&sandbox, "c", &[("lr", "2e-3")]);
    assert_snapshot!(sandbox.run(&["sweep", "run", &file, "-stop_after", "2"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the run `c` was trained with another `-lr`
      ╰─▶ `save/c` was started with `1e-3`, and the sweep says `2e-3`
      help: give the sweep another `-name`, or start its runs anew with `-reset 1`
    ");
    sandbox
        .run(&["sweep", "run", &file, "-stop_after", "2", "-reset", "1"])
        .ok();
    // The same number in other words, and a longer run, are no other run.
    write_sweep(&sandbox, "c", &[("lr", "0.002")]);
    let longer = sandbox
        .run(&["sweep", "run", &file, "-stop_after", "4"])
        .ok();
    assert!(
        longer.stdout.lines().nth(1).unwrap().starts_with("c    4 "),
        "{longer}"
    );
}

#[test]
fn a_sweep_is_trained_by_one_process_at_a_time_and_needs_an_end() {
    let sandbox = Sandbox::new();
    let file = write_sweep(&sandbox, "one", &[("lr", "1e-3")]);
    // Longer than the second start takes, on any machine.
    let long = ["sweep", "run", &file, "-stop_after", "1000000"];
    let mut running = sandbox.start(&long, &[]);
    wait_until("the run", || {
        steps_seen(&sandbox.run_folder("one")) >= 1 || running.has_ended()
    });
    let second = sandbox.run(&long);
    assert_eq!(second.code, Some(2), "{second}");
    assert!(
        second
            .stderr
            .contains("the run `save/one.sweep` is being trained"),
        "{second}"
    );
    running.signal("TERM");
    running.wait().ok();
    assert_snapshot!(sandbox.run(&["sweep", "run", &file, "-stop_after", "none"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the run `one` has no end
      ╰─▶ neither the sweep file nor the command line has `stop_after`
      help: add `-stop_after <steps>`
    ");
}

/// A sweep that was killed leaves a process behind, which is waited for and not disturbed.
#[test]
fn a_run_that_outlived_its_sweep_is_waited_for() {
    let sandbox = Sandbox::new();
    let file = write_sweep(&sandbox, "k", &[("lr", "1e-3")]);
    let mut running = sandbox.start(&["sweep", "run", &file], &[]);
    wait_until("the run", || {
        steps_seen(&sandbox.run_folder("k")) >= 1 || running.has_ended()
    });
    running.signal("KILL");
    assert_eq!(running.wait().code, None);
    let outcome = sandbox.run(&["sweep", "run", &file]).ok();
    assert!(!outcome.stderr.contains("fail"), "{outcome}");
    let log = fs::read_to_string(sandbox.work().join("save/k.sweep/k.log")).unwrap();
    assert!(!log.contains("is being trained"), "{log}");
    assert_eq!(steps_seen(&sandbox.run_folder("k")), N_STEPS);
}
