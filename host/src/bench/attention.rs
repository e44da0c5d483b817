//! `bench attention`: softmax attention in the form in which the models call libtorch's, causal and without a mask tensor.

use super::ceilings::Ceilings;
use super::layer::Layer;
use super::options::Options;
use super::report::Report;
use super::shapes::{Shape, wanted};
use super::{machine, misuse};
use crate::error::HostError;
use crate::log::Terminal;
use crate::plugins::Registry;
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Fixes inputs.
const SEED: i64 = 1;

/// Times all shapes.
///
/// # Errors
/// For mistakes in the arguments, and if libtorch refuses.
pub(super) fn bench(
    argv: &[String],
    options: &Options,
    _: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Report, HostError> {
    let (config, placement) = machine(argv, terminal)?;
    let device = moeut_torch::device(placement.device);
    let kind = moeut_torch::kind(placement.compute_dtype);
    if let Some(kernel) = options.kernels.first() {
        let why = format!("`-kernel {kernel}` means nothing to `bench attention`");
        return Err(misuse(why));
    }
    let shapes = wanted(&options.shapes, device.is_cuda(), Shape::of_attention)?;
    let ceilings = Ceilings::measure(device, kind)?;
    tch::manual_seed(config.seed.unwrap_or(SEED));
    let mut rows = Vec::new();
    for (name, shape) in shapes {
        let [n_sequences, seq_len, n_heads, d_head] = shape;
        let bthd = || Tensor::randn(shape, (Kind::Float, device)).to_kind(kind);
        let n_tokens = n_sequences * seq_len;
        let layer = Layer {
            name: format!("{name} attention"),
            inputs: vec![bthd(), bthd(), bthd()],
            call: Box::new(attention),
            n_tokens,
            // Scores and values, of which the causal mask leaves half.
            flops: 2.0 * (n_tokens * n_heads) as f64 * (seq_len * d_head) as f64,
        };
        rows.extend(layer.measure(device, options.effort, &ceilings)?);
    }
    Report::new("attention", argv, (device, kind), ceilings, rows)
}

/// `[B, T, H, d]` each, and the same back.
fn attention(qkv_bthd: &[Tensor]) -> Result<Tensor, PluginError> {
    let [q, k, v] = qkv_bthd else {
        return Err(PluginError::new("attention is of queries, keys and values"));
    };
    let mixed = Tensor::f_scaled_dot_product_attention(
        &q.transpose(1, 2),
        &k.transpose(1, 2),
        &v.transpose(1, 2),
        None::<&Tensor>,
        0.0,
        true,
        None,
        false,
    );
    Ok(mixed.or_plugin_error("attention fails")?.transpose(1, 2))
}
