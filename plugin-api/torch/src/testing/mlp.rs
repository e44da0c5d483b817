//! The fused σ-MoE layer: odd cases, a dense oracle, and what a kernel without it answers.

use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{Activation, FusedCall, MoeMlp, MoeMlpOptions};
use moeut_plugin_api::{Capabilities, DType, Device as AbiDevice, PluginError};
use tch::{Device, Kind, Tensor};

use super::subject::{Inputs, Leaf, Subject, assert_explained};
use super::{Routing, selection, tch_device};
use crate::{IntoHandle, IntoTensor};

/// Checks the call where the kernel says that it has it, and its refusal elsewhere.
pub(super) fn check(
    kernel: &KernelClient,
    capabilities: &Capabilities,
    device: AbiDevice,
    dtype: DType,
) {
    for activation in [Activation::Relu, Activation::Gelu, Activation::Unknown] {
        let subject = |case: &'static Case| case.subject(kernel, tch_device(device), activation);
        let small = subject(&CASES[0]);
        if capabilities.provides(FusedCall::MoeMlp, Some(activation), device, dtype) {
            for case in CASES
                .iter()
                .filter(|case| case.is_stable(activation, dtype))
            {
                subject(case).check(dtype, capabilities.is_deterministic);
            }
            check_shape_errors(&small, dtype);
        } else {
            let what = format!("`moe_mlp` with {activation:?} in {dtype}, which is not listed");
            assert_explained(&what, (small.call)(&small.inputs(dtype)));
        }
    }
}

/// One routing and its sizes.
struct Case {
    name: &'static str,
    n_tokens: i64,
    top_k: i64,
    d_model: i64,
    d_expert: i64,
    n_experts: i64,
    has_bias: bool,
    keeps_less: bool,
    routing: Routing,
}

impl Case {
    const fn new(
        name: &'static str,
        [n_tokens, top_k]: [i64; 2],
        [d_model, d_expert, n_experts]: [i64; 3],
        routing: Routing,
    ) -> Self {
        Self {
            name,
            n_tokens,
            top_k,
            d_model,
            d_expert,
            n_experts,
            has_bias: false,
            keeps_less: false,
            routing,
        }
    }

    const fn with_bias(self) -> Self {
        Self {
            has_bias: true,
            ..self
        }
    }

    const fn keeping_less(self) -> Self {
        Self {
            keeps_less: true,
            ..self
        }
    }

    /// A kernel may round `x · w1` before it adds the bias. Units that this brings to the other side of the kink of `ReLU`
    /// change the gradients by far more than rounding, and in 16-bit types there are some; GELU has no kink.
    fn is_stable(&self, activation: Activation, dtype: DType) -> bool {
        let is_wide = matches!(dtype, DType::F64 | DType::F32);
        is_wide || !self.has_bias || activation != Activation::Relu
    }

    fn subject<'a>(
        &'a self,
        kernel: &'a KernelClient,
        device: Device,
        activation: Activation,
    ) -> Subject<'a> {
        let Self {
            n_tokens,
            top_k,
            d_model,
            d_expert,
            n_experts,
            ..
        } = *self;
        let ids = self.routing.ids(n_tokens * top_k, n_experts, device);
        let mut leaves = vec![
            Leaf::activation("x", &[n_tokens, d_model]),
            Leaf::master("w1", &[n_experts, d_model, d_expert]),
            Leaf::master("w2", &[n_experts, d_expert, d_model]),
            Leaf::master("gate", &[n_tokens, top_k]),
        ];
        if self.has_bias {
            leaves.push(Leaf::master("b1", &[n_experts, d_expert]));
        }
        let same_ids = ids.shallow_clone();
        let options = MoeMlpOptions {
            activation,
            keeps_less: self.keeps_less,
        };
        Subject {
            name: format!("fused σ-MoE, {activation:?}, {}", self.name),
            device,
            leaves,
            call: Box::new(move |inputs| call(kernel, inputs, &ids, n_experts, options)),
            oracle: Box::new(move |inputs| self.oracle(inputs, &same_ids, activation)),
        }
    }

    /// Every expert on every token; the gates pick.
    fn oracle(&self, inputs: &Inputs, ids: &Tensor, activation: Activation) -> Tensor {
        let (x_td, w1) = (inputs.get("x"), inputs.get("w1"));
        let mut hidden_tes = Tensor::einsum("td,eds->tes", &[x_td, w1], None::<i64>);
        if let Some(b1_es) = inputs.find("b1") {
            hidden_tes += b1_es;
        }
        let active_tes = match activation {
            Activation::Relu => hidden_tes.relu(),
            Activation::Gelu => hidden_tes.gelu("none"),
            Activation::Unknown => panic!("no kernel can provide an unknown activation"),
        };
        let w2 = inputs.get("w2");
        let y_ted = Tensor::einsum("tes,esd->ted", &[&active_tes, w2], None::<i64>);
        let one_hot_tke = ids.one_hot(self.n_experts).to_kind(Kind::Double).reshape([
            self.n_tokens,
            self.top_k,
            self.n_experts,
        ]);
        let of_expert_te = Tensor::einsum(
            "tke,tk->te",
            &[&one_hot_tke, inputs.get("gate")],
            None::<i64>,
        );
        Tensor::einsum("te,ted->td", &[&of_expert_te, &y_ted], None::<i64>)
    }
}

/// Tokens and selections of each; `d_model`, `d_expert` and experts.
const CASES: [Case; 14] = [
    Case::new("plain", [24, 4], [16, 8, 6], Routing::Mixed),
    Case::new("with a bias", [24, 4], [16, 8, 6], Routing::Mixed).with_bias(),
    Case::new("k = 1", [24, 1], [16, 8, 6], Routing::Mixed),
    Case::new("a single expert", [24, 2], [16, 8, 1], Routing::Mixed).with_bias(),
    Case::new("all on one expert", [24, 4], [16, 8, 6], Routing::One).with_bias(),
    Case::new("empty experts", [24, 4], [16, 8, 12], Routing::Sparse).with_bias(),
    Case::new(
        "more experts than selections",
        [2, 2],
        [16, 8, 32],
        Routing::Mixed,
    ),
    Case::new("412 and 82", [15, 3], [412, 82, 5], Routing::Mixed),
    Case::new("82 and 41", [15, 3], [82, 41, 5], Routing::Mixed).with_bias(),
    Case::new(
        "experts of several tiles",
        [300, 2],
        [136, 144, 3],
        Routing::Mixed,
    ),
    Case::new(
        "one expert with more than 15 %",
        [400, 4],
        [64, 48, 40],
        Routing::Skewed,
    ),
    Case::new("zero tokens", [0, 4], [16, 8, 6], Routing::Mixed).with_bias(),
    Case::new("computed again", [24, 4], [16, 8, 6], Routing::Mixed).keeping_less(),
    Case::new(
        "computed again, 82 and 41",
        [15, 3],
        [82, 41, 5],
        Routing::Mixed,
    )
    .with_bias()
    .keeping_less(),
];

/// Breaks one input.
type Change = fn(&Tensor) -> Tensor;

fn check_shape_errors(plain: &Subject<'_>, dtype: DType) {
    let wrong: [(&str, &str, Change); 4] = [
        ("values of another width", "w2", |w2| w2.narrow(2, 0, 8)),
        ("keys without an axis of experts", "w1", |w1| w1.get(0)),
        ("more tokens than gates", "x", |x| Tensor::cat(&[x, x], 0)),
        ("a gate of too few entries", "gate", |g| g.narrow(1, 0, 3)),
    ];
    for (what, name, change) in wrong {
        let mut inputs = plain.inputs(dtype);
        inputs.change(name, change);
        assert_explained(what, (plain.call)(&inputs));
    }
}

fn call(
    kernel: &KernelClient,
    inputs: &Inputs,
    ids: &Tensor,
    n_experts: i64,
    options: MoeMlpOptions,
) -> Result<Tensor, PluginError> {
    let y = kernel.moe_mlp(MoeMlp {
        x: inputs.get("x").share(),
        w1: inputs.get("w1").share(),
        b1: inputs.find("b1").map(IntoHandle::share),
        w2: inputs.get("w2").share(),
        gate: inputs.get("gate").share(),
        selection: selection(ids, n_experts),
        options,
    })?;
    Ok(y.into_tensor())
}
