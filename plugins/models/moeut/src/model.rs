//! The model behind the plugin boundary: arguments in, a language model of [`Block`]s out.

use crate::args::ARGS;
use crate::block::Block;
use crate::config::Config;
use moeut_nn::lm::{ExpertNeeds, LanguageModel};
use moeut_plugin_api::{ArgSpec, Host, Model, ModelSetup, PluginError};

/// See [`LanguageModel`].
pub(crate) struct Moeut {
    lm: LanguageModel<Block>,
}

impl Model for Moeut {
    const NAME: &'static str = "moeut";
    const SUMMARY: &'static str =
        "Mixture-of-experts Transformer with shared layers (MoEUT) and its ablations";
    const ARGS: &'static [ArgSpec] = ARGS;
    type Config = Config;

    fn build(config: Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError> {
        let blueprint = config.checked(setup.compat)?;
        let experts = ExpertNeeds {
            kernel: &blueprint.kernel,
            router_dtype: blueprint.router_dtype,
        };
        let block = |params: &_| Block::new(params, &blueprint, setup.compat);
        let shell = blueprint.shell.clone();
        let lm = LanguageModel::build(shell, Some(experts), setup, host, block)?;
        Ok(Self { lm })
    }

    moeut_nn::hand_on_to_language_model!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_nn::testing::{
        TestPrecision, build, check_cache, check_padding, check_recomputation, check_segments,
        check_wishes, size, tokens,
    };
    use moeut_plugin_api::{Chart, ForwardInput, Past, Wishes};
    use moeut_torch::{IntoHandle, IntoTensor};
    use tch::Kind;

    const SMALL: [(&str, &str); 9] = [
        ("state_size", "16"),
        ("transformer.n_heads", "2"),
        ("transformer.encoder_n_layers", "4"),
        ("transformer.universal.group_size", "2"),
        ("moe.n_experts", "6"),
        ("moe.expert_size", "8"),
        ("pkm.n_heads", "2"),
        ("moe.att.n_experts", "3"),
        ("lm.trafo.context_blocks", "2"),
    ];

    /// Pre-, post- and peri-layernorm, each with dense attention, the paper's SwitchHead, and experts everywhere that
    /// share one selection on both sides.
    fn all_flags() -> impl Iterator<Item = Vec<(&'static str, &'static str)>> {
        const NORMS: [&[(&str, &str)]; 3] = [
            &[("transformer.variant", "preln_moe_universal")],
            &[("transformer.variant", "moe_universal")],
            &[("moe.nonorm", "1")],
        ];
        const ATTENTIONS: [&[(&str, &str)]; 3] = [
            &[],
            &[
                ("moe.att.enable", "1"),
                ("moe.att.q_expert", "0"),
                ("moe.att.k_expert", "0"),
            ],
            &[("moe.att.enable", "1"), ("moe.att.same_sel", "1")],
        ];
        let both = NORMS
            .into_iter()
            .flat_map(|norm| ATTENTIONS.map(|attention| (norm, attention)));
        both.map(|(norm, attention)| [&SMALL, norm, attention].concat())
    }

    fn all() -> impl Iterator<Item = Moeut> {
        all_flags().map(|flags| build(&flags).unwrap())
    }

    #[test]
    fn a_cache_gives_the_logits_of_the_whole_text() {
        all().for_each(|mut model| check_cache(&mut model));
    }

    #[test]
    fn segments_that_are_all_kept_give_the_logits_of_the_whole_text() {
        all().for_each(|mut model| check_segments(&mut model));
    }

    #[test]
    fn no_wish_changes_a_result() {
        all().for_each(|mut model| {
            check_wishes(&mut model);
        });
    }

    /// With regularizers of both kinds of experts, one mode after the other, and with segment memory.
    #[test]
    fn running_layers_again_changes_no_bit() {
        let modes = ["step", "time", "layers_time", "global"];
        // Nine models and four modes: over two rounds each norm meets each mode.
        for (flags, mode) in all_flags()
            .chain(all_flags())
            .zip(modes.into_iter().cycle())
        {
            let balance = [
                ("moe.perplexity_reg", "0.3"),
                ("moe.perplexity_reg_mode", mode),
                ("moe.att.perplexity_reg", "0.2"),
            ];
            for precision in TestPrecision::BOTH {
                check_recomputation::<Moeut>(&[&flags[..], &balance].concat(), precision);
            }
        }
    }

    /// All experts are selected, so that rounding changes no selection.
    #[test]
    fn odd_widths_are_padded_without_a_trace() {
        let odd = [
            ("state_size", "20"),
            ("transformer.n_heads", "4"),
            ("pkm.n_heads", "6"),
            ("moe.att.k", "3"),
            ("moe.bias", "1"),
            ("moe.perplexity_reg", "0.3"),
        ];
        for flags in all_flags() {
            check_padding::<Moeut>(&[&flags[..], &odd].concat());
        }
    }

    /// Two distinct layers of two applications each.
    #[test]
    fn everything_has_the_name_that_the_reference_gave_it() {
        let paper = [
            ("moe.nonorm", "1"),
            ("moe.att.enable", "1"),
            ("moe.att.q_expert", "0"),
            ("moe.att.k_expert", "0"),
            ("moe.selection_mode", "gate"),
            ("moe.sel_bias", "1"),
        ];
        let mut model: Moeut = build(&[&SMALL[..], &paper].concat()).unwrap();
        let [evaluation, training] = check_wishes(&mut model);
        let of_layers = |names: &[String], stack: &[&str], layer: &[&str]| {
            let mut expected: Vec<String> = stack.iter().map(|&name| name.to_owned()).collect();
            for index in 0..2 {
                expected.extend(layer.iter().map(|name| match name.strip_prefix('^') {
                    Some(map) => format!("activations/unique_layers.{index}.{map}"),
                    None => format!("unique_layers.{index}.{name}"),
                }));
            }
            expected.extend((0..4).flat_map(|place| {
                [
                    "abs_update_layer",
                    "in_layer",
                    "rel_update_layer",
                    "io_cossim",
                ]
                .map(|what| format!("activation_norm/{what}_{place}"))
            }));
            expected.sort();
            assert_eq!(names, expected);
        };
        let always = [
            "pkm/expert_rel_perplexity_per_selection",
            "pkm/usag_rel_perplexity_all_layers",
            "pkm/dead_expert_proportion_all_layers",
            "pkm/counts",
            "pkm/pairs",
            "self_attn/usag_rel_perplexity/o",
            "self_attn/usag_rel_perplexity/v",
            "self_attn/counts/o",
            "self_attn/counts/v",
            "self_attn/sel_correlation",
            "^self_attn/attention_max",
            "^self_attn/head_0",
            "^self_attn/head_1",
        ];
        of_layers(
            &evaluation,
            &[],
            &[&always[..], &["pkm/expert_coocurence"]].concat(),
        );
        let (overlaps, own): (Vec<String>, Vec<String>) = training
            .into_iter()
            .partition(|name| name.contains("layer_sel_overlap"));
        // Each layer runs at places that the other does not run at.
        let expected = ["0.pkm/layer_sel_overlap_2", "1.pkm/layer_sel_overlap_3"];
        assert_eq!(
            overlaps,
            expected.map(|name| format!("unique_layers.{name}"))
        );
        let details = [
            "pkm/min_sel_score",
            "pkm/max_sel_score",
            "pkm/relu_pass_rate",
            "pkm/sel_bias_min",
            "pkm/sel_bias_max",
            "pkm/ani/keys",
            "pkm/ani/values",
            "pkm/ani/expert_sel",
            "pkm/usag_rel_perplexity_100",
            "pkm/dead_expert_proportion_100",
            "pkm/usage_counts_100",
            "pkm/moe_per_layer_100",
            "pkm/layer_sel_similarity_100",
            "pkm/universal_score",
            "pkm/universal_score_optimist",
            "pkm/test_exert_channel_usage",
            "self_attn/usag_rel_perplexity_100",
            "self_attn/sel_counts/o",
            "self_attn/sel_counts/v",
            "self_attn/moe_per_layer_100/o_h0",
            "self_attn/moe_per_layer_100/o_h1",
            "self_attn/moe_per_layer_100/v_h0",
            "self_attn/moe_per_layer_100/v_h1",
        ];
        let stack = [
            "feature_cossim",
            "out_dist_cossim",
            "out_diff_0",
            "out_diff_1",
            "out_diff_2",
            "out_diff_3",
        ];
        of_layers(&own, &stack, &[&always[..], &details].concat());
    }

    /// Counts of several passes are shown by the next one that shows anything, and then begin anew.
    #[test]
    fn charts_are_of_everything_counted_since_the_last_ones() {
        let mut model: Moeut = build(&SMALL).unwrap();
        let mut shown = |is_training, is_shown| {
            let input = ForwardInput {
                tokens_tb: tokens(5, 2).share(),
                is_training,
                wishes: Wishes {
                    counts: true,
                    details: is_shown,
                    ..Wishes::default()
                },
                past: Past::None,
            };
            let charts = model.forward(input).unwrap().charts.into_iter();
            let total = |chart: Chart| {
                let what = chart.name.strip_prefix("unique_layers.0.pkm/")?.to_owned();
                let n = chart.values.into_tensor().sum(Kind::Int64).int64_value(&[]);
                what.contains("usage").then_some((what, n))
            };
            charts.filter_map(total).collect::<Vec<_>>()
        };
        let bars = |n| ("usage_counts_100".to_owned(), n);
        // Ten tokens, two applications, two experts each.
        assert_eq!(shown(true, false), []);
        assert_eq!(shown(true, true), [bars(80)]);
        assert_eq!(shown(false, true), []);
        assert_eq!(shown(false, true), []);
        let of_evaluation = ("test_exert_channel_usage".to_owned(), 80);
        assert_eq!(shown(true, true), [bars(40), of_evaluation]);
        assert_eq!(shown(true, true), [bars(40)]);
    }

    /// Multiply-accumulates of a whole training, 100,000 steps of 64 sequences, are those of the paper's plots.
    #[test]
    fn the_papers_models_have_its_sizes() {
        for (shape, experts, n_params, macs) in [
            (
                ["412", "4", "82", "16", "2"],
                ["155", "12", "8"],
                44_345_792,
                "2.9570e17",
            ),
            (
                ["768", "4", "96", "18", "2"],
                ["254", "12", "10"],
                125_669_696,
                "6.0483e17",
            ),
            (
                ["1024", "4", "128", "18", "2"],
                ["387", "16", "10"],
                243_326_784,
                "1.0390e18",
            ),
            (
                ["1024", "4", "128", "24", "3"],
                ["338", "16", "10"],
                318_107_456,
                "1.3774e18",
            ),
            (
                ["1280", "5", "128", "36", "4"],
                ["467", "20", "13"],
                727_424_320,
                "3.1646e18",
            ),
            (
                ["1536", "6", "128", "36", "4"],
                ["565", "24", "12"],
                1_040_319_296,
                "4.4817e18",
            ),
        ] {
            let [d_model, n_heads, d_head, n_layers, group_size] = shape;
            let [n_experts, top_k, n_att_experts] = experts;
            let (n, of_sequence) = size::<Moeut>(&[
                ("moe.nonorm", "1"),
                ("moe.att.enable", "1"),
                ("moe.att.q_expert", "0"),
                ("moe.att.k_expert", "0"),
                ("lm.trafo.context_blocks", "0"),
                ("state_size", d_model),
                ("transformer.n_heads", n_heads),
                ("transformer.head_projection_size", d_head),
                ("transformer.encoder_n_layers", n_layers),
                ("transformer.universal.group_size", group_size),
                ("moe.n_experts", n_experts),
                ("pkm.n_heads", top_k),
                ("moe.att.n_experts", n_att_experts),
            ])
            .unwrap();
            assert_eq!(n, n_params);
            assert_eq!(format!("{:.4e}", of_sequence as f64 * 6.4e6), macs);
        }
    }

    #[test]
    fn a_summary_names_the_parts_of_a_layer() {
        let what = |flags: &[(&str, &str)]| {
            let model: Moeut = build(&[&SMALL, flags].concat()).unwrap();
            let summary = model.summary(8);
            assert_eq!(summary.layers.len(), 4);
            assert!(summary.activation_bytes.iter().all(|&(_, n)| n > 0));
            summary.layers[3].what.clone()
        };
        assert_eq!(
            what(&[]),
            "attention + σ-MoE (2 of 6, width 8), pre-layernorm"
        );
        assert_eq!(
            what(&[
                ("moe.nonorm", "1"),
                ("moe.att.enable", "1"),
                ("moe.att.q_expert", "0"),
                ("moe.att.k_expert", "0"),
                ("moe.selection_mode", "gate"),
            ]),
            "SwitchHead (2 heads of 8; v, o: 2 of 3) + softmax MoE (2 of 6, width 8), peri-layernorm"
        );
    }

    #[test]
    fn a_selection_that_the_reference_fails_at_is_refused() {
        let flags = [
            ("moe.att.enable", "1"),
            ("moe.att.selection_mode", "gumbel_sigmoid"),
        ];
        let error = build::<Moeut>(&flags).err().unwrap();
        assert_eq!(error.what, "attention experts cannot be selected");
        assert_eq!(error.fix, "set `-moe.att.selection_mode sigmoid`");
    }
}
