//! `moeut-host eval` and the evaluations of a training: sets in the published formats, with questions made for these tests.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]
#![expect(
    clippy::float_cmp,
    reason = "a number that is printed twice, or computed twice from the same digits, is the same number"
)]

use insta::assert_snapshot;
use moeut_e2e::{Outcome, Sandbox, losses, shared_data, staged_plugins, tiny};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The plugins of the sets.
const SETS: [&str; 6] = ["ai2arc", "blimp", "cbt", "hellaswag", "lambada", "piqa"];

const LAMBADA: &str = r#"{"text": "the lamp stood on the table and she lit the lamp"}
{"text": "he went to the gate , waited there , and then he closed the gate"}
{"text": "one stone and another stone"}
"#;

const PIQA: &str = r#"{"goal": "To dry a wet shirt,", "sol1": "hang it in the sun", "sol2": "put it into the pond"}
{"goal": "To cut bread,", "sol1": "use a spoon", "sol2": "use a knife"}
"#;

const HELLASWAG: &str = r#"{"activity_label": "Fishing", "ctx_a": "A man sits by the river.", "ctx_b": "he", "endings": ["waits for a fish.", "eats the boat.", "paints a wall.", "is a fish."], "label": 0}
"#;

/// A sandbox with the plugins of all sets.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    for set in SETS {
        let name = format!("libmoeut_dataset_{set}.so");
        fs::copy(staged_plugins().join(&name), sandbox.installed().join(name)).unwrap();
    }
    sandbox
}

/// Fewer sentences than the published questions have, and a candidate too few in the last one.
fn cbt() -> String {
    let words = [
        "door", "tree", "bird", "road", "fish", "ship", "hand", "king", "rain", "wall",
    ];
    let mut text = String::new();
    for (answer, n_words) in [("door", 10), ("king", 10), ("rain", 9)] {
        let words: Vec<&str> = words.iter().rev().take(n_words).copied().collect();
        text += "1 It was late , and nobody was there .\n2 She went to the old house .\n";
        let words = words.join("|");
        write!(text, "3 She opened the XXXXX .\t{answer}\t\t{words}\n\n").unwrap();
    }
    text
}

/// Writes the questions into a folder; of `blimp` and `ai2arc` there are none.
fn write_sets(folder: &Path) {
    for (path, text) in [
        ("lambada_test.jsonl", LAMBADA),
        ("piqa/valid.jsonl", PIQA),
        ("piqa/valid-labels.lst", "0\n1\n"),
        ("hellaswag_val.jsonl", HELLASWAG),
        ("cbt/cbtest_CN_test_3ex.txt", &cbt()),
    ] {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// As [`sandbox`], with a run `a` of a few steps and the folder `sets`.
fn trained() -> Sandbox {
    let sandbox = sandbox();
    write_sets(&sandbox.work().join("sets"));
    sandbox
        .run(&tiny("a", &["-stop_after", "20"]).as_strs())
        .ok();
    sandbox
}

fn eval(sandbox: &Sandbox, line: &str) -> Outcome {
    let args: Vec<&str> = ["eval"].into_iter().chain(line.split(' ')).collect();
    sandbox.run(&args)
}

fn json(path: &Path) -> BTreeMap<String, f64> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The last value of each metric that is logged at a step.
fn logged(run_folder: &Path, step: u64) -> BTreeMap<String, f64> {
    let text = fs::read_to_string(run_folder.join("metrics.jsonl")).unwrap();
    let records = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let of_step = records.filter(|record| record["step"] == step);
    let metrics = of_step.flat_map(|record| record.as_object().unwrap().clone());
    metrics
        .filter_map(|(name, value)| Some((name, value.as_f64()?)))
        .collect()
}

#[test]
fn a_trained_run_is_scored_and_stays_as_it_is() {
    let sandbox = trained();
    let folder = sandbox.run_folder("a");
    let before = fs::read(folder.join("metrics.jsonl")).unwrap();
    let outcome = eval(
        &sandbox,
        "-gpu none -name a -sets val,lambada,cbt,hellaswag,piqa -data.dir sets",
    )
    .ok();
    let shape: Vec<String> = outcome
        .stdout
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [set, metric, _, n] => format!("{set} {metric} {n}"),
                _ => format!("{} columns", words.len()),
            }
        })
        .collect();
    assert_snapshot!(shape.join("\n"), @r"
    set metric n
    val loss 192
    val accuracy 192
    val perplexity 192
    val bits_per_byte 192
    lambada loss 57
    lambada accuracy/total 3
    lambada accuracy/openai_last_token 3
    lambada perplexity 3
    lambada lm_loss 57
    lambada lm_perplexity 57
    cbt loss 772
    cbt accuracy/CN 2
    cbt accuracy/group_average 1
    cbt accuracy/seq_average 2
    hellaswag loss 104
    hellaswag accuracy/val 1
    hellaswag accuracy/group_average 1
    hellaswag accuracy/seq_average 1
    piqa loss 106
    piqa accuracy/val 2
    piqa accuracy/group_average 1
    piqa accuracy/seq_average 2
    0 columns
    9 columns
    8 columns
    ");
    assert!(
        outcome.stdout.lines().all(|line| !line.ends_with(' ')),
        "{outcome}"
    );

    let scores = json(&folder.join("eval.json"));
    let at_the_end = logged(&folder, 20);
    for metric in ["loss", "accuracy", "perplexity"] {
        let (own, logged) = (
            scores[&format!("val/{metric}")],
            at_the_end[&format!("validation/val/{metric}")],
        );
        assert!(
            (own - logged).abs() <= 1e-6 * logged.abs(),
            "{metric}: {own} {logged}"
        );
    }
    assert_eq!(
        scores["lambada/lm_perplexity"],
        scores["lambada/lm_loss"].exp()
    );
    let mean = f64::midpoint(scores["val/loss"], scores["lambada/loss"]);
    assert!((scores["mean_loss"] - mean).abs() < 1e-12);
    assert!(fs::read(folder.join("metrics.jsonl")).unwrap() == before);

    // By checkpoint, in another order, and to another file.
    let outcome = eval(
        &sandbox,
        "-gpu none -restore save/a/checkpoint/model-20 -sets piqa,lambada -data.dir=sets -json b.json",
    )
    .ok();
    let again = json(&sandbox.work().join("b.json"));
    for (name, value) in &again {
        if name.starts_with("piqa/") || name.starts_with("lambada/") {
            assert_eq!(scores[name], *value, "{name}");
        }
    }
    assert!(outcome.stdout.find("piqa").unwrap() < outcome.stdout.find("lambada").unwrap());
    assert!(!again.contains_key("val/loss"));
}

#[test]
fn a_limit_scores_the_first_questions_of_each_group_and_says_so() {
    let sandbox = trained();
    let sets = sandbox.work().join("sets");
    // A second group of questions, behind the first.
    fs::write(sets.join("cbt/cbtest_NE_test_3ex.txt"), cbt()).unwrap();
    let line = "-gpu none -name a -sets val,lambada,cbt,piqa -data.dir sets -limit 1 -json";
    let outcome = eval(&sandbox, &format!("{line} of_all.json")).ok();
    let counts: Vec<&str> = outcome
        .stdout
        .lines()
        .filter(|line| line.contains("accuracy/"))
        .collect();
    let counts: Vec<String> = counts
        .iter()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            [words[0], words[1], words[3]].join(" ")
        })
        .collect();
    assert_snapshot!(counts.join("\n"), @r"
    lambada accuracy/total 1
    lambada accuracy/openai_last_token 1
    cbt accuracy/CN 1
    cbt accuracy/NE 1
    cbt accuracy/group_average 2
    cbt accuracy/seq_average 2
    piqa accuracy/val 1
    piqa accuracy/group_average 1
    piqa accuracy/seq_average 1
    ");
    assert!(
        outcome
            .stdout
            .ends_with("of a sample: the first 1 questions of each group\n"),
        "{outcome}"
    );
    assert!(
        outcome
            .stderr
            .contains("cbt: 2 questions, the first 1 of each group;"),
        "{outcome}"
    );

    // The same as files with nothing else in them.
    let first = |text: &str| format!("{}\n", text.lines().next().unwrap());
    fs::write(sets.join("lambada_test.jsonl"), first(LAMBADA)).unwrap();
    fs::write(sets.join("piqa/valid.jsonl"), first(PIQA)).unwrap();
    fs::write(sets.join("piqa/valid-labels.lst"), "0\n").unwrap();
    let block = format!("{}\n\n", cbt().split("\n\n").next().unwrap());
    for group in ["CN", "NE"] {
        fs::write(
            sets.join(format!("cbt/cbtest_{group}_test_3ex.txt")),
            &block,
        )
        .unwrap();
    }
    eval(&sandbox, &format!("{line} of_few.json")).ok();
    let [of_all, of_few] =
        ["of_all.json", "of_few.json"].map(|name| json(&sandbox.work().join(name)));
    assert_eq!(of_all, of_few);
    assert_eq!(of_all["limit"], 1.0);
}

#[test]
fn a_limit_is_a_number_of_questions_and_counting_has_none() {
    let sandbox = sandbox();
    write_sets(&sandbox.work().join("sets"));
    let count = |line: &str| eval(&sandbox, &format!("--count-only {line}"));
    assert_snapshot!(count("-sets lambada -limit 0"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `-limit 0` cannot be used
      ╰─▶ it is how many questions of each group are scored, a whole number above 0
      help: set `-limit` to 100, say, or leave it out to score all
    ");
    assert_snapshot!(count("-sets lambada -limit"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no value for `-limit`
      ╰─▶ it takes a number of questions
      help: write `-limit <value>`
    ");
    let outcome = count("-sets lambada -data.dir sets -limit 1").ok();
    assert_snapshot!(outcome.stdout, @"lambada 3 0");
    assert!(
        outcome
            .stderr
            .contains("`-limit` has no effect with `--count-only`"),
        "{outcome}"
    );
}

#[test]
fn all_leaves_out_what_is_missing_and_a_name_insists() {
    let sandbox = trained();
    let outcome = eval(&sandbox, "-gpu none -name a -data.dir sets").ok();
    for left_out in ["`ai2arc` is left out", "`blimp` is left out"] {
        assert!(outcome.stderr.contains(left_out), "{outcome}");
    }
    let scores = json(&sandbox.run_folder("a").join("eval.json"));
    for name in [
        "val/loss",
        "cbt/accuracy/CN",
        "lambada/accuracy/total",
        "piqa/accuracy/val",
    ] {
        assert!(scores.contains_key(name), "{name}");
    }
    assert!(!scores.keys().any(|name| name.starts_with("blimp/")));
    let outcome = eval(&sandbox, "-gpu none -name a -sets blimp -data.dir sets");
    assert_snapshot!(outcome, @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the questions of `blimp` are missing
      ╰─▶ no file in `sets` or below is named `BLiMP.zip`
      help: get it from https://github.com/alexwarstadt/blimp/raw/master/BLiMP.zip and put it there,
            or leave out `-data.dir` to have it downloaded
    ");
}

#[test]
fn evaluations_come_with_validations_and_change_nothing_else() {
    let sandbox = sandbox();
    // The embedded text with its tokenizer, and sets where downloads are kept.
    let warm = tiny("warm", &["-stop_after", "1"]);
    sandbox.run(&warm.as_strs()).ok();
    let cache = sandbox.copy_cache();
    fs::create_dir_all(cache.join("Lambada")).unwrap();
    fs::write(cache.join("Lambada/lambada_test.jsonl"), LAMBADA).unwrap();
    let run = |name: &str, more: &[&str]| {
        let own = [
            "-data.cache_dir",
            "cache",
            "-lm.eval.blimp.enabled",
            "0",
            "-lm.trafo.context_blocks",
            "1",
            "-test_interval",
            "4",
            "-stop_after",
            "8",
        ];
        sandbox.run(&tiny(name, &[&own[..], more].concat()).as_strs())
    };
    run("without", &["-lm.eval.enabled", "0"]).ok();
    run("with", &["-lm.eval.enabled", "1"]).ok();
    run(
        "end",
        &["-lm.eval.enabled", "1", "-lm.eval.lambada.end_only", "1"],
    )
    .ok();
    let folder = |name: &str| sandbox.run_folder(name);
    for name in ["with", "end"] {
        assert_eq!(losses(&folder(name)), losses(&folder("without")), "{name}");
    }
    let metric = "validation/lambada/accuracy/total";
    for (name, step, is_there) in [
        ("without", 8, false),
        ("with", 4, true),
        ("with", 8, true),
        ("end", 4, false),
        ("end", 8, true),
    ] {
        assert_eq!(
            logged(&folder(name), step).contains_key(metric),
            is_there,
            "{name} {step}"
        );
    }

    let outcome = run("end", &["-lm.eval.enabled", "1", "-test_only", "1"]).ok();
    let line = outcome.stdout.lines().nth(1).unwrap();
    let scores: BTreeMap<String, f64> = serde_json::from_str(line).unwrap();
    let at_the_end = logged(&folder("end"), 8);
    assert_eq!(
        scores["lambada/loss"],
        at_the_end["validation/lambada/loss"]
    );
    assert!(scores.contains_key("lambada/time_since_best_loss"));

    // Found out before the first step.
    fs::write(cache.join("Lambada/lambada_test.jsonl"), "{\"text\": 1}\n").unwrap();
    let outcome = run("damaged", &["-lm.eval.enabled", "1"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(outcome.stderr.contains("`-lm.eval.enabled 0`"), "{outcome}");
    assert!(losses(&folder("damaged")).is_empty());
}

#[test]
fn questions_and_documents_are_counted_without_a_model() {
    let sandbox = sandbox();
    write_sets(&sandbox.work().join("sets"));
    let count = |line: &str| eval(&sandbox, &format!("--count-only {line}"));
    assert_snapshot!(count("-sets piqa,cbt,lambada -data.dir sets").ok().stdout, @r"
    piqa 2 0
    cbt 2 1
    lambada 3 0
    ");
    let outcome = count("-sets all -data.dir sets").ok();
    assert_snapshot!(outcome.stdout, @r"
    cbt 2 1
    hellaswag 1 0
    lambada 3 0
    piqa 2 0
    ");
    assert!(outcome.stderr.contains("`blimp` is left out"), "{outcome}");
}

/// The published files, as far as the test data has them.
#[test]
fn published_files_are_counted() {
    let (Some(sets), Some(c4)) = (shared_data("data/eval"), shared_data("data/lm/c4_like")) else {
        return;
    };
    let sandbox = sandbox();
    let count = |names: &str, folder: &Path| {
        let folder = folder.to_str().unwrap();
        let args = ["eval", "--count-only", "-sets", names, "-data.dir", folder];
        sandbox.run(&args).ok().stdout
    };
    assert_snapshot!(count("all", &sets), @r"
    ai2arc 2415 11
    blimp 67000 0
    cbt 1355 0
    hellaswag 50 0
    lambada 50 0
    piqa 1838 0
    ");
    assert_snapshot!(count("c4", &c4), @"c4 2184 0");
}

#[test]
fn what_cannot_be_evaluated_is_said() {
    let sandbox = sandbox();
    let sets = sandbox.work().join("sets");
    write_sets(&sets);
    let count = |line: &str| eval(&sandbox, &format!("--count-only {line}"));
    assert_snapshot!(count("-sets lambda -data.dir sets"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown evaluation set `lambda`
      ╰─▶ there are `ai2arc`, `blimp`, `c4`, `cbt`, `hellaswag`, `lambada`, `piqa`
      help: did you mean `lambada`?
    ");
    assert_snapshot!(count("-sets blimp -data.dir sets"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the questions of `blimp` are missing
      ╰─▶ no file in `sets` or below is named `BLiMP.zip`
      help: get it from https://github.com/alexwarstadt/blimp/raw/master/BLiMP.zip and put it there,
            or leave out `-data.dir` to have it downloaded
    ");
    assert_snapshot!(count("-sets lambada -data.dir nowhere"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `-data.dir nowhere` cannot be used
      ╰─▶ No such file or directory (os error 2)
      help: name a folder that you may read, or leave out `-data.dir` to have files downloaded
    ");
    let outcome = count("-sets c4 -data.dir sets");
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(
        outcome.stderr.contains("the dataset has no text"),
        "{outcome}"
    );
    assert_snapshot!(count("-sets"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no value for `-sets`
      ╰─▶ it takes names with commas between them, or `all`
      help: write `-sets <value>`
    ");
    assert_snapshot!(count("-sets ,"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no value for `-sets`
      ╰─▶ it takes names with commas between them, or `all`
      help: write `-sets <value>`
    ");

    fs::create_dir_all(sets.join("more")).unwrap();
    fs::write(
        sets.join("more/lambada_test.jsonl"),
        LAMBADA.replace("lamp", "lump"),
    )
    .unwrap();
    assert_snapshot!(count("-sets lambada -data.dir sets"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the questions of `lambada` are there twice
      ╰─▶ both `sets/lambada_test.jsonl` and `sets/more/lambada_test.jsonl` could be
          `lambada_test.jsonl`
      help: name a folder with one of them only, or move the other one away
    ");
    fs::remove_dir_all(sets.join("more")).unwrap();
    fs::write(sets.join("lambada_test.jsonl"), "{\"text\": 1}\n").unwrap();
    assert_snapshot!(count("-sets lambada -data.dir sets"), @r#"
    exit: 2
    --- stdout
    --- stderr
    Error:   × a file of questions is damaged
      ╰─▶ `sets/lambada_test.jsonl` line 1: invalid type: integer `1`, expected a string at column 10;
          the line starts `{"text": 1}`
      help: correct the line, or replace `sets/lambada_test.jsonl` by what is published as
            https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl
    "#);
    // Damaged is not missing, also when everything is asked for.
    assert_eq!(count("-sets all -data.dir sets").code, Some(2));

    assert_snapshot!(eval(&sandbox, "-sets val"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no model is named
      ╰─▶ trained weights are needed, and neither `-restore` nor `-name` is given
      help: add `-name <name of a run>` or `-restore <checkpoint>`
    ");
    assert_snapshot!(eval(&sandbox, "-name b"), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × no checkpoint in `save/b`
      ╰─▶ No such file or directory (os error 2)
      help: give `-restore` a `model-<step>` folder or that of a run: `-restore save/<name>`
    ");
}

#[test]
fn scores_are_not_lost_to_a_wrong_path() {
    let sandbox = trained();
    let outcome = eval(&sandbox, "-gpu none -name a -sets nothing -data.dir sets");
    assert_snapshot!(outcome, @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown evaluation set `nothing`
      ╰─▶ there are `val`, `ai2arc`, `blimp`, `cbt`, `hellaswag`, `lambada`, `piqa`
      help: type `-sets all`, or some of these names with commas between them
    ");
    let outcome = eval(
        &sandbox,
        "-gpu none -name a -sets val -json no/such/file.json",
    );
    assert_snapshot!(outcome, @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × the scores cannot be written to `no/such/file.json`
      ╰─▶ `no/such` is no folder
      help: make it with `mkdir -p no/such`, or set `-json` to another file
    ");
}
