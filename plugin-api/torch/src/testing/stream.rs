//! What a kernel may fuse around the residual stream: addition with layer normalization, and rotary positions.

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{FusedCall, ResidualNorm, ResidualNormOptions, Rotate};
use moeut_plugin_api::{Capabilities, DType, Device as AbiDevice, PluginError};
use tch::{Device, Kind, Tensor};

use super::subject::{Inputs, Leaf, Subject, assert_close, assert_explained, tolerance, unwrap};
use super::tch_device;
use crate::{IntoHandle, IntoTensor, convert};

/// Checks the calls where the kernel says that it has them, and their refusal elsewhere.
pub(super) fn check(
    kernel: &KernelClient,
    capabilities: &Capabilities,
    abi_device: AbiDevice,
    dtype: DType,
) {
    let device = tch_device(abi_device);
    let provides = |call| capabilities.provides(call, None, abi_device, dtype);
    let is_deterministic = capabilities.is_deterministic;
    if provides(FusedCall::ResidualNorm) {
        for case in &NORMS {
            case.subject(kernel, device, dtype)
                .check(dtype, is_deterministic);
            if matches!(dtype, DType::Bf16 | DType::F16) {
                case.check_rounded(kernel, device, dtype);
            }
        }
        check_norm_shapes(&NORMS[0].subject(kernel, device, dtype), dtype);
    } else {
        let subject = NORMS[0].subject(kernel, device, dtype);
        let outcome = (subject.call)(&subject.inputs(dtype));
        assert_explained("`residual_norm`, which is not listed", outcome);
    }
    for case in &ROTATIONS {
        let subject = case.subject(kernel, device);
        if provides(FusedCall::Rotate) {
            subject.check(dtype, is_deterministic);
        } else {
            let outcome = (subject.call)(&subject.inputs(dtype));
            assert_explained("`rotate`, which is not listed", outcome);
        }
    }
}

struct NormCase {
    name: &'static str,
    shape: [i64; 3],
    /// Channels that are normalized.
    width: i64,
    has_update: bool,
    is_wide: bool,
}

impl NormCase {
    const fn new(name: &'static str, shape: [i64; 3], has_update: bool, is_wide: bool) -> Self {
        Self {
            name,
            shape,
            width: shape[2],
            has_update,
            is_wide,
        }
    }

    const fn in_wider_rows(name: &'static str, width: i64, shape: [i64; 3]) -> Self {
        Self {
            width,
            ..Self::new(name, shape, true, false)
        }
    }

    fn subject<'a>(
        &'a self,
        kernel: &'a KernelClient,
        device: Device,
        dtype: DType,
    ) -> Subject<'a> {
        let width = &[self.width];
        let mut leaves = vec![
            Leaf::activation("x", &self.shape),
            Leaf::master("weight", width),
            Leaf::master("bias", width),
        ];
        if self.has_update {
            leaves.push(Leaf::activation("update", &self.shape));
        }
        Subject {
            name: format!("layernorm, {}", self.name),
            device,
            leaves,
            call: Box::new(move |inputs| self.call(kernel, inputs, dtype)),
            oracle: Box::new(|inputs| {
                let x = inputs.get("x");
                let sum = match inputs.find("update") {
                    Some(update) => x + update,
                    None => x.shallow_clone(),
                };
                let normed = normed(&sum, inputs);
                joined([&sum, &sum, &normed], Kind::Double)
            }),
        }
    }

    /// A stream that is rounded already stays as it is, and is normalized without a graph.
    fn check_rounded(&self, kernel: &KernelClient, device: Device, dtype: DType) {
        let inputs = self.subject(kernel, device, dtype).inputs(dtype);
        let x = inputs.get("x");
        let parameter = |name| inputs.get(name).to_kind(Kind::Float).into_handle();
        let found = unwrap(kernel.residual_norm(ResidualNorm {
            x: x.share(),
            update: None,
            weight: parameter("weight"),
            bias: parameter("bias"),
            options: self.options(dtype),
        }));
        let of_oracle = inputs.in_f64();
        let wanted = normed(of_oracle.get("x"), &of_oracle);
        let what = format!("layernorm of what is rounded, {}", self.name);
        for same in [found.sum, found.plain] {
            assert_eq!(&same.into_tensor(), x, "{what}");
        }
        let found = found.normed.into_tensor();
        let is_recorded = found.requires_grad();
        assert!(
            !is_recorded && (found.kind() == Kind::Float) == self.is_wide,
            "{what}"
        );
        assert_close(&what, &found, &wanted, tolerance(dtype));
    }

    fn options(&self, dtype: DType) -> ResidualNormOptions {
        ResidualNormOptions {
            eps: EPS,
            dtype,
            is_wide: self.is_wide,
        }
    }

    fn call(
        &self,
        kernel: &KernelClient,
        inputs: &Inputs,
        dtype: DType,
    ) -> Result<Tensor, PluginError> {
        let kind = convert::kind(dtype);
        // The stream and the parameters are as precise as masters.
        let wide = match kind {
            Kind::Half | Kind::BFloat16 => Kind::Float,
            kind => kind,
        };
        let stream = |name| inputs.get(name).to_kind(wide).into_handle();
        let found = kernel.residual_norm(ResidualNorm {
            x: stream("x"),
            update: inputs.find("update").map(IntoHandle::share),
            weight: stream("weight"),
            bias: stream("bias"),
            options: self.options(dtype),
        })?;
        let [sum, plain, normed] =
            [found.sum, found.plain, found.normed].map(IntoTensor::into_tensor);
        let of_normed = if self.is_wide { wide } else { kind };
        assert_eq!(
            [&sum, &plain, &normed].map(Tensor::kind),
            [wide, kind, of_normed]
        );
        Ok(joined([&sum, &plain, &normed], kind))
    }
}

/// The first channels of `sum` normalized, the others 0.
fn normed(sum: &Tensor, inputs: &Inputs) -> Tensor {
    let (weight, bias) = (inputs.get("weight"), Some(inputs.get("bias")));
    let read = sum.narrow(-1, 0, weight.size()[0]);
    let normed = read.layer_norm(weight.size(), Some(weight), bias, EPS, false);
    normed.constant_pad_nd([0, sum.size()[2] - weight.size()[0]])
}

const EPS: f64 = 1e-5;

const NORMS: [NormCase; 8] = [
    NormCase::new("plain", [2, 5, 16], true, false),
    NormCase::new("without an update", [2, 5, 16], false, false),
    NormCase::new("a precise result", [2, 5, 16], true, true),
    NormCase::new("a width of 412", [3, 41, 412], true, false),
    NormCase::new("an odd width", [3, 5, 41], true, true),
    NormCase::new("more rows than blocks", [9, 100, 24], true, false),
    NormCase::in_wider_rows("412 of 416 channels", 412, [3, 41, 416]),
    NormCase::in_wider_rows("41 of 48 channels", 41, [3, 5, 48]),
];

/// Three results as one.
fn joined(results: [&Tensor; 3], kind: Kind) -> Tensor {
    Tensor::cat(&results.map(|result| result.to_kind(kind)), 0)
}

fn check_norm_shapes(plain: &Subject<'_>, dtype: DType) {
    for (what, name) in [
        ("a weight of another width", "weight"),
        ("an update of another width", "update"),
    ] {
        let mut inputs = plain.inputs(dtype);
        inputs.change(name, |input| input.narrow(-1, 0, 8));
        assert_explained(what, (plain.call)(&inputs));
    }
}

struct RotationCase {
    name: &'static str,
    shape: [i64; 4],
    n_angles: i64,
}

impl RotationCase {
    fn subject<'a>(&'a self, kernel: &'a KernelClient, device: Device) -> Subject<'a> {
        Subject {
            name: format!("rotation, {}", self.name),
            device,
            leaves: vec![Leaf::activation("x", &self.shape)],
            call: Box::new(move |inputs| {
                let x = inputs.get("x");
                let kind = if x.kind() == Kind::Double {
                    Kind::Double
                } else {
                    Kind::Float
                };
                let [cos, sin] = self.tables(device).map(|table| table.to_kind(kind));
                let y = kernel.rotate(Rotate {
                    x: x.share(),
                    cos: cos.into_handle(),
                    sin: sin.into_handle(),
                })?;
                Ok(y.into_tensor())
            }),
            oracle: Box::new(move |inputs| {
                let x = inputs.get("x");
                let [cos, sin] = self.tables(device).map(|table| table.unsqueeze(1));
                let n = self.n_angles;
                let (x1, x2) = (x.narrow(3, 0, n), x.narrow(3, n, n));
                let rest = x.narrow(3, 2 * n, self.shape[3] - 2 * n);
                let (y1, y2) = (&x1 * &cos - &x2 * &sin, &x2 * &cos + &x1 * &sin);
                Tensor::cat(&[y1, y2, rest], 3)
            }),
        }
    }

    /// `cos` and `sin`, `[T, n]`.
    fn tables(&self, device: Device) -> [Tensor; 2] {
        let options = (Kind::Double, device);
        let positions = Tensor::arange(self.shape[1], options);
        let angles = positions.outer(&(Tensor::arange(self.n_angles, options) + 1.0)) * 0.3;
        [angles.cos(), angles.sin()]
    }
}

const ROTATIONS: [RotationCase; 4] = [
    RotationCase {
        name: "half of the channels",
        shape: [2, 5, 3, 32],
        n_angles: 8,
    },
    RotationCase {
        name: "odd sizes",
        shape: [3, 4, 2, 41],
        n_angles: 10,
    },
    RotationCase {
        name: "halves that are no whole pieces",
        shape: [2, 5, 3, 48],
        n_angles: 20,
    },
    RotationCase {
        name: "all channels",
        shape: [1, 7, 1, 16],
        n_angles: 8,
    },
];
