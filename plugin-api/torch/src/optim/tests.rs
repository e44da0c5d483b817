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
        step(&tensors, config, None)
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
fn norms_are_those_of_all_elements_and_of_each_tensor() {
    let mut tensors = grads(0.5, Kind::Double);
    let flat = Tensor::cat(
        &tensors.iter().map(|t| t.reshape([-1])).collect::<Vec<_>>(),
        0,
    );
    let found = norms(&refs(&tensors)).unwrap();
    assert_eq!((found.total.kind(), found.total.dim()), (Kind::Double, 0));
    assert!(max_gap(&found.total, &flat.norm()) < FP64_TOLERANCE);
    tensors[0] = tensors[0].to_kind(Kind::Float);
    let mixed = norms(&refs(&tensors)).unwrap();
    for (index, tensor) in tensors.iter().enumerate() {
        let each = mixed.each.get(i64::try_from(index).unwrap());
        assert!(max_gap(&each, &tensor.norm()) < 1e-6, "tensor {index}");
    }
    assert_eq!(norms(&[]).unwrap().total.double_value(&[]), 0.0);
    assert!(norms(&[&Tensor::new()]).is_err());
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
        let want_norm = norms(&refs(&before)).unwrap().total.double_value(&[]);
        let factor = (max_norm / (want_norm + 1e-6)).min(1.0);

        let clipped: Vec<Tensor> = before.iter().map(Tensor::copy).collect();
        let found = clip_grad_norm_(&refs(&clipped), max_norm).unwrap();
        assert!((found.total.double_value(&[]) - want_norm).abs() < FP64_TOLERANCE);
        for (index, (got, grad)) in clipped.iter().zip(&before).enumerate() {
            assert!(max_gap(got, &(grad * factor)) < FP64_TOLERANCE);
            let each = found.each.get(i64::try_from(index).unwrap());
            assert!(max_gap(&each, &got.norm()) < FP64_TOLERANCE);
        }

        let _norms = clip_grad_norm_(&refs(&mixed), max_norm).unwrap();
        assert_eq!(mixed[2].kind(), Kind::Float);
        assert!(max_gap(&mixed[2].to_kind(Kind::Double), &(&before[2] * factor)) < 1e-6);
    }
}

#[test]
fn clipping_checks_its_bound() {
    let tensors = grads(0.5, Kind::Double);
    assert!(clip_grad_norm_(&refs(&tensors), -1.0).is_err());
    assert!(clip_grad_norm_(&refs(&tensors), f64::NAN).is_err());
    let _norms = clip_grad_norm_(&refs(&tensors), f64::INFINITY).unwrap();
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

/// A rule: parameters, gradients, state and step counters, all changed in place.
type Rule<'a> = &'a dyn Fn(&[&Tensor], &[&Tensor], &[&Tensor], &[&Tensor]);

/// One parameter after four steps of a rule, against `formula`, which gets the parameter, its state and the gradient.
fn assert_rule(step: Rule<'_>, formula: &dyn Fn(Tensor, Tensor, Tensor) -> (Tensor, Tensor)) {
    let phases = [0.5, 1.5, 2.5, 3.5];
    let state = State::new(Kind::Double);
    for phase in phases {
        step(
            &refs(&state.params),
            &refs(&grads(phase, Kind::Double)),
            &refs(&state.exp_avg),
            &refs(&state.steps),
        );
    }
    for (index, param) in State::new(Kind::Double).params.into_iter().enumerate() {
        let slot = param.zeros_like();
        let (want, want_slot) = phases.iter().fold((param, slot), |(param, slot), phase| {
            let grad = grads(*phase, Kind::Double).swap_remove(index);
            formula(param, slot, grad)
        });
        assert!(max_gap(&state.params[index], &want) < FP64_TOLERANCE);
        assert!(max_gap(&state.exp_avg[index], &want_slot) < FP64_TOLERANCE);
    }
}

const SGD: SgdConfig = SgdConfig {
    lr: 0.01,
    momentum: 0.9,
    weight_decay: 0.1,
};

const ADAGRAD: AdagradConfig = AdagradConfig {
    lr: 0.01,
    eps: 1e-10,
    weight_decay: 0.1,
};

#[test]
fn sgd_equals_its_formula() {
    assert_rule(
        &|params, grads, momentum_buffer, _| {
            let tensors = SgdTensors {
                params,
                grads,
                momentum_buffer,
            };
            fused_sgd_(&tensors, &SGD, None).unwrap();
        },
        &|p, b, g| {
            let b = b * SGD.momentum + g + &p * SGD.weight_decay;
            (p - &b * SGD.lr, b)
        },
    );
}

#[test]
fn adagrad_equals_its_formula() {
    assert_rule(
        &|params, grads, sum, steps| {
            let tensors = AdagradTensors {
                params,
                grads,
                sum,
                steps,
            };
            fused_adagrad_(&tensors, &ADAGRAD, None).unwrap();
        },
        &|p, s, g| {
            let g = g + &p * ADAGRAD.weight_decay;
            let s = s + &g * &g;
            (p - &g * ADAGRAD.lr / (s.sqrt() + ADAGRAD.eps), s)
        },
    );
}

#[test]
fn rules_refuse_numbers_below_zero_and_state_that_does_not_match() {
    let (param, grad) = (waves(&[3], 0.0, Kind::Float), waves(&[3], 1.0, Kind::Float));
    let short = waves(&[2], 0.0, Kind::Float);
    let step = Tensor::zeros([], (Kind::Float, Device::Cpu));
    let sgd = |buffer: &Tensor, config: &SgdConfig| {
        let tensors = SgdTensors {
            params: &[&param],
            grads: &[&grad],
            momentum_buffer: &[buffer],
        };
        fused_sgd_(&tensors, config, None)
    };
    assert!(sgd(&short, &SGD).is_err());
    assert!(sgd(&param.zeros_like(), &SgdConfig { lr: -1.0, ..SGD }).is_err());
    let adagrad = |sum: &Tensor, config: &AdagradConfig| {
        let tensors = AdagradTensors {
            params: &[&param],
            grads: &[&grad],
            sum: &[sum],
            steps: &[&step],
        };
        fused_adagrad_(&tensors, config, None)
    };
    assert!(adagrad(&short, &ADAGRAD).is_err());
    let config = AdagradConfig {
        eps: f64::NAN,
        ..ADAGRAD
    };
    assert!(adagrad(&param.zeros_like(), &config).is_err());
    assert_eq!(param, waves(&[3], 0.0, Kind::Float));
}

/// A step with the flag raised changes nothing, one with the flag down is a step without a flag.
#[test]
fn a_flag_on_the_device_drops_a_step() {
    type Step = fn(&[&Tensor], &[&Tensor], [&[&Tensor]; 3], Option<&Tensor>);
    let rules: [(&str, Step); 3] = [
        ("adamw", |params, grads, [one, two, steps], skip| {
            let tensors = AdamTensors {
                params,
                grads,
                exp_avg: one,
                exp_avg_sq: two,
                steps,
            };
            fused_adamw_(&tensors, &CONFIG, skip).unwrap();
        }),
        ("sgd", |params, grads, [momentum_buffer, _, _], skip| {
            let tensors = SgdTensors {
                params,
                grads,
                momentum_buffer,
            };
            fused_sgd_(&tensors, &SGD, skip).unwrap();
        }),
        ("adagrad", |params, grads, [sum, _, steps], skip| {
            let tensors = AdagradTensors {
                params,
                grads,
                sum,
                steps,
            };
            fused_adagrad_(&tensors, &ADAGRAD, skip).unwrap();
        }),
    ];
    for (name, step) in rules {
        let run = |flags: &[Option<f64>]| {
            let state = State::new(Kind::Float);
            for flag in flags {
                let skip = flag.map(|flag| Tensor::from(flag).to_kind(Kind::Float));
                let mut grads = grads(0.5, Kind::Float);
                if *flag == Some(1.0) {
                    grads[0] = &grads[0] * f64::NAN;
                }
                let slots = [
                    &refs(&state.exp_avg)[..],
                    &refs(&state.exp_avg_sq)[..],
                    &refs(&state.steps)[..],
                ];
                step(&refs(&state.params), &refs(&grads), slots, skip.as_ref());
            }
            state
        };
        let plain = run(&[None, None]);
        let flagged = run(&[Some(0.0), Some(1.0), Some(0.0)]);
        for (one, other) in [
            (&plain.params, &flagged.params),
            (&plain.exp_avg, &flagged.exp_avg),
            (&plain.steps, &flagged.steps),
        ] {
            assert!(one.iter().zip(other).all(|(a, b)| a == b), "{name}");
        }
    }
}

#[test]
fn unscaling_multiplies_and_finds_what_is_not_finite() {
    let flag = |value: f64| Tensor::from(value).to_kind(Kind::Float);
    let tensors = grads(0.5, Kind::Float);
    let found = flag(0.0);
    unscale_(&refs(&tensors), &flag(0.5), &found).unwrap();
    assert_eq!(found.double_value(&[]), 0.0);
    assert_eq!(tensors[1], &grads(0.5, Kind::Float)[1] * 0.5);

    for bad in [f64::NAN, f64::INFINITY] {
        let tensors = grads(0.5, Kind::Float);
        let _ = tensors[1].get(2).fill_(bad);
        let found = flag(0.0);
        unscale_(&refs(&tensors), &flag(0.5), &found).unwrap();
        assert_eq!(found.double_value(&[]), 1.0);
    }
    let double = Tensor::from(0.0_f64);
    assert!(unscale_(&refs(&tensors), &flag(0.5), &double).is_err());
}

#[test]
fn gradients_that_are_set_are_shared() {
    let x = waves(&[3], 0.5, Kind::Float).set_requires_grad(true);
    let grad = waves(&[3], 2.0, Kind::Float);
    set_grads(&[&x], &[&grad]).unwrap();
    let _ = grad.shallow_clone().fill_(7.0);
    assert_eq!(x.grad(), grad);
    let others = [
        waves(&[2], 1.0, Kind::Float),
        waves(&[3], 1.0, Kind::Double),
    ];
    for other in &others {
        assert!(set_grads(&[&x], &[other]).is_err());
    }
    assert!(set_grads(&[&x], &[]).is_err());
}

#[test]
fn cleared_gradients_are_gone() {
    let x = waves(&[3], 0.5, Kind::Float).set_requires_grad(true);
    (&x * &x).sum(Kind::Float).backward();
    assert!(x.grad().defined());
    clear_grads(&[&x]).unwrap();
    assert!(!x.grad().defined());
    assert!(clear_grads(&[&Tensor::new()]).is_err());
}
