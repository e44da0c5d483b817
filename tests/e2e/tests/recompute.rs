//! `-transformer.recompute`: what the backward pass computes again changes no bit of a run.

use moeut_e2e::{Sandbox, checkpoint_files, losses, staged_plugins, tiny};
use std::fs;

/// Chance wherever a model has some, so that a second pass that draws other numbers shows.
const CHANCE: &[&str] = &[
    "-transformer.encoder_n_layers",
    "4",
    "-transformer.universal.group_size",
    "2",
    "-transformer.p_drop_layer",
    "0.1",
    "-stop_after",
    "20",
    "-test_interval",
    "10",
    "-details_log_interval",
    "10",
];

/// The paper's layers, remembered segments, and two microbatches.
const MOEUT: &[&str] = &[
    "-moe.nonorm",
    "1",
    "-moe.att.enable",
    "1",
    "-moe.att.n_experts",
    "3",
    "-moe.drop_expert",
    "0.1",
    "-moe.selection_dropout",
    "0.1",
    "-moe.att.selection_dropout",
    "0.1",
    "-moe.att.dropout",
    "0.1",
    "-moe.perplexity_reg",
    "0.1",
    "-moe.att.perplexity_reg",
    "0.1",
    "-lm.trafo.context_blocks",
    "1",
    "-n_microbatch",
    "2",
];

const DENSE: &[&str] = &["-transformer.variant", "preln_rope_universal"];

const SUT: &[&str] = &[
    "-transformer.variant",
    "preln_actsut_universal",
    "-transformer.universal.group_size",
    "1",
    "-transformer.head_projection_size",
    "16",
    "-moe.att.expert_size",
    "32",
    "-moe.att.n_experts",
    "3",
    "-transformer.act_loss",
    "0.01",
    "-moa.miloss",
    "0.1",
    "-sut.drop_gate",
    "0.1",
    "-moe.att.dropout",
    "0.1",
];

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    for name in ["libmoeut_model_dense.so", "libmoeut_model_sut.so"] {
        let copied = fs::copy(staged_plugins().join(name), sandbox.installed().join(name));
        assert!(copied.is_ok(), "{name}: {copied:?}");
    }
    sandbox
}

#[test]
fn every_loss_and_the_final_parameters_are_the_same() {
    let sandbox = sandbox();
    for (model, own, n_ranks) in [
        ("moeut", MOEUT, 1),
        ("dense", DENSE, 1),
        ("sut", SUT, 1),
        ("moeut_of_two", MOEUT, 2),
    ] {
        let [kept, others @ ..] = ["0", "cheap", "1"].map(|recompute| {
            let name = format!("{model}_{recompute}");
            let flag = ["-transformer.recompute", recompute];
            let args = tiny(&name, &[CHANCE, own, &flag].concat());
            if n_ranks == 1 {
                sandbox.run(&args.as_strs()).ok();
            } else {
                for outcome in sandbox.run_ranks(n_ranks, &args.as_strs()) {
                    outcome.ok();
                }
            }
            let folder = sandbox.run_folder(&name);
            (losses(&folder), checkpoint_files(&folder, 20))
        });
        assert_eq!(kept.0.len(), 20, "{model}");
        for again in others {
            assert_eq!(kept.0, again.0, "{model}");
            assert!(
                kept.1 == again.1,
                "{model}: other parameters or optimizer states"
            );
        }
    }
}
