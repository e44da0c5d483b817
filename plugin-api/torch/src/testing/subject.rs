//! One call of a kernel beside its oracle, and everything that must hold between the two. Knows no particular call.

use moeut_plugin_api::{DType, PluginError};
use tch::{Device, Kind, Tensor};

use crate::{Autocast, OrPluginError, convert, determinism};

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

/// A differentiable input of a call.
pub(super) struct Leaf {
    pub(super) name: &'static str,
    pub(super) shape: Vec<i64>,
    /// Whether it may be stored in fp32 while the call computes in a half type.
    pub(super) is_master: bool,
}

impl Leaf {
    pub(super) fn activation(name: &'static str, shape: &[i64]) -> Self {
        Self {
            name,
            shape: shape.to_vec(),
            is_master: false,
        }
    }

    pub(super) fn master(name: &'static str, shape: &[i64]) -> Self {
        Self {
            is_master: true,
            ..Self::activation(name, shape)
        }
    }
}

/// The differentiable inputs of one call.
pub(super) struct Inputs(Vec<(&'static str, Tensor)>);

impl Inputs {
    /// Reproducible values in about `[-1, 1]`, rounded to `kind` also where they are stored as `master_kind`: rounding
    /// a master is the kernel's task and no error of its own.
    fn new(leaves: &[Leaf], device: Device, kind: Kind, master_kind: Kind) -> Self {
        let phases = (1..).map(|index| 0.1 * f64::from(index));
        let inputs = leaves.iter().zip(phases).map(|(leaf, phase)| {
            let stored_kind = if leaf.is_master { master_kind } else { kind };
            let values = waves(&leaf.shape, phase, device);
            let values = values.to_kind(kind).to_kind(stored_kind);
            (leaf.name, values.set_requires_grad(true))
        });
        Self(inputs.collect())
    }

    /// # Panics
    /// If there is no input of that name.
    pub(super) fn get(&self, name: &str) -> &Tensor {
        match self.find(name) {
            Some(input) => input,
            None => panic!("no input `{name}`"),
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<&Tensor> {
        self.0
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, input)| input)
    }

    /// Replaces one input.
    pub(super) fn change(&mut self, name: &str, change: impl Fn(&Tensor) -> Tensor) {
        for (other, input) in &mut self.0 {
            if *other == name {
                *input = change(input);
            }
        }
    }

    /// The same values as inputs of another graph.
    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        let changed = self.0.iter().map(|(name, input)| (*name, change(input)));
        Self(changed.collect())
    }

    pub(super) fn in_f64(&self) -> Self {
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
}

type Call<'a> = dyn Fn(&Inputs) -> Result<Tensor, PluginError> + 'a;

/// One call on given sizes and routing.
pub(super) struct Subject<'a> {
    /// For messages.
    pub(super) name: String,
    pub(super) device: Device,
    pub(super) leaves: Vec<Leaf>,
    pub(super) call: Box<Call<'a>>,
    pub(super) oracle: Box<dyn Fn(&Inputs) -> Tensor + 'a>,
}

/// A result and the gradients of the inputs, in their order.
struct Outcome {
    y: Tensor,
    grads: Vec<Tensor>,
}

impl Subject<'_> {
    /// Values with inputs of the call's own element type.
    pub(super) fn inputs(&self, dtype: DType) -> Inputs {
        let kind = convert::kind(dtype);
        Inputs::new(&self.leaves, self.device, kind, kind)
    }

    /// Everything that must hold where the call is supported.
    pub(super) fn check(&self, dtype: DType, is_deterministic: bool) {
        let plain = self.inputs(dtype);
        if matches!(self.device, Device::Cuda(_)) {
            // Sums may be in any order unless somebody asks, and what follows compares bits.
            self.check_against_oracle("in any order", &plain, dtype, false);
            in_order(true);
        }
        let first = self.check_against_oracle("", &plain, dtype, false);
        if is_deterministic {
            let again = differentiate(&plain, false, |inputs| self.run(inputs));
            assert_eq!(first.y, again.y, "{}: two results differ", self.name);
            for ((name, _), (a, b)) in plain.0.iter().zip(first.grads.iter().zip(&again.grads)) {
                assert_eq!(a, b, "{}: two gradients of {name} differ", self.name);
            }
        }
        self.check_against_oracle("with a gradient of stride 0", &plain, dtype, true);
        if matches!(dtype, DType::Bf16 | DType::F16) {
            let kind = convert::kind(dtype);
            let masters = Inputs::new(&self.leaves, self.device, kind, Kind::Float);
            self.check_against_oracle("with fp32 masters", &masters, dtype, false);
        }
        let strided = plain.map(|input| {
            if input.dim() < 2 {
                return input.detach().copy().set_requires_grad(true);
            }
            let transposed = input.detach().transpose(-1, -2).contiguous();
            transposed.transpose(-1, -2).set_requires_grad(true)
        });
        self.check_against_oracle("with transposed memory", &strided, dtype, false);
        self.check_each_gradient_alone(&plain, &first);
        self.check_autocast(&plain, &first.y);
        if matches!(self.device, Device::Cuda(_)) {
            in_order(false);
        }
    }

    /// Compares gradients with central differences; needs fp64.
    pub(super) fn check_finite_differences(&self) {
        const STEP: f64 = 1e-5;
        let inputs = self.inputs(DType::F64);
        let loss = |inputs: &Inputs| {
            let y = self.run(inputs);
            (&y * cotangent(&y)).sum(Kind::Double)
        };
        loss(&inputs).backward();
        for (name, input) in &inputs.0 {
            let gradient = input.grad().reshape([-1]);
            for index in 0..gradient.size()[0] {
                let at = |shift: f64| {
                    let moved = inputs.detached();
                    let _element = moved.get(name).view([-1]).get(index).g_add_scalar_(shift);
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

    fn run(&self, inputs: &Inputs) -> Tensor {
        unwrap((self.call)(inputs))
    }

    fn check_against_oracle(
        &self,
        variant: &str,
        inputs: &Inputs,
        dtype: DType,
        is_summed: bool,
    ) -> Outcome {
        let tolerance = tolerance(dtype);
        let label = format!("{} {variant} in {dtype} on {:?}", self.name, self.device);
        let got = differentiate(inputs, is_summed, |inputs| self.run(inputs));
        let want = differentiate(&inputs.in_f64(), is_summed, &self.oracle);
        assert_eq!(
            got.y.kind(),
            convert::kind(dtype),
            "{label}: element type of the result"
        );
        assert_close(&format!("{label}: the result"), &got.y, &want.y, tolerance);
        for ((name, input), (got, want)) in inputs.0.iter().zip(got.grads.iter().zip(&want.grads)) {
            assert_close(&format!("{label}: d{name}"), got, want, tolerance);
            assert_eq!(got.kind(), input.kind(), "{label}: element type of d{name}");
        }
        got
    }

    /// Asking for one gradient must not need the others.
    fn check_each_gradient_alone(&self, plain: &Inputs, all: &Outcome) {
        for ((name, _), want) in plain.0.iter().zip(&all.grads) {
            let alone = plain.detached();
            let input = alone.get(name).set_requires_grad(true);
            let y = self.run(&alone);
            y.backward_with(&cotangent(&y));
            assert_eq!(
                &input.grad(),
                want,
                "{}: d{name} alone differs from d{name} among others",
                self.name
            );
        }
        let y = tch::no_grad(|| self.run(plain));
        assert!(
            !y.requires_grad(),
            "{}: a graph was recorded inside `no_grad`",
            self.name
        );
        assert_eq!(
            y, all.y,
            "{}: the result depends on whether a graph is recorded",
            self.name
        );
    }

    /// The caller chose the element type with `x`; autocast must not choose another one.
    fn check_autocast(&self, plain: &Inputs, want: &Tensor) {
        let scope = Autocast::new(self.device, Some(Kind::BFloat16));
        assert!(scope.is_ok(), "cannot enter autocast: {scope:?}");
        let y = self.run(plain);
        assert_eq!(
            y.kind(),
            want.kind(),
            "{}: element type under autocast",
            self.name
        );
        assert_eq!(
            &y.detach(),
            want,
            "{}: autocast changes the result",
            self.name
        );
    }
}

pub(super) fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => TOLERANCE_F64,
        DType::F32 => TOLERANCE_F32,
        DType::Bf16 => TOLERANCE_BF16,
        DType::F16 => TOLERANCE_F16,
    }
}

/// Runs `call` and its backward pass from [`cotangent`], or from the sum of all elements.
fn differentiate(inputs: &Inputs, is_summed: bool, call: impl Fn(&Inputs) -> Tensor) -> Outcome {
    let fresh = inputs.map(|input| input.detach().set_requires_grad(true));
    let y = call(&fresh);
    if is_summed {
        y.sum(y.kind()).backward();
    } else {
        y.backward_with(&cotangent(&y));
    }
    Outcome {
        y: y.detach(),
        grads: fresh.0.iter().map(|(_, input)| input.grad()).collect(),
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

/// A gradient of the result without pattern, exact in every type of two or more bytes.
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
pub(super) fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
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

/// Wants an error of three parts.
pub(super) fn assert_explained<T>(what: &str, outcome: Result<T, PluginError>) {
    match outcome {
        Ok(_) => panic!("{what} gave a result instead of an error"),
        Err(error) => assert!(
            !error.what.is_empty() && !error.why.is_empty() && !error.fix.is_empty(),
            "{what}: the error lacks a part: {error:?}"
        ),
    }
}

fn in_order(is_on: bool) {
    unwrap(determinism::set(is_on).or_plugin_error("libtorch's setting cannot be changed"));
}

pub(super) fn unwrap<T>(result: Result<T, PluginError>) -> T {
    result.unwrap_or_else(|error| panic!("{error}; fix: {}", error.fix))
}
