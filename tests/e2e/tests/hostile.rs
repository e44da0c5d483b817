//! Components that misbehave: what the user sees, and with which exit code. The host neither crashes nor hangs.
#![expect(
    clippy::expect_used,
    reason = "a helper of a test panics where the test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Outcome, Sandbox, build_new, losses, read, tiny, wait_until};
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

/// The plugin, built once.
static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let sandbox = Sandbox::bare();
    sandbox.run(&["plugins", "new", "model", "hostile"]).ok();
    let folder = sandbox.work().join("moeut-model-hostile");
    let write = |path: &str, text: &str| {
        fs::write(folder.join(path), text).expect("the sandbox can be written");
    };
    write("src/lib.rs", include_str!("../fixtures/hostile/lib.rs"));
    write("throws.cpp", include_str!("../fixtures/hostile/throws.cpp"));
    write("build.rs", include_str!("../fixtures/hostile/build.rs"));
    let manifest = fs::read_to_string(folder.join("Cargo.toml")).expect("the crate is there");
    write(
        "Cargo.toml",
        &(manifest + "\n[build-dependencies]\ncc = \"1\"\n"),
    );
    build_new(&folder)
});

/// A sandbox with the plugin.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "hostile.so", &read(&LIBRARY));
    sandbox
}

/// Trains six steps with misbehaviour in one place.
fn run(sandbox: &Sandbox, place: &str, how: &str) -> Outcome {
    let place = format!("-hostile.{place}");
    let args = "-task hostile -name a -gpu none -threads 1 -seed 1 -batch_size 4 -stop_after 6 -log_interval 2 \
                -test_interval 4 -n_samples 0 -log none -lr 0.1 -reset 1";
    let args: Vec<&str> = args
        .split_whitespace()
        .chain([place.as_str(), how])
        .collect();
    sandbox.run(&args)
}

/// Without what differs between machines: where crates are, and the last digits of numbers.
fn stable(text: &str) -> String {
    let mut stable = match (text.find("(at /"), text.find("tch-0.")) {
        (Some(start), Some(end)) if start < end => {
            format!("{}(at …/{}", &text[..start], &text[end..])
        }
        _ => text.to_owned(),
    };
    let long: Vec<String> = stable
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter(|word| word.len() > 10 && word.contains('.'))
        .map(str::to_owned)
        .collect();
    for number in long {
        stable = stable.replace(&number, &number[..5]);
    }
    stable
}

/// What the user sees that matters: the error or the end, on one line.
fn row(how: &str, outcome: &Outcome) -> String {
    let text = outcome.stderr.replace('│', " ");
    let start = text.find("Error:").or_else(|| text.find("warning:"));
    let shown = match start {
        Some(start) => text[start..]
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
        None if outcome.code == Some(0) => "trains".to_owned(),
        None => format!("{outcome}"),
    };
    let code = outcome
        .code
        .map_or("killed".to_owned(), |code| code.to_string());
    format!("{how} | {} | {code}", stable(&shown))
}

fn table(place: &str, ways: &[&str]) -> String {
    let sandbox = sandbox();
    let rows = ways.iter().map(|how| row(how, &run(&sandbox, place, how)));
    rows.collect::<Vec<_>>().join("\n")
}

#[test]
fn tasks() {
    let ways = [
        "well",
        "no_dataset",
        "no_model",
        "no_tokens",
        "twice",
        "odd_name",
    ];
    assert_snapshot!(table("task", &ways));
}

#[test]
fn datasets() {
    let ways = [
        "no_windows",
        "no_words",
        "endless",
        "nan_bytes",
        "error",
        "panic",
        "too_large",
        "negative",
    ];
    assert_snapshot!(table("data", &ways));
}

#[test]
fn models() {
    let ways = [
        "no_parameters",
        "twice",
        "integers",
        "no_name",
        "panic_parameters",
        "wrong_shape",
        "wrong_rank",
        "too_few_words",
        "wrong_dtype",
        "detached",
        "nan",
        "panic",
        "error",
        "exception",
        "changes_input",
        "frees_weight",
        "regularizer_vector",
        "regularizer_nan",
        "regularizer_integer",
        "stats_vector",
        "stats_empty",
        "stats_name",
        "leaks",
        "calls_on",
        "drop_calls",
        "drop_panics",
        "throws",
        "throws_unannounced",
        "throws_in_thread",
    ];
    assert_snapshot!(table("model", &ways));
}

/// `-moe.kernel auto` takes the fastest kernel that computes what it should: here a run with one that does not is the
/// run without it, and says so.
#[test]
fn kernels() {
    let sandbox = Sandbox::new();
    let train = |how: Option<&str>| {
        let variables: Vec<(&str, &str)> = how.iter().map(|&how| ("HOSTILE_KERNEL", how)).collect();
        let name = how.unwrap_or("without");
        let args = tiny(name, &["-stop_after", "3"]);
        let outcome = sandbox.start(&args.as_strs(), &variables).wait();
        (outcome, losses(&sandbox.run_folder(name)))
    };
    let (_, expected) = train(None);
    assert_eq!(expected.len(), 3);
    sandbox.drop_in("plugins", "hostile.so", &read(&LIBRARY));
    let ways = ["cannot", "error", "panic", "zeros"].map(|how| {
        let (outcome, losses) = train(Some(how));
        assert_eq!(losses, expected, "{how}: {outcome}");
        let said = outcome.stderr.lines().next().unwrap_or_default();
        format!("{how} | {said}")
    });
    assert_snapshot!(ways.join("\n"));

    for kernel in ["grouped", "reference"] {
        let file = format!("libmoeut_kernel_{kernel}.so");
        fs::remove_file(sandbox.installed().join(file)).expect("the kernel was there");
    }
    let args = tiny("nothing_else", &["-stop_after", "3"]);
    let outcome = sandbox
        .start(&args.as_strs(), &[("HOSTILE_KERNEL", "zeros")])
        .wait();
    assert_snapshot!(outcome);
}

/// Nothing ends such a call from outside; but it is named, and two signals end the run.
#[test]
fn a_call_that_never_returns_is_named() {
    let sandbox = sandbox();
    for (place, call) in [
        ("-hostile.model", "`forward` of model `hostile_table`"),
        ("-hostile.data", "`read` of dataset `hostile_bytes`"),
    ] {
        let args = "-task hostile -name b -gpu none -batch_size 4 -stop_after 6 -n_samples 0 -log none -reset 1 -watchdog 0.2";
        let args: Vec<&str> = args.split(' ').chain([place, "blocks"]).collect();
        let mut running = sandbox.start(&args, &[]);
        wait_until("the call is named", || {
            running
                .stderr()
                .contains(&format!("{call} has not returned for "))
        });
        assert!(!running.has_ended());
        // Two signals that wait at once are one.
        wait_until("the host to end", || {
            running.has_ended() || {
                running.signal("INT");
                false
            }
        });
        let outcome = running.wait();
        assert_eq!(outcome.code, Some(130), "{outcome}");
    }
}

/// In one of several processes it is found by what it does not take part in, though it lives: the others end with its
/// name, and end it.
#[test]
fn a_process_that_never_comes_back_is_named_by_the_others() {
    let sandbox = sandbox();
    let args = "-task hostile -name c -gpu none -threads 1 -batch_size 4 -stop_after 6 -n_samples 0 -log none \
                -distributed_timeout 4 -hostile.model blocks_rank_1";
    let args: Vec<&str> = args.split_whitespace().collect();
    let outcomes = sandbox.run_ranks(2, &args);
    for outcome in &outcomes {
        assert_eq!(outcome.code, Some(2), "{outcome}");
    }
    let words: Vec<&str> = outcomes[0].stderr.split_whitespace().collect();
    let words = words.join(" ");
    assert!(words.contains("rank 0: rank 1 ended the run"), "{words}");
    assert!(words.contains("does not come: it is in step 3,"), "{words}");
}

/// Whose memory it is that is not freed cannot be told; but what was called meanwhile can.
#[test]
fn a_process_that_grows_is_told_with_what_it_calls() {
    let sandbox = sandbox();
    let args = "-task hostile -name g -gpu none -batch_size 4 -stop_after 1000000 -n_samples 0 -log none -reset 1 \
                -watchdog 1 -hostile.model leaks";
    let args: Vec<&str> = args.split_whitespace().collect();
    let mut running = sandbox.start(&args, &[]);
    wait_until("the growth is told", || {
        running.stderr().contains("this process grows: it has ")
    });
    assert!(!running.has_ended());
    running.signal("INT");
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(130), "{outcome}");
    let told = outcome
        .stderr
        .lines()
        .find(|line| line.contains("this process grows"));
    assert!(
        told.is_some_and(|told| told.contains(" times `forward` of model `hostile_table`")),
        "{outcome}"
    );
}

/// An exception of C++ ends the process, but nothing of what was saved.
#[test]
fn a_run_goes_on_after_an_exception() {
    let sandbox = sandbox();
    let train = |stop_after: &str, how: &str| {
        let args =
            "-task hostile -name x -gpu none -batch_size 4 -n_samples 0 -log none -stop_after";
        let model = ["-hostile.model", how];
        let args: Vec<&str> = args
            .split_whitespace()
            .chain([stop_after])
            .chain(model)
            .collect();
        sandbox.run(&args)
    };
    train("4", "well").ok();
    assert_eq!(train("8", "throws").code, Some(2));
    let last = train("8", "well").ok();
    assert!(last.stderr.contains("going on from step 4"), "{last}");
}
