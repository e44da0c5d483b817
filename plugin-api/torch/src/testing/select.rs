//! Routing in one call: gates, mean probabilities and the sorted selections, beside a dense oracle.

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{FusedCall, Select, SelectOptions};
use moeut_plugin_api::{Capabilities, DType, Device as AbiDevice};
use tch::{Device, Kind, Tensor};

use super::subject::{Inputs, Leaf, Subject, assert_explained, unwrap};
use super::{selection, tch_device};
use crate::{IntoHandle, IntoTensor};

/// Checks the call where the kernel says that it has it, and its refusal elsewhere.
pub(super) fn check(
    kernel: &KernelClient,
    capabilities: &Capabilities,
    device: AbiDevice,
    dtype: DType,
) {
    let small = CASES[0].subject(kernel, tch_device(device));
    if !capabilities.provides(FusedCall::Select, None, device, dtype) {
        let outcome = (small.call)(&small.inputs(dtype));
        assert_explained("`select`, which is not listed", outcome);
        return;
    }
    for case in &CASES {
        let subject = case.subject(kernel, tch_device(device));
        subject.check(dtype, capabilities.is_deterministic);
        case.check_selection(kernel, &subject.inputs(dtype));
    }
    for (what, name, axis) in [
        ("a router of another width", "weight", 1),
        ("a lost token", "x", 0),
    ] {
        let mut inputs = small.inputs(dtype);
        inputs.change(name, |input| {
            let length = input.size()[usize::from(axis == 1)];
            input.narrow(axis, 0, length - 1)
        });
        assert_explained(what, (small.call)(&inputs));
    }
}

struct Case {
    name: &'static str,
    n_sequences: i64,
    seq_len: i64,
    d_model: i64,
    n_groups: i64,
    n_experts: i64,
    top_k: i64,
    keeps_less: bool,
}

impl Case {
    const fn new(
        name: &'static str,
        [n_sequences, seq_len, d_model]: [i64; 3],
        [n_groups, n_experts, top_k]: [i64; 3],
    ) -> Self {
        Self {
            name,
            n_sequences,
            seq_len,
            d_model,
            n_groups,
            n_experts,
            top_k,
            keeps_less: false,
        }
    }

    const fn keeping_less(self) -> Self {
        Self {
            keeps_less: true,
            ..self
        }
    }

    fn subject<'a>(&'a self, kernel: &'a KernelClient, device: Device) -> Subject<'a> {
        Subject {
            name: format!("selection, {}", self.name),
            device,
            leaves: vec![
                Leaf::activation("x", &[self.n_sequences * self.seq_len, self.d_model]),
                Leaf::master("weight", &[self.n_groups * self.n_experts, self.d_model]),
            ],
            call: Box::new(move |inputs| {
                let found = kernel.select(self.call(inputs))?;
                let (gate, log_means) = (found.gate.into_tensor(), found.log_means.into_tensor());
                let results = [gate.reshape([-1]), log_means.reshape([-1])];
                Ok(Tensor::cat(&results, 0).to_kind(inputs.get("x").kind()))
            }),
            oracle: Box::new(move |inputs| {
                let z = self.logits(inputs);
                let gate = z.gather(-1, &self.chosen(&z), false).sigmoid();
                let p = z.softmax(-1, None).view([
                    self.n_sequences,
                    self.seq_len,
                    self.n_groups,
                    self.n_experts,
                ]);
                let log_means = p.mean_dim(1_i64, false, None).log();
                Tensor::cat(&[gate.reshape([-1]), log_means.reshape([-1])], 0)
            }),
        }
    }

    fn call(&self, inputs: &Inputs) -> Select {
        Select {
            x: inputs.get("x").share(),
            weight: inputs.get("weight").share(),
            options: SelectOptions {
                n_groups: self.n_groups,
                top_k: self.top_k,
                n_sequences: self.n_sequences,
                allows_tf32: false,
                keeps_less: self.keeps_less,
            },
        }
    }

    /// `[T·G, E]`.
    fn logits(&self, inputs: &Inputs) -> Tensor {
        let z = inputs.get("x").matmul(&inputs.get("weight").tr());
        z.reshape([-1, self.n_experts])
    }

    /// Ids within a group, best first.
    fn chosen(&self, z: &Tensor) -> Tensor {
        tch::no_grad(|| z.topk(self.top_k, -1, true, true).1)
    }

    /// The sorted selections are those of a stable sort of the ids.
    fn check_selection(&self, kernel: &KernelClient, inputs: &Inputs) {
        let found = unwrap(kernel.select(self.call(inputs)));
        let (got, got_ids) = (found.selection, found.ids.into_tensor());
        let wide = inputs.in_f64();
        let ids = self.chosen(&self.logits(&wide));
        let first_of_group = Tensor::arange(self.n_groups, (Kind::Int64, ids.device()));
        let ids = ids.view([-1, self.n_groups, self.top_k])
            + (first_of_group * self.n_experts).unsqueeze(-1);
        assert_eq!(
            got_ids,
            ids.to_kind(Kind::Int).view_as(&got_ids),
            "{}: ids",
            self.name
        );
        let want = selection(&ids, self.n_groups * self.n_experts);
        for (what, got, want) in [
            ("order", got.order, want.order),
            ("inverse", got.inverse, want.inverse),
            ("ends", got.ends, want.ends),
        ] {
            let (got, want) = (got.into_tensor(), want.into_tensor());
            assert_eq!(got.kind(), want.kind(), "{}: type of {what}", self.name);
            assert_eq!(got, want, "{}: {what}", self.name);
        }
    }
}

/// Sequences, tokens of each and `d_model`; groups, experts of each and selections of each.
const CASES: [Case; 9] = [
    Case::new("plain", [2, 12, 16], [1, 6, 3]),
    Case::new("heads", [2, 12, 16], [4, 5, 2]),
    Case::new("several chunks", [3, 150, 24], [1, 40, 4]),
    Case::new("odd numbers", [2, 7, 41], [1, 131, 5]),
    Case::new("hundreds of experts", [2, 30, 64], [1, 387, 16]),
    Case::new("a thousand experts", [1, 20, 64], [1, 1001, 32]),
    Case::new("all experts", [2, 5, 16], [2, 4, 4]),
    Case::new("one expert", [2, 5, 16], [1, 1, 1]),
    Case::new("computed again", [2, 30, 64], [1, 387, 16]).keeping_less(),
];
