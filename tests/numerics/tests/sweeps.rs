//! The paper's 43 configurations have the reference's numbers of parameters; built in shape only, through the plugins.

use moeut_numerics::fixture::shared;
use moeut_numerics::plugins;
use moeut_numerics::subject::{Subject, flags, on_cpu};
use moeut_plugin_api::DType;
use serde_json::Value;
use std::collections::BTreeMap;

/// Pieces of the paper's tokenizer.
const VOCAB: u64 = 8000;

#[test]
fn parameter_counts_of_all_sweeps_are_the_references() {
    let Some(path) = shared("sweeps_resolved.json").unwrap() else {
        println!("no sweeps found: set MOEUT_SHARED to the shared data");
        return;
    };
    let sweeps: BTreeMap<String, BTreeMap<String, Value>> =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(sweeps.len(), SWEEPS.len());
    let kernel = plugins::kernels().unwrap().swap_remove(0);
    let mut setup = on_cpu(VOCAB, DType::F32);
    setup.is_shape_only = true;
    let mut wrong = Vec::new();
    for &(name, n_params, n_model_weights) in SWEEPS {
        match Subject::build(&flags(&sweeps[name]), &setup, &kernel) {
            Ok(subject) => {
                let own = [subject.n_params(""), subject.n_params("unique_layers.")];
                if own != [n_params, n_model_weights] {
                    wrong.push(format!(
                        "{name}: {own:?}, {n_params} and {n_model_weights} expected"
                    ));
                }
            }
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Sweep, all parameters, parameters of the distinct layers: closed forms, which the reference's own modules confirmed.
const SWEEPS: &[(&str, u64, u64)] = &[
    ("c4_baseline_1b_rope_nodrop", 1_044_300_608, 1_019_713_536),
    ("c4_baseline_big_rope_nodrop", 243_568_700, 227_174_652),
    ("c4_baseline_bigger_rope_nodrop", 319_293_584, 302_899_536),
    ("c4_baseline_gigantic_rope_nodrop", 728_694_080, 708_203_520),
    ("c4_baseline_mid_rope_nodrop", 125_654_336, 113_356_800),
    ("c4_baseline_small_rope_long_nodrop", 44_544_264, 37_943_440),
    ("c4_moeut_1b_switchead", 1_040_319_296, 1_015_732_224),
    (
        "c4_moeut_big_matched_rope_noln_aabb",
        243_326_784,
        226_932_736,
    ),
    (
        "c4_moeut_big_matched_rope_noln_g1",
        243_589_952,
        227_195_904,
    ),
    (
        "c4_moeut_big_matched_rope_noln_g18",
        243_844_928,
        227_450_880,
    ),
    (
        "c4_moeut_big_matched_rope_noln_g3",
        243_844_928,
        227_450_880,
    ),
    (
        "c4_moeut_big_matched_rope_noln_g6",
        243_844_928,
        227_450_880,
    ),
    (
        "c4_moeut_big_matched_rope_noln_g9",
        243_844_928,
        227_450_880,
    ),
    ("c4_moeut_big_matched_rope_postln", 243_324_736, 226_932_736),
    ("c4_moeut_big_matched_rope_preln", 243_326_784, 226_932_736),
    (
        "c4_moeut_big_matched_rope_preln_linear_norot_nosm1",
        243_326_784,
        226_932_736,
    ),
    (
        "c4_moeut_bigger_matched_rope_nonorm_g24",
        319_661_888,
        303_267_840,
    ),
    (
        "c4_moeut_bigger_matched_rope_nonorm_g3",
        318_107_456,
        301_713_408,
    ),
    ("c4_moeut_gigantic_switchead", 727_424_320, 706_933_760),
    ("c4_moeut_gigantic_switchead_g36", 731_228_480, 710_737_920),
    ("c4_moeut_mid_matched_rope_noln", 125_669_696, 113_372_160),
    (
        "c4_moeut_mid_matched_rope_noln_g18",
        126_069_056,
        113_771_520,
    ),
    (
        "c4_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
    ),
    (
        "c4_moeut_small_matched_rope_noln_long_g16",
        44_129_080,
        37_528_256,
    ),
    ("c4_moeut_small_matched_rope_postln", 44_344_968, 37_744_968),
    ("c4_small_sut_lowreg2_fixed_44m", 44_657_100, 38_057_100),
    (
        "c4_sut_big_lessloss2_ffflopmatch_attmatch_actloss",
        244_521_280,
        228_129_280,
    ),
    ("pes2o_baseline_big_rope_nodrop", 243_568_700, 227_174_652),
    (
        "pes2o_baseline_small_rope_long_nodrop",
        44_544_264,
        37_943_440,
    ),
    (
        "pes2o_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
    ),
    (
        "pes2o_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
    ),
    ("pes2o_small_sut_lowreg2_fixed_44m", 44_657_100, 38_057_100),
    (
        "pes2o_sut_big_lessloss2_ffflopmatch_attmatch_actloss",
        244_521_280,
        228_129_280,
    ),
    (
        "slimpajama_baseline_1b_rope_nodrop",
        1_044_300_608,
        1_019_713_536,
    ),
    (
        "slimpajama_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
    ),
    (
        "slimpajama_baseline_small_rope_long_nodrop",
        44_544_264,
        37_943_440,
    ),
    (
        "slimpajama_moeut_1b_switchead",
        1_040_319_296,
        1_015_732_224,
    ),
    (
        "slimpajama_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
    ),
    (
        "slimpajama_moeut_small_matched_rope_noln_long",
        44_345_792,
        37_744_968,
    ),
    (
        "thestack_baseline_big_rope_nodrop",
        243_568_700,
        227_174_652,
    ),
    (
        "thestack_baseline_gigantic_rope_nodrop_multilang",
        728_694_080,
        708_203_520,
    ),
    (
        "thestack_moeut_big_matched_rope_noln",
        243_326_784,
        226_932_736,
    ),
    (
        "thestack_moeut_gigantic_switchead_multilang",
        727_424_320,
        706_933_760,
    ),
];
