//! Layers with experts on a kernel with fused calls and on one without: which calls they take, and that both agree.

use std::cell::Cell;
use std::rc::Rc;

use moeut_nn::attention::Heads;
use moeut_nn::balance::{BalanceConfig, BalanceMode};
use moeut_nn::moe::{MoeConfig, MoePlace, SigmaMoe};
use moeut_nn::switchhead::{ExpertSides, SwitchHead, SwitchHeadConfig, SwitchHeadPlace};
use moeut_nn::{
    Activation, AttentionMaps, Context, LayerPast, Params, RopeConfig, Routing, Scoring, Stream,
};
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::{
    self, Fused, FusedCall, MoeMlp, ResidualNorm, ResidualNormed, Rotate, Select, Selected,
};
use moeut_plugin_api::{
    Capabilities, DType, GroupedMatmul, Host, Kernel, PluginError, Selection, TensorHandle,
};
use moeut_torch::frugal::{counted, frugally};
use moeut_torch::{IntoHandle, IntoTensor, OrPluginError};
use tch::{Device, Kind, Tensor};

thread_local! {
    static N_FUSED_CALLS: Cell<u32> = const { Cell::new(0) };
    static N_SELECTIONS: Cell<u32> = const { Cell::new(0) };
    static N_ROTATIONS: Cell<u32> = const { Cell::new(0) };
}

/// Copies each selection's weight; the fused calls, if it has them, know GELU.
struct Copies<const IS_FUSED: bool>;

impl<const IS_FUSED: bool> Kernel for Copies<IS_FUSED> {
    const NAME: &'static str = "copies";
    const SUMMARY: &'static str = "For this test";

    fn new(_host: &Host) -> Result<Self, PluginError> {
        Ok(Self)
    }

    fn capabilities() -> Capabilities {
        let fused = [
            FusedCall::MoeMlp,
            FusedCall::ResidualNorm,
            FusedCall::Select,
            FusedCall::Rotate,
        ]
        .map(|call| Fused {
            call,
            activations: vec![kernel::Activation::Gelu],
            cpu: vec![DType::F64],
            cuda: Vec::new(),
        });
        Capabilities {
            cpu: vec![DType::F64],
            fused: fused.into_iter().filter(|_| IS_FUSED).collect(),
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

    fn residual_norm(&self, call: ResidualNorm) -> Result<ResidualNormed, PluginError> {
        let mut sum = call.x.into_tensor();
        if let Some(update) = call.update {
            sum = &sum + update.into_tensor();
        }
        let (weight, bias) = (call.weight.into_tensor(), call.bias.into_tensor());
        let eps = call.options.eps;
        let normed = sum.layer_norm(weight.size(), Some(&weight), Some(&bias), eps, false);
        Ok(ResidualNormed {
            plain: sum.share(),
            sum: sum.into_handle(),
            normed: normed.into_handle(),
        })
    }

    fn select(&self, call: Select) -> Result<Selected, PluginError> {
        N_SELECTIONS.set(N_SELECTIONS.get() + 1);
        let (x, weight, options) = (
            call.x.into_tensor(),
            call.weight.into_tensor(),
            call.options,
        );
        let n_experts = weight.size()[0] / options.n_groups;
        let z_tge = x
            .matmul(&weight.tr())
            .view([-1, options.n_groups, n_experts]);
        let ids_tgk = tch::no_grad(|| z_tge.topk(options.top_k, -1, true, true).1);
        let gate_tgk = z_tge.gather(-1, &ids_tgk, false).sigmoid();
        let p_btge =
            z_tge
                .softmax(-1, None)
                .view([options.n_sequences, -1, options.n_groups, n_experts]);
        let log_means = p_btge.mean_dim(1_i64, false, None).log();
        let groups = Tensor::arange(options.n_groups, (Kind::Int64, Device::Cpu));
        let ids_tgk = ids_tgk + (groups * n_experts).unsqueeze(-1);
        let routing = Routing::new(&ids_tgk, weight.size()[0]);
        Ok(Selected {
            gate: gate_tgk.view([-1, options.top_k]).into_handle(),
            log_means: log_means.into_handle(),
            ids: ids_tgk
                .view([-1, options.top_k])
                .to_kind(Kind::Int)
                .into_handle(),
            selection: routing.selection(),
        })
    }

    fn rotate(&self, call: Rotate) -> Result<TensorHandle, PluginError> {
        N_ROTATIONS.set(N_ROTATIONS.get() + 1);
        let x = call.x.into_tensor();
        let [cos, sin] = [call.cos, call.sin].map(|table| table.into_tensor().unsqueeze(1));
        let (n, d_head) = (cos.size()[2], x.size()[3]);
        let (x1, x2) = (x.narrow(3, 0, n), x.narrow(3, n, n));
        let turned = [&x1 * &cos - &x2 * &sin, &x2 * &cos + &x1 * &sin];
        let rest = x.narrow(3, 2 * n, d_head - 2 * n);
        Ok(Tensor::cat(&[&turned[0], &turned[1], &rest], 3).into_handle())
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

const BALANCE: BalanceConfig = BalanceConfig {
    is_everywhere: true,
    weight: 0.5,
    mode: BalanceMode::LayersTime,
};

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
        balance: BALANCE,
    };
    SigmaMoe::new(params, place, config)
}

/// What a layer gives: its output, the gradients of `x` and of all parameters; and the bytes that it kept for them.
type Outcome = (Vec<Tensor>, usize);

/// The layer's.
fn run<const IS_FUSED: bool>(
    activation: Activation,
    has_bias: bool,
    is_frugal: bool,
) -> Result<Outcome, PluginError> {
    let params = Params::new(Kind::Double, Device::Cpu);
    let layer = layer(&params, activation, has_bias);
    let tensors = filled(&params);
    let ctx = context::<IS_FUSED>(is_frugal)?;
    let x = values(&SHAPE).set_requires_grad(true);
    let forward = || {
        let mut pass = layer.begin(&ctx);
        let reading = ctx.reading(&Stream::from(x.shallow_clone()), layer.norm(), false)?;
        let y = layer.forward(&reading, &mut pass, &ctx)?;
        Ok((y, SigmaMoe::finish(pass, &[0])?.balance))
    };
    differentiated(forward, &x, &tensors)
}

/// The attention's, likewise, with an update on the way into it.
fn run_attention<const IS_FUSED: bool>(is_frugal: bool) -> Result<Outcome, PluginError> {
    let params = Params::new(Kind::Double, Device::Cpu);
    let place = SwitchHeadPlace {
        d_model: SHAPE[2],
        depth_init: None,
        has_norm: true,
    };
    let config = SwitchHeadConfig {
        heads: Heads {
            n_heads: 2,
            d_head: 4,
        },
        d_value: 3,
        n_experts: 3,
        top_k: 2,
        sides: ExpertSides {
            q: false,
            k: false,
            v: true,
            o: true,
            same_sel: false,
            separate_kq_sel: false,
        },
        scoring: Scoring::Sigmoid,
        dropout: 0.0,
        expert_dropout: 0.0,
        router_dropout: 0.0,
        has_norm_init: false,
        balance: BALANCE,
        rope: RopeConfig {
            fraction: 0.5,
            base: 100.0,
        },
    };
    let layer = SwitchHead::new(&params, place, config);
    let tensors = filled(&params);
    let ctx = context::<IS_FUSED>(is_frugal)?;
    let x = values(&SHAPE).set_requires_grad(true);
    let forward = || {
        let mut pass = layer.begin(&ctx);
        let between = Stream::updated(x.shallow_clone(), &x * &x);
        let reading = ctx.reading(&between, layer.norm(), false)?;
        let seen = (&mut LayerPast::none(false), &mut AttentionMaps::new(&ctx));
        let y = layer.forward(&reading, None, &mut pass, seen, &ctx)?;
        let balances = layer.finish(pass)?.balances.into_iter();
        let balance = balances.map(|(_, term)| term).reduce(|a, b| a + b);
        Ok((y + reading.stream, balance))
    };
    differentiated(forward, &x, &tensors)
}

/// The parameters, with values that hide nothing: biases start as zeros.
fn filled(params: &Params) -> Vec<Tensor> {
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
            tensor.shallow_clone().copy_(&values(&tensor.size()));
        }
    });
    tensors
}

fn context<const IS_FUSED: bool>(is_frugal: bool) -> Result<Context, PluginError> {
    Ok(Context {
        kernel: Some(Rc::new(KernelClient::in_process(Copies::<IS_FUSED>)?)),
        compute: Kind::Double,
        is_mixed: false,
        router_dtype: moeut_nn::RouterDtype::F32,
        is_training: true,
        wishes: moeut_plugin_api::Wishes::default(),
        everyone: None,
        is_compat: false,
        is_frugal,
    })
}

/// The outcome of a pass that gives a result and a regularizer.
fn differentiated(
    forward: impl FnOnce() -> Result<(Tensor, Option<Tensor>), PluginError>,
    x: &Tensor,
    tensors: &[Tensor],
) -> Result<Outcome, PluginError> {
    let (results, count) = counted(|| frugally(forward)).or_plugin_error("no scope")?;
    let n_bytes = count.n_bytes();
    let (y, balance) = results.or_plugin_error("no scope")??;
    let y = &y;
    let loss = (y * y.detach().cos()).sum(Kind::Double) + balance.unwrap_or_default();
    loss.backward();
    let grads = tensors.iter().map(Tensor::grad);
    let results = [y.detach(), x.grad()].into_iter().chain(grads);
    Ok((results.collect(), n_bytes))
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
    let (composed, _) = run::<false>(activation, has_bias, false)?;
    assert_eq!(N_FUSED_CALLS.take(), 0);
    let (fused, _) = run::<true>(activation, has_bias, false)?;
    assert_eq!(N_FUSED_CALLS.take(), n_fused_calls);
    assert_eq!(N_SELECTIONS.take(), 1);
    assert_equal(&composed, &fused);
    Ok(())
}

fn assert_equal(composed: &[Tensor], fused: &[Tensor]) {
    assert_eq!(composed.len(), fused.len());
    for (a, b) in composed.iter().zip(fused) {
        assert!(a.abs().max().double_value(&[]) > 0.0);
        assert!((a - b).abs().max().double_value(&[]) < 1e-12);
    }
}

#[test]
fn attention_with_fused_calls_is_attention() {
    let (composed, _) = run_attention::<false>(false).unwrap();
    assert_eq!((N_SELECTIONS.take(), N_ROTATIONS.take()), (0, 0));
    let (fused, _) = run_attention::<true>(false).unwrap();
    assert_eq!((N_SELECTIONS.take(), N_ROTATIONS.take()), (2, 2));
    assert_equal(&composed, &fused);
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

/// What the routers, queries and keys read is made again by the kernel, from what it rounded: here to nothing less.
#[test]
fn a_frugal_pass_with_fused_calls_keeps_no_norm_and_changes_no_bit() {
    let of_moe = [false, true].map(|is_frugal| run::<true>(Activation::Gelu, true, is_frugal));
    let of_attention = [false, true].map(run_attention::<true>);
    for outcomes in [of_moe, of_attention] {
        let [(kept, n_bytes), (frugal, n_fewer)] = outcomes.map(Result::unwrap);
        assert_eq!(n_bytes - n_fewer, 2 * 5 * 6 * 8);
        for (kept, frugal) in kept.iter().zip(&frugal) {
            assert!(kept.equal(frugal));
        }
    }
}
