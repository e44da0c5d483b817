//! The model behind the plugin boundary: arguments in, a language model of [`Block`]s out.

use crate::block::Block;
use moeut_nn::lm::{LanguageModel, SHELL_ARGS, Shell, ShellConfig};
use moeut_plugin_api::{ArgSpec, Host, Model, ModelSetup, PluginError};
use serde::Deserialize;

/// The variant whose attention and feed-forward layer read the same.
const PARALLEL: &str = "preln_rope_parallel";

const VARIANTS: &[&str] = &[
    "rope",
    "preln_rope",
    PARALLEL,
    "rope_universal",
    "preln_rope_universal",
];

/// All arguments; the table is [`SHELL_ARGS`].
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    shell: ShellConfig,
}

/// See [`LanguageModel`].
pub(crate) struct Dense {
    lm: LanguageModel<Block>,
}

impl Model for Dense {
    const NAME: &'static str = "dense";
    const SUMMARY: &'static str = "Dense Transformer with rotary positions: the baselines";
    const ARGS: &'static [ArgSpec] = SHELL_ARGS;
    type Config = Config;

    fn build(config: Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError> {
        let shell = Shell::new(config.shell, VARIANTS)?;
        let is_parallel = shell.variant.name == PARALLEL;
        let block = |params: &_| Block::new(params, &shell, is_parallel, setup.compat);
        let lm = LanguageModel::build(shell.clone(), None, setup, host, block)?;
        Ok(Self { lm })
    }

    moeut_nn::hand_on_to_language_model!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_nn::testing::{
        TestPrecision, VOCAB, build, check_cache, check_padding, check_recomputation,
        check_segments, check_wishes, logits, size, tokens,
    };
    use moeut_plugin_api::{ForwardInput, NamedTensor, Past, Wishes};
    use moeut_torch::frugal::counted;
    use moeut_torch::{IntoHandle, IntoTensor};
    use std::collections::BTreeMap;
    use tch::{Device, Kind, Tensor};

    fn dense(variant: &str, memory: &[(&str, &str)]) -> Dense {
        let mut flags = vec![
            ("transformer.variant", variant),
            ("state_size", "16"),
            ("embedding_size", "12"),
            ("transformer.encoder_n_layers", "4"),
            ("transformer.universal.group_size", "2"),
            ("transformer.activation", "topk"),
            ("transformer.topk_value", "5"),
        ];
        flags.extend(memory);
        build(&flags).unwrap()
    }

    #[test]
    fn a_cache_gives_the_logits_of_the_whole_text() {
        for variant in VARIANTS {
            check_cache(&mut dense(variant, &[("lm.trafo.context_blocks", "0")]));
            check_cache(&mut dense(variant, &[]));
        }
    }

    #[test]
    fn no_wish_changes_a_result_and_maps_are_told() {
        for variant in VARIANTS {
            let [evaluation, training] = check_wishes(&mut dense(variant, &[]));
            for names in [evaluation, training] {
                let map = "activations/unique_layers.1.self_attn/head_3";
                assert!(names.iter().any(|name| name == map), "{variant}: {names:?}");
            }
        }
    }

    #[test]
    fn running_layers_again_changes_no_bit() {
        for (variant, n_segments) in VARIANTS.iter().flat_map(|v| [(*v, "0"), (*v, "1")]) {
            let flags = [
                ("transformer.variant", variant),
                ("state_size", "16"),
                ("transformer.encoder_n_layers", "4"),
                ("transformer.universal.group_size", "2"),
                ("lm.trafo.context_blocks", n_segments),
            ];
            for precision in TestPrecision::BOTH {
                check_recomputation::<Dense>(&flags, precision);
            }
        }
    }

    #[test]
    fn odd_widths_are_padded_without_a_trace() {
        for (variant, n_segments) in VARIANTS.iter().flat_map(|v| [(*v, "0"), (*v, "1")]) {
            let flags = [
                ("transformer.variant", variant),
                ("state_size", "20"),
                ("transformer.n_heads", "4"),
                ("transformer.ff_multiplier", "1.55"),
                ("lm.trafo.context_blocks", n_segments),
            ];
            check_padding::<Dense>(&flags);
        }
    }

    /// Of four layers two norms and values of 18·16·8 bytes, and hidden units of 18·32·8, are gone, and nothing else.
    #[test]
    fn cheap_recomputation_keeps_neither_norms_nor_values_nor_hidden_units() {
        let n_bytes = ["0", "cheap"].map(|recompute| {
            let flags = [
                ("transformer.recompute", recompute),
                ("transformer.activation", "relu"),
                ("lm.trafo.context_blocks", "0"),
            ];
            let mut model = dense("preln_rope_universal", &flags);
            let input = ForwardInput {
                tokens_tb: tokens(9, 2).into_handle(),
                is_training: true,
                wishes: Wishes::default(),
                past: Past::None,
            };
            let (output, count) = counted(|| model.forward(input)).unwrap();
            let logits = output.unwrap().logits_tbv.into_tensor();
            assert!(logits.requires_grad());
            count.n_bytes()
        });
        assert_eq!(n_bytes[0] - n_bytes[1], 4 * 18 * (3 * 16 + 32) * 8);
    }

    /// Double precision: four inputs of 10·16·8, and one layer.
    #[test]
    fn layers_that_run_again_keep_their_inputs() {
        let flags = [
            ("transformer.recompute", "1"),
            ("lm.trafo.context_blocks", "0"),
        ];
        let summary = dense("preln_rope_universal", &flags).summary(10);
        let kept = [
            ("inputs of layers", 4 * 1_280),
            ("attention", 6_400),
            ("feed-forward", 6_400),
        ];
        assert_eq!(
            summary.activation_bytes,
            kept.map(|(part, n)| (part.to_owned(), n))
        );
    }

    /// Double precision: four times 10·(16 + 3·16)·8, of queries, keys and their mixture, and 10·16·8.
    #[test]
    fn cheap_recomputation_is_part_of_the_estimate() {
        let flags = [
            ("transformer.recompute", "cheap"),
            ("lm.trafo.context_blocks", "0"),
        ];
        let summary = dense("preln_rope_universal", &flags).summary(10);
        let kept = [("attention", 4 * 5_120), ("feed-forward", 4 * 1_280)];
        assert_eq!(
            summary.activation_bytes,
            kept.map(|(part, n)| (part.to_owned(), n))
        );
    }

    #[test]
    fn segments_that_are_all_kept_give_the_logits_of_the_whole_text() {
        for variant in VARIANTS {
            check_segments(&mut dense(variant, &[("lm.trafo.context_blocks", "2")]));
            let in_eval = [
                ("lm.trafo.context_blocks", "0"),
                ("lm.trafo.test_context_blocks", "2"),
            ];
            check_segments(&mut dense(variant, &in_eval));
        }
    }

    /// Multiply-accumulates of a whole training, 100,000 steps of 64 sequences, are those of the paper's plots.
    #[test]
    fn the_papers_baselines_have_its_sizes() {
        for (d_model, n_heads, d_head, n_layers, multiplier, n_params, macs) in [
            ("412", "10", "41", "16", "4.985", 44_544_264, "3.3628e17"),
            ("768", "16", "48", "16", "4", 125_654_336, "9.0710e17"),
            ("1024", "16", "64", "18", "4.014", 243_568_700, "1.7351e18"),
            ("1024", "16", "64", "24", "4.014", 319_293_584, "2.3135e18"),
            ("1280", "20", "64", "36", "4", 728_694_080, "5.2570e18"),
            ("1536", "24", "64", "36", "4", 1_044_300_608, "7.4217e18"),
        ] {
            let (n, of_sequence) = size::<Dense>(&[
                ("transformer.variant", "preln_rope"),
                ("lm.trafo.context_blocks", "0"),
                ("state_size", d_model),
                ("transformer.n_heads", n_heads),
                ("transformer.head_projection_size", d_head),
                ("transformer.encoder_n_layers", n_layers),
                ("transformer.ff_multiplier", multiplier),
            ])
            .unwrap();
            assert_eq!(n, n_params);
            assert_eq!(format!("{:.4e}", of_sequence as f64 * 6.4e6), macs);
        }
    }

    #[test]
    fn a_summary_names_layers_and_costs() {
        let summary = dense("preln_rope_universal", &[]).summary(10);
        let layers: Vec<u64> = summary
            .layers
            .iter()
            .map(|layer| layer.unique_index)
            .collect();
        assert_eq!(layers, [0, 1, 0, 1]);
        assert_eq!(
            summary.layers[1].what,
            "attention + feed-forward (width 32), pre-layernorm"
        );
        // One remembered segment doubles what is attended to: 4 layers of 2·16·10·20, 4·16·16·10 and 2·16·32·10.
        let macs = [
            ("attention: scores and values", 25_600),
            ("attention: projections", 40_960),
            ("feed-forward", 40_960),
        ];
        assert_eq!(summary.macs, macs.map(|(part, n)| (part.to_owned(), n)));
        // Double precision: 4 layers of 10·(16 + 64)·8 and, as `topk` keeps input and output, 10·(16 + 64)·8.
        let kept = [("attention", 25_600), ("feed-forward", 25_600)];
        assert_eq!(
            summary.activation_bytes,
            kept.map(|(part, n)| (part.to_owned(), n))
        );
    }

    /// What token `t` of a second segment sees of the first one, of four tokens: `1` where its logits change.
    fn sees_of_first_segment(flags: &[(&str, &str)]) -> [String; 4] {
        let mut model: Dense = build(
            &[
                &[
                    ("transformer.variant", "preln_rope"),
                    ("state_size", "16"),
                    ("transformer.encoder_n_layers", "1"),
                ],
                flags,
            ]
            .concat(),
        )
        .unwrap();
        let (first, second) = (tokens(4, 1), tokens(4, 1));
        let mut second_after = |first: &Tensor| {
            let past = |is_reset| Past::Segments { slot: 0, is_reset };
            let _ = logits(&mut model, first, past(true)).unwrap();
            logits(&mut model, &second, past(false)).unwrap()
        };
        let before = second_after(&first);
        let changes: Vec<Vec<bool>> = (0..4)
            .map(|index| {
                let changed = first.copy();
                let other = (first.narrow(0, index, 1) + 1).remainder(VOCAB);
                changed.narrow(0, index, 1).copy_(&other);
                let difference = (second_after(&changed) - &before).abs().amax([1, 2], false);
                Vec::try_from(difference.gt(1e-9)).unwrap()
            })
            .collect();
        std::array::from_fn(|t| {
            let row = changes
                .iter()
                .map(|of_token| if of_token[t] { '1' } else { '.' });
            row.collect()
        })
    }

    #[test]
    fn a_segment_is_seen_whole_in_a_window_or_not_at_all() {
        assert_eq!(sees_of_first_segment(&[]), ["1111"; 4]);
        // The first token sees all but the first of the segment, the last one none.
        let sees = [".111", "..11", "...1", "...."];
        assert_eq!(
            sees_of_first_segment(&[("lm.trafo.same_length", "1")]),
            sees
        );
        assert_eq!(
            sees_of_first_segment(&[("lm.trafo.same_length_eval", "1")]),
            sees
        );
        assert_eq!(
            sees_of_first_segment(&[("lm.trafo.context_blocks", "0")]),
            ["...."; 4]
        );
        assert_eq!(
            sees_of_first_segment(&[("lm.trafo.last_layer_context", "1")]),
            ["1111"; 4]
        );
    }

    #[test]
    fn memory_is_by_slot_layer_and_age() {
        let names = |flags: &[(&str, &str)]| {
            let mut model = dense("preln_rope", flags);
            for slot in [5, 5, 5, 9] {
                let past = Past::Segments {
                    slot,
                    is_reset: false,
                };
                let _ = logits(&mut model, &tokens(3, 2), past).unwrap();
            }
            let memory = model.memory().into_iter();
            memory.map(|state| state.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]).len(), 2 * 4);
        assert_eq!(
            names(&[
                ("lm.trafo.context_blocks", "2"),
                ("lm.trafo.last_layer_context", "1"),
            ]),
            [
                "memory.slot_5.layer_0.segment_0",
                "memory.slot_5.layer_0.segment_1",
                "memory.slot_9.layer_0.segment_0",
            ]
        );
        assert!(names(&[("lm.trafo.context_blocks", "0")]).is_empty());
    }

    #[test]
    fn memory_of_another_model_is_refused() {
        let mut model = dense("preln_rope", &[]);
        for (name, width) in [
            ("memory.slot_0.layer_0.segment_0", 15),
            ("memory.slot_0.layer_4.segment_0", 16),
            ("embedding.weight", 16),
        ] {
            let state = Tensor::zeros([2, 3, width], (Kind::Double, Device::Cpu));
            let memory = vec![NamedTensor {
                name: name.to_owned(),
                tensor: state.into_handle(),
            }];
            let error = model.set_memory(memory).unwrap_err();
            assert_eq!(error.what, "a remembered state does not fit the model");
        }
    }

    /// Standard deviation of each weight, by name.
    fn deviations(flags: &[(&str, &str)]) -> BTreeMap<String, f64> {
        let model: Dense = build(&[&[("state_size", "96")], flags].concat()).unwrap();
        let parameters = model.parameters().into_iter();
        parameters
            .map(|parameter| {
                let std = parameter.tensor.into_tensor().std(true).double_value(&[]);
                (parameter.name, std)
            })
            .collect()
    }

    #[test]
    fn initial_deviations_are_those_of_the_reference() {
        let pre = deviations(&[
            ("transformer.variant", "preln_rope"),
            ("transformer.encoder_n_layers", "2"),
        ]);
        // √(2 / (layers · inputs)), exactly.
        for (name, fan_in) in [
            ("linear1", 96.0),
            ("linear2", 192.0),
            ("self_attn.data_to_q", 96.0),
            ("self_attn.data_to_kv", 96.0),
            ("self_attn.out_proj", 96.0),
        ] {
            let std = pre[&format!("unique_layers.1.{name}.weight")];
            assert!(
                (std - 1.0 / f64::sqrt(fan_in)).abs() < 1e-12,
                "{name}: {std}"
            );
        }
        assert!(pre["unique_layers.0.linear1.bias"].abs() < 1e-12);

        let post = deviations(&[("transformer.variant", "rope")]);
        let uniform = |bound: f64| bound / 3f64.sqrt();
        for (name, expected) in [
            ("linear1.weight", 2f64.sqrt() * (2.0 / 288f64).sqrt()),
            ("linear2.weight", uniform((6.0 / 288f64).sqrt())),
            ("linear1.bias", uniform(1.0 / 96f64.sqrt())),
            ("self_attn.data_to_q.weight", uniform((6.0 / 192f64).sqrt())),
            (
                "self_attn.data_to_kv.weight",
                uniform((6.0 / 288f64).sqrt()),
            ),
            ("self_attn.out_proj.weight", uniform(1.0 / 96f64.sqrt())),
        ] {
            let std = post[&format!("unique_layers.1.{name}")];
            assert!(
                (std / expected - 1.0).abs() < 0.1,
                "{name}: {std}, not {expected}"
            );
        }

        let xl = deviations(&[
            ("transformer.variant", "rope"),
            ("embedding_size", "64"),
            ("lm.trafo.force_out_norm", "1"),
            ("lm.trafo.xl_init", "1"),
        ]);
        for (name, std) in xl {
            let is_norm = name.contains("norm");
            let expected = if name.ends_with("bias") { 0.0 } else { 0.02 };
            let tolerance = if is_norm { 6e-3 } else { 1e-3 };
            assert!((std - expected).abs() < tolerance, "{name}: {std}");
        }
    }

    #[test]
    fn an_embedding_of_another_width_has_adapters() {
        let model = dense("preln_rope", &[]);
        let parameters = model.parameters().into_iter();
        let sizes = parameters.filter(|parameter| !parameter.name.starts_with("unique_layers"));
        let sizes: Vec<String> = sizes
            .map(|parameter| format!("{} {:?}", parameter.name, parameter.tensor.tensor().size()))
            .collect();
        assert_eq!(
            sizes,
            [
                "embedding.weight [50, 12]",
                "embedding_adapter.weight [16, 12]",
                "embedding_adapter.bias [16]",
                "out_norm.weight [16]",
                "out_norm.bias [16]",
                "output_adapter.weight [12, 16]",
                "output_adapter.bias [12]",
                "output.weight [50, 12]",
                "output.bias [50]",
            ]
        );
    }
}
