//! The fused kernels against their formulas in plain tensors.

#![expect(clippy::float_cmp, reason = "small integers are exact")]

use tch::{Device, Kind, Tensor};

use super::*;

/// Rounding of some tens of fp64 operations.
const FP64_TOLERANCE: f64 = 1e-12;

/// A tensor of reproducible values in about `[-1, 1]`.
fn waves(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
    let n_elements: i64 = shape.iter().product();
    let x = Tensor::arange(n_elements, (Kind::Double, Device::Cpu)) * 0.7 + phase;
    x.sin().reshape(shape).to_kind(kind)
}

fn max_gap(left: &Tensor, right: &Tensor) -> f64 {
    (left - right).abs().max().double_value(&[])
}

fn refs(tensors: &[Tensor]) -> Vec<&Tensor> {
    tensors.iter().collect()
}

struct State {
    params: Vec<Tensor>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl State {
    fn new(kind: Kind) -> Self {
        let params = vec![
            waves(&[3, 5], 0.1, kind),
            waves(&[7], 0.2, kind),
            waves(&[2, 4], 0.3, kind).tr(),
        ];
        Self {
            exp_avg: params.iter().map(Tensor::zeros_like).collect(),
            exp_avg_sq: params.iter().map(Tensor::zeros_like).collect(),
            steps: params
                .iter()
                .map(|_| Tensor::zeros([], (Kind::Float, Device::Cpu)))
                .collect(),
            params,
        }
    }

    fn step(
        &self,
        grads: &[Tensor],
        config: &AdamConfig,
        is_decoupled: bool,
    ) -> Result<(), TchError> {
        let tensors = AdamTensors {
            params: &refs(&self.params),
            grads: &refs(grads),
            exp_avg: &refs(&self.exp_avg),
            exp_avg_sq: &refs(&self.exp_avg_sq),
            steps: &refs(&self.steps),
        };
        let step = if is_decoupled {
            fused_adamw_
        } else {
            fused_adam_
        };
        step(&tensors, config)
    }
}

/// The last gradient has another memory order than its parameter.
fn grads(phase: f64, kind: Kind) -> Vec<Tensor> {
    vec![
        waves(&[3, 5], phase, kind),
        waves(&[7], phase + 1.0, kind),
        waves(&[4, 2], phase + 2.0, kind),
    ]
}

const CONFIG: AdamConfig = AdamConfig {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};

/// Adam as in its paper, one tensor at a time.
fn plain_adam(
    param: &Tensor,
    phases: &[f64],
    index: usize,
    config: &AdamConfig,
    is_decoupled: bool,
) -> Tensor {
    let mut p = param.copy();
    let (mut m, mut v) = (p.zeros_like(), p.zeros_like());
    for (t, phase) in (1..).zip(phases) {
        let mut g = grads(*phase, Kind::Double).swap_remove(index);
        if is_decoupled {
            p = &p * (1.0 - config.lr * config.weight_decay);
        } else {
            g += &p * config.weight_decay;
        }
        m = m * config.beta1 + &g * (1.0 - config.beta1);
        v = v * config.beta2 + &g * &g * (1.0 - config.beta2);
        let m_hat = &m / (1.0 - config.beta1.powi(t));
        let v_hat = &v / (1.0 - config.beta2.powi(t));
        p -= m_hat * config.lr / (v_hat.sqrt() + config.eps);
    }
    p
}

fn assert_steps_equal_the_formula(is_decoupled: bool) {
    let phases = [0.5, 1.5, 2.5, 3.5];
    let before = State::new(Kind::Double);
    let state = State::new(Kind::Double);
    for phase in phases {
        state
            .step(&grads(phase, Kind::Double), &CONFIG, is_decoupled)
            .unwrap();
    }
    for (index, param) in before.params.iter().enumerate() {
        let want = plain_adam(param, &phases, index, &CONFIG, is_decoupled);
        let gap = max_gap(&state.params[index], &want);
        assert!(gap < FP64_TOLERANCE, "parameter {index} is off by {gap}");
        assert_eq!(state.steps[index].double_value(&[]), 4.0);
    }
}

#[test]
fn adamw_equals_its_formula() {
    assert_steps_equal_the_formula(true);
}

#[test]
fn adam_equals_its_formula() {
    assert_steps_equal_the_formula(false);
}

#[test]
fn element_types_may_be_mixed_in_one_call() {
    let mut state = State::new(Kind::Double);
    let mut gradients = grads(0.5, Kind::Double);
    for list in [
        &mut state.params,
        &mut state.exp_avg,
        &mut state.exp_avg_sq,
        &mut gradients,
    ] {
        list[1] = list[1].to_kind(Kind::Float);
    }
    let want = plain_adam(
        &State::new(Kind::Double).params[1],
        &[0.5],
        1,
        &CONFIG,
        true,
    );
    state.step(&gradients, &CONFIG, true).unwrap();
    assert!(max_gap(&state.params[1].to_kind(Kind::Double), &want) < 1e-6);
}

#[test]
fn parameters_that_need_gradients_are_stepped_without_a_graph() {
    let mut state = State::new(Kind::Double);
    state.params = state
        .params
        .iter()
        .map(|p| p.copy().set_requires_grad(true))
        .collect();
    state.exp_avg = state
        .params
        .iter()
        .map(|p| p.detach().zeros_like())
        .collect();
    state.exp_avg_sq = state
        .params
        .iter()
        .map(|p| p.detach().zeros_like())
        .collect();
    state
        .step(&grads(0.5, Kind::Double), &CONFIG, true)
        .unwrap();
    assert!(state.params.iter().all(Tensor::is_leaf));
}

#[test]
fn lists_that_do_not_match_change_nothing() {
    let refuse = |part: &str, change: &dyn Fn(&mut State, &mut Vec<Tensor>)| {
        let mut state = State::new(Kind::Double);
        let mut gradients = grads(0.5, Kind::Double);
        change(&mut state, &mut gradients);
        let error = state
            .step(&gradients, &CONFIG, true)
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(state.params[0], State::new(Kind::Double).params[0]);
    };
    refuse("`grads` has 2 tensors", &|_, grads| drop(grads.pop()));
    refuse("`grads[1]` is Double [3]", &|_, grads| {
        grads[1] = waves(&[3], 0.0, Kind::Double);
    });
    refuse("`grads[1]` is an undefined", &|_, grads| {
        grads[1] = Tensor::new();
    });
    refuse("`exp_avg[0]` is Float", &|state, _| {
        state.exp_avg[0] = waves(&[3, 5], 0.0, Kind::Float);
    });
    refuse("`exp_avg_sq[0]` has strides [1, 3]", &|state, _| {
        state.exp_avg_sq[0] = waves(&[5, 3], 0.0, Kind::Double).tr();
    });
    refuse("`steps[2]` must be one Float", &|state, _| {
        state.steps[2] = Tensor::from(0.0_f64);
    });
    refuse("`steps` has 2 tensors", &|state, _| drop(state.steps.pop()));
    refuse("`params[1]` must be a dense floating-point", &|state, _| {
        state.params[1] = Tensor::arange(7, (Kind::Int64, Device::Cpu));
    });
}

#[test]
fn numbers_out_of_range_are_refused() {
    let state = State::new(Kind::Double);
    for config in [
        AdamConfig {
            lr: f64::NAN,
            ..CONFIG
        },
        AdamConfig { lr: -1.0, ..CONFIG },
        AdamConfig {
            beta1: 1.0,
            ..CONFIG
        },
        AdamConfig {
            beta2: -0.1,
            ..CONFIG
        },
        AdamConfig {
            eps: f64::INFINITY,
            ..CONFIG
        },
    ] {
        assert!(
            state
                .step(&grads(0.5, Kind::Double), &config, true)
                .is_err(),
            "{config:?}"
        );
    }
}

#[test]
fn the_global_norm_is_the_norm_of_all_elements() {
    let tensors = grads(0.5, Kind::Double);
    let flat = Tensor::cat(
        &tensors.iter().map(|t| t.reshape([-1])).collect::<Vec<_>>(),
        0,
    );
    let norm = global_norm(&refs(&tensors)).unwrap();
    assert_eq!((norm.kind(), norm.dim()), (Kind::Double, 0));
    assert!(max_gap(&norm, &flat.norm()) < FP64_TOLERANCE);
    assert_eq!(global_norm(&[]).unwrap().double_value(&[]), 0.0);
    assert!(global_norm(&[&Tensor::new()]).is_err());
}

#[test]
fn clipping_equals_its_formula() {
    for max_norm in [0.25, 1e9] {
        let before = grads(0.5, Kind::Double);
        let mixed = [
            before[0].copy(),
            before[1].copy(),
            before[2].to_kind(Kind::Float),
        ];
        let want_norm = global_norm(&refs(&before)).unwrap().double_value(&[]);
        let factor = (max_norm / (want_norm + 1e-6)).min(1.0);

        let clipped: Vec<Tensor> = before.iter().map(Tensor::copy).collect();
        let norm = clip_grad_norm_(&refs(&clipped), max_norm).unwrap();
        assert!((norm.double_value(&[]) - want_norm).abs() < FP64_TOLERANCE);
        for (got, grad) in clipped.iter().zip(&before) {
            assert!(max_gap(got, &(grad * factor)) < FP64_TOLERANCE);
        }

        let _norm = clip_grad_norm_(&refs(&mixed), max_norm).unwrap();
        assert_eq!(mixed[2].kind(), Kind::Float);
        assert!(max_gap(&mixed[2].to_kind(Kind::Double), &(&before[2] * factor)) < 1e-6);
    }
}

#[test]
fn clipping_checks_its_bound() {
    let tensors = grads(0.5, Kind::Double);
    assert!(clip_grad_norm_(&refs(&tensors), -1.0).is_err());
    assert!(clip_grad_norm_(&refs(&tensors), f64::NAN).is_err());
    let _norm = clip_grad_norm_(&refs(&tensors), f64::INFINITY).unwrap();
    assert_eq!(tensors[0], grads(0.5, Kind::Double)[0]);
}

#[test]
fn scaling_multiplies_and_checks_the_factor() {
    let tensors = grads(0.5, Kind::Double);
    scale_grads_(&refs(&tensors), &Tensor::from(0.5_f64)).unwrap();
    assert!(max_gap(&tensors[1], &(&grads(0.5, Kind::Double)[1] * 0.5)) < FP64_TOLERANCE);
    assert!(scale_grads_(&refs(&tensors), &Tensor::from_slice(&[0.5, 0.5])).is_err());
    assert!(scale_grads_(&refs(&tensors), &Tensor::new()).is_err());
}
