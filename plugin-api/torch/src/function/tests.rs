//! Custom functions against finite differences, and their failures: each must end as an error, none as an abort.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tch::{Device, Kind, Tensor};

use super::*;

/// `y = a² · b`, `z = a + b`, with a counter of drops.
struct SquareTimes {
    n_drops: Arc<AtomicUsize>,
}

impl Function for SquareTimes {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [a, b] = inputs else {
            return Err(format!("{} inputs instead of 2", inputs.len()).into());
        };
        ctx.save(&[a, b])?;
        Ok(vec![a * a * b, a + b])
    }

    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let saved = ctx.saved()?;
        let (a, b) = (&saved[0], &saved[1]);
        let mut grad_a = a.zeros_like();
        let mut grad_b = b.zeros_like();
        if let Some(grad_y) = &grads[0] {
            grad_a += grad_y * a * b * 2.0;
            grad_b += grad_y * a * a;
        }
        if let Some(grad_z) = &grads[1] {
            grad_a += grad_z;
            grad_b += grad_z;
        }
        Ok(vec![
            ctx.needs_input_grad(0).then_some(grad_a),
            ctx.needs_input_grad(1).then_some(grad_b),
        ])
    }
}

impl Drop for SquareTimes {
    fn drop(&mut self) {
        self.n_drops.fetch_add(1, Ordering::SeqCst);
    }
}

fn square_times(inputs: &[&Tensor]) -> Result<Vec<Tensor>, TchError> {
    let n_drops = Arc::new(AtomicUsize::new(0));
    apply(SquareTimes { n_drops }, inputs)
}

/// A function made of two closures.
struct Closures<F, B> {
    forward: F,
    backward: B,
}

impl<F, B> Function for Closures<F, B>
where
    F: Fn(&mut Context, &[Tensor]) -> Result<Vec<Tensor>, FunctionError> + Send + 'static,
    B: Fn(&Context, &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, FunctionError>
        + Send
        + 'static,
{
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        (self.forward)(ctx, inputs)
    }

    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        (self.backward)(ctx, grads)
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the signature is the trait's")]
fn double(_: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
    Ok(vec![&inputs[0] * 2.0])
}

#[expect(clippy::unnecessary_wraps, reason = "the signature is the trait's")]
fn double_grad(
    _: &Context,
    grads: &[Option<Tensor>],
) -> Result<Vec<Option<Tensor>>, FunctionError> {
    Ok(vec![grads[0].as_ref().map(|grad| grad * 2.0)])
}

fn leaf(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

fn error_text(error: &TchError) -> String {
    one_line(error)
}

/// Central differences of `loss` at `x`, one element at a time.
fn finite_differences(x: &Tensor, loss: impl Fn(&Tensor) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    (0..x.numel())
        .map(|index| {
            let at = |shift: f64| {
                let moved = x.detach().copy();
                let _element = moved
                    .view([-1])
                    .get(i64::try_from(index).unwrap())
                    .g_add_scalar_(shift);
                loss(&moved)
            };
            (at(STEP) - at(-STEP)) / (2.0 * STEP)
        })
        .collect()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.detach().view([-1])).unwrap()
}

fn max_gap(left: &[f64], right: &[f64]) -> f64 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(l, r)| (l - r).abs())
        .fold(0.0, f64::max)
}

/// Central differences with a step of 1e-5 are right to about 1e-10 times the third derivative.
const FINITE_DIFFERENCE_TOLERANCE: f64 = 1e-8;

#[test]
fn gradients_equal_finite_differences() {
    let (a, b) = (leaf(&[0.3, -1.2, 2.0]), leaf(&[1.5, 0.7, -0.4]));
    let loss = |a: &Tensor, b: &Tensor| {
        let outputs = square_times(&[a, b]).unwrap();
        (outputs[0].sin() + &outputs[1] * &outputs[1]).sum(Kind::Double)
    };
    loss(&a, &b).backward();
    let want_a = finite_differences(&a, |a| loss(a, &b).double_value(&[]));
    let want_b = finite_differences(&b, |b| loss(&a, b).double_value(&[]));
    assert!(max_gap(&values(&a.grad()), &want_a) < FINITE_DIFFERENCE_TOLERANCE);
    assert!(max_gap(&values(&b.grad()), &want_b) < FINITE_DIFFERENCE_TOLERANCE);
}

#[test]
fn a_gradient_can_be_differentiated_again() {
    let (a, b) = (leaf(&[0.3, -1.2]), leaf(&[1.5, 0.7]));
    let y = square_times(&[&a, &b])
        .unwrap()
        .swap_remove(0)
        .sum(Kind::Double);
    let first = Tensor::run_backward(&[y], &[&a], true, true).swap_remove(0);
    let second = Tensor::run_backward(&[first.sum(Kind::Double)], &[&a], false, false);
    assert!(max_gap(&values(&second[0]), &values(&(&b * 2.0))) < 1e-12);
}

#[test]
fn an_unused_output_has_no_gradient() {
    let (a, b) = (leaf(&[2.0]), leaf(&[5.0]));
    square_times(&[&a, &b]).unwrap()[1].backward();
    assert_eq!(
        (values(&a.grad()), values(&b.grad())),
        (vec![1.0], vec![1.0])
    );
}

#[test]
fn an_input_that_is_no_leaf_gets_no_gradient() {
    let (a, b) = (leaf(&[2.0]), Tensor::from_slice(&[5.0]));
    square_times(&[&a, &b]).unwrap()[0].backward();
    assert_eq!(values(&a.grad()), vec![20.0]);
    assert!(!b.grad().defined());
}

#[test]
fn several_applications_add_up_in_one_graph() {
    let (a, b) = (leaf(&[2.0]), leaf(&[3.0]));
    let y = square_times(&[&a, &b]).unwrap().swap_remove(0);
    let z = square_times(&[&y, &b]).unwrap().swap_remove(0);
    z.backward(); // z = a⁴ b³
    assert_eq!(values(&a.grad()), vec![4.0 * 8.0 * 27.0]);
    assert_eq!(values(&b.grad()), vec![16.0 * 3.0 * 9.0]);
}

#[test]
fn forty_inputs_and_outputs_are_not_too_many() {
    let inputs: Vec<Tensor> = (0..40).map(|i| leaf(&[f64::from(i)])).collect();
    let identity = Closures {
        forward: |_: &mut Context, inputs: &[Tensor]| Ok(inputs.iter().map(|x| x * 3.0).collect()),
        backward: |_: &Context, grads: &[Option<Tensor>]| {
            Ok(grads
                .iter()
                .map(|grad| grad.as_ref().map(|g| g * 3.0))
                .collect())
        },
    };
    let outputs = apply(identity, &inputs.iter().collect::<Vec<_>>()).unwrap();
    assert_eq!(outputs.len(), 40);
    Tensor::stack(&outputs, 0).sum(Kind::Double).backward();
    assert!(inputs.iter().all(|input| values(&input.grad()) == [3.0]));
}

#[test]
fn forward_records_no_graph_inside() {
    let x = leaf(&[1.0]);
    let forward = |ctx: &mut Context, inputs: &[Tensor]| {
        let y = &inputs[0] * 2.0;
        assert!(!y.requires_grad());
        assert!(ctx.needs_input_grad(0));
        Ok(vec![y])
    };
    let y = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap();
    assert!(y[0].requires_grad());
}

#[test]
fn without_grad_nothing_is_recorded() {
    let x = leaf(&[1.0]);
    let forward = |ctx: &mut Context, inputs: &[Tensor]| {
        assert!(!ctx.needs_input_grad(0));
        double(ctx, inputs)
    };
    let y = tch::no_grad(|| {
        apply(
            Closures {
                forward,
                backward: double_grad,
            },
            &[&x],
        )
    })
    .unwrap();
    assert!(!y[0].requires_grad());
}

#[test]
fn the_object_drops_once_with_its_graph() {
    let n_drops = Arc::new(AtomicUsize::new(0));
    let count = || n_drops.load(Ordering::SeqCst);
    let (a, b) = (leaf(&[2.0]), leaf(&[5.0]));
    let outputs = apply(
        SquareTimes {
            n_drops: Arc::clone(&n_drops),
        },
        &[&a, &b],
    )
    .unwrap();
    assert_eq!(count(), 0);
    outputs[0].backward();
    assert_eq!(count(), 0);
    drop(outputs);
    assert_eq!(count(), 1);

    // Without a graph the call is its whole life, also when it fails.
    tch::no_grad(|| {
        apply(
            SquareTimes {
                n_drops: Arc::clone(&n_drops),
            },
            &[&a, &b],
        )
    })
    .unwrap();
    assert_eq!(count(), 2);
    apply(
        SquareTimes {
            n_drops: Arc::clone(&n_drops),
        },
        &[&a],
    )
    .unwrap_err();
    assert_eq!(count(), 3);
    apply(
        SquareTimes {
            n_drops: Arc::clone(&n_drops),
        },
        &[&a, &Tensor::new()],
    )
    .unwrap_err();
    assert_eq!(count(), 4);
}

#[test]
fn an_error_or_panic_in_forward_is_an_error_of_apply() {
    let x = leaf(&[1.0]);
    let forward = |_: &mut Context, _: &[Tensor]| Err("no kernel for this shape".into());
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert_eq!(
        error_text(&error),
        "forward of a custom function: no kernel for this shape"
    );

    let forward = |_: &mut Context, inputs: &[Tensor]| Ok(vec![inputs[7].shallow_clone()]);
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert!(
        error_text(&error).contains("panic: index out of bounds"),
        "{error}"
    );
}

#[test]
fn an_error_or_panic_in_backward_is_an_error_of_the_backward_pass() {
    let x = leaf(&[1.0]);
    let backward = |_: &Context, _: &[Option<Tensor>]| Err("no kernel for this shape".into());
    let y = apply(
        Closures {
            forward: double,
            backward,
        },
        &[&x],
    )
    .unwrap();
    let error = y[0].f_backward().unwrap_err();
    assert_eq!(
        error_text(&error),
        "backward of a custom function: no kernel for this shape"
    );

    let backward =
        |_: &Context, grads: &[Option<Tensor>]| Ok(vec![grads[3].as_ref().map(Tensor::copy)]);
    let y = apply(
        Closures {
            forward: double,
            backward,
        },
        &[&x],
    )
    .unwrap();
    let error = y[0].f_backward().unwrap_err();
    assert!(
        error_text(&error).contains("panic: index out of bounds"),
        "{error}"
    );
}

#[test]
fn a_wrong_number_of_gradients_is_an_error() {
    let x = leaf(&[1.0]);
    let backward = |_: &Context, _: &[Option<Tensor>]| Ok(vec![None, None]);
    let y = apply(
        Closures {
            forward: double,
            backward,
        },
        &[&x],
    )
    .unwrap();
    let error = y[0].f_backward().unwrap_err();
    assert!(
        error_text(&error).contains("returned 2 gradients for 1 inputs"),
        "{error}"
    );
}

#[test]
fn misuse_of_the_context_is_an_error() {
    let x = leaf(&[1.0]);
    let forward = |ctx: &mut Context, inputs: &[Tensor]| {
        ctx.save(&[&inputs[0]])?;
        ctx.save(&[&inputs[0]])?;
        double(ctx, inputs)
    };
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert!(error_text(&error).contains("called twice"), "{error}");

    let forward = |ctx: &mut Context, _: &[Tensor]| ctx.saved();
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert!(
        error_text(&error).contains("works in backward only"),
        "{error}"
    );

    let forward = |ctx: &mut Context, inputs: &[Tensor]| {
        assert!(ctx.needs_input_grad(1));
        double(ctx, inputs)
    };
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert!(
        error_text(&error).contains("input 1 of a function of 1 inputs"),
        "{error}"
    );
}

#[test]
fn empty_lists_are_errors() {
    let x = leaf(&[1.0]);
    let error = apply(
        Closures {
            forward: double,
            backward: double_grad,
        },
        &[],
    )
    .unwrap_err();
    assert!(error_text(&error).contains("at least one input"), "{error}");
    let forward = |_: &mut Context, _: &[Tensor]| Ok(Vec::new());
    let error = apply(
        Closures {
            forward,
            backward: double_grad,
        },
        &[&x],
    )
    .unwrap_err();
    assert!(error_text(&error).contains("returned no tensor"), "{error}");
}

#[test]
fn a_saved_tensor_changed_in_place_is_an_error() {
    let (a, b) = (leaf(&[2.0]), leaf(&[5.0]));
    let inner = &a * 1.0;
    let y = square_times(&[&inner, &b]).unwrap();
    let mut changed = inner.detach();
    let _ = changed.g_add_scalar_(1.0);
    let error = y[0].f_backward().unwrap_err();
    assert!(
        error_text(&error).contains("modified by an inplace operation"),
        "{error}"
    );
}

#[test]
fn integer_inputs_take_no_gradient() {
    let x = leaf(&[1.0, 2.0]);
    let index = Tensor::from_slice(&[1_i64]);
    let forward =
        |_: &mut Context, inputs: &[Tensor]| Ok(vec![inputs[0].index_select(0, &inputs[1])]);
    let backward = |ctx: &Context, grads: &[Option<Tensor>]| {
        assert!(!ctx.needs_input_grad(1));
        let grad = Tensor::zeros([2], (Kind::Double, Device::Cpu));
        let index = Tensor::from_slice(&[1_i64]);
        Ok(vec![
            grads[0].as_ref().map(|g| grad.index_add(0, &index, g)),
            None,
        ])
    };
    apply(Closures { forward, backward }, &[&x, &index]).unwrap()[0]
        .sum(Kind::Double)
        .backward();
    assert_eq!(values(&x.grad()), vec![0.0, 1.0]);
}
