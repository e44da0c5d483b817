//! Several processes train one model: the result is that of one process, whatever happens to one of them ends all, and
//! the next start goes on.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use insta::assert_snapshot;
use moeut_e2e::{
    Args, Outcome, Ranks, RawTensor, Sandbox, checkpoint_files, losses, read, read_safetensors,
    staged_plugins, steps_seen, tiny, wait_until,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A batch that neither two nor four processes share evenly, and no chance in the model.
const EXACT: &[&str] = &[
    "-batch_size",
    "7",
    "-dropout",
    "0",
    "-test_interval",
    "6",
    "-stop_after",
    "12",
];

/// The other models.
const DENSE: &[&str] = &[
    "-transformer.variant",
    "preln_rope_universal",
    "-dropout",
    "0",
];

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    for name in [
        "libmoeut_model_dense.so",
        "libmoeut_dataset_lambada.so",
        "libmoeut_dataset_piqa.so",
    ] {
        fs::copy(staged_plugins().join(name), sandbox.installed().join(name)).unwrap();
    }
    sandbox
}

fn ok(outcomes: Vec<Outcome>) -> Vec<Outcome> {
    outcomes.into_iter().map(Outcome::ok).collect()
}

/// All numbers of a run that are no times, by step and name.
fn numbers(folder: &Path) -> BTreeMap<(u64, String), f64> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_record = |record: Value| -> Vec<((u64, String), f64)> {
        let step = record["step"].as_u64().unwrap();
        let numbers = record.as_object().unwrap().iter();
        let numbers = numbers.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        numbers.map(|(name, value)| ((step, name), value)).collect()
    };
    records.flat_map(of_record).collect()
}

/// Those that do not depend on how a batch is cut.
fn is_of_batch(name: &str) -> bool {
    ["train/loss", "train/reg_loss", "max_grad", "validation/"]
        .iter()
        .any(|start| name.starts_with(start))
}

fn floats(tensor: &RawTensor) -> Vec<f32> {
    let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    tensor.bytes.chunks(4).map(float).collect()
}

/// Compares numbers and final parameters of two runs of 12 steps; float32 sums in another order differ in the last digits.
fn assert_same(one: &Path, other: &Path, what: &str) {
    let (expected, got) = (numbers(one), numbers(other));
    let mut n = 0;
    for ((step, name), value) in expected.iter().filter(|((_, name), _)| is_of_batch(name)) {
        let other = got.get(&(*step, name.clone()));
        let other = other.unwrap_or_else(|| panic!("{what}: no `{name}` of step {step}"));
        let error = (other - value).abs() / value.abs().max(1e-2);
        assert!(
            error < 2e-5,
            "{what}: step {step}, `{name}`: {other}, not {value}"
        );
        n += 1;
    }
    assert!(n > 30, "{what}: only {n} numbers");
    for file in ["model", "optimizer"] {
        let tensors = |folder: &Path| -> BTreeMap<String, RawTensor> {
            let path = folder.join(format!("checkpoint/model-12/{file}.safetensors"));
            read_safetensors(&read(&path)).into_iter().collect()
        };
        let (expected, got) = (tensors(one), tensors(other));
        for (name, tensor) in &expected {
            // Random generators and memories are of one process.
            if tensor.dtype != "F32" || name.starts_with("memory/") {
                continue;
            }
            let other = &got[name];
            assert_eq!(tensor.shape, other.shape, "{what}: `{name}`");
            let pairs = floats(tensor).into_iter().zip(floats(other));
            let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 3e-4, "{what}: `{name}` differs by {error}");
        }
    }
}

#[test]
fn many_processes_do_what_one_does() {
    let sandbox = sandbox();
    let global = [
        "-moe.perplexity_reg_mode",
        "global",
        "-moe.perplexity_reg",
        "0.5",
    ];
    let memory = ["-lm.trafo.context_blocks", "1", "-n_microbatch", "2"];
    for (model, more, n_ranks) in [
        ("moeut", &[][..], 2),
        ("global", &global, 2),
        ("memory", &memory, 3),
        ("dense", DENSE, 4),
    ] {
        let args = |name: &str, own: &[&str]| tiny(name, &[EXACT, more, own].concat());
        sandbox.run(&args(model, &[]).as_strs()).ok();
        let one = sandbox.run_folder(model);
        for (kind, own) in [("many", &[][..]), ("sharded", &["-shard_optimizer", "1"])] {
            let name = format!("{model}_{kind}");
            let outcomes = ok(sandbox.run_ranks(n_ranks, &args(&name, own).as_strs()));
            let first = &outcomes[0].stderr;
            let world = format!("torchrun. World size: {n_ranks}, rank: 0");
            assert!(first.contains(&world), "{first}");
            for other in &outcomes[1..] {
                assert_eq!((other.stdout.as_str(), other.stderr.as_str()), ("", ""));
            }
            assert_same(&one, &sandbox.run_folder(&name), &name);
        }
    }
}

/// Questions are shared out, too: scores are those of one process to the last digit that a sum leaves alone.
#[test]
fn evaluation_sets_are_shared_out() {
    let sandbox = sandbox();
    // The embedded text with its tokenizer, and a set where downloads are kept.
    sandbox
        .run(&tiny("warm", &["-stop_after", "1"]).as_strs())
        .ok();
    let cache = sandbox.copy_cache();
    fs::create_dir_all(cache.join("Lambada")).unwrap();
    let passage =
        |word: &str| format!("{{\"text\": \"the {word} stood there and she took the {word}\"}}\n");
    let passages: String = ["lamp", "gate", "stone", "bird", "book"]
        .map(passage)
        .concat();
    fs::write(cache.join("Lambada/lambada_test.jsonl"), passages).unwrap();
    let args = |name: &str| {
        let more = [
            "-lm.eval.enabled",
            "1",
            "-lm.eval.blimp.enabled",
            "0",
            "-test_batch_size",
            "1",
            "-data.cache_dir",
            "cache",
        ];
        tiny(name, &[EXACT, &more].concat())
    };
    sandbox.run(&args("one").as_strs()).ok();
    ok(sandbox.run_ranks(3, &args("three").as_strs()));
    let [one, three] = ["one", "three"].map(|name| numbers(&sandbox.run_folder(name)));
    let of_sets = |name: &str| name.contains("/lambada/");
    let expected: Vec<_> = one.iter().filter(|((_, name), _)| of_sets(name)).collect();
    assert!(expected.len() >= 8, "{expected:?}");
    for (key, value) in expected {
        let error = (three[key] - value).abs() / value.abs().max(1e-2);
        assert!(error < 2e-5, "{key:?}: {}, not {value}", three[key]);
    }
}

/// A run with chance in it that saves every seven steps and ends after 60.
fn long(name: &str, more: &[&str]) -> Args {
    let own = [
        "-stop_after",
        "60",
        "-save_interval",
        "7",
        "-test_interval",
        "20",
        "-lm.trafo.context_blocks",
        "1",
        "-distributed_timeout",
        "20",
    ];
    tiny(name, &[&own, more].concat())
}

/// Waits until a run has logged a step, or a process has ended, which is a mistake.
fn wait_for_step(ranks: &mut Ranks<'_>, folder: &Path, step: u64) {
    wait_until("a step", || {
        steps_seen(folder) >= step || ranks.has_ended(0)
    });
    assert!(steps_seen(folder) >= step, "{}", ranks.stderr(0));
}

/// Whichever process is killed, the others end with its name, and the next start ends bit for bit as if nothing had
/// happened: each process has its own random numbers and its own memory of the text back.
#[test]
fn a_killed_process_ends_all_and_the_next_start_goes_on() {
    let sandbox = sandbox();
    for shards in ["0", "1"] {
        let more = ["-shard_optimizer", shards];
        let name = |what: &str| format!("{what}_{shards}");
        ok(sandbox.run_ranks(2, &long(&name("straight"), &more).as_strs()));
        let folder = sandbox.run_folder(&name("killed"));
        for (victim, step) in [(1, 10), (0, 30)] {
            let args = long(&name("killed"), &more);
            let mut ranks = sandbox.start_ranks(&vec![args.as_strs(); 2]);
            wait_for_step(&mut ranks, &folder, step);
            ranks.signal(victim, "KILL");
            let outcomes = ranks.wait();
            let left = &outcomes[1 - victim];
            assert_eq!(left.code, Some(2), "{left}");
            let why = format!("rank {victim} ended the run");
            assert!(left.stderr.contains(&why), "{left}");
        }
        ok(sandbox.run_ranks(2, &long(&name("killed"), &more).as_strs()));
        let straight = sandbox.run_folder(&name("straight"));
        assert_eq!(losses(&folder), losses(&straight));
        assert!(
            checkpoint_files(&folder, 60) == checkpoint_files(&straight, 60),
            "{shards}"
        );
    }
    // Sharded or not, and by how many processes: a checkpoint is one of all.
    ok(sandbox.run_ranks(
        3,
        &long("killed_1", &["-shard_optimizer", "1", "-stop_after", "66"]).as_strs(),
    ));
    let last = sandbox
        .run(&long("killed_1", &["-stop_after", "70"]).as_strs())
        .ok();
    assert!(last.stderr.contains("going on from step 66"), "{last}");
}

#[test]
fn what_one_process_is_asked_for_all_do() {
    let sandbox = sandbox();
    let folder = sandbox.run_folder("asked");
    let args = long(
        "asked",
        &[
            "-stop_after",
            "5000",
            "-save_interval",
            "4000",
            "-test_interval",
            "4000",
        ],
    );
    let mut ranks = sandbox.start_ranks(&vec![args.as_strs(); 2]);
    wait_for_step(&mut ranks, &folder, 3);
    ranks.signal(1, "USR1");
    let saved = || {
        fs::read_dir(folder.join("checkpoint")).is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("model-"))
            })
        })
    };
    wait_until("the save", saved);
    assert!(!ranks.has_ended(0) && !ranks.has_ended(1));
    ranks.signal(1, "INT");
    let outcomes = ranks.wait();
    assert_eq!(
        outcomes
            .iter()
            .map(|outcome| outcome.code)
            .collect::<Vec<_>>(),
        [Some(130); 2]
    );
    assert!(
        outcomes[0].stderr.contains("stopped by SIGINT after step"),
        "{}",
        outcomes[0]
    );
    // During a validation, too.
    let args = long(
        "validating",
        &[
            "-stop_after",
            "10",
            "-test_interval",
            "1",
            "-lmds.valid_ratio",
            "0.05",
        ],
    );
    let mut ranks = sandbox.start_ranks(&vec![args.as_strs(); 2]);
    wait_for_step(&mut ranks, &sandbox.run_folder("validating"), 1);
    ranks.signal(1, "TERM");
    let outcomes = ok(ranks.wait());
    assert!(
        outcomes[0].stderr.contains("stopped by SIGTERM after step"),
        "{}",
        outcomes[0]
    );
}

/// A scheduler's SIGTERM before the first step is no failure, whatever the processes are doing.
#[test]
fn preparing_data_is_no_reason_to_wait() {
    let sandbox = sandbox();
    let fresh = [
        "-data.cache_dir",
        "fresh",
        "-sentencepiece.n_pieces",
        "4000",
    ];
    let args = long("prepared", &fresh);
    let ranks = sandbox.start_ranks(&vec![args.as_strs(); 2]);
    wait_until("the data", || sandbox.work().join("fresh").exists());
    ranks.signal(0, "TERM");
    ranks.signal(1, "TERM");
    let outcomes = ok(ranks.wait());
    let said = &outcomes[0].stderr;
    assert!(
        said.contains("stopped by SIGTERM before the first step") && !said.contains("Error"),
        "{}",
        outcomes[0]
    );
}

/// A process that stands still is found by its silence, and named.
#[test]
fn a_process_that_stands_still_is_named() {
    let sandbox = sandbox();
    let args = long(
        "still",
        &["-stop_after", "5000", "-distributed_timeout", "6"],
    );
    let mut ranks = sandbox.start_ranks(&vec![args.as_strs(); 2]);
    wait_for_step(&mut ranks, &sandbox.run_folder("still"), 3);
    ranks.signal(1, "STOP");
    wait_until("the others to end", || ranks.has_ended(0));
    ranks.signal(1, "KILL");
    let outcomes = ranks.wait();
    assert_eq!(outcomes[0].code, Some(2), "{}", outcomes[0]);
    assert!(
        outcomes[0].stderr.contains("rank 1 ended the run"),
        "{}",
        outcomes[0]
    );
    assert!(
        outcomes[0].stderr.contains("has been silent"),
        "{}",
        outcomes[0]
    );
}

/// What the culprit and the other process say. Numbers of processes and names of hosts are not the same everywhere.
fn said(outcomes: &[Outcome]) -> String {
    let of_rank = |(rank, outcome): (usize, &Outcome)| {
        let words = outcome
            .stderr
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        let from = words.find("Error:").unwrap_or(words.len());
        let words = match words.split_once(", process ") {
            Some((before, behind)) => {
                let behind = behind.split_once(": ").map_or("", |(_, behind)| behind);
                format!("{before}, process <n> on <host>: {behind}")[from..].to_owned()
            }
            None => words[from..].to_owned(),
        };
        format!("rank {rank}: exit {:?}\n{words}\n", outcome.code)
    };
    outcomes.iter().enumerate().map(of_rank).collect()
}

#[test]
fn mistakes_end_all_processes() {
    let sandbox = sandbox();
    let good = long("mistakes", &[]);
    let good = good.as_strs();
    let with = |more: &[&'static str]| [&good[..], more].concat();
    let mut text = String::new();
    for (what, lines) in [
        ("other arguments", [good.clone(), with(&["-lr", "7"])]),
        (
            "an argument that only one has wrong",
            [good.clone(), with(&["-lr", "x"])],
        ),
        (
            "an argument that all have wrong",
            [with(&["-lr", "x"]), with(&["-lr", "x"])],
        ),
        (
            "too small a batch",
            [with(&["-batch_size", "1"]), with(&["-batch_size", "1"])],
        ),
        (
            "one GPU for all",
            [with(&["-gpu", "0"]), with(&["-gpu", "0"])],
        ),
        (
            "a model that only one knows",
            [good.clone(), with(&["-transformer.variant", "mine"])],
        ),
    ] {
        let outcomes = sandbox.start_ranks(&lines).wait();
        text.extend(["# ", what, "\n", &said(&outcomes)]);
    }
    // Another plugin of the same name and version, in a folder that only one process looks into.
    let mut bytes = read(&staged_plugins().join("libmoeut_model_moeut.so"));
    bytes.push(0);
    sandbox.drop_in("elsewhere", "libmoeut_model_moeut.so", &bytes);
    let lines = [good.clone(), with(&["-plugin_dir", "elsewhere"])];
    let outcomes = sandbox.start_ranks(&lines).wait();
    let outcomes = said(&outcomes);
    text += "# another plugin\n";
    text += &without_hashes(&outcomes);
    assert_snapshot!(text);
}

fn without_hashes(text: &str) -> String {
    let is_hash = |word: &str| word.len() == 64 && word.chars().all(|c| c.is_ascii_hexdigit());
    let parts = text
        .split('`')
        .map(|part| if is_hash(part) { "<sha256>" } else { part });
    parts.collect::<Vec<_>>().join("`")
}

#[test]
fn the_environment_and_the_launcher_say_what_they_need() {
    let sandbox = sandbox();
    let mut text = String::new();
    let args = long("alone", &["-distributed_timeout", "1"]);
    for variables in [
        &[("RANK", "0"), ("WORLD_SIZE", "2")][..],
        &[
            ("RANK", "2"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", "0"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "1"),
        ],
    ] {
        let outcome = sandbox.start(&args.as_strs(), variables).wait();
        text += &said(&[outcome]);
    }
    for line in [
        &["launch"][..],
        &["launch", "-n", "x"],
        &["launch", "-task", "x"],
    ] {
        text += &said(&[sandbox.run(line)]);
    }
    assert_snapshot!(text);
}

/// Both sides of a meeting that does not take place.
#[test]
fn who_waits_in_vain_says_for_whom() {
    let sandbox = sandbox();
    let args = long("alone", &["-distributed_timeout", "2"]);
    let port = moeut_e2e::free_port().to_string();
    let variables = |rank| {
        [
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_RANK", rank),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", port.as_str()),
        ]
    };
    let first = sandbox.start(&args.as_strs(), &variables("0")).wait();
    assert_eq!(first.code, Some(2));
    assert!(
        first.stderr.contains("rank 1 of 2 does not come"),
        "{first}"
    );
    let second = sandbox.start(&args.as_strs(), &variables("1")).wait();
    assert_eq!(second.code, Some(2));
    assert!(
        second
            .stderr
            .contains(&format!("`127.0.0.1:{port}` does not answer")),
        "{second}"
    );
}

/// `moeut-host launch`: output of the first process, one exit code, and no process left behind.
#[test]
fn the_launcher_starts_and_ends_them() {
    let sandbox = sandbox();
    let with = |args: &Args| -> Vec<String> {
        let own = ["launch", "-n", "2"].into_iter().chain(args.as_strs());
        own.map(str::to_owned).collect()
    };
    let strs = |words: &[String]| -> Vec<&'static str> {
        words
            .iter()
            .map(|word| &*Box::leak(word.clone().into_boxed_str()))
            .collect()
    };
    let outcome = sandbox.run(&strs(&with(&long("launched", &[])))).ok();
    assert_eq!(
        outcome.stderr.matches("World size: 2").count(),
        1,
        "{outcome}"
    );

    let args = with(&long("stopped", &["-stop_after", "5000"]));
    let running = sandbox.start(&strs(&args), &[]);
    let folder = sandbox.run_folder("stopped");
    wait_until("a step", || steps_seen(&folder) >= 3);
    running.signal("TERM");
    let outcome = running.wait().ok();
    assert!(outcome.stderr.contains("stopped by SIGTERM"), "{outcome}");

    let outcome = sandbox.run(&strs(&with(&long("wrong", &["-lr", "x"]))));
    assert_eq!(outcome.code, Some(2), "{outcome}");
}
