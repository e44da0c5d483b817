//! `moeut-host bench`: what it measures adds up, and what it refuses. How fast anything is decides nothing here.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]
#![expect(
    clippy::float_cmp,
    reason = "numbers that are computed twice from the same ones are the same"
)]
use insta::assert_snapshot;
use moeut_e2e::{Sandbox, read, tiny};
use serde_json::Value;
use std::fs;

/// What rounding of printed numbers does.
const TOLERANCE: f64 = 1e-9;

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("`{value}` is no number"))
}

/// The rows of a report, each of which must be positive and agree with itself and with the ceilings.
fn rows(report: &Value, bench: &str) -> Vec<Value> {
    assert_eq!(report["bench"], bench);
    assert_eq!(report["machine"]["device"], "CPU");
    let same = |a: f64, b: f64| {
        assert!(a > 0.0 && b > 0.0, "{a} or {b} is not positive");
        assert!((a - b).abs() <= TOLERANCE * b, "{a} is not {b}");
    };
    let spread = |seconds: &Value| {
        let [min, median, max] = ["min", "median", "max"].map(|name| number(&seconds[name]));
        assert!(0.0 < min && min <= median && median <= max, "{seconds}");
        median
    };
    let [matmul, copy] = ["matmul", "copy"].map(|name| &report["ceilings"][name]);
    let n_operations = 2.0 * number(&matmul["width"]).powi(3);
    let most_flops = number(&matmul["tflops_per_s"]);
    same(most_flops * 1e12 * spread(&matmul["seconds"]), n_operations);
    let most_bytes = number(&copy["gb_per_s"]);
    same(
        most_bytes * 1e9 * spread(&copy["seconds"]),
        2.0 * number(&copy["bytes"]),
    );

    let rows = report["rows"].as_array().unwrap();
    assert!(!rows.is_empty());
    for row in rows {
        let seconds = spread(&row["seconds"]);
        same(
            number(&row["tokens_per_s"]) * seconds,
            number(&row["n_tokens"]),
        );
        if bench != "data" {
            let speed = number(&row["tflops_per_s"]);
            same(speed * seconds, number(&row["tflop"]));
            same(number(&row["share_of_matmul"]) * most_flops, speed);
        }
        if bench != "step" {
            let speed = number(&row["gb_per_s"]);
            same(speed * 1e9 * seconds, number(&row["bytes"]));
            same(number(&row["share_of_copy"]) * most_bytes, speed);
        }
        assert!(number(&row["peak_bytes"]) > 0.0);
    }
    rows.clone()
}

fn bench(sandbox: &Sandbox, args: &[&str]) -> Value {
    let args = [&["bench"], args, &["--json", "-rounds", "2", "-calls", "2"]].concat();
    serde_json::from_str(&sandbox.run(&args).ok().stdout).unwrap()
}

/// The words of a tiny run without its name, which a bench has no use for.
fn tiny_run(what: &'static str, more: &[&'static str]) -> Vec<String> {
    let args = tiny("unused", more);
    let words = std::iter::once(what).chain(args.as_strs());
    words.map(str::to_owned).collect()
}

#[test]
fn steps_are_timed_and_nothing_is_left_behind() {
    let sandbox = Sandbox::new();
    let args = tiny_run("step", &["-warmup", "1", "-n_microbatch", "2"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let report = bench(&sandbox, &[&args[..], &["-out", "step.json"]].concat());
    let rows = rows(&report, "step");
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["name"], &rows[0]["pass"]),
        (&"moeut".into(), &"step".into())
    );
    // Four sequences of 32.
    assert_eq!(rows[0]["n_tokens"], 128);
    assert_eq!(rows[0]["seconds"]["n_rounds"], 2);
    assert_eq!(report["machine"]["n_threads"], 1);
    let written: Value = serde_json::from_slice(&read(&sandbox.work().join("step.json"))).unwrap();
    assert_eq!(written, report);
    assert!(!sandbox.work().join("save").exists());
}

#[test]
fn batches_are_read_as_the_training_reads_them() {
    let sandbox = Sandbox::new();
    let args = tiny_run("data", &[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let rows = rows(&bench(&sandbox, &args), "data");
    assert_eq!(rows[0]["n_tokens"], 128);
    // One more token than is seen, in 8 bytes, for each of 4 sequences.
    assert_eq!(number(&rows[0]["bytes"]), f64::from(4 * 33 * 8));
}

/// The oracle and the usual kernel, in σ-MoE and both projections, each forward and with its backward pass.
#[test]
fn every_kernel_is_timed_and_compared_with_the_first() {
    let sandbox = Sandbox::new();
    let report = bench(&sandbox, &["moe", "-gpu", "none", "-threads", "1"]);
    let rows = rows(&report, "moe");
    let of_kernel =
        |name: &str| -> Vec<&Value> { rows.iter().filter(|row| row["kernel"] == name).collect() };
    let (reference, grouped) = (of_kernel("reference"), of_kernel("grouped"));
    assert_eq!((reference.len(), grouped.len(), rows.len()), (6, 6, 12));
    assert!(reference.iter().all(|row| row.get("error").is_none()));
    for row in &grouped {
        // Sums of fp32 in another order.
        assert!((0.0..1e-5).contains(&number(&row["error"])), "{row}");
    }
    // 256 tokens, 4 of 16 experts of 32 units, 64 channels: two products forward, and four back.
    let tflop = |row: &Value| number(&row["tflop"]) * 1e12;
    let forward = f64::from(2 * 2 * 256 * 4 * 64 * 32);
    assert_eq!(
        [tflop(grouped[0]), tflop(grouped[1])].map(f64::round),
        [forward, 3.0 * forward]
    );
}

#[test]
fn a_shape_of_ones_own_and_one_kernel() {
    let sandbox = Sandbox::new();
    let args = [
        "moe",
        "-gpu",
        "none",
        "-shape",
        "20x8x4x2x16",
        "-kernel",
        "grouped",
    ];
    let rows = rows(&bench(&sandbox, &args), "moe");
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["pass"], "forward + backward");
    assert_eq!(rows[1]["n_tokens"], 20);
}

#[test]
fn attention_is_timed_in_both_directions() {
    let sandbox = Sandbox::new();
    let args = ["attention", "-gpu", "none", "-shape", "tiny,2x16x2x8"];
    let rows = rows(&bench(&sandbox, &args), "attention");
    let passes: Vec<&Value> = rows.iter().map(|row| &row["pass"]).collect();
    assert_eq!(
        passes,
        [
            "forward",
            "forward + backward",
            "forward",
            "forward + backward"
        ]
    );
    assert_eq!(rows[3]["n_tokens"], 32);
}

#[test]
fn a_table_is_for_people() {
    let sandbox = Sandbox::new();
    let args = [
        "bench",
        "attention",
        "-gpu",
        "none",
        "-threads",
        "1",
        "-rounds",
        "1",
        "-shape",
        "2x16x2x8",
    ];
    let text = sandbox.run(&args).ok().stdout;
    assert!(text.starts_with("CPU, f32, 1 threads; most: "), "{text}");
    assert!(
        text.contains("2x16x2x8 attention  forward + backward  "),
        "{text}"
    );
}

#[test]
fn mistakes_say_what_why_and_how_else() {
    let sandbox = Sandbox::new();
    let lines = [
        "bench",
        "bench fast",
        "bench moe -rounds 0",
        "bench moe -gpu none -shape 3B",
        "bench moe -gpu none -kernel swift",
        "bench moe -gpu none -lr 1",
        "bench attention -gpu none -kernel grouped",
        "bench attention -gpu none -shpe tiny",
        "bench step -lr 1",
        "bench step -task moeut_c4 -restore save/a",
        "bench data",
    ];
    let mut seen = String::new();
    for line in lines {
        let args: Vec<&str> = line.split(' ').collect();
        let outcome = sandbox.run(&args);
        assert_eq!(outcome.code, Some(2), "{line}: {outcome}");
        seen.extend(["$ moeut-host ", line, "\n", &outcome.stderr]);
    }
    assert_snapshot!(seen);
}

#[test]
fn a_result_that_cannot_be_written_is_not_lost() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.work().join("folder")).unwrap();
    let args = [
        "bench",
        "attention",
        "-gpu",
        "none",
        "-shape",
        "2x16x2x8",
        "-rounds",
        "1",
    ];
    let outcome = sandbox.run(&[&args[..], &["-out", "folder"]].concat());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(
        outcome.stderr.contains("`folder` cannot be written"),
        "{outcome}"
    );
    assert!(outcome.stdout.contains("2x16x2x8 attention"), "{outcome}");
}
