//! What the arguments of `moeut` mean and which contradict each other.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where it is allowed")]

use moeut_numerics::plugins::{self, KernelPlugin};
use moeut_numerics::subject::on_cpu;
use moeut_numerics::tiny::{self, Flags, MOEUT, VOCAB};
use moeut_plugin_api::{DType, PluginError};

fn reference_kernel() -> KernelPlugin {
    plugins::kernels().unwrap().swap_remove(0)
}

/// The reference passes `norm_init` to another parameter; only `-compat 1` repeats that.
#[test]
fn norm_init_normalizes_unless_the_reference_is_imitated() {
    let mut setup = on_cpu(VOCAB.unsigned_abs(), DType::F64);
    for (compat, is_normalized) in [(false, true), (true, false)] {
        setup.compat = compat;
        let norm_init: &Flags = &[("moe.att.norm_init", "1")];
        let subject = tiny::build_with(&[MOEUT, norm_init], &setup, &reference_kernel()).unwrap();
        let weight = &subject.trainable["unique_layers.0.self_attn.projections.v"];
        let norms = weight.detach().norm_scalaropt_dim(2, 0, false);
        let spread = (norms.max() / norms.min()).double_value(&[]) - 1.0;
        assert_eq!(spread < 1e-12, is_normalized, "compat {compat}: {spread}");
    }
}

#[test]
fn contradictory_arguments_are_refused_with_a_way_out() {
    for (changes, message) in [
        (
            &[("pkm.n_heads", "7")][..],
            "a token cannot use more experts than there are: `pkm.n_heads` is 7, but `moe.n_experts` is 6",
        ),
        (
            &[("moe.att.k", "4")],
            "a token cannot use more experts than there are: `moe.att.k` is 4, but `moe.att.n_experts` is 3",
        ),
        (
            &[("transformer.encoder_n_layers", "5")],
            "layers cannot be shared: `transformer.encoder_n_layers` is 5, which is no multiple of \
             `transformer.universal.group_size` 2",
        ),
        (
            &[("transformer.variant", "preln_moee")],
            "the model has no such variant: `transformer.variant` is `preln_moee`",
        ),
        (
            &[("dropout", "1.5")],
            "the model cannot be built: `dropout` is 1.5, it must be a probability below 1",
        ),
        (
            &[
                ("transformer.head_projection_size", "none"),
                ("transformer.n_heads", "3"),
            ],
            "the width of a head is unknown: `state_size` 16 is no multiple of `transformer.n_heads` 3",
        ),
        (
            &[("state_size", "0")],
            "the model cannot be built: `state_size` is 0, it must be at least 1",
        ),
    ] {
        let Err(error) = tiny::build(&[MOEUT, changes], &reference_kernel()) else {
            panic!("{changes:?} was accepted");
        };
        assert_eq!(error.to_string(), message);
        let error = error.downcast_ref::<PluginError>().unwrap();
        assert!(error.fix.starts_with("set `-"), "{error:?}");
    }
}
