//! Facts about the `moeut` model that hold for any parameters.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where it is allowed")]

use moeut_numerics::plugins::{self, KernelPlugin};
use moeut_numerics::subject::{Subject, on_cpu};
use moeut_plugin_api::{DType, Past};
use moeut_torch::Autocast;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

const VOCAB: i64 = 50;
const SEQ_LEN: i64 = 12;
const BATCH: i64 = 2;

/// A small MoEUT: two layers, shared twice, experts in v and o.
const MOEUT: [(&str, &str); 15] = [
    ("state_size", "16"),
    ("transformer.n_heads", "2"),
    ("transformer.head_projection_size", "8"),
    ("transformer.encoder_n_layers", "4"),
    ("transformer.variant", "preln_moe_universal"),
    ("transformer.universal.group_size", "2"),
    ("moe.nonorm", "1"),
    ("moe.n_experts", "6"),
    ("moe.expert_size", "8"),
    ("pkm.n_heads", "2"),
    ("moe.att.enable", "1"),
    ("moe.att.n_experts", "3"),
    ("moe.att.k", "2"),
    ("moe.att.q_expert", "0"),
    ("moe.att.k_expert", "0"),
];

/// The small MoEUT with other or further arguments.
fn flags(changes: &[(&str, &str)]) -> BTreeMap<String, String> {
    let pairs = MOEUT.iter().chain(changes);
    pairs
        .map(|&(flag, raw)| (flag.to_owned(), raw.to_owned()))
        .collect()
}

fn reference_kernel() -> KernelPlugin {
    plugins::kernels().unwrap().swap_remove(0)
}

fn build(changes: &[(&str, &str)]) -> Subject {
    let setup = on_cpu(VOCAB as u64, DType::F64);
    Subject::build(&flags(changes), &setup, &reference_kernel()).unwrap()
}

fn tokens() -> Tensor {
    Tensor::randint(VOCAB, [SEQ_LEN, BATCH], (Kind::Int64, Device::Cpu))
}

fn logits(subject: &mut Subject, tokens_tb: &Tensor) -> Tensor {
    subject.forward(tokens_tb, Past::None).unwrap().0
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64) {
    let error = moeut_numerics::error_of::tensor(a, b);
    assert!(error < tolerance, "error {error:e}");
}

/// The variants whose blocks differ.
const BLOCKS: [&[(&str, &str)]; 5] = [
    &[],
    // In compatibility mode this makes value heads one wide, unlike query heads.
    &[("moe.att.same_sel", "1")],
    &[("moe.nonorm", "0")],
    &[
        ("moe.nonorm", "0"),
        ("transformer.variant", "moe_universal"),
    ],
    &[("moe.att.enable", "0")],
];

#[test]
fn a_later_token_never_changes_an_earlier_logit() {
    const CHANGED: i64 = 7;
    for block in BLOCKS {
        let mut subject = build(block);
        let before = tokens();
        let after = before.copy();
        let _ = after.narrow(0, CHANGED, 1).fill_(0);
        let _ = after.narrow(0, CHANGED, 1).narrow(1, 0, 1).fill_(1);
        let (a, b) = (logits(&mut subject, &before), logits(&mut subject, &after));
        assert_close(&a.narrow(0, 0, CHANGED), &b.narrow(0, 0, CHANGED), 1e-12);
        let later = SEQ_LEN - CHANGED;
        assert!(!a.narrow(0, CHANGED, later).allclose(
            &b.narrow(0, CHANGED, later),
            1e-6,
            1e-6,
            false
        ));
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for block in BLOCKS {
        let mut subject = build(block);
        let tokens = tokens();
        let together = logits(&mut subject, &tokens);
        for index in 0..BATCH {
            let alone = logits(&mut subject, &tokens.narrow(1, index, 1));
            assert_close(&together.narrow(1, index, 1), &alone, 1e-12);
        }
    }
}

#[test]
fn the_order_of_experts_does_not_matter() {
    let mut subject = build(&[]);
    let tokens = tokens();
    let before = logits(&mut subject, &tokens);
    let permute = |name: &str, order: &[i64]| {
        let own = &subject.trainable[name];
        let permuted = own.index_select(0, &Tensor::from_slice(order));
        tch::no_grad(|| own.shallow_clone().copy_(&permuted));
    };
    for name in ["keys", "values", "expert_sel"] {
        permute(&format!("unique_layers.0.pkm.{name}"), &[3, 0, 5, 1, 4, 2]);
    }
    // Two heads of three experts: experts change places within their head.
    for name in ["projections.v", "selections.v"] {
        permute(
            &format!("unique_layers.1.self_attn.{name}"),
            &[2, 0, 1, 4, 3, 5],
        );
    }
    assert_close(&logits(&mut subject, &tokens), &before, 1e-12);
}

#[test]
fn shared_layers_equal_unrolled_copies_and_their_gradients_add_up() {
    for (group_type, order) in [("abab", [0, 1, 0, 1]), ("aabb", [0, 0, 1, 1])] {
        let mut shared = build(&[("transformer.universal.group_type", group_type)]);
        let mut unrolled = build(&[("transformer.variant", "preln_moe")]);
        // The shared name of a parameter of the unrolled model.
        let origin = |name: &str| match name.strip_prefix("unique_layers.") {
            Some(rest) => {
                let (place, rest) = rest.split_once('.').unwrap();
                format!(
                    "unique_layers.{}.{rest}",
                    order[place.parse::<usize>().unwrap()]
                )
            }
            None => name.to_owned(),
        };
        for (name, copy) in &unrolled.trainable {
            tch::no_grad(|| copy.shallow_clone().copy_(&shared.trainable[&origin(name)]));
        }
        let tokens = tokens();
        let (a, b) = (logits(&mut shared, &tokens), logits(&mut unrolled, &tokens));
        assert_close(&a, &b, 1e-12);

        a.square().mean(Kind::Double).backward();
        b.square().mean(Kind::Double).backward();
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, copy) in &unrolled.trainable {
            let sum = sums
                .remove(&origin(name))
                .map_or_else(|| copy.grad(), |sum| sum + copy.grad());
            sums.insert(origin(name), sum);
        }
        assert!(sums.keys().eq(shared.trainable.keys()));
        for (name, sum) in &sums {
            assert_close(&shared.trainable[name].grad(), sum, 1e-10);
        }
    }
}

/// The reference passes `norm_init` to another parameter; only `-compat 1` repeats that.
#[test]
fn norm_init_normalizes_unless_the_reference_is_imitated() {
    let mut setup = on_cpu(VOCAB as u64, DType::F64);
    for (compat, is_normalized) in [(false, true), (true, false)] {
        setup.compat = compat;
        let flags = flags(&[("moe.att.norm_init", "1")]);
        let subject = Subject::build(&flags, &setup, &reference_kernel()).unwrap();
        let weight = &subject.trainable["unique_layers.0.self_attn.projections.v"];
        let norms = weight.detach().norm_scalaropt_dim(2, 0, false);
        let spread = (norms.max() / norms.min()).double_value(&[]) - 1.0;
        assert_eq!(spread < 1e-12, is_normalized, "compat {compat}: {spread}");
    }
}

/// With bf16 products the logits stay near the exact ones and every gradient is finite and in single precision.
#[test]
fn mixed_precision_stays_near_full_precision() {
    let mut setup = on_cpu(VOCAB as u64, DType::F32);
    setup.compute_dtype = DType::Bf16;
    for kernel in plugins::kernels().unwrap() {
        if !kernel.capabilities.cpu.contains(&DType::Bf16) {
            continue;
        }
        let mut mixed = Subject::build(&flags(&[]), &setup, &kernel).unwrap();
        let mut full = build(&[]);
        for (name, value) in &full.trainable {
            tch::no_grad(|| mixed.trainable[name].shallow_clone().copy_(value));
        }
        let tokens = tokens();
        let exact = logits(&mut full, &tokens);
        let rounded = {
            let _bf16 = Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
            logits(&mut mixed, &tokens)
        };
        // A token near a routing boundary may choose another expert, which moves its logits more than rounding does.
        let error = (rounded.to_kind(Kind::Double) - &exact)
            .square()
            .mean(Kind::Double)
            .sqrt();
        let scale = exact.square().mean(Kind::Double).sqrt();
        let relative = (error / scale).double_value(&[]);
        assert!(relative < 0.1, "{}: {relative}", kernel.name);
        rounded
            .to_kind(Kind::Float)
            .square()
            .mean(Kind::Float)
            .backward();
        for (name, parameter) in &mixed.trainable {
            let grad = parameter.grad();
            assert_eq!(grad.kind(), Kind::Float, "{name}");
            assert!(bool::try_from(grad.isfinite().all()).unwrap(), "{name}");
        }
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
        let setup = on_cpu(VOCAB as u64, DType::F64);
        let Err(error) = Subject::build(&flags(changes), &setup, &reference_kernel()) else {
            panic!("{changes:?} was accepted");
        };
        assert_eq!(error.to_string(), message);
        let error = error
            .downcast_ref::<moeut_plugin_api::PluginError>()
            .unwrap();
        assert!(error.fix.starts_with("set `-"), "{error:?}");
    }
}
