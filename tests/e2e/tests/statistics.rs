//! What a model tells about itself, in the files of a run: which names at which steps, and that asking changes nothing.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use moeut_e2e::{Args, Sandbox, checkpoint_files, losses, read, read_safetensors, tiny};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A tiny run with everything that reports: two distinct layers, each applied twice, with experts everywhere.
fn with_experts(name: &str, more: &[&str]) -> Args {
    let own = [
        "-transformer.encoder_n_layers",
        "4",
        "-transformer.universal.group_size",
        "2",
        "-moe.att.enable",
        "1",
        "-moe.att.n_experts",
        "3",
        "-moe.sel_bias",
        "1",
        "-n_microbatch",
        "2",
        "-log_interval",
        "4",
        "-test_interval",
        "6",
        "-stop_after",
        "12",
    ];
    tiny(name, &[&own, more].concat())
}

/// The steps at which each metric was logged.
fn steps(run_folder: &Path) -> BTreeMap<String, Vec<u64>> {
    let mut steps: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for line in fs::read_to_string(run_folder.join("metrics.jsonl"))
        .unwrap()
        .lines()
    {
        let record: Value = serde_json::from_str(line).unwrap();
        let step = record["step"].as_u64().unwrap();
        for (name, value) in record.as_object().unwrap() {
            if name != "step" && name != "time" && !value.is_object() && !value.is_array() {
                assert!(
                    value.is_number() || value.is_string(),
                    "{name} is {value} at {step}"
                );
                steps.entry(name.clone()).or_default().push(step);
            }
        }
    }
    steps
}

#[test]
fn every_metric_has_its_interval() {
    let sandbox = Sandbox::new();
    let more = ["-details_log_interval", "6", "-val_log_details", "1"];
    sandbox.run(&with_experts("a", &more).as_strs()).ok();
    let steps = steps(&sandbox.run_folder("a"));
    let mut expected: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut expect = |at: &[u64], names: &[&str]| {
        for name in names {
            expected.insert((*name).to_owned(), at.to_vec());
        }
    };
    let (once, records, details, validation) =
        (&[0][..], &[4, 8, 12][..], &[6, 12][..], &[6, 12][..]);
    expect(
        once,
        &[
            "n_params",
            "n_model_weights",
            "n_attention_weights",
            "n_non_attnetion_weights",
            "attention_precent",
            "epoch",
        ],
    );
    expect(
        records,
        &[
            "train/loss",
            "max_grad",
            "average_num_chunks",
            "timing/ms_per_iter",
            "timing/ms_per_load",
            "timing/ms_per_plot",
            "timing/total_ms_per_token",
            "timing/ms_per_token",
        ],
    );
    for place in 0..4 {
        for what in [
            "abs_update_layer",
            "in_layer",
            "rel_update_layer",
            "io_cossim",
        ] {
            let name = format!("activation_norm/{what}_{place}");
            expect(records, &[&name]);
            expect(validation, &[&format!("validation/val/{name}")]);
        }
        expect(details, &[&format!("out_diff_{place}")]);
    }
    for (layer, second_place) in [(0, 2), (1, 3)] {
        let name = |name: &str| format!("unique_layers.{layer}.{name}");
        for of_record in [
            "usag_rel_perplexity_all_layers",
            "dead_expert_proportion_all_layers",
        ] {
            let name = name(&format!("pkm/{of_record}"));
            expect(records, &[&name]);
            expect(validation, &[&format!("validation/val/{name}")]);
        }
        for of_details in [
            "pkm/min_sel_score",
            "pkm/max_sel_score",
            "pkm/relu_pass_rate",
            "pkm/usag_rel_perplexity_100",
            "pkm/dead_expert_proportion_100",
            "pkm/universal_score",
            "pkm/universal_score_optimist",
            "pkm/ani/keys",
            "pkm/ani/values",
            "pkm/ani/expert_sel",
            "pkm/sel_bias_min",
            "pkm/sel_bias_max",
            "self_attn/usag_rel_perplexity_100",
        ] {
            expect(details, &[&name(of_details)]);
        }
        expect(
            details,
            &[&name(&format!("pkm/layer_sel_overlap_{second_place}"))],
        );
    }
    for (name, expected) in &expected {
        assert_eq!(steps.get(name), Some(expected), "{name}");
    }
    for metric in [
        "loss",
        "accuracy",
        "perplexity",
        "time_since_best_loss",
        "time_since_best_accuracy",
    ] {
        assert_eq!(
            steps[&format!("validation/val/{metric}")],
            validation,
            "{metric}"
        );
    }
    assert_eq!(steps["validation/mean_loss"], validation);
}

#[test]
fn asking_changes_no_result() {
    let sandbox = Sandbox::new();
    let run = |name: &str, more: &[&str]| {
        let args = [&["-log_interval", "1"], more].concat();
        sandbox.run(&with_experts(name, &args).as_strs()).ok();
        let folder = sandbox.run_folder(name);
        (losses(&folder), checkpoint_files(&folder, 12))
    };
    let silent = run("silent", &["-details_log_interval", "none"]);
    let everything = [
        "-details_log_interval",
        "1",
        "-debug_plot_interval",
        "1",
        "-transformer.plot_head_details",
        "1",
        "-val_log_details",
        "1",
        "-dump_logs",
        "1",
    ];
    let talkative = run("talkative", &everything);
    assert_eq!(silent.0, talkative.0);
    assert!(silent.1 == talkative.1, "the tensors differ");
}

#[test]
fn selections_are_dumped_for_each_step_and_validation() {
    let sandbox = Sandbox::new();
    let more = ["-dump_logs", "1", "-details_log_interval", "none"];
    sandbox.run(&with_experts("a", &more).as_strs()).ok();
    let folder = sandbox.run_folder("a").join("export/log_dumps");
    let counts = |path: &str, name: &str| -> Vec<i64> {
        let file = read(&folder.join(path).join("selections.safetensors"));
        let tensors = read_safetensors(&file);
        let (_, tensor) = tensors.iter().find(|(known, _)| known == name).unwrap();
        let bytes = &tensor.bytes;
        bytes
            .chunks(8)
            .map(|word| i64::from_le_bytes(word.try_into().unwrap()))
            .collect()
    };
    // 4 sequences of 32 tokens in two microbatches, 2 of 4 experts each, in each of 2 applications.
    for step in 1..=12 {
        let counts = counts(&step.to_string(), "unique_layers.1.pkm/counts");
        assert_eq!(counts.len(), 2 * 4);
        for application in counts.chunks(4) {
            assert_eq!(application.iter().sum::<i64>(), 4 * 32 * 2, "step {step}");
        }
    }
    // Each of the two heads pairs two experts of values with two of the output.
    let pairs = counts("1", "unique_layers.0.self_attn/sel_correlation");
    assert_eq!(
        (pairs.len(), pairs.iter().sum()),
        (2 * 3 * 3, 2 * 2 * 4 * 32 * 4)
    );
    for step in ["6", "12"] {
        let counts = counts(&format!("{step}/valid/val"), "unique_layers.0.pkm/counts");
        let n_tokens = counts.iter().sum::<i64>() / 4;
        assert!(n_tokens > 0 && n_tokens % 32 == 0, "{n_tokens} tokens");
    }
}

#[test]
fn nothing_is_dumped_unless_asked_for_nor_by_a_dry_run() {
    let sandbox = Sandbox::new();
    sandbox.run(&with_experts("a", &[]).as_strs()).ok();
    sandbox
        .run(&with_experts("b", &["-dump_logs", "1", "-dry_run", "1"]).as_strs())
        .ok();
    for name in ["a", "b"] {
        assert!(!sandbox.run_folder(name).join("export").exists(), "{name}");
    }
}
