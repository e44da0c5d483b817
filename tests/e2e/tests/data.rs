//! Text through the real program: the four corpora in their published formats, text of one's own, and everything that
//! can be wrong with a shard, a disk or a server. Whatever happens, no wrong token is ever cached: a run that is started
//! again has the bytes of one that was never disturbed.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use flate2::{Compression, write::GzEncoder};
use insta::assert_snapshot;
use moeut_e2e::{
    Args, Fault, Outcome, Request, Sandbox, Web, losses, shared_data, steps_seen, tiny_on,
    wait_until,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A folder of real text, in the layout of a corpus.
fn corpus(name: &str) -> Option<PathBuf> {
    shared_data(&format!("data/lm/{name}"))
}

/// Every file below a folder, by its path there.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_owned();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// The token files of a cache: what must be the same whatever happened on the way.
fn tokens(sandbox: &Sandbox, cache: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = files(&sandbox.work().join(cache));
    all.retain(|path, _| path.extension().is_some_and(|ending| ending == "bin"));
    assert!(!all.is_empty());
    all
}

#[test]
fn each_corpus_trains_on_its_published_format() {
    for (task, folder) in [
        ("moeut_c4", "c4_like"),
        ("moeut_pes2o", "pes2o_like"),
        ("moeut_slimpajama", "slimpajama_like"),
        ("moeut_thestack", "thestack_like"),
    ] {
        let Some(corpus) = corpus(folder) else {
            return;
        };
        let sandbox = Sandbox::full();
        let dir = ["-data.dir", corpus.to_str().unwrap()];
        let more = [
            "-stop_after",
            "30",
            "-test_interval",
            "30",
            "-batch_size",
            "8",
        ];
        let args = tiny_on(task, "a", &[&dir[..], &more].concat());
        sandbox.run(&args.as_strs()).ok();
        let run = sandbox.run_folder("a");
        assert_eq!(steps_seen(&run), 30);
        let losses = losses(&run);
        // A vocabulary of 500: ln 500 = 6.2 at the start.
        assert!(losses[&30] < losses[&1] - 0.5, "{task}: {losses:?}");
    }
}

/// One text in 40 files of lines, and a folder with a few of each kind that is read.
fn own_text(folder: &Path) {
    fs::create_dir_all(folder.join("more")).unwrap();
    let line = |i: usize| {
        format!(
            "line {i} of a text that says little, {} times\n",
            i * i % 97
        )
    };
    for i in 0..40 {
        let text: String = (0..5 + i % 7).map(|j| line(10 * i + j)).collect();
        fs::write(folder.join(format!("more/{i}.txt")), text).unwrap();
    }
    let rows: String = (0..60)
        .map(|i| serde_json::json!({ "text": line(i), "id": i }).to_string() + "\n")
        .collect();
    fs::write(folder.join("rows.jsonl"), &rows).unwrap();
    fs::write(folder.join("rows.json.gz"), gzip(rows.as_bytes())).unwrap();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The validation loss that a run ended with.
fn last_validation_loss(run: &Path) -> f64 {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records
        .filter_map(|record| record["validation/val/loss"].as_f64())
        .next_back()
        .unwrap()
}

#[test]
fn text_of_ones_own_trains_as_a_stream_and_by_documents() {
    let sandbox = Sandbox::full();
    own_text(&sandbox.work().join("text"));
    let run = |name: &str, more: &[&str]| {
        let own = [
            "-data.dir",
            "text",
            "-sentencepiece.n_pieces",
            "90",
            "-lmds.valid_ratio",
            "1",
        ];
        let rest = ["-stop_after", "20", "-test_interval", "20", "-dropout", "0"];
        let args = tiny_on("moeut_text_files", name, &[&own[..], &rest, more].concat());
        let outcome = sandbox.run(&args.as_strs()).ok();
        let run = sandbox.run_folder(name);
        assert_eq!(steps_seen(&run), 20, "{outcome}");
        (last_validation_loss(&run), losses(&run))
    };
    let documents = ["-text_files.documents", "1"];
    run("stream", &[]);
    let (one_by_one, _) = run(
        "one",
        &[&documents[..], &["-test_batch_size", "1"]].concat(),
    );
    let (padded, plain) = run(
        "many",
        &[&documents[..], &["-test_batch_size", "7"]].concat(),
    );
    // What is behind a document's end changes no score.
    assert!(
        (one_by_one - padded).abs() < 1e-5,
        "{one_by_one} and {padded}"
    );
    let (_, bucketed) = run(
        "buckets",
        &[&documents[..], &["-length_bucketed_sampling", "1"]].concat(),
    );
    assert_ne!(plain, bucketed);
}

/// Documents, too, are seen in the order in which a run without a stop would have seen them.
#[test]
fn documents_go_on_where_a_killed_run_was() {
    let sandbox = Sandbox::full();
    own_text(&sandbox.work().join("text"));
    let args = |name: &str, n_steps: &str| {
        let own = [
            "-data.dir",
            "text",
            "-sentencepiece.n_pieces",
            "90",
            "-lmds.valid_ratio",
            "1",
        ];
        let documents = [
            "-text_files.documents",
            "1",
            "-length_bucketed_sampling",
            "1",
        ];
        let rest = [
            "-stop_after",
            n_steps,
            "-lr_sched.type",
            "step",
            "-test_interval",
            "1000",
        ];
        tiny_on(
            "moeut_text_files",
            name,
            &[&own[..], &documents, &rest].concat(),
        )
    };
    // 100-odd documents in batches of 4: 40 steps are more than one epoch.
    sandbox.run(&args("straight", "40").as_strs()).ok();
    for n_steps in ["9", "31", "40"] {
        sandbox.run(&args("stopped", n_steps).as_strs()).ok();
    }
    let losses_of = |name: &str| losses(&sandbox.run_folder(name));
    assert_eq!(losses_of("stopped"), losses_of("straight"));
}

/// Damage to one shard of a small C4.
type Damage = fn(&Path);

fn train_shard(folder: &Path) -> PathBuf {
    folder.join("en/c4-train.00001-of-01024.json.gz")
}

fn cut(path: &Path, n_bytes: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes.truncate(bytes.len() - n_bytes);
    fs::write(path, bytes).unwrap();
}

/// Replaces the second training shard by these lines.
fn lines(folder: &Path, lines: &[u8]) {
    fs::write(train_shard(folder), gzip(lines)).unwrap();
}

const DAMAGES: &[(&str, Damage)] = &[
    ("gzip cut off", |folder| cut(&train_shard(folder), 1000)),
    ("gzip with a flipped byte", |folder| {
        let mut bytes = fs::read(train_shard(folder)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        fs::write(train_shard(folder), bytes).unwrap();
    }),
    ("not gzip", |folder| {
        fs::write(train_shard(folder), "text\n").unwrap();
    }),
    ("no bytes", |folder| {
        fs::write(train_shard(folder), "").unwrap();
    }),
    ("no JSON", |folder| {
        lines(folder, b"{\"text\": \"a\"}\nnonsense\n");
    }),
    ("no key", |folder| lines(folder, b"{\"txt\": \"a\"}\n")),
    ("a number", |folder| lines(folder, b"{\"text\": 5}\n")),
    ("no UTF-8", |folder| {
        lines(folder, b"{\"text\": \"\xff\xfe\"}\n");
    }),
    ("no shard of a split", |folder| {
        fs::remove_file(folder.join("en/c4-validation.00000-of-00008.json.gz")).unwrap();
    }),
    ("no folder", |folder| {
        fs::remove_dir_all(folder).unwrap();
    }),
];

/// A small C4: two training shards and one for validation, made of the shared one's.
fn small_c4(folder: &Path) -> Option<()> {
    let shared = corpus("c4_like")?;
    fs::create_dir_all(folder.join("en")).unwrap();
    for name in [
        "c4-train.00000-of-01024.json.gz",
        "c4-train.00001-of-01024.json.gz",
        "c4-validation.00000-of-00008.json.gz",
    ] {
        fs::copy(shared.join("en").join(name), folder.join("en").join(name)).unwrap();
    }
    Some(())
}

/// A run that makes tokens of both training shards in `cache`, and trains one step.
fn c4(name: &str, source: &[&str], cache: &str) -> Args {
    let own = [
        "-data.cache_dir",
        cache,
        "-stop_after",
        "none",
        "-test_only",
        "0",
        "-dry_run",
        "1",
    ];
    tiny_on("moeut_c4", name, &[&own[..], source].concat())
}

/// What, why and fix, a line each: where they are broken depends on the length of the sandbox's path.
fn error(outcome: &Outcome) -> String {
    let start = outcome.stderr.find("Error: ").unwrap_or(0);
    let mut text = String::new();
    for line in outcome.stderr[start..].lines() {
        let line = line.trim();
        let begins = ["Error:", "╰─▶", "help:"]
            .iter()
            .any(|mark| line.starts_with(mark));
        if begins {
            text.push('\n');
        } else if !text.ends_with(['-', '/']) {
            text.push(' ');
        }
        text.push_str(line);
    }
    text.trim().to_owned() + "\n"
}

#[test]
fn each_damage_gets_what_why_and_fix_and_caches_no_wrong_token() {
    let sandbox = Sandbox::full();
    let good = sandbox.work().join("good");
    if small_c4(&good).is_none() {
        return;
    }
    let source = ["-data.dir", "good"];
    sandbox.run(&c4("good", &source, "cache").as_strs()).ok();
    let mut table = String::new();
    for (index, (name, damage)) in DAMAGES.iter().enumerate() {
        let folder = format!("damaged-{index}");
        let path = sandbox.work().join(&folder);
        small_c4(&path);
        damage(&path);
        let cache = format!("cache-{index}");
        let source = ["-data.dir", folder.as_str()];
        let args = c4("a", &source, &cache);
        let outcome = sandbox.run(&args.as_strs());
        writeln!(
            table,
            "{name}: exit {:?}\n{}",
            outcome.code,
            error(&outcome)
        )
        .unwrap();
        // Repaired, it goes on, and has what was never damaged.
        small_c4(&path);
        sandbox.run(&args.as_strs()).ok();
        assert_same_tokens(&sandbox, "cache", &cache, name);
    }
    assert_snapshot!("damages", table);
}

/// Token files are equal whatever the folder of the text was called.
fn assert_same_tokens(sandbox: &Sandbox, a: &str, b: &str, what: &str) {
    let by_name = |cache: &str| -> BTreeMap<PathBuf, Vec<u8>> {
        let all = tokens(sandbox, cache).into_iter();
        all.map(|(path, bytes)| (path.components().skip(1).collect(), bytes))
            .collect()
    };
    assert!(by_name(a) == by_name(b), "{what}");
}

/// A server with the small C4 at the place where the hub has it.
fn hub(sandbox: &Sandbox) -> Option<Web> {
    let folder = sandbox.work().join("hub");
    small_c4(&folder.join(ON_HUB))?;
    Some(Web::serve(&folder))
}

/// From the hub until `limit` tokens are there; `more` are arguments of the test.
fn from_hub(sandbox: &Sandbox, web: &Web, cache: &str, more: &[&str]) -> Outcome {
    // Two steps of data, and the hundred that are kept in stock: less than the first training shard has.
    let own = [
        "-data.source",
        "hub",
        "-data.cache_dir",
        cache,
        "-stop_after",
        "2",
    ];
    let args = tiny_on("moeut_c4", cache, &[&own[..], more].concat());
    let variables = [
        ("HF_ENDPOINT", web.address()),
        ("HF_TOKEN", "a-secret"),
        ("NO_PROXY", "127.0.0.1"),
    ];
    sandbox.start(&args.as_strs(), &variables).wait()
}

/// Where the hub has C4.
const ON_HUB: &str = "datasets/allenai/c4/resolve/1ddc917116b730e1859edef32896ec5c16be51d0";
const FIRST: &str = "en/c4-train.00000-of-01024.json.gz";

/// Servers that fail for a while are waited for, and what was cut is asked for from where it broke.
#[test]
fn a_server_that_fails_for_a_while_changes_nothing() {
    let sandbox = Sandbox::full();
    let Some(web) = hub(&sandbox) else {
        return;
    };
    // The tokenizer wants more shards than there are, so that it is handed over.
    let model = |cache: &str| {
        let folder = sandbox.work().join(cache).join("C4/C4-en-500");
        fs::create_dir_all(&folder).unwrap();
        let trained = files(&sandbox.work().join("trained"));
        let (_, bytes) = trained
            .iter()
            .find(|(path, _)| path.ends_with("tokenizer.model.model"))
            .unwrap();
        fs::write(folder.join("tokenizer.model.model"), bytes).unwrap();
    };
    let dir = sandbox.work().join("hub").join(ON_HUB);
    let source = ["-data.dir", dir.to_str().unwrap()];
    sandbox
        .run(&c4("trained", &source, "trained").as_strs())
        .ok();

    model("calm");
    from_hub(&sandbox, &web, "calm", &[]).ok();
    let n_calm = web.requests().len();
    let paths: Vec<String> = web
        .requests()
        .into_iter()
        .map(|request| request.path)
        .collect();
    assert!(paths.iter().any(|path| path.ends_with(FIRST)), "{paths:?}");
    assert!(
        !paths.iter().any(|path| path.contains("c4-train.00001")),
        "more was downloaded than is needed: {paths:?}"
    );
    let authorized =
        |request: &Request| request.authorization.as_deref() == Some("Bearer a-secret");
    assert!(web.requests().iter().all(authorized));

    for (index, (name, faults)) in [
        ("503", vec![Fault::Status(503), Fault::Status(500)]),
        ("429", vec![Fault::Status(429)]),
        ("cut", vec![Fault::Cut(100_000)]),
        ("cut, no ranges", vec![Fault::Cut(100_000), Fault::NoRanges]),
    ]
    .into_iter()
    .enumerate()
    {
        for fault in faults {
            web.fault(FIRST, fault, 1);
        }
        let cache = format!("troubled-{index}");
        model(&cache);
        let before = web.requests().len();
        from_hub(&sandbox, &web, &cache, &[]).ok();
        let since: Vec<_> = web.requests().into_iter().skip(before).collect();
        assert!(since.len() > n_calm, "{name}: {since:?}");
        if name == "cut" {
            assert!(
                since.iter().any(|request| request.start == Some(100_000)),
                "{since:?}"
            );
        }
        assert!(
            tokens(&sandbox, &cache) == tokens(&sandbox, "calm"),
            "{name}"
        );
    }
}

/// What does not pass by waiting is an error with its address.
#[test]
fn a_server_that_keeps_failing_is_named() {
    let sandbox = Sandbox::full();
    let Some(web) = hub(&sandbox) else {
        return;
    };
    let mut table = String::new();
    for (name, fault) in [
        ("401", Fault::Status(401)),
        ("404", Fault::Status(404)),
        ("500 for ever", Fault::Status(500)),
        ("cut at the same place for ever", Fault::Cut(0)),
    ] {
        let n_times = if name.contains("ever") { 50 } else { 1 };
        web.fault(FIRST, fault, n_times);
        let cache = name.replace(' ', "-");
        let outcome = from_hub(&sandbox, &web, &cache, &[]);
        let text = error(&outcome).replace(web.address(), "[hub]");
        writeln!(table, "{name}: exit {:?}\n{text}", outcome.code).unwrap();
        web.forgive();
        let made = files(&sandbox.work().join(&cache));
        let is_tokens = |path: &&PathBuf| path.extension().is_some_and(|end| end == "bin");
        assert_eq!(made.keys().filter(is_tokens).count(), 0, "{name}");
    }
    assert_snapshot!("server_errors", table);
}

/// Four times in the middle of its work, then once to the end: the bytes of a run that nobody killed.
#[test]
fn a_killed_preparation_goes_on_without_a_wrong_token() {
    let sandbox = Sandbox::full();
    let good = sandbox.work().join("good");
    if small_c4(&good).is_none() {
        return;
    }
    let source = ["-data.dir", "good"];
    sandbox.run(&c4("a", &source, "undisturbed").as_strs()).ok();
    let args = c4("b", &source, "killed");
    for n_files in 1..5 {
        let mut running = sandbox.start(&args.as_strs(), &[]);
        // Each time a little later: while the tokenizer is trained, in the first chunk, in the second.
        let cache = sandbox.work().join("killed");
        wait_until("some files of the cache", || {
            running.has_ended() || (cache.exists() && files_now(&cache) >= n_files)
        });
        running.signal("KILL");
        drop(running);
    }
    sandbox.run(&args.as_strs()).ok();
    assert_same_tokens(&sandbox, "undisturbed", "killed", "after four kills");
}

/// How many files are in a folder that another process changes.
fn files_now(folder: &Path) -> usize {
    let entries = fs::read_dir(folder).map(Iterator::flatten);
    entries.map_or(0, |entries| {
        entries
            .map(|entry| {
                let path = entry.path();
                if path.is_dir() { files_now(&path) } else { 1 }
            })
            .sum()
    })
}

/// One of them works, the other waits, says so, and uses what the first has made.
#[test]
fn two_processes_prepare_the_same_text_once() {
    let sandbox = Sandbox::full();
    if small_c4(&sandbox.work().join("good")).is_none() {
        return;
    }
    let source = ["-data.dir", "good"];
    sandbox.run(&c4("a", &source, "alone").as_strs()).ok();
    let other = Sandbox::full();
    let first = sandbox.start(&c4("b", &source, "shared").as_strs(), &[]);
    let dir = sandbox.work().join("good");
    let cache = sandbox.work().join("shared");
    let (dir, cache) = (dir.to_str().unwrap(), cache.to_str().unwrap());
    let second = other.start(&c4("c", &["-data.dir", dir], cache).as_strs(), &[]);
    let outcomes = [first.wait(), second.wait()];
    for outcome in &outcomes {
        assert_eq!(outcome.code, Some(0), "{outcome}");
    }
    assert_same_tokens(&sandbox, "alone", "shared", "two at once");
}
