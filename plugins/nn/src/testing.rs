//! What tests of models and layers need: a kernel that is obviously right, a context and a host that have only that
//! kernel, and checks of what a model makes of earlier tokens.

use crate::Context;
use moeut_plugin_api::abi::client::{HostServices, KernelClient, host_in_process};
pub use moeut_plugin_api::testing::config;
use moeut_plugin_api::{
    Capabilities, DType, Device, ForwardInput, GroupedMatmul, Host, HostInfo, Kernel, LogLevel,
    MapWish, Model, ModelSetup, Past, PluginError, TensorHandle, Wishes,
};
use moeut_torch::frugal::counted;
use moeut_torch::{Autocast, IntoHandle, IntoTensor};
use std::rc::Rc;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Copies each selection's weight and multiplies.
struct Copies;

impl Kernel for Copies {
    const NAME: &'static str = "copies";
    const SUMMARY: &'static str = "For tests";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        Capabilities {
            cpu: vec![DType::F64],
            is_deterministic: true,
            ..Capabilities::default()
        }
    }

    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
        let ends = call.selection.ends.into_tensor();
        let inverse = call.selection.inverse.into_tensor();
        let n_selections = inverse.size()[0];
        let positions = Tensor::arange(n_selections, (Kind::Int, x.device()));
        let sorted = positions.searchsorted(&ends, false, true, "right", None::<Tensor>);
        let experts = sorted.index_select(0, &inverse);
        let x = x.repeat_interleave_self_int(n_selections / x.size()[0], 0, None);
        let of_selection = weight.index_select(0, &experts);
        let y = x.unsqueeze(1).bmm(&of_selection).squeeze_dim(1);
        let Some(gate) = call.gate.map(IntoTensor::into_tensor) else {
            return Ok(y.into_handle());
        };
        let n = gate.size()[1];
        let y = y.view([-1, n, y.size()[1]]) * gate.unsqueeze(-1);
        Ok(y.sum_dim_intlist(1i64, false, None).into_handle())
    }
}

/// Has one kernel, whatever a model asks for.
struct TestHost;

impl HostServices for TestHost {
    fn info(&self) -> HostInfo {
        HostInfo {
            n_ranks: 1,
            cache_dir: std::env::temp_dir(),
            n_threads: 1,
            compat: false,
        }
    }

    fn log(&self, _: LogLevel, _: &str) {}

    fn progress(&self, _: &str, _: u64, _: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }

    fn kernel(&self, _: &str, _: Device, _: DType) -> Result<KernelClient, PluginError> {
        KernelClient::in_process(Copies)
    }
}

/// Number of distinct tokens of [`build`]'s models.
pub const VOCAB: i64 = 50;

/// A double-precision model on the CPU, from flags as a user types them; the rest are defaults.
///
/// # Errors
/// Whatever the model says.
///
/// # Panics
/// If a flag is unknown or its value malformed.
pub fn build<M: Model>(flags: &[(&str, &str)]) -> Result<M, PluginError> {
    build_with(flags, |_| ())
}

/// The same with another setup.
///
/// # Errors
/// Whatever the model says.
///
/// # Panics
/// If a flag is unknown or its value malformed.
pub fn build_with<M: Model>(
    flags: &[(&str, &str)],
    change: impl FnOnce(&mut ModelSetup),
) -> Result<M, PluginError> {
    let config = config(M::ARGS, flags);
    let mut setup = ModelSetup {
        vocab_size: VOCAB.unsigned_abs(),
        device: Device::Cpu,
        dtype: DType::F64,
        compute_dtype: DType::F64,
        compat: false,
        is_shape_only: false,
    };
    change(&mut setup);
    let services: Arc<dyn HostServices> = Arc::new(TestHost);
    M::build(config, &setup, &host_in_process(&services)?)
}

/// A double-precision pass with the kernel, for layers by themselves.
///
/// # Panics
/// If the kernel cannot be made, which is a fault of the test.
pub fn context(is_training: bool) -> Context {
    let kernel = KernelClient::in_process(Copies).unwrap_or_else(|error| panic!("{error}"));
    Context {
        kernel: Some(Rc::new(kernel)),
        compute: Kind::Double,
        is_mixed: false,
        router_dtype: crate::RouterDtype::F32,
        is_training,
        wishes: Wishes::default(),
        everyone: None,
        is_compat: false,
        is_frugal: false,
    }
}

/// Random tokens `[T, B]`.
pub fn tokens(seq_len: i64, batch: i64) -> Tensor {
    Tensor::randint(VOCAB, [seq_len, batch], (Kind::Int64, tch::Device::Cpu))
}

/// Logits `[T, B, V]` in evaluation mode.
///
/// # Errors
/// Whatever the model says.
pub fn logits(
    model: &mut impl Model,
    tokens_tb: &Tensor,
    past: Past,
) -> Result<Tensor, PluginError> {
    let input = ForwardInput {
        tokens_tb: tokens_tb.share(),
        is_training: false,
        wishes: Wishes::default(),
        past,
    };
    let output = tch::no_grad(|| model.forward(input))?;
    Ok(output.logits_tbv.into_tensor())
}

/// Checks that a text given piece by piece to a cache has the logits of the whole, that slots are independent, that a
/// reset forgets, and that a fork serves several rows and leaves the cache as it is.
///
/// # Panics
/// With what is off.
pub fn check_cache(model: &mut impl Model) {
    let (a, b) = (tokens(11, 2), tokens(11, 1));
    let whole_a = expect(logits(model, &a, Past::None));
    let whole_b = expect(logits(model, &b, Past::None));
    for round in 0..2 {
        let mut at = 0;
        for n in [4, 1, 1, 3, 2] {
            for (slot, text, whole) in [(0, &a, &whole_a), (7, &b, &whole_b)] {
                let past = Past::Cache {
                    slot,
                    is_reset: at == 0,
                };
                let piece = expect(logits(model, &text.narrow(0, at, n), past));
                assert_close(
                    &piece,
                    &whole.narrow(0, at, n),
                    &format!("{round} {slot} {at}"),
                );
            }
            at += n;
        }
    }
    let past = Past::Cache {
        slot: 0,
        is_reset: false,
    };
    let error = logits(model, &b, past).err();
    assert!(error.is_some_and(|error| error.what.contains("another batch size")));
    check_fork(model);
}

fn check_fork(model: &mut impl Model) {
    let (start, ends) = (tokens(5, 2), tokens(4, 6));
    let starts = start.repeat_interleave_self_int(3, 1, None);
    let whole = expect(logits(
        model,
        &Tensor::cat(&[starts, ends.shallow_clone()], 0),
        Past::None,
    ));
    let fill = Past::Cache {
        slot: 3,
        is_reset: true,
    };
    let _ = expect(logits(model, &start, fill));
    for round in 0..2 {
        let forked = expect(logits(model, &ends, Past::Fork { slot: 3 }));
        assert_close(&forked, &whole.narrow(0, 5, 4), &format!("fork {round}"));
    }
    let error = logits(model, &tokens(4, 5), Past::Fork { slot: 3 }).err();
    assert!(error.is_some_and(|error| error.what.contains("another batch size")));
}

/// Checks that a model with at least two segments of memory sees all of a text that is given in three pieces, forgets
/// what is older, and goes on from what [`Model::memory`] gave.
///
/// # Panics
/// With what is off.
pub fn check_segments(model: &mut impl Model) {
    let text = tokens(12, 2);
    let whole = expect(logits(model, &text, Past::None));
    let piece = |model: &mut _, slot, index: i64, is_reset| {
        let past = Past::Segments { slot, is_reset };
        expect(logits(model, &text.narrow(0, 4 * index, 4), past))
    };
    for index in 0..3 {
        let given = piece(model, 3, index, index == 0);
        assert_close(
            &given,
            &whole.narrow(0, 4 * index, 4),
            &format!("segment {index}"),
        );
    }

    let _ = (piece(model, 1, 0, true), piece(model, 1, 1, false));
    let kept = model.memory();
    assert!(
        kept.iter()
            .any(|state| state.name.starts_with("memory.slot_1.layer_0.segment_"))
    );
    // The states of slot 1 change; what was taken out puts them back.
    let _ = piece(model, 1, 0, true);
    let other = piece(model, 1, 2, false);
    if let Err(error) = model.set_memory(kept) {
        panic!("{error}");
    }
    let same = piece(model, 1, 2, false);
    assert_close(&same, &whole.narrow(0, 8, 4), "restored");
    assert!(!other.allclose(&same, 1e-6, 1e-6, false));
}

/// Everything that a pass can be asked for.
pub const EVERYTHING: Wishes = Wishes {
    stats: true,
    counts: true,
    pairs: true,
    details: true,
    selections: true,
    maps: Some(MapWish {
        n_steps: -4,
        has_heads: true,
    }),
};

/// Checks that no wish changes a result of a model without dropout, in evaluation and in training; returns the names of
/// everything that is told, those of evaluation first, then those of a training pass behind it.
///
/// # Panics
/// With what is off.
pub fn check_wishes(model: &mut impl Model) -> [Vec<String>; 2] {
    let tokens_tb = tokens(9, 2);
    let mut told = [Vec::new(), Vec::new()];
    for (is_training, told) in [false, true].into_iter().zip(&mut told) {
        let mut pass = |wishes| {
            let input = ForwardInput {
                tokens_tb: tokens_tb.share(),
                is_training,
                wishes,
                past: Past::None,
            };
            let output = model
                .forward(input)
                .unwrap_or_else(|error| panic!("{error}"));
            let mut results = vec![output.logits_tbv.into_tensor()];
            let terms = output.regularizers.into_iter();
            results.extend(terms.map(|term| term.tensor.into_tensor()));
            let mut names = Vec::new();
            for named in output.stats.into_iter().chain(output.selections) {
                let value = named.tensor.into_tensor();
                assert!(
                    bool::try_from(value.isfinite().all()).is_ok_and(|is| is),
                    "{}",
                    named.name
                );
                names.push(named.name);
            }
            for chart in output.charts {
                let values = chart.values.into_tensor();
                assert!(!values.requires_grad(), "{} is in the graph", chart.name);
                assert!(
                    bool::try_from(values.isfinite().all()).is_ok_and(|is| is),
                    "{}",
                    chart.name
                );
                names.push(chart.name);
            }
            (results, names)
        };
        let (plain, nothing) = pass(Wishes::default());
        assert!(nothing.is_empty(), "nobody asked for {nothing:?}");
        let (watched, names) = pass(EVERYTHING);
        assert_eq!(plain.len(), watched.len());
        for (plain, watched) in plain.iter().zip(&watched) {
            assert!(plain.equal(watched), "a wish changes a result");
        }
        *told = names;
        told.sort();
    }
    told
}

/// Checks that neither what is made again nor layers that run again change results or gradients of training, to the bit,
/// nor evaluation; that the first keeps less than a pass without, and the second less than the first. The flags must
/// leave no chance to the model: tests of a process share the random generator.
///
/// # Panics
/// With what is off.
pub fn check_recomputation<M: Model>(flags: &[(&str, &str)], precision: TestPrecision) {
    // Products this small take longer on several threads.
    tch::set_num_threads(1);
    let segments = [tokens(9, 2), tokens(9, 2)];
    let mut models = ["0", "cheap", "1"].map(|recompute| {
        let flags = [flags, &[("transformer.recompute", recompute)]].concat();
        build_in::<M>(&flags, precision)
    });
    let [plain, others @ ..] = &models;
    for other in others {
        copy_parameters(plain, other);
    }
    let what = format!("{flags:?} {precision:?}");
    let outcomes = models.each_mut().map(|model| {
        let results = trained(model, &segments, precision);
        (results, expect(logits(model, &segments[0], Past::None)))
    });
    let [(results, evaluated), others @ ..] = &outcomes;
    assert!(results.iter().filter(|result| result.defined()).count() > 10);
    for (of_other, evaluated_by_other) in others {
        assert_eq!(results.len(), of_other.len());
        for (index, (result, other)) in results.iter().zip(of_other).enumerate() {
            let is_same = match (result.defined(), other.defined()) {
                (true, true) => result.equal(other),
                (is, is_other) => is == is_other,
            };
            assert!(is_same, "{what}: result or gradient {index}");
        }
        assert!(evaluated.equal(evaluated_by_other), "{what}");
    }

    let n_bytes = models.each_mut().map(|model| {
        let pass = || training_pass(model, &segments[0], true, precision);
        let (results, count) = counted(pass).unwrap_or_else(|error| panic!("{error}"));
        let n_alive = count.n_bytes();
        drop(results);
        // The rest are parameters, which not every graph refers to.
        n_alive - count.n_bytes()
    });
    let [all, cheap, layers] = n_bytes;
    // The kernel here keeps neither its operands nor, in mixed precision, the casts that they are.
    let is_less = precision.is_mixed() || all > cheap;
    assert!(is_less && cheap > layers, "{what}: {n_bytes:?} are kept");

    // What is kept must not change before the backward pass; what is computed anew may.
    let survive_change = models.each_mut().map(|model| {
        let results = training_pass(model, &segments[0], true, precision);
        let of_layers = model.parameters().into_iter();
        let of_layers = of_layers.filter(|parameter| parameter.name.starts_with("unique_layers."));
        for parameter in of_layers {
            let _ = parameter.tensor.into_tensor().detach().g_add_scalar_(0);
        }
        loss(&results).f_backward().is_ok()
    });
    assert_eq!(survive_change, [false, false, true], "{what}");
}

/// What rounding to fp16 may change of logits and regularizers, as a share of their length: ten times its unit
/// roundoff. In 475 models it was up to 1.6e-3.
const MIXED_RESULT: f64 = 5e-3;
/// The same of gradients. Units that rounding brings to the other side of the kink of `ReLU` change them by far more, in
/// models this small by up to 0.12.
const MIXED_GRADIENT: f64 = 0.3;

/// That a training in mixed precision, where odd widths are padded, is one in single precision but for rounding: logits,
/// regularizers, gradients. With `flags` that let nothing depend on which of two numbers is larger.
///
/// # Panics
/// With what is off by more.
pub fn check_padding<M: Model>(flags: &[(&str, &str)]) {
    tch::set_num_threads(1);
    // Rounding of fp16 hides less than that of bf16.
    let precisions = [DType::F32, DType::F16].map(TestPrecision::of);
    let [mut exact, mut mixed] = precisions.map(|precision| build_in::<M>(flags, precision));
    copy_parameters(&exact, &mixed);
    let segments = [tokens(9, 2), tokens(9, 2)];
    let results = trained(&mut exact, &segments, precisions[0]);
    let mixed = trained(&mut mixed, &segments, precisions[1]);
    assert_eq!(results.len(), mixed.len());
    let n_results = results.len() - exact.parameters().len();
    for (index, (result, mixed)) in results.iter().zip(&mixed).enumerate() {
        let tolerance = if index < n_results {
            MIXED_RESULT
        } else {
            MIXED_GRADIENT
        };
        assert_eq!(result.defined(), mixed.defined());
        if result.defined() {
            assert_eq!(
                result.size(),
                mixed.size(),
                "{flags:?}: result or gradient {index}"
            );
            let off = (result - mixed).norm().double_value(&[]) / result.norm().double_value(&[]);
            assert!(
                off <= tolerance,
                "{flags:?}: result or gradient {index} is off by {off}"
            );
        }
    }
}

fn build_in<M: Model>(flags: &[(&str, &str)], precision: TestPrecision) -> M {
    expect(build_with(flags, |setup| {
        setup.dtype = precision.dtype;
        setup.compute_dtype = precision.compute_dtype;
    }))
}

fn copy_parameters<M: Model>(from: &M, to: &M) {
    tch::no_grad(|| {
        for (to, from) in to.parameters().iter().zip(from.parameters()) {
            to.tensor.tensor().copy_(&from.tensor.tensor());
        }
    });
}

/// Logits and regularizers of the segments of a training, and the gradients of all parameters.
fn trained(model: &mut impl Model, segments: &[Tensor], precision: TestPrecision) -> Vec<Tensor> {
    let train = |(index, tokens_tb)| {
        let results = training_pass(model, tokens_tb, index == 0, precision);
        loss(&results).backward();
        results
    };
    let results: Vec<Tensor> = segments.iter().enumerate().flat_map(train).collect();
    let grads = model.parameters().into_iter();
    let grads = grads.map(|parameter| parameter.tensor.into_tensor().grad());
    results.into_iter().chain(grads).collect()
}

/// Element types of a model under test: of its parameters, and of its products.
#[derive(Debug, Clone, Copy)]
pub struct TestPrecision {
    dtype: DType,
    compute_dtype: DType,
}

impl TestPrecision {
    /// Single precision, and the same with bf16 where autocast wants it.
    pub const BOTH: [Self; 2] = [Self::of(DType::F32), Self::of(DType::Bf16)];

    const fn of(compute_dtype: DType) -> Self {
        Self {
            dtype: DType::F32,
            compute_dtype,
        }
    }

    fn is_mixed(self) -> bool {
        self.dtype != self.compute_dtype
    }
}

/// Logits and regularizers of a segment of training.
fn training_pass(
    model: &mut impl Model,
    tokens_tb: &Tensor,
    is_reset: bool,
    precision: TestPrecision,
) -> Vec<Tensor> {
    let mixed = precision
        .is_mixed()
        .then(|| moeut_torch::kind(precision.compute_dtype));
    let _mixed = Autocast::new(tch::Device::Cpu, mixed).unwrap_or_else(|error| panic!("{error}"));
    let output = expect(model.forward(ForwardInput {
        tokens_tb: tokens_tb.share(),
        is_training: true,
        wishes: Wishes::default(),
        past: Past::Segments { slot: 0, is_reset },
    }));
    let terms = output.regularizers.into_iter();
    let mut results = vec![output.logits_tbv.into_tensor()];
    results.extend(terms.map(|term| term.tensor.into_tensor()));
    results
}

/// A sum in which every element has another weight.
fn loss(results: &[Tensor]) -> Tensor {
    let weighted = |result: &Tensor| {
        let index = Tensor::arange(
            result.size().iter().product::<i64>(),
            (Kind::Double, result.device()),
        );
        (result * index.cos().view_as(result)).sum(Kind::Double)
    };
    results.iter().map(weighted).sum()
}

/// Parameters, and multiply-accumulates of one sequence of 1024 tokens, of a model of the paper with its vocabulary; no
/// weights are made.
///
/// # Errors
/// Whatever the model says.
pub fn size<M: Model>(flags: &[(&str, &str)]) -> Result<(u64, u64), PluginError> {
    let model: M = build_with(flags, |setup| {
        setup.vocab_size = 8000;
        setup.is_shape_only = true;
    })?;
    let parameters = model.parameters().into_iter();
    let numel = |tensor: TensorHandle| tensor.into_tensor().numel() as u64;
    let trainable = parameters.filter(|parameter| parameter.is_trainable);
    let n_params = trainable.map(|parameter| numel(parameter.tensor)).sum();
    let macs = model.summary(1024).macs.into_iter();
    Ok((n_params, macs.map(|(_, n)| n).sum()))
}

fn assert_close(a: &Tensor, b: &Tensor, what: &str) {
    let error = (a - b).abs().max().double_value(&[]);
    assert!(error < 1e-10, "{what}: off by {error:e}");
}

fn expect<T>(result: Result<T, PluginError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}"))
}
