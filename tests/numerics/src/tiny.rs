//! Small models of every kind, for facts that hold for any parameters.

use crate::Result;
use crate::plugins::KernelPlugin;
use crate::subject::{Subject, on_cpu};
use moeut_plugin_api::{DType, ModelSetup};
use tch::{Device, Kind, Tensor};

/// Number of distinct tokens.
pub const VOCAB: i64 = 50;

/// Flags and values as a user types them; a model ignores those that only others have.
pub type Flags = [(&'static str, &'static str)];

/// Four layers, two of them distinct, and for models with experts a few experts.
const SIZES: [(&str, &str); 15] = [
    ("state_size", "16"),
    ("transformer.n_heads", "2"),
    ("transformer.head_projection_size", "8"),
    ("transformer.encoder_n_layers", "4"),
    ("transformer.universal.group_size", "2"),
    ("moe.n_experts", "6"),
    ("moe.expert_size", "8"),
    ("pkm.n_heads", "2"),
    ("moe.att.enable", "1"),
    ("moe.att.n_experts", "3"),
    ("moe.att.k", "2"),
    ("moe.att.q_expert", "0"),
    ("moe.att.k_expert", "0"),
    ("moe.att.expert_size", "16"),
    ("sut.max_relative_positions", "4"),
];

/// The paper's MoEUT: shared layers, peri-layernorm, experts in v and o.
pub const MOEUT: &Flags = &[
    ("transformer.variant", "preln_moe_universal"),
    ("moe.nonorm", "1"),
];

/// All that differ in their blocks.
pub const MODELS: [&Flags; 13] = [
    MOEUT,
    // In compatibility mode this makes value heads one wide, unlike query heads.
    &[("moe.nonorm", "1"), ("moe.att.same_sel", "1")],
    &[
        ("moe.nonorm", "1"),
        ("moe.att.q_expert", "1"),
        ("moe.att.k_expert", "1"),
    ],
    &[("moe.nonorm", "1"), ("moe.att.enable", "0")],
    &[("transformer.variant", "preln_moe_universal")],
    &[("transformer.variant", "moe_universal")],
    &[("transformer.variant", "preln_rope_universal")],
    &[("transformer.variant", "preln_rope_parallel")],
    &[("transformer.variant", "rope_universal")],
    &[("transformer.variant", "sut_universal")],
    &[("transformer.variant", "preln_sut_universal")],
    &[("transformer.variant", "actsut_universal")],
    &[("transformer.variant", "preln_actsut_universal")],
];

/// A small model in double precision on the CPU.
///
/// # Errors
/// As [`Subject::build`].
pub fn build(flags: &[&Flags], kernel: &KernelPlugin) -> Result<Subject> {
    build_with(flags, &on_cpu(VOCAB.unsigned_abs(), DType::F64), kernel)
}

/// A small model of which also the parameters that start at 0 do something. Later flags win.
///
/// # Errors
/// As [`Subject::build`].
pub fn build_with(flags: &[&Flags], setup: &ModelSetup, kernel: &KernelPlugin) -> Result<Subject> {
    let pairs = SIZES.iter().chain(flags.iter().copied().flatten());
    let flags = pairs
        .map(|&(flag, raw)| (flag.to_owned(), raw.to_owned()))
        .collect();
    let subject = Subject::build(&flags, setup, kernel)?;
    for parameter in subject.trainable.values() {
        tch::no_grad(|| {
            if parameter.count_nonzero(None::<i64>).int64_value(&[]) == 0 {
                let _ = parameter.shallow_clone().normal_(0.0, 0.3);
            }
        });
    }
    Ok(subject)
}

/// Random tokens `[T, B]`.
pub fn tokens(seq_len: i64, batch: i64) -> Tensor {
    Tensor::randint(VOCAB, [seq_len, batch], (Kind::Int64, Device::Cpu))
}
