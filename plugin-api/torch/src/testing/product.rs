//! The grouped matrix product: its uses, its odd cases, and a dense oracle.

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::{Capabilities, DType, Device as AbiDevice, GroupedMatmul, PluginError};
use tch::{Device, Kind, Tensor};

use super::subject::{Inputs, Leaf, Subject, assert_explained};
use super::{Routing, selection, tch_device};
use crate::{IntoHandle, IntoTensor};

/// Checks the product where the kernel says that it has it, and its refusal elsewhere.
pub(super) fn check(
    kernel: &KernelClient,
    capabilities: &Capabilities,
    device: AbiDevice,
    dtype: DType,
) {
    let small = SMALL.subject(kernel, tch_device(device));
    if !capabilities.supports(device, dtype) {
        let outcome = (small.call)(&small.inputs(dtype));
        assert_explained("an element type that is not listed", outcome);
        return;
    }
    for case in &CASES {
        let subject = case.subject(kernel, tch_device(device));
        subject.check(dtype, capabilities.is_deterministic);
    }
    check_shape_errors(&small, dtype);
}

/// A product small enough for differences element by element.
pub(super) fn small(kernel: &KernelClient, device: Device) -> Subject<'_> {
    SMALL.subject(kernel, device)
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

    fn subject<'a>(&'a self, kernel: &'a KernelClient, device: Device) -> Subject<'a> {
        let n_selections = self.n_rows * self.per_row;
        let ids = self.routing.ids(n_selections, self.n_experts, device);
        let mut leaves = vec![
            Leaf::activation("x", &[self.n_rows, self.d_in]),
            Leaf::master("weight", &[self.n_experts, self.d_in, self.d_out]),
        ];
        if self.n_summed > 0 {
            let shape = [n_selections / self.n_summed, self.n_summed];
            leaves.push(Leaf::master("gate", &shape));
        }
        let same_ids = ids.shallow_clone();
        Subject {
            name: self.name.to_owned(),
            device,
            leaves,
            call: Box::new(move |inputs| call(kernel, inputs, &ids, self.n_experts)),
            oracle: Box::new(move |inputs| self.oracle(inputs, &same_ids)),
        }
    }

    /// The product that [`moeut_plugin_api::Kernel`] states, without sorting anything.
    fn oracle(&self, inputs: &Inputs, ids: &Tensor) -> Tensor {
        let x_mk = inputs
            .get("x")
            .repeat_interleave_self_int(self.per_row, 0, ids.size()[0]);
        let one_hot_me = ids.one_hot(self.n_experts).to_kind(Kind::Double);
        let weight = inputs.get("weight");
        let all_men = Tensor::einsum("mk,ekn->men", &[&x_mk, weight], None::<i64>);
        let y_mn = Tensor::einsum("me,men->mn", &[&one_hot_me, &all_men], None::<i64>);
        match inputs.find("gate") {
            None => y_mn,
            Some(gate) => {
                let y = y_mn.reshape([gate.size()[0], self.n_summed, self.d_out]);
                (y * gate.unsqueeze(-1)).sum_dim_intlist(1, false, None::<Kind>)
            }
        }
    }
}

const SMALL: Case = Case::new("small", [3, 4, 2], [5, 3, 3], Routing::Mixed);

/// Rows, selections per row and selections summed; inner width, outer width and experts.
const CASES: [Case; 16] = [
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
    Case::new(
        "results wider than a tile",
        [24, 2, 2],
        [16, 200, 5],
        Routing::Mixed,
    ),
    Case::new(
        "experts of several tiles",
        [300, 2, 2],
        [72, 136, 3],
        Routing::Mixed,
    ),
    Case::new(
        "one expert with more than 15 %",
        [400, 4, 4],
        [64, 48, 40],
        Routing::Skewed,
    ),
    Case::new("zero tokens", [0, 4, 2], [16, 8, 6], Routing::Mixed),
];

/// Breaks one input.
type Change = fn(&Tensor) -> Tensor;

fn check_shape_errors(small: &Subject<'_>, dtype: DType) {
    let wrong: [(&str, &str, Change); 5] = [
        ("a weight of another inner width", "weight", |w| {
            w.narrow(1, 0, 4)
        }),
        ("a weight without an axis of experts", "weight", |w| {
            w.get(0)
        }),
        ("rows that do not divide the selections", "x", |x| {
            Tensor::cat(&[x, &x.narrow(0, 0, 2)], 0)
        }),
        ("no rows for some selections", "x", |x| x.narrow(0, 0, 0)),
        ("a gate of too few entries", "gate", |gate| {
            gate.narrow(0, 0, 5)
        }),
    ];
    for (what, name, change) in wrong {
        let mut inputs = small.inputs(dtype);
        inputs.change(name, change);
        assert_explained(what, (small.call)(&inputs));
    }
}

fn call(
    kernel: &KernelClient,
    inputs: &Inputs,
    ids: &Tensor,
    n_experts: i64,
) -> Result<Tensor, PluginError> {
    let product = kernel.grouped_matmul(GroupedMatmul {
        x: inputs.get("x").share(),
        weight: inputs.get("weight").share(),
        selection: selection(ids, n_experts),
        gate: inputs.find("gate").map(IntoHandle::share),
    })?;
    Ok(product.into_tensor())
}
