//! The model: the shell of all language models around SUT blocks.

use crate::args::ARGS;
use crate::block::Block;
use crate::config::Config;
use moeut_nn::lm::{ExpertNeeds, LanguageModel};
use moeut_plugin_api::{ArgSpec, Host, LogLevel, Model, ModelSetup, PluginError};

/// A Sparse Universal Transformer.
pub(crate) struct Sut {
    lm: LanguageModel<Block>,
}

impl Model for Sut {
    const NAME: &'static str = "sut";
    const SUMMARY: &'static str =
        "Sparse Universal Transformer (SUT): attention and feed-forward experts, tokens that halt";
    const ARGS: &'static [ArgSpec] = ARGS;
    type Config = Config;

    fn build(config: Config, setup: &ModelSetup, host: &Host) -> Result<Self, PluginError> {
        let (shell, layers) = config.resolve(setup.compat)?;
        for remark in config.remarks(&layers) {
            host.log(LogLevel::Warning, &remark);
        }
        let experts = ExpertNeeds {
            kernel: &config.kernel,
            router_dtype: config.router_dtype,
        };
        let block = |params: &_| Ok(Block::new(params, &layers));
        let lm = LanguageModel::build(shell, Some(experts), setup, host, block)?;
        Ok(Self { lm })
    }

    moeut_nn::hand_on_to_language_model!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_nn::testing::{
        TestPrecision, build, check_cache, check_recomputation, check_segments, check_wishes,
    };
    use moeut_plugin_api::ModelSummary;

    fn flags<'a>(variant: &'a str, n_segments: &'a str) -> [(&'static str, &'a str); 12] {
        [
            ("transformer.variant", variant),
            ("transformer.encoder_n_layers", "3"),
            ("transformer.head_projection_size", "8"),
            ("lm.trafo.context_blocks", n_segments),
            ("state_size", "10"),
            ("moe.n_experts", "7"),
            ("moe.expert_size", "6"),
            ("pkm.n_heads", "3"),
            ("moe.att.n_experts", "5"),
            ("moe.att.k", "2"),
            ("moe.att.expert_size", "16"),
            ("sut.max_relative_positions", "4"),
        ]
    }

    fn sut(variant: &str, n_segments: &str) -> Sut {
        build(&flags(variant, n_segments)).unwrap()
    }

    fn summary(variant: &str, seq_len: u64) -> ModelSummary {
        sut(variant, "0").summary(seq_len)
    }

    fn of(parts: &[(String, u64)], name: &str) -> u64 {
        let part = parts.iter().find(|(part, _)| part == name);
        part.unwrap_or_else(|| panic!("no {name} in {parts:?}")).1
    }

    /// One token, by hand: two experts of width 16 with q and o each, and k and v: 6 · 10 · 16.
    #[test]
    fn no_wish_changes_a_result_and_the_stack_is_told() {
        for variant in ["preln_sut_universal", "actsut_universal"] {
            let [evaluation, training] = check_wishes(&mut sut(variant, "0"));
            let is_told = |names: &[String], name: &str| names.iter().any(|told| told == name);
            assert!(is_told(&evaluation, "activation_norm/io_cossim_2"));
            for name in [
                "unique_layers.0.moe/usag_rel_perplexity_all_layers",
                "feature_cossim",
                "out_diff_2",
            ] {
                assert!(is_told(&training, name), "{name}");
            }
        }
    }

    #[test]
    fn counts_by_hand() {
        let one = summary("actsut_universal", 1).macs;
        for (name, of_layer) in [
            ("attention: projections", 960),
            ("attention: scores and values", 2 * 2 * 16),
            ("attention: positions", 2 * 16),
            ("attention: router", 10 * (10 + 5)),
            ("feed-forward: experts", 2 * 3 * 10 * 6),
            ("feed-forward: router", 10 * (10 + 7)),
            ("halting", 10 * 10 + 2 * 10),
        ] {
            assert_eq!(of(&one, name), 3 * of_layer, "{name}");
        }
        // Only products of queries with keys and values grow faster than the text; positions stop at four.
        let long = summary("sut_universal", 1000).macs;
        assert_eq!(long.len(), one.len() - 1);
        let scores = of(&long, "attention: scores and values");
        assert_eq!(scores, 3 * 2 * 2 * 16 * 1000 * 1000);
        assert_eq!(of(&long, "attention: positions"), 3 * 2 * 16 * 1000 * 4);
    }

    #[test]
    fn layers_say_what_they_are() {
        let summary = summary("preln_actsut_universal", 8);
        assert_eq!(summary.layers.len(), 3);
        assert_eq!(summary.layers[2].unique_index, 0);
        assert_eq!(
            summary.layers[2].what,
            "expert attention (2 of 5, 2 heads of 8) + experts (3 of 7, width 6), pre-layernorm, halting"
        );
        // Double precision: biases of 2 heads and 2 experts, for 4 near keys in blocks of 8, 4 · 8 · 16; input 80; 16
        // rows of 16 + 16 + 10; k and v 256.
        let attention = 512 + 80 + 16 * 42 + 256;
        assert_eq!(
            of(&summary.activation_bytes, "attention"),
            3 * 8 * attention
        );
    }

    /// With all losses, halting that travels between layers, and segment memory.
    #[test]
    fn running_layers_again_changes_no_bit() {
        for variant in ["sut_universal", "preln_actsut_universal"] {
            for n_segments in ["0", "1"] {
                let losses = [
                    ("moa.miloss", "0.1"),
                    ("moa.cvloss", "0.1"),
                    ("moa.zloss", "0.1"),
                    ("moa.switchloss", "0.1"),
                    ("transformer.act_loss", "0.1"),
                ];
                for precision in TestPrecision::BOTH {
                    let flags = [&flags(variant, n_segments)[..], &losses].concat();
                    check_recomputation::<Sut>(&flags, precision);
                }
            }
        }
    }

    /// Double precision: in each layer the input, 8·10·8, and with halting two tensors more that travel with it.
    #[test]
    fn layers_that_run_again_keep_what_travels() {
        for (variant, n_streams) in [("sut_universal", 1), ("actsut_universal", 3)] {
            let again = [("transformer.recompute", "1")];
            let model: Sut = build(&[&flags(variant, "0")[..], &again].concat()).unwrap();
            let kept = model.summary(8).activation_bytes;
            assert_eq!(of(&kept, "inputs of layers"), 3 * n_streams * 640);
            let of_layer = of(&summary(variant, 8).activation_bytes, "attention") / 3;
            assert_eq!(of(&kept, "attention"), of_layer);
        }
    }

    #[test]
    fn pieces_of_a_text_give_the_logits_of_the_whole() {
        for variant in ["sut_universal", "preln_actsut_universal"] {
            check_cache(&mut sut(variant, "0"));
            check_segments(&mut sut(variant, "2"));
        }
    }
}
