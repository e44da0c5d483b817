//! Times kernels side by side on a GPU, and says how far their results are from those of the first one.
//!
//! ```text
//! cargo xtask build
//! cargo run --release -p moeut-kernel-cuda --example time_mlp target/release/plugins/libmoeut_kernel_{grouped,cuda}.so
//! ```
//!
//! Milliseconds are wall time between two waits for the GPU, divided by the calls between them; the median of several.
//! Inputs are normal, experts are chosen by i.i.d. scores, everything is bf16.

#![expect(clippy::print_stdout, reason = "it prints a table")]

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use moeut_plugin_api::abi::client::{HostServices, KernelClient, PluginClient};
use moeut_plugin_api::kernel::{Activation, MoeMlp, MoeMlpOptions};
use moeut_plugin_api::{
    ComponentKind, DType, Device as AbiDevice, GroupedMatmul, HostInfo, LogLevel, PluginError,
    Selection,
};
use moeut_torch::testing::selection;
use moeut_torch::{IntoHandle, IntoTensor, cuda};
use tch::{Device, Kind, Tensor};

const DEVICE: Device = Device::Cuda(0);
const CALLS: u32 = 4;
const ROUNDS: usize = 7;

/// A layer of a model, and its numbers.
struct Shape {
    name: &'static str,
    n_tokens: i64,
    d_model: i64,
    n_experts: i64,
    top_k: i64,
    /// Heads, experts of each and width of a head, of the model's attention.
    heads: [i64; 3],
}

const D_EXPERT: i64 = 128;
const SHAPES: [Shape; 3] = [
    Shape {
        name: "244M",
        n_tokens: 65536,
        d_model: 1024,
        n_experts: 387,
        top_k: 16,
        heads: [4, 10, 128],
    },
    Shape {
        name: "1B",
        n_tokens: 16384,
        d_model: 1536,
        n_experts: 565,
        top_k: 24,
        heads: [6, 12, 128],
    },
    Shape {
        name: "44M",
        n_tokens: 65536,
        d_model: 412,
        n_experts: 155,
        top_k: 12,
        heads: [4, 8, 82],
    },
];

/// A host that has a cache folder and nothing else.
struct Services;

impl HostServices for Services {
    fn info(&self) -> HostInfo {
        HostInfo {
            n_ranks: 1,
            cache_dir: "cache".into(),
            n_threads: 1,
            compat: false,
        }
    }

    fn log(&self, _level: LogLevel, text: &str) {
        println!("{text}");
    }

    fn progress(&self, _label: &str, _done: u64, _total: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }

    fn kernel(&self, _: &str, _: AbiDevice, _: DType) -> Result<KernelClient, PluginError> {
        Err(PluginError::new("a kernel needs no other kernel"))
    }
}

type Call<'a> = dyn Fn(&KernelClient, &[Tensor]) -> Result<Tensor, PluginError> + 'a;

/// A call to time: its name, its differentiable inputs and the call itself.
struct Subject<'a> {
    name: String,
    inputs: Vec<Tensor>,
    call: Box<Call<'a>>,
}

fn main() -> Result<(), Box<dyn Error>> {
    if !cuda::load()? {
        return Err("there is no GPU to time on".into());
    }
    let kernels: Vec<_> = std::env::args()
        .skip(1)
        .map(|path| kernel(Path::new(&path)))
        .collect::<Result<_, _>>()?;
    println!("{}, bf16", cuda::describe(DEVICE)?.name);
    println!("| layer | kernel | forward ms | forward + backward ms | peak GB | largest error |");
    println!("|---|---|---|---|---|---|");
    tch::manual_seed(1);
    for shape in &SHAPES {
        for subject in [shape.mlp(), shape.values(), shape.outputs()] {
            let mut first: Option<Vec<Tensor>> = None;
            for (name, kernel) in &kernels {
                let results = run(&subject, kernel)?;
                let error = first
                    .as_ref()
                    .map_or(0.0, |first| distance(first, &results));
                first.get_or_insert(results);
                cuda::reset_peak_memory(DEVICE)?;
                let before = cuda::memory_stats(DEVICE)?.allocated;
                let forward = median_ms(|| {
                    tch::no_grad(|| (subject.call)(kernel, &subject.inputs)).map(drop)
                })?;
                let both = median_ms(|| run(&subject, kernel).map(drop))?;
                let peak = cuda::memory_stats(DEVICE)?.allocated_peak - before;
                println!(
                    "| {} {} | {name} | {forward:.2} | {both:.2} | {:.1} | {error:.1e} |",
                    shape.name,
                    subject.name,
                    peak as f64 / 1e9
                );
            }
        }
    }
    Ok(())
}

/// The one kernel of a plugin, with its name.
fn kernel(library: &Path) -> Result<(String, KernelClient), Box<dyn Error>> {
    let plugin = PluginClient::open(library)?;
    let services: Arc<dyn HostServices> = Arc::new(Services);
    let components = plugin.components()?;
    let component = components
        .iter()
        .find(|component| component.kind == ComponentKind::Kernel)
        .ok_or_else(|| format!("`{}` has no kernel", library.display()))?;
    let kernel = plugin.new_kernel(&component.name, &services)?;
    Ok((component.name.clone(), kernel))
}

/// The result and the gradients of all inputs.
fn run(subject: &Subject, kernel: &KernelClient) -> Result<Vec<Tensor>, PluginError> {
    let inputs: Vec<_> = subject
        .inputs
        .iter()
        .map(|input| input.detach().set_requires_grad(true))
        .collect();
    let y = (subject.call)(kernel, &inputs)?;
    (&y * &y).sum(Kind::Float).backward();
    let mut results = vec![y.detach()];
    results.extend(inputs.iter().map(Tensor::grad));
    Ok(results)
}

/// The largest of the relative distances (Frobenius norms) of the pairs.
fn distance(wanted: &[Tensor], got: &[Tensor]) -> f64 {
    let relative = wanted.iter().zip(got).map(|(wanted, got)| {
        let wanted = wanted.to_kind(Kind::Float);
        ((got.to_kind(Kind::Float) - &wanted).norm() / wanted.norm()).double_value(&[])
    });
    relative.fold(0.0, f64::max)
}

fn median_ms(mut call: impl FnMut() -> Result<(), PluginError>) -> Result<f64, PluginError> {
    call()?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        tch::Cuda::synchronize(0);
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        tch::Cuda::synchronize(0);
        times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(CALLS));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}

impl Shape {
    fn mlp(&self) -> Subject<'_> {
        let Self {
            n_tokens,
            d_model,
            n_experts,
            top_k,
            ..
        } = *self;
        let sorted = Sorted::new(&chosen(n_tokens, n_experts, top_k), n_experts);
        Subject {
            name: "σ-MoE".to_owned(),
            inputs: vec![
                normal(&[n_tokens, d_model], 1.0),
                normal(&[n_experts, d_model, D_EXPERT], (d_model as f64).powf(-0.5)),
                normal(&[n_experts, D_EXPERT, d_model], 0.1),
                normal(&[n_tokens, top_k], 1.0).sigmoid(),
            ],
            call: Box::new(move |kernel, inputs| {
                let y = kernel.moe_mlp(MoeMlp {
                    x: inputs[0].share(),
                    w1: inputs[1].share(),
                    b1: None,
                    w2: inputs[2].share(),
                    gate: inputs[3].share(),
                    selection: sorted.share(),
                    options: MoeMlpOptions {
                        activation: Activation::Relu,
                    },
                })?;
                Ok(y.into_tensor())
            }),
        }
    }

    /// The attention's value projection: every head chooses two of its own experts.
    fn values(&self) -> Subject<'_> {
        let [n_heads, _, d_head] = self.heads;
        let n_tokens = self.n_tokens;
        self.product(
            "v",
            [n_tokens, self.d_model, d_head],
            [n_tokens * n_heads, 2],
        )
    }

    /// Its output projection.
    fn outputs(&self) -> Subject<'_> {
        let [n_heads, _, d_head] = self.heads;
        let n_tokens = self.n_tokens;
        self.product(
            "o",
            [n_tokens * n_heads, d_head, self.d_model],
            [n_tokens, n_heads * 2],
        )
    }

    fn product(
        &self,
        name: &str,
        [n_rows, d_in, d_out]: [i64; 3],
        gate_shape: [i64; 2],
    ) -> Subject<'_> {
        let [n_heads, n_experts, _] = self.heads;
        let first_of_head = Tensor::arange(n_heads, (Kind::Int64, DEVICE)) * n_experts;
        let ids = chosen(self.n_tokens * n_heads, n_experts, 2).view([self.n_tokens, n_heads, 2])
            + first_of_head.view([1, n_heads, 1]);
        let n_experts = n_heads * n_experts;
        let sorted = Sorted::new(&ids, n_experts);
        Subject {
            name: name.to_owned(),
            inputs: vec![
                normal(&[n_rows, d_in], 1.0),
                normal(&[n_experts, d_in, d_out], (d_in as f64).powf(-0.5)),
                normal(&gate_shape, 1.0).sigmoid(),
            ],
            call: Box::new(move |kernel, inputs| {
                let y = kernel.grouped_matmul(GroupedMatmul {
                    x: inputs[0].share(),
                    weight: inputs[1].share(),
                    selection: sorted.share(),
                    gate: Some(inputs[2].share()),
                })?;
                Ok(y.into_tensor())
            }),
        }
    }
}

/// A selection that many calls share.
struct Sorted([Tensor; 3]);

impl Sorted {
    fn new(ids: &Tensor, n_experts: i64) -> Self {
        let Selection {
            order,
            inverse,
            ends,
        } = selection(ids, n_experts);
        Self([order, inverse, ends].map(IntoTensor::into_tensor))
    }

    fn share(&self) -> Selection {
        let [order, inverse, ends] = self.0.each_ref().map(IntoHandle::share);
        Selection {
            order,
            inverse,
            ends,
        }
    }
}

fn normal(shape: &[i64], std: f64) -> Tensor {
    (Tensor::randn(shape, (Kind::Float, DEVICE)) * std).to_kind(Kind::BFloat16)
}

/// `k` different experts for each of `n`.
fn chosen(n: i64, n_experts: i64, k: i64) -> Tensor {
    let scores = Tensor::rand([n, n_experts], (Kind::Float, DEVICE));
    scores.topk(k, -1, true, false).1
}
