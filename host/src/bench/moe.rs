//! `bench moe`: the layers around a kernel, for each kernel: σ-MoE after its routing, and SwitchHead's projections of
//! values (`v`) and outputs (`o`).
//!
//! Inputs are normal, experts are selected by i.i.d. scores. A kernel without a fused σ-MoE has it composed of two grouped
//! products, as the layers do it.

use super::ceilings::Ceilings;
use super::layer::{Layer, distance};
use super::options::Options;
use super::report::Report;
use super::shapes::{Heads, Shape, wanted};
use super::{machine, misuse};
use crate::error::HostError;
use crate::kernels::{Sorted, product, sigma_moe};
use crate::log::Terminal;
use crate::plugins::Registry;
use crate::services::Services;
use crate::train::device::Placement;
use moeut_plugin_api::abi::client::{HostServices, KernelClient};
use moeut_plugin_api::kernel::{Activation, FusedCall};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Fixes inputs and routing.
const SEED: i64 = 1;
/// Experts that a head uses for a token.
const TOP_K_OF_HEAD: i64 = 2;

/// A kernel with its name.
struct Subject {
    name: String,
    kernel: KernelClient,
    is_deterministic: bool,
    /// Whether it has a σ-MoE of its own here.
    is_fused: bool,
}

/// Times all shapes with all kernels.
///
/// # Errors
/// For mistakes in the arguments, and whatever a kernel says.
pub(super) fn bench(
    argv: &[String],
    options: &Options,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> Result<Report, HostError> {
    let (config, placement) = machine(argv, terminal)?;
    let device = moeut_torch::device(placement.device);
    let kind = moeut_torch::kind(placement.compute_dtype);
    let shapes = wanted(&options.shapes, device.is_cuda(), Shape::of_moe)?;
    let services: Arc<dyn HostServices> =
        Services::new(registry, terminal, &config, &Arc::default());
    let kernels = kernels(&options.kernels, registry, placement, &services)?;
    let ceilings = Ceilings::measure(device, kind)?;
    tch::manual_seed(config.seed.unwrap_or(SEED));
    let n_parts: usize = shapes.iter().map(|(_, shape)| n_parts(shape)).sum();
    let n_layers = (n_parts * kernels.len()) as u64;
    let mut rows = Vec::new();
    for (_, shape) in &shapes {
        for part in parts(shape, device, kind) {
            let mut first: Option<Vec<Tensor>> = None;
            for subject in &kernels {
                let layer = part.with(subject);
                let results = layer.results(&layer.gradient()?)?;
                let error = first.as_ref().map(|first| distance(first, &results));
                first.get_or_insert(results);
                for mut row in layer.measure(device, options.effort, &ceilings)? {
                    row.kernel = Some(subject.name.clone());
                    row.is_deterministic = Some(subject.is_deterministic);
                    row.error = error;
                    rows.push(row);
                }
                terminal.work("layers", rows.len() as u64 / 2, n_layers);
            }
        }
    }
    Report::new("moe", argv, (device, kind), ceilings, rows)
}

/// The kernels that a user names, or all that can be used; slow ones first.
fn kernels(
    wanted: &[String],
    registry: &Registry,
    placement: Placement,
    services: &Arc<dyn HostServices>,
) -> Result<Vec<Subject>, HostError> {
    let Placement {
        device,
        compute_dtype: dtype,
        ..
    } = placement;
    let mut names = wanted.to_vec();
    if names.is_empty() {
        let usable = registry.kernels(device, dtype)?;
        names = usable
            .iter()
            .rev()
            .map(|component| component.info.name.clone())
            .collect();
        names.dedup();
    }
    let open = |name: &String| -> Result<Subject, HostError> {
        if name == "auto" {
            return Err(misuse("`auto` is no kernel by itself".to_owned()));
        }
        let component = registry.find_kernel(name, device, dtype)?;
        let kernel = component
            .client()
            .new_kernel(&component.info.name, services)?;
        let relu = Some(Activation::Relu);
        Ok(Subject {
            name: component.info.name.clone(),
            is_deterministic: kernel.capabilities()?.is_deterministic,
            is_fused: kernel.provides(FusedCall::MoeMlp, relu, device, dtype),
            kernel,
        })
    };
    names.iter().map(open).collect()
}

/// A layer before a kernel is chosen.
struct Part {
    name: String,
    /// `x`, weights and gates: two weights are σ-MoE, one is a product.
    inputs: Vec<Tensor>,
    selection: Sorted,
    n_tokens: i64,
    flops: f64,
}

/// How many [`parts`] there are.
fn n_parts(shape: &Shape) -> usize {
    if shape.heads.is_some() { 3 } else { 1 }
}

/// The σ-MoE layer, and the projections of the attention if the shape has one.
fn parts(shape: &Shape, device: Device, kind: Kind) -> Vec<Part> {
    let mut parts = vec![mlp(shape, device, kind)];
    if let Some(heads) = shape.heads {
        let n_tokens = shape.n_tokens;
        let v = [n_tokens, shape.d_model, heads.d_head];
        let o = [n_tokens * heads.n_heads, heads.d_head, shape.d_model];
        let gates_of_v = [n_tokens * heads.n_heads, TOP_K_OF_HEAD];
        let gates_of_o = [n_tokens, heads.n_heads * TOP_K_OF_HEAD];
        parts.push(projection(shape, heads, "v", v, gates_of_v, (device, kind)));
        parts.push(projection(shape, heads, "o", o, gates_of_o, (device, kind)));
    }
    parts
}

fn mlp(shape: &Shape, device: Device, kind: Kind) -> Part {
    let Shape {
        n_tokens,
        d_model,
        n_experts,
        top_k,
        d_expert,
        ..
    } = *shape;
    let normal = |size: &[i64], std: f64| normal(size, std, (device, kind));
    Part {
        name: format!("{} σ-MoE", shape.name),
        inputs: vec![
            normal(&[n_tokens, d_model], 1.0),
            normal(&[n_experts, d_model, d_expert], (d_model as f64).powf(-0.5)),
            normal(&[n_experts, d_expert, d_model], 0.1),
            normal(&[n_tokens, top_k], 1.0).sigmoid(),
        ],
        selection: Sorted::new(&chosen(n_tokens, n_experts, top_k, device), n_experts),
        n_tokens,
        flops: 4.0 * (n_tokens * top_k) as f64 * (d_model * d_expert) as f64,
    }
}

/// A grouped product of `[n_rows, d_in]` with experts of `d_in · d_out`, whose results are summed by gates.
fn projection(
    shape: &Shape,
    heads: Heads,
    name: &str,
    [n_rows, d_in, d_out]: [i64; 3],
    gates: [i64; 2],
    (device, kind): (Device, Kind),
) -> Part {
    let Heads {
        n_heads, n_experts, ..
    } = heads;
    let n_tokens = shape.n_tokens;
    let first_of_head = Tensor::arange(n_heads, (Kind::Int64, device)) * n_experts;
    let ids = chosen(n_tokens * n_heads, n_experts, TOP_K_OF_HEAD, device);
    let ids = ids.view([n_tokens, n_heads, TOP_K_OF_HEAD]) + first_of_head.view([1, n_heads, 1]);
    let n_selections = n_tokens * n_heads * TOP_K_OF_HEAD;
    let normal = |size: &[i64], std: f64| normal(size, std, (device, kind));
    Part {
        name: format!("{} {name}", shape.name),
        inputs: vec![
            normal(&[n_rows, d_in], 1.0),
            normal(
                &[n_heads * n_experts, d_in, d_out],
                (d_in as f64).powf(-0.5),
            ),
            normal(&gates, 1.0).sigmoid(),
        ],
        selection: Sorted::new(&ids, n_heads * n_experts),
        n_tokens,
        flops: 2.0 * n_selections as f64 * (d_in * d_out) as f64,
    }
}

impl Part {
    fn with<'a>(&'a self, subject: &'a Subject) -> Layer<'a> {
        let (kernel, selection) = (&subject.kernel, &self.selection);
        let call = move |inputs: &[Tensor]| match inputs {
            [x, w1, w2, gate] => sigma_moe(kernel, subject.is_fused, selection, [x, w1, w2, gate]),
            [x, weight, gate] => product(kernel, selection, x, weight, Some(gate)),
            _ => unreachable!("a part has three or four inputs"),
        };
        Layer {
            name: self.name.clone(),
            inputs: self.inputs.iter().map(Tensor::shallow_clone).collect(),
            call: Box::new(call),
            n_tokens: self.n_tokens,
            flops: self.flops,
        }
    }
}

fn normal(size: &[i64], std: f64, (device, kind): (Device, Kind)) -> Tensor {
    (Tensor::randn(size, (Kind::Float, device)) * std).to_kind(kind)
}

/// `k` different experts for each of `n`.
fn chosen(n: i64, n_experts: i64, k: i64, device: Device) -> Tensor {
    let scores = Tensor::rand([n, n_experts], (Kind::Float, device));
    scores.topk(k, -1, true, false).1
}
