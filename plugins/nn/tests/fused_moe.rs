//! σ-MoE on a kernel with the fused call and on one without: which call the layer takes, and that both agree.

use std::cell::Cell;
use std::rc::Rc;

use moeut_nn::balance::{BalanceConfig, BalanceMode};
use moeut_nn::moe::{MoeConfig, MoePlace, SigmaMoe};
use moeut_nn::{Activation, Context, Params, Scoring};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{self, Fused, FusedCall, MoeMlp};
use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, Selection, TensorHandle,
};
use moeut_torch::{IntoHandle, IntoTensor};
use tch::{Device, Kind, Tensor};

thread_local! {
    static N_FUSED_CALLS: Cell<u32> = const { Cell::new(0) };
}

/// Copies each selection's weight; the fused call, if it has it, knows GELU.
struct Copies<const IS_FUSED: bool>;

impl<const IS_FUSED: bool> Kernel for Copies<IS_FUSED> {
    const NAME: &'static str = "copies";
    const SUMMARY: &'static str = "For this test";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        let fused = Fused {
            call: FusedCall::MoeMlp,
            activations: vec![kernel::Activation::Gelu],
            cpu: vec![DType::F64],
            cuda: Vec::new(),
        };
        Capabilities {
            cpu: vec![DType::F64],
            fused: IS_FUSED.then_some(fused).into_iter().collect(),
            ..Capabilities::default()
        }
    }

    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError> {
        let (x, weight) = (call.x.into_tensor(), call.weight.into_tensor());
        let experts_m = experts(call.selection);
        let per_row = experts_m.size()[0] / x.size()[0];
        let x_mk = x.repeat_interleave_self_int(per_row, 0, None);
        let y_mn = multiplied(&x_mk, &weight, &experts_m);
        Ok(match call.gate.map(IntoTensor::into_tensor) {
            None => y_mn,
            Some(gate) => weighted(&y_mn, &gate),
        }
        .into_handle())
    }

    fn moe_mlp(&self, call: MoeMlp) -> Result<TensorHandle, PluginError> {
        assert_eq!(call.options.activation, kernel::Activation::Gelu);
        N_FUSED_CALLS.set(N_FUSED_CALLS.get() + 1);
        let experts_m = experts(call.selection);
        let gate_tk = call.gate.into_tensor();
        let x = call.x.into_tensor();
        let x_md = x.repeat_interleave_self_int(gate_tk.size()[1], 0, None);
        let mut hidden_ms = multiplied(&x_md, &call.w1.into_tensor(), &experts_m);
        if let Some(b1_es) = call.b1 {
            hidden_ms += b1_es.into_tensor().index_select(0, &experts_m);
        }
        let y_md = multiplied(&hidden_ms.gelu("none"), &call.w2.into_tensor(), &experts_m);
        Ok(weighted(&y_md, &gate_tk).into_handle())
    }
}

/// Each selection's expert.
fn experts(selection: Selection) -> Tensor {
    let ends = selection.ends.into_tensor();
    let inverse = selection.inverse.into_tensor();
    let rows = Tensor::arange(inverse.size()[0], (Kind::Int, Device::Cpu));
    rows.searchsorted(&ends, false, true, "right", None::<Tensor>)
        .index_select(0, &inverse)
}

fn multiplied(x_mk: &Tensor, weight_ekn: &Tensor, experts_m: &Tensor) -> Tensor {
    let of_selection = weight_ekn.index_select(0, experts_m);
    x_mk.unsqueeze(1).bmm(&of_selection).squeeze_dim(1)
}

fn weighted(y_mn: &Tensor, gate: &Tensor) -> Tensor {
    let n = gate.size()[1];
    let y = y_mn.view([-1, n, y_mn.size()[1]]) * gate.unsqueeze(-1);
    y.sum_dim_intlist(1_i64, false, None)
}

const SHAPE: [i64; 3] = [2, 5, 6];

fn layer(params: &Params, activation: Activation, has_bias: bool) -> SigmaMoe {
    let place = MoePlace {
        d_model: SHAPE[2],
        depth_init: None,
        has_norm: true,
        activation,
        balances_selected: false,
    };
    let config = MoeConfig {
        n_experts: 4,
        d_expert: 3,
        top_k: 2,
        scoring: Scoring::Sigmoid,
        scores_after_top_k: false,
        has_bias,
        has_router_bias: false,
        expert_dropout: 0.0,
        router_dropout: 0.0,
        init_scale: 1.0,
        layer_std_constant: 2.0,
        balance: BalanceConfig {
            weight: 0.0,
            mode: BalanceMode::LayersTime,
        },
    };
    SigmaMoe::new(params, place, config)
}

/// The layer's output and the gradients of `x` and of all parameters.
fn run<const IS_FUSED: bool>(
    activation: Activation,
    has_bias: bool,
) -> Result<Vec<Tensor>, PluginError> {
    let params = Params::new(Kind::Double, Device::Cpu);
    let layer = layer(&params, activation, has_bias);
    let tensors: Vec<_> = params
        .parameters()
        .into_iter()
        .filter(|p| p.is_trainable)
        .collect();
    let tensors: Vec<Tensor> = tensors
        .into_iter()
        .map(|p| p.tensor.into_tensor())
        .collect();
    tch::no_grad(|| {
        for tensor in &tensors {
            // Biases start as zeros, which would hide them.
            tensor.shallow_clone().copy_(&values(&tensor.size()));
        }
    });
    let ctx = Context {
        kernel: Some(Rc::new(KernelClient::in_process(Copies::<IS_FUSED>)?)),
        compute: Kind::Double,
        is_mixed: false,
        router_dtype: moeut_nn::RouterDtype::F32,
        is_training: true,
        wishes: moeut_plugin_api::Wishes::default(),
        is_compat: false,
    };
    let x = values(&SHAPE).set_requires_grad(true);
    let mut pass = layer.begin(&ctx);
    let y = layer.forward(&x, &mut pass, &ctx)?;
    (&y * y.detach().cos()).sum(Kind::Double).backward();
    let grads = tensors.iter().map(Tensor::grad);
    Ok([y.detach(), x.grad()].into_iter().chain(grads).collect())
}

/// Values without a pattern, and without the random generator, which all tests of a process share.
fn values(shape: &[i64]) -> Tensor {
    let index = Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu));
    (&index * &index * 0.7 + 0.1).sin().reshape(shape)
}

fn assert_same(
    activation: Activation,
    has_bias: bool,
    n_fused_calls: u32,
) -> Result<(), PluginError> {
    let composed = run::<false>(activation, has_bias)?;
    assert_eq!(N_FUSED_CALLS.take(), 0);
    let fused = run::<true>(activation, has_bias)?;
    assert_eq!(N_FUSED_CALLS.take(), n_fused_calls);
    assert_eq!(composed.len(), fused.len());
    for (a, b) in composed.iter().zip(&fused) {
        assert!(a.abs().max().double_value(&[]) > 0.0);
        assert!((a - b).abs().max().double_value(&[]) < 1e-12);
    }
    Ok(())
}

#[test]
fn the_fused_call_is_taken_and_changes_nothing() {
    assert_same(Activation::Gelu, false, 1).unwrap();
    assert_same(Activation::Gelu, true, 1).unwrap();
}

#[test]
fn an_activation_that_the_call_lacks_is_composed() {
    assert_same(Activation::Relu, true, 0).unwrap();
    assert_same(Activation::Softmax, true, 0).unwrap();
}
