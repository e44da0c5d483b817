//! The loss of each token beside an oracle, with logits small and large, and rows without a target.

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{CrossEntropy, FusedCall};
use moeut_plugin_api::{Capabilities, DType, Device as AbiDevice, PluginError};
use tch::{Device, Kind, Tensor};

use super::subject::{Inputs, Leaf, Subject, assert_close, assert_explained, tolerance, unwrap};
use super::tch_device;
use crate::{IntoHandle, IntoTensor};

/// Checks the call where the kernel says that it has it, and its refusal elsewhere.
pub(super) fn check(
    kernel: &KernelClient,
    capabilities: &Capabilities,
    device: AbiDevice,
    dtype: DType,
) {
    let small = CASES[0].subject(kernel, tch_device(device));
    if !capabilities.provides(FusedCall::CrossEntropy, None, device, dtype) {
        let outcome = (small.call)(&small.inputs(dtype));
        assert_explained("`cross_entropy`, which is not listed", outcome);
        return;
    }
    for case in &CASES {
        let subject = case.subject(kernel, tch_device(device));
        subject.check(dtype, capabilities.is_deterministic);
        case.check_precision(kernel, &subject.inputs(dtype), dtype);
    }
    check_refusals(kernel, &small.inputs(dtype));
}

struct Case {
    name: &'static str,
    n_rows: i64,
    vocab_size: i64,
    /// A power of two, so that logits are as exact as what they are made of.
    scale: f64,
    /// Every how many rows there is one without a target; 0: none is.
    n_between: i64,
}

impl Case {
    const fn new(
        name: &'static str,
        [n_rows, vocab_size]: [i64; 2],
        scale: f64,
        n_between: i64,
    ) -> Self {
        Self {
            name,
            n_rows,
            vocab_size,
            scale,
            n_between,
        }
    }

    fn subject<'a>(&'a self, kernel: &'a KernelClient, device: Device) -> Subject<'a> {
        Subject {
            name: format!("cross-entropy, {}", self.name),
            device,
            leaves: vec![Leaf::activation("x", &[self.n_rows, self.vocab_size])],
            call: Box::new(move |inputs| {
                let losses = self.losses(kernel, inputs)?;
                Ok(losses.to_kind(inputs.get("x").kind()))
            }),
            oracle: Box::new(move |inputs| {
                let logits = inputs.get("x") * self.scale;
                let targets = self.targets(device);
                let log_p = logits.log_softmax(-1, Kind::Double);
                let ids = targets.clamp_min(0).unsqueeze(-1);
                let losses = -log_p.gather(-1, &ids, false).squeeze_dim(-1);
                // Where there is no target, there is no way for a gradient either.
                losses * targets.ge(0)
            }),
        }
    }

    fn losses(&self, kernel: &KernelClient, inputs: &Inputs) -> Result<Tensor, PluginError> {
        let x = inputs.get("x");
        let losses = kernel.cross_entropy(CrossEntropy {
            logits: (x * self.scale).into_handle(),
            targets: self.targets(x.device()).into_handle(),
        })?;
        Ok(losses.into_tensor())
    }

    /// Negative ones of two kinds among them.
    fn targets(&self, device: Device) -> Tensor {
        let row = Tensor::arange(self.n_rows, (Kind::Int64, device));
        let ids = (&row * 7919 + self.vocab_size / 2).remainder(self.vocab_size);
        if self.n_between == 0 {
            return ids;
        }
        let none = row.remainder(2) * -99 - 1;
        let is_none = row.remainder(self.n_between).eq(0);
        none.where_self(&is_none, &ids)
    }

    /// Losses are computed and left in fp32 also where logits have 16 bits.
    fn check_precision(&self, kernel: &KernelClient, inputs: &Inputs, dtype: DType) {
        let losses = unwrap(self.losses(kernel, inputs)).detach();
        let (kind, precision) = match dtype {
            DType::F64 => (Kind::Double, DType::F64),
            DType::F32 | DType::Bf16 | DType::F16 => (Kind::Float, DType::F32),
        };
        assert_eq!(losses.kind(), kind, "{}: element type", self.name);
        let subject = self.subject(kernel, losses.device());
        let want = (subject.oracle)(&inputs.in_f64()).detach();
        let what = format!("{}: the losses of logits in {dtype}", self.name);
        assert_close(&what, &losses, &want, tolerance(precision));
    }
}

/// Rows and ids, scale, rows without a target.
const CASES: [Case; 10] = [
    Case::new("plain", [5, 40], 4.0, 0),
    Case::new("an odd vocabulary", [7, 41], 4.0, 3),
    Case::new("a handful of ids", [9, 5], 4.0, 4),
    Case::new("one id", [4, 1], 32768.0, 0),
    Case::new("thousands of ids", [3, 8003], 8.0, 0),
    Case::new("one row", [1, 1000], 8.0, 0),
    Case::new("many rows", [300, 24], 4.0, 2),
    Case::new("no row has a target", [3, 24], 4.0, 1),
    Case::new("large logits", [6, 97], 32768.0, 3),
    Case::new("two large logits", [64, 2], 32768.0, 0),
];

fn check_refusals(kernel: &KernelClient, inputs: &Inputs) {
    let x = inputs.get("x").detach();
    let targets = CASES[0].targets(x.device());
    let call = |logits: &Tensor, targets: &Tensor| {
        kernel.cross_entropy(CrossEntropy {
            logits: logits.share(),
            targets: targets.share(),
        })
    };
    for (what, logits, targets) in [
        ("a target too few", &x, targets.narrow(0, 0, 4)),
        ("logits of sequences", &x.unsqueeze(0), targets.unsqueeze(0)),
        ("targets that are no ids", &x, targets.to_kind(Kind::Float)),
    ] {
        assert_explained(what, call(logits, &targets));
    }
    match call(&x, &(targets + CASES[0].vocab_size)) {
        Ok(losses) => assert!(
            losses.into_tensor().isnan().all().int64_value(&[]) == 1,
            "targets beyond the vocabulary have a loss"
        ),
        refused => assert_explained("targets beyond the vocabulary", refused),
    }
}
