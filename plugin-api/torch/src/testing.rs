//! The conformance suite of kernels: what a kernel crate runs in its own `#[test]`s.
//!
//! The oracle is independent of every kernel: a dense product with one-hot experts in fp64, differentiated by libtorch.
//! Shape letters are those of [`moeut_plugin_api::Kernel`].

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{Capabilities, DType, GroupedMatmul, PluginError, Selection};
use tch::{Device, Kind, Tensor};

use crate::{Autocast, IntoHandle, IntoTensor, convert, cuda};

/// fp64: rounding of sums of some hundred products.
const TOLERANCE_F64: f64 = 1e-12;
/// fp32: unit roundoff 6e-8, sums of up to 412 products, in any order.
const TOLERANCE_F32: f64 = 1e-5;
/// bf16: unit roundoff 4e-3; up to four intermediate results are rounded, sums are kept in fp32.
const TOLERANCE_BF16: f64 = 2e-2;
/// f16: as bf16, with a unit roundoff of 5e-4.
const TOLERANCE_F16: f64 = 2.5e-3;
/// Central differences of step 1e-5 in fp64; the product is linear in each input, so only rounding (1e-16 / 1e-5 per
/// unit of the loss) remains.
const TOLERANCE_DIFFERENCES: f64 = 1e-8;

/// All selections of `ids` (int64, any shape, in `0..n_experts`), sorted by expert.
pub fn selection(ids: &Tensor, n_experts: i64) -> Selection {
    let ids = ids.reshape([-1]);
    let (_, order) = ids.sort_stable(true, 0, false);
    let ends = ids
        .bincount(None::<&Tensor>, n_experts)
        .cumsum(0, Kind::Int64);
    Selection {
        inverse: order.argsort(0, false).into_handle(),
        order: order.into_handle(),
        ends: ends.to_kind(Kind::Int).into_handle(),
    }
}

/// Checks that a kernel computes [`moeut_plugin_api::Kernel`]'s product and its gradients wherever its capabilities
/// say so, and refuses everything else with an error that explains itself. CUDA is checked where there is a device.
///
/// # Panics
/// With the case that does not conform.
pub fn check_kernel(kernel: &KernelClient) {
    let has_cuda = cuda::load().unwrap_or(false);
    let capabilities = unwrap(kernel.capabilities());
    assert!(
        !capabilities.cpu.is_empty() || !capabilities.cuda.is_empty(),
        "the kernel runs nowhere: {capabilities:?}"
    );
    let cuda = has_cuda.then_some((Device::Cuda(0), &capabilities.cuda));
    for (device, dtypes) in [(Device::Cpu, &capabilities.cpu)].into_iter().chain(cuda) {
        for dtype in [DType::F64, DType::F32, DType::Bf16, DType::F16] {
            if dtypes.contains(&dtype) {
                check_dtype(kernel, &capabilities, device, dtype);
            } else {
                assert_explained(
                    "an element type that is not listed",
                    call(kernel, &SMALL, device, dtype),
                );
            }
        }
        if let Some(&dtype) = dtypes.first() {
            check_shape_errors(kernel, device, dtype);
        }
    }
}

/// Checks the gradients of a kernel with fp64 on the CPU against central differences.
///
/// # Panics
/// If one is off, or if the kernel has no fp64.
pub fn check_finite_differences(kernel: &KernelClient) {
    const STEP: f64 = 1e-5;
    let operands = Operands::new(&SMALL, Device::Cpu, Kind::Double, Kind::Double);
    let ids = SMALL.ids(Device::Cpu);
    let loss = |operands: &Operands| {
        let y = run(kernel, operands, &ids, SMALL.n_experts);
        (&y * cotangent(&y)).sum(Kind::Double)
    };
    loss(&operands).backward();
    for (name, input) in operands.named() {
        let gradient = input.grad().reshape([-1]);
        for index in 0..gradient.size()[0] {
            let at = |shift: f64| {
                let moved = operands.detached();
                let target = moved.named().into_iter().find(|(other, _)| *other == name);
                if let Some((_, target)) = target {
                    let _element = target.view([-1]).get(index).g_add_scalar_(shift);
                }
                loss(&moved).double_value(&[])
            };
            let want = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let got = gradient.double_value(&[index]);
            assert!(
                (got - want).abs() <= TOLERANCE_DIFFERENCES * want.abs().max(1.0),
                "d{name}[{index}] is {got}, central differences say {want}"
            );
        }
    }
}

/// One routing and its sizes.
struct Case {
    name: &'static str,
    n_rows: i64,
    per_row: i64,
    d_in: i64,
    d_out: i64,
    n_experts: i64,
    /// Selections that a gate sums; 0 without a gate.
    n_summed: i64,
    routing: Routing,
}

#[derive(Clone, Copy)]
enum Routing {
    /// All experts, in an order without pattern.
    Mixed,
    /// Only expert 1, as when a router has collapsed.
    One,
    /// Every other expert gets nothing.
    Sparse,
}

impl Case {
    const fn new(
        name: &'static str,
        [n_rows, per_row, n_summed]: [i64; 3],
        [d_in, d_out, n_experts]: [i64; 3],
        routing: Routing,
    ) -> Self {
        Self {
            name,
            n_rows,
            per_row,
            d_in,
            d_out,
            n_experts,
            n_summed,
            routing,
        }
    }

    fn n_selections(&self) -> i64 {
        self.n_rows * self.per_row
    }

    fn ids(&self, device: Device) -> Tensor {
        let m = Tensor::arange(self.n_selections(), (Kind::Int64, device));
        match self.routing {
            // A full-period sequence modulo a prime beyond all sizes here.
            Routing::Mixed => (m * 7919 + 13).remainder(10_007).remainder(self.n_experts),
            Routing::One => m.ones_like(),
            Routing::Sparse => {
                (m * 7919 + 13)
                    .remainder(10_007)
                    .remainder(self.n_experts / 2)
                    * 2
            }
        }
    }
}

const SMALL: Case = Case::new("small", [3, 4, 2], [5, 3, 3], Routing::Mixed);

/// Rows, selections per row and selections summed; inner width, outer width and experts.
const CASES: [Case; 13] = [
    Case::new("σ-MoE up", [24, 4, 0], [16, 8, 6], Routing::Mixed),
    Case::new("σ-MoE down", [96, 1, 4], [8, 16, 6], Routing::Mixed),
    Case::new("SwitchHead v", [24, 8, 2], [16, 8, 12], Routing::Mixed),
    Case::new("SwitchHead o", [96, 2, 8], [8, 16, 12], Routing::Mixed),
    Case::new("k = 1 up", [24, 1, 0], [16, 8, 6], Routing::Mixed),
    Case::new("k = 1 down", [24, 1, 1], [8, 16, 6], Routing::Mixed),
    Case::new("a single expert", [24, 2, 0], [16, 8, 1], Routing::Mixed),
    Case::new("all on one expert", [24, 4, 2], [16, 8, 6], Routing::One),
    Case::new("empty experts", [24, 4, 4], [16, 8, 12], Routing::Sparse),
    Case::new(
        "more experts than selections",
        [2, 2, 2],
        [16, 8, 32],
        Routing::Mixed,
    ),
    Case::new("odd sizes up", [15, 3, 0], [412, 41, 5], Routing::Mixed),
    Case::new("odd sizes down", [45, 1, 3], [82, 412, 5], Routing::Mixed),
    Case::new("zero tokens", [0, 4, 2], [16, 8, 6], Routing::Mixed),
];

/// The differentiable inputs of one call.
struct Operands {
    x: Tensor,
    weight: Tensor,
    gate: Option<Tensor>,
}

impl Operands {
    /// Reproducible values in about `[-1, 1]`, rounded to `kind` also where they are stored as `master_kind`: rounding
    /// a master is the kernel's task and no error of its own.
    fn new(case: &Case, device: Device, kind: Kind, master_kind: Kind) -> Self {
        let leaf = |shape: &[i64], phase: f64, stored_kind: Kind| {
            waves(shape, phase, device)
                .to_kind(kind)
                .to_kind(stored_kind)
                .set_requires_grad(true)
        };
        let n = case.n_summed;
        Self {
            x: leaf(&[case.n_rows, case.d_in], 0.1, kind),
            weight: leaf(&[case.n_experts, case.d_in, case.d_out], 0.2, master_kind),
            gate: (n > 0).then(|| leaf(&[case.n_selections() / n, n], 0.3, master_kind)),
        }
    }

    /// The same values as leaves of another graph.
    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            x: change(&self.x),
            weight: change(&self.weight),
            gate: self.gate.as_ref().map(change),
        }
    }

    fn in_f64(&self) -> Self {
        self.map(|input| {
            input
                .detach()
                .to_kind(Kind::Double)
                .copy()
                .set_requires_grad(true)
        })
    }

    fn detached(&self) -> Self {
        self.map(|input| input.detach().copy())
    }

    fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let gate = self.gate.as_ref().map(|gate| ("gate", gate));
        [("x", &self.x), ("weight", &self.weight)]
            .into_iter()
            .chain(gate)
            .collect()
    }
}

/// A product and the gradients of `x`, `weight` and `gate`, by name.
struct Outcome {
    y: Tensor,
    grads: Vec<(&'static str, Tensor)>,
}

/// The product that [`moeut_plugin_api::Kernel`] states, without sorting anything.
fn oracle(operands: &Operands, ids: &Tensor, case: &Case) -> Tensor {
    let x_mk = operands
        .x
        .repeat_interleave_self_int(case.per_row, 0, case.n_selections());
    let one_hot_me = ids.one_hot(case.n_experts).to_kind(Kind::Double);
    let all_men = Tensor::einsum("mk,ekn->men", &[&x_mk, &operands.weight], None::<i64>);
    let y_mn = Tensor::einsum("me,men->mn", &[&one_hot_me, &all_men], None::<i64>);
    match &operands.gate {
        None => y_mn,
        Some(gate) => {
            let y = y_mn.reshape([gate.size()[0], case.n_summed, case.d_out]);
            (y * gate.unsqueeze(-1)).sum_dim_intlist(1, false, None::<Kind>)
        }
    }
}

fn check_dtype(kernel: &KernelClient, capabilities: &Capabilities, device: Device, dtype: DType) {
    let (kind, tolerance) = (convert::kind(dtype), tolerance(dtype));
    for case in &CASES {
        let ids = case.ids(device);
        let check = |variant: &str, operands: &Operands, is_summed: bool| {
            let label = format!("{} {variant} in {dtype} on {device:?}", case.name);
            let got = differentiate(operands, is_summed, |operands| {
                run(kernel, operands, &ids, case.n_experts)
            });
            let wide = operands.in_f64();
            let want = differentiate(&wide, is_summed, |operands| oracle(operands, &ids, case));
            assert_eq!(got.y.kind(), kind, "{label}: element type of the product");
            assert_close(&format!("{label}: the product"), &got.y, &want.y, tolerance);
            for ((name, got), (_, want)) in got.grads.iter().zip(&want.grads) {
                assert_close(&format!("{label}: d{name}"), got, want, tolerance);
            }
            for ((name, got), (_, input)) in got.grads.iter().zip(operands.named()) {
                assert_eq!(got.kind(), input.kind(), "{label}: element type of d{name}");
            }
            got
        };

        let plain = Operands::new(case, device, kind, kind);
        let first = check("", &plain, false);
        if capabilities.is_deterministic {
            let again = differentiate(&plain, false, |operands| {
                run(kernel, operands, &ids, case.n_experts)
            });
            assert_eq!(first.y, again.y, "{}: two products differ", case.name);
            for ((name, a), (_, b)) in first.grads.iter().zip(&again.grads) {
                assert_eq!(a, b, "{}: two gradients of {name} differ", case.name);
            }
        }
        check("with a gradient of stride 0", &plain, true);
        if matches!(dtype, DType::Bf16 | DType::F16) {
            check(
                "with fp32 masters",
                &Operands::new(case, device, kind, Kind::Float),
                false,
            );
        }
        let strided = plain.map(|t| t.detach().transpose(-1, -2).contiguous().transpose(-1, -2));
        check(
            "with transposed memory",
            &strided.map(|t| t.set_requires_grad(true)),
            false,
        );
        check_each_gradient_alone(kernel, case, &plain, &first);
        check_autocast(kernel, case, &plain, &first.y);
    }
}

/// Asking for one gradient must not need the others.
fn check_each_gradient_alone(kernel: &KernelClient, case: &Case, plain: &Operands, all: &Outcome) {
    let ids = case.ids(plain.x.device());
    for (index, (name, want)) in all.grads.iter().enumerate() {
        let alone = plain.detached();
        let input = alone.named()[index].1.set_requires_grad(true);
        let y = run(kernel, &alone, &ids, case.n_experts);
        y.backward_with(&cotangent(&y));
        assert_eq!(
            &input.grad(),
            want,
            "{}: d{name} alone differs from d{name} among others",
            case.name
        );
    }
    let y = tch::no_grad(|| run(kernel, plain, &ids, case.n_experts));
    assert!(
        !y.requires_grad(),
        "{}: a graph was recorded inside `no_grad`",
        case.name
    );
    assert_eq!(
        y, all.y,
        "{}: the product depends on whether a graph is recorded",
        case.name
    );
}

/// The caller chose the element type with `x`; autocast must not choose another one.
fn check_autocast(kernel: &KernelClient, case: &Case, plain: &Operands, want: &Tensor) {
    let device = plain.x.device();
    let scope = Autocast::new(device, Some(Kind::BFloat16));
    assert!(scope.is_ok(), "cannot enter autocast: {scope:?}");
    let y = run(kernel, plain, &case.ids(device), case.n_experts);
    assert_eq!(
        y.kind(),
        want.kind(),
        "{}: element type under autocast",
        case.name
    );
    assert_eq!(
        &y.detach(),
        want,
        "{}: autocast changes the product",
        case.name
    );
}

/// Breaks the operands of a call.
type Change = fn(&mut Operands);

fn check_shape_errors(kernel: &KernelClient, device: Device, dtype: DType) {
    let kind = convert::kind(dtype);
    let ids = SMALL.ids(device);
    let wrong: [(&str, Change); 5] = [
        ("a weight of another inner width", |o| {
            o.weight = o.weight.narrow(1, 0, 4);
        }),
        ("a weight without an axis of experts", |o| {
            o.weight = o.weight.get(0);
        }),
        ("rows that do not divide the selections", |o| {
            o.x = Tensor::cat(&[&o.x, &o.x.narrow(0, 0, 2)], 0);
        }),
        ("no rows for some selections", |o| o.x = o.x.narrow(0, 0, 0)),
        ("a gate of too few entries", |o| {
            o.gate = o.gate.as_ref().map(|gate| gate.narrow(0, 0, 5));
        }),
    ];
    for (what, change) in wrong {
        let mut operands = Operands::new(&SMALL, device, kind, kind);
        change(&mut operands);
        assert_explained(what, try_run(kernel, &operands, &ids, SMALL.n_experts));
    }
}

fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => TOLERANCE_F64,
        DType::F32 => TOLERANCE_F32,
        DType::Bf16 => TOLERANCE_BF16,
        DType::F16 => TOLERANCE_F16,
    }
}

fn call(
    kernel: &KernelClient,
    case: &Case,
    device: Device,
    dtype: DType,
) -> Result<Tensor, PluginError> {
    let kind = convert::kind(dtype);
    try_run(
        kernel,
        &Operands::new(case, device, kind, kind),
        &case.ids(device),
        case.n_experts,
    )
}

fn run(kernel: &KernelClient, operands: &Operands, ids: &Tensor, n_experts: i64) -> Tensor {
    unwrap(try_run(kernel, operands, ids, n_experts))
}

fn try_run(
    kernel: &KernelClient,
    operands: &Operands,
    ids: &Tensor,
    n_experts: i64,
) -> Result<Tensor, PluginError> {
    let product = kernel.grouped_matmul(GroupedMatmul {
        x: operands.x.share(),
        weight: operands.weight.share(),
        selection: selection(ids, n_experts),
        gate: operands.gate.as_ref().map(IntoHandle::share),
    })?;
    Ok(product.into_tensor())
}

/// Runs `product` and its backward pass from [`cotangent`], or from the sum of all elements.
fn differentiate(
    operands: &Operands,
    is_summed: bool,
    product: impl Fn(&Operands) -> Tensor,
) -> Outcome {
    let fresh = operands.map(|input| input.detach().set_requires_grad(true));
    let y = product(&fresh);
    if is_summed {
        y.sum(y.kind()).backward();
    } else {
        y.backward_with(&cotangent(&y));
    }
    let grads = fresh
        .named()
        .into_iter()
        .map(|(name, input)| (name, input.grad()))
        .collect();
    Outcome {
        y: y.detach(),
        grads,
    }
}

trait BackwardWith {
    fn backward_with(&self, cotangent: &Tensor);
}

impl BackwardWith for Tensor {
    /// tch starts backward passes from scalars only.
    fn backward_with(&self, cotangent: &Tensor) {
        (self.to_kind(Kind::Double) * cotangent.to_kind(Kind::Double))
            .sum(Kind::Double)
            .backward();
    }
}

/// A gradient of the product without pattern, exact in every type of two or more bytes.
fn cotangent(y: &Tensor) -> Tensor {
    let values = waves(&y.size(), 0.4, y.device()) * 64.0;
    (values.round() / 64.0).to_kind(y.kind())
}

/// Reproducible values without a pattern. With `sin(0.7 i)` sums along a row would cancel almost wholly, and rounding
/// would look large beside them.
fn waves(shape: &[i64], phase: f64, device: Device) -> Tensor {
    let n_elements: i64 = shape.iter().product();
    let i = Tensor::arange(n_elements, (Kind::Double, device));
    (&i * &i * 0.7 + phase).sin().reshape(shape)
}

/// Compares relative to the largest wanted element, as sums cancel in single ones.
fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size(), "{what}: shape");
    if got.numel() == 0 {
        return;
    }
    let scale = want.abs().max().double_value(&[]);
    let gap = (got.to_kind(Kind::Double) - want)
        .abs()
        .max()
        .double_value(&[]);
    assert!(
        gap <= tolerance * scale,
        "{what} is off by {gap:e}, of values up to {scale:e}"
    );
}

fn assert_explained(what: &str, outcome: Result<Tensor, PluginError>) {
    match outcome {
        Ok(y) => panic!(
            "{what} gave a product of shape {:?} instead of an error",
            y.size()
        ),
        Err(error) => assert!(
            !error.what.is_empty() && !error.why.is_empty() && !error.fix.is_empty(),
            "{what}: the error lacks a part: {error:?}"
        ),
    }
}

fn unwrap<T>(result: Result<T, PluginError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}; fix: {}", error.fix))
}
