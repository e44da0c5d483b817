//! Single steps: that they repeat, what they log, and what is said when one goes wrong.

use moeut_e2e::{Sandbox, checkpoint_files, losses, read, tiny};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Losses of `tiny("a", ["-stop_after", "100"])`, one line a step: number and nats per token. Made by
///
/// ```sh
/// MOEUT_WRITE_CURVE=1 cargo test --release -p moeut-e2e --test steps curve
/// ```
const CURVE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/curves/tiny.txt");
/// Other processors sum in another order.
const CURVE_TOLERANCE: f64 = 1e-4;

fn curve(text: &str) -> Option<BTreeMap<u64, f64>> {
    let number = |line: &str| {
        let (step, loss) = line.split_once(' ')?;
        Some((step.parse().ok()?, loss.parse().ok()?))
    };
    text.lines().map(number).collect()
}

#[test]
fn the_curve_is_the_stored_one_and_a_second_run_repeats_it_bit_for_bit() {
    let sandbox = Sandbox::new();
    let [first, second] = ["a", "b"].map(|name| {
        sandbox
            .run(&tiny(name, &["-stop_after", "100"]).as_strs())
            .ok();
        let folder = sandbox.run_folder(name);
        (losses(&folder), checkpoint_files(&folder, 100))
    });
    assert_eq!(first.0, second.0);
    assert!(first.1 == second.1, "the second run ends elsewhere");

    if std::env::var_os("MOEUT_WRITE_CURVE").is_some() {
        let lines = first.0.iter().map(|(step, loss)| format!("{step} {loss}"));
        let lines: Vec<String> = lines.collect();
        fs::create_dir_all(Path::new(CURVE).parent().unwrap()).unwrap();
        fs::write(CURVE, lines.join("\n") + "\n").unwrap();
    }
    let stored = curve(&fs::read_to_string(CURVE).unwrap()).unwrap();
    assert_eq!((stored.len(), first.0.len()), (100, 100));
    for (step, loss) in stored {
        let gap = (first.0[&step] - loss).abs() / loss;
        assert!(
            gap <= CURVE_TOLERANCE,
            "step {step}: {}, not {loss}",
            first.0[&step]
        );
    }
}

/// Where there can be no CUDA graphs the log says so once, and steps are as ever.
#[test]
fn cuda_graphs_without_a_gpu_are_no_obstacle() {
    let sandbox = Sandbox::new();
    let [plain, wished] = ["0", "1"].map(|wish| {
        let args = [
            "-cuda_graphs",
            wish,
            "-stop_after",
            "10",
            "-log_interval",
            "5",
        ];
        let output = sandbox.run(&tiny(wish, &args).as_strs()).ok();
        let n_warnings = output
            .stderr
            .matches("`-cuda_graphs` has no effect: the device is no GPU")
            .count();
        (losses(&sandbox.run_folder(wish)), n_warnings)
    });
    assert_eq!((plain.1, wished.1), (0, 1));
    assert!(!plain.0.is_empty() && plain.0 == wished.0);
}

#[test]
fn every_optimizer_learns_and_resumes() {
    let sandbox = Sandbox::new();
    for (optimizer, lr, state) in [
        ("adam", "3e-3", "exp_avg_sq/"),
        ("sgd", "0.05", "momentum_buffer/"),
        ("adagrad", "0.03", "sum/"),
    ] {
        let args = [
            "-optimizer",
            optimizer,
            "-lr",
            lr,
            "-wd",
            "0.01",
            "-overfit_batches",
            "1",
            "-stop_after",
            "40",
            "-save_interval",
            "20",
            "-keep_last",
            "2",
        ];
        let run = || sandbox.run(&tiny(optimizer, &args).as_strs()).ok();
        run();
        let folder = sandbox.run_folder(optimizer);
        let seen: Vec<f64> = losses(&folder).into_values().collect();
        assert!(
            seen[39] < seen[0] - 0.2,
            "{optimizer}: {} fell to {}",
            seen[0],
            seen[39]
        );
        let whole = checkpoint_files(&folder, 40);
        let header = String::from_utf8_lossy(&whole[1][..4096]).into_owned();
        assert!(header.contains(state), "{header}");
        fs::remove_dir_all(folder.join("checkpoint/model-40")).unwrap();
        let resumed = run();
        assert!(
            resumed.stderr.contains("going on from step 20"),
            "{resumed}"
        );
        assert!(checkpoint_files(&folder, 40) == whole, "{optimizer}");
    }
}

#[test]
fn a_record_has_times_memory_and_norms() {
    let sandbox = Sandbox::new();
    let args = [
        "-stop_after",
        "6",
        "-test_interval",
        "3",
        "-speedtest",
        "iter",
        "-log_grad_norms",
        "1",
        "-peak_tflops",
        "0.1",
        "-log_interval",
        "2",
    ];
    sandbox.run(&tiny("a", &args).as_strs()).ok();
    let text = fs::read_to_string(sandbox.run_folder("a").join("metrics.jsonl")).unwrap();
    for name in [
        "timing/ms_per_iter",
        "timing/ms_per_load",
        "timing/ms_per_forward_backward",
        "timing/ms_per_optimizer",
        "timing/ms_per_log",
        "timing/ms_per_validate",
        "timing/ms_per_save",
        "timing/exact_ms_per_iter",
        "timing/tokens_per_s",
        "timing/mfu",
        "memory/peak_bytes",
        "max_grad",
    ] {
        assert!(text.contains(name), "no {name} in {text}");
    }
    let steps_with = |name: &str| -> BTreeSet<u64> {
        let records = text.lines().filter(|line| line.contains(name));
        let record = |line| serde_json::from_str::<serde_json::Value>(line).unwrap();
        records
            .map(|line| record(line)["step"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(steps_with("model/grad_norms/"), (1..=6).collect());
    assert_eq!(steps_with("max_grad"), [2, 4, 6].into());
}

/// After one step the parameters are finite and huge; what is computed from them is not.
const EXPLODES: [&str; 8] = [
    "-stop_after",
    "10",
    "-lr",
    "1e30",
    "-grad_clip",
    "none",
    "-save_interval",
    "1",
];

#[test]
fn a_step_that_is_not_finite_ends_the_run_and_is_dumped() {
    let sandbox = Sandbox::new();
    let outcome = sandbox.run(&tiny("a", &EXPLODES).as_strs());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    for part in [
        "step 2 is not finite",
        "first not finite",
        "logits",
        "non_finite-2`",
    ] {
        assert!(outcome.stderr.contains(part), "no `{part}` in {outcome}");
    }
    let folder = sandbox.run_folder("a");
    assert!(folder.join("checkpoint/model-1/MANIFEST.json").is_file());
    assert!(!folder.join("checkpoint/model-2").exists());
    let report = read(&folder.join("non_finite-2/report.json"));
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["step"], 2);
    assert_eq!(
        report["tokens_by_microbatch"][0].as_array().unwrap().len(),
        4
    );
    assert!(folder.join("non_finite-2/tensors.safetensors").is_file());
}

#[test]
fn bad_steps_are_skipped_within_the_budget() {
    let sandbox = Sandbox::new();
    let more = [&EXPLODES[..], &["-nan_policy", "skip", "-nan_budget", "3"]].concat();
    let outcome = sandbox.run(&tiny("a", &more).as_strs());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    for part in [
        "step 2 is not finite",
        "1 of at most 3",
        "3 of at most 3",
        "step 5 is not finite",
    ] {
        assert!(outcome.stderr.contains(part), "no `{part}` in {outcome}");
    }
}

#[test]
fn with_nan_detect_the_step_itself_ends_the_run() {
    let sandbox = Sandbox::new();
    let more = [&EXPLODES[..], &["-nan_detect", "1"]].concat();
    let outcome = sandbox.run(&tiny("a", &more).as_strs());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    for part in ["much slower", "step 2 is not finite", "logits"] {
        assert!(outcome.stderr.contains(part), "no `{part}` in {outcome}");
    }
}

#[test]
fn a_regularizer_that_is_not_there() {
    let sandbox = Sandbox::new();
    let more = [
        "-stop_after",
        "3",
        "-reg_lin_decay",
        "mo",
        "-moe.perplexity_reg",
        "0.01",
    ];
    let outcome = sandbox.run(&tiny("a", &more).as_strs());
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(outcome.stderr.contains("no regularizer `mo`"), "{outcome}");
    assert!(outcome.stderr.contains("the model has `moe`"), "{outcome}");
}

/// The address space is limited, so that the test needs no more of the machine.
#[test]
fn too_large_a_batch_names_the_flag() {
    let sandbox = Sandbox::new();
    let more = [
        "-stop_after",
        "1",
        "-lm.unroll",
        "8",
        "-batch_size",
        "20000",
        "-state_size",
        "512",
    ];
    for is_dry in ["0", "1"] {
        let more = [&more[..], &["-dry_run", is_dry]].concat();
        let outcome = sandbox.run_within(3 << 30, &tiny("a", &more).as_strs());
        assert_eq!(outcome.code, Some(2), "{outcome}");
        for part in [
            "out of memory in step 1",
            "20000",
            "parameters ",
            "-n_microbatch 2",
        ] {
            assert!(outcome.stderr.contains(part), "no `{part}` in {outcome}");
        }
    }
}
