//! What a user sees on stderr, and that nobody who reads it can stop a training.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use moeut_e2e::{Args, Sandbox, checkpoint_files, steps_seen, tiny, wait_until};
use std::io::{PipeReader, Read, Write, pipe};
use std::process::Stdio;

fn args(name: &str) -> Args {
    tiny(name, &["-stop_after", "30", "-test_interval", "10"])
}

/// A pipe that somebody else fills, more than any system lets it hold; and its reader.
fn full_pipe() -> (PipeReader, Stdio) {
    const N_PAGES: usize = 1024;
    let (reader, writer) = pipe().unwrap();
    let mut filler = writer.try_clone().unwrap();
    std::thread::spawn(move || {
        // A page at a time does not tear what others write. It ends with the reader.
        for _ in 0..N_PAGES {
            if filler.write_all(&[b'x'; 4096]).is_err() {
                return;
            }
        }
    });
    (reader, writer.into())
}

#[test]
fn a_reader_that_stopped_does_not_stop_the_training() {
    let sandbox = Sandbox::new();
    let (out, stdout) = full_pipe();
    let (err, stderr) = full_pipe();
    let mut running = sandbox.start_into(&args("a").as_strs(), stdout, stderr);
    wait_until("the run to end", || running.has_ended());
    assert_eq!(running.wait().code, Some(0));
    assert_eq!(steps_seen(&sandbox.run_folder("a")), 30);
    checkpoint_files(&sandbox.run_folder("a"), 30);
    drop((out, err));
}

#[test]
fn a_closed_reader_and_a_closed_terminal_do_not_stop_the_training() {
    let sandbox = Sandbox::new();
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut running = sandbox.start_into(&args("a").as_strs(), Stdio::null(), writer.into());
    let folder = sandbox.run_folder("a");
    wait_until("a step", || steps_seen(&folder) > 0 || running.has_ended());
    running.signal("HUP");
    wait_until("the run to end", || running.has_ended());
    assert_eq!(running.wait().code, Some(0));
    checkpoint_files(&folder, 30);
}

#[test]
fn an_error_waits_for_a_reader_that_comes_back() {
    let sandbox = Sandbox::new();
    let (mut reader, stderr) = full_pipe();
    let mut running = sandbox.start_into(&["-task", "moeut_c5"], Stdio::null(), stderr);
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    wait_until("the host to end", || running.has_ended());
    assert_eq!(running.wait().code, Some(2));
    let text = String::from_utf8_lossy(&text).replace('x', ""); // What filled the pipe.
    assert!(text.contains("unknown task `moeut_c5`"), "{text}");
    assert!(text.contains("did you mean"), "{text}");
}

#[test]
fn quiet_is_the_result_only() {
    let sandbox = Sandbox::new();
    let args = args("a");
    let quiet = [&["--quiet"], &args.as_strs()[..]].concat();
    let outcome = sandbox.run(&quiet).ok();
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    let [score, last] = lines[..] else {
        panic!("{outcome}");
    };
    assert!(score.starts_with("step 30: val loss "), "{outcome}");
    assert!(last.starts_with("step 30/30, loss "), "{outcome}");
    for part in [" tokens/s, ", " steps/s, ", " GiB (peak "] {
        assert!(last.contains(part), "{last}");
    }
    assert_eq!(outcome.stdout, "");
    // Errors come out in any case.
    let outcome = sandbox.run(&["plugins", "show", "nothing", "-q"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(outcome.stderr.contains("nothing"), "{outcome}");
}

#[test]
fn every_command_takes_the_words_for_verbosity() {
    let sandbox = Sandbox::new();
    for command in [
        &["-q", "plugins", "list"][..],
        &["plugins", "-v", "list"],
        &["config", "show", "-task", "moeut_c4", "--verbose"],
        &["model", "show", "-task", "moeut_c4", "--quiet"],
        &["doctor", "-v"],
        &["sweep", "-q"],
        &["-v", "--help"],
    ] {
        let outcome = sandbox.run(command).ok();
        assert!(!outcome.stdout.is_empty(), "{command:?} {outcome}");
    }
}
