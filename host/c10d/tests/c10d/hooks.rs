//! Callbacks when gradients are complete, alone and together with operations.

use std::sync::{Arc, Mutex};

use moeut_c10d::{GradHooks, Group, Reduction, Work};
use moeut_torch::{Context, Function, FunctionError, apply};
use tch::{Device, Kind, Tensor};

use crate::support::{PATIENCE, as_threads, numbers};

/// What was called, in order.
type Calls = Arc<Mutex<Vec<usize>>>;

fn recording(params: &[&Tensor]) -> (GradHooks, Calls) {
    let calls = Calls::default();
    let seen = Arc::clone(&calls);
    let hooks = GradHooks::new(params, move |index| seen.lock().unwrap().push(index)).unwrap();
    (hooks, calls)
}

fn take(calls: &Calls) -> Vec<usize> {
    std::mem::take(&mut *calls.lock().unwrap())
}

fn param(value: f64) -> Tensor {
    Tensor::full([3], value, (Kind::Double, Device::Cpu)).set_requires_grad(true)
}

#[test]
fn a_shared_parameter_calls_once_per_backward_pass() {
    let (shared, other) = (param(2.0), param(3.0));
    let (_hooks, calls) = recording(&[&shared, &other]);
    for _ in 0..2 {
        // Used three times: the gradient is complete only after all of them.
        let y = (&shared * &other * &shared).sum(Kind::Double) + shared.sum(Kind::Double);
        y.backward();
        let mut called = take(&calls);
        called.sort_unstable();
        assert_eq!(called, [0, 1]);
    }
    assert_eq!(numbers(&shared.grad()), [2.0 * 13.0; 3]);
}

#[test]
fn parameters_without_a_gradient_do_not_call() {
    let (used, unused) = (param(2.0), param(3.0));
    let (_hooks, calls) = recording(&[&unused, &used]);
    used.sum(Kind::Double).backward();
    assert_eq!(take(&calls), [1]);
}

#[test]
fn microbatches_call_once_each_with_the_gradient_so_far() {
    let weight = param(1.0);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (grads, handle) = (Arc::clone(&seen), Mutex::new(weight.shallow_clone()));
    let _hooks = GradHooks::new(&[&weight], move |_| {
        let grad = handle.lock().unwrap().grad();
        grads.lock().unwrap().push(numbers(&grad)[0]);
    })
    .unwrap();
    for scale in [1.0, 10.0, 100.0] {
        (&weight * scale).sum(Kind::Double).backward();
    }
    assert_eq!(*seen.lock().unwrap(), [1.0, 11.0, 111.0]);
}

#[test]
fn later_layers_call_before_earlier_ones() {
    let (first, last) = (param(2.0), param(3.0));
    let (_hooks, calls) = recording(&[&first, &last]);
    ((&first * 2.0).exp() * &last).sum(Kind::Double).backward();
    assert_eq!(take(&calls), [1, 0]);
}

#[test]
fn dropped_hooks_are_silent_even_in_a_graph_made_before() {
    let weight = param(2.0);
    let (hooks, calls) = recording(&[&weight]);
    let y = (&weight * &weight).sum(Kind::Double);
    drop(hooks);
    y.backward();
    assert_eq!(take(&calls), [] as [usize; 0]);
    drop(y);
    // Nothing but the graph and the hooks held the callback.
    assert_eq!(Arc::strong_count(&calls), 1);

    let (_hooks, calls) = recording(&[&weight]);
    weight.sum(Kind::Double).backward();
    assert_eq!(take(&calls), [0]);
}

#[test]
fn hooks_outlive_the_graphs_in_between() {
    let weight = param(2.0);
    let (_hooks, calls) = recording(&[&weight]);
    for _ in 0..3 {
        drop(weight.exp());
        weight.exp().sum(Kind::Double).backward();
    }
    assert_eq!(take(&calls), [0, 0, 0]);
}

#[test]
fn a_panic_in_the_callback_ends_the_backward_pass_with_an_error() {
    let weight = param(2.0);
    let hooks = GradHooks::new(&[&weight], |index| panic!("no bucket for {index}")).unwrap();
    let error = weight.sum(Kind::Double).f_backward().unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("the callback of gradient 0: panic: no bucket for 0"),
        "{text}"
    );
    drop(hooks);
    weight.sum(Kind::Double).f_backward().unwrap();
}

#[test]
fn only_parameters_have_hooks() {
    let weight = param(2.0);
    let product = &weight * 2.0;
    let constant = Tensor::ones([2], (Kind::Float, Device::Cpu));
    for wrong in [&product, &constant, &Tensor::new()] {
        let error = GradHooks::new(&[&weight, wrong], |_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor 1 is no parameter: only a leaf that requires a gradient accumulates one"
        );
    }
    let (_hooks, calls) = recording(&[&weight]);
    weight.sum(Kind::Double).backward();
    assert_eq!(take(&calls), [0], "the refused ones left nothing behind");
}

/// The first layer of a model: its backward runs after the last layer's gradient is complete, and here waits until that
/// has come back from the other ranks.
struct FirstLayer {
    from_hook: Arc<Mutex<Option<Work>>>,
}

impl Function for FirstLayer {
    fn forward(&self, _: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        Ok(vec![&inputs[0] * 2.0])
    }

    fn backward(
        &self,
        _: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let work = self.from_hook.lock().unwrap().take();
        work.ok_or("the hook started nothing")?
            .wait()
            .map_err(|error| error.to_string())?;
        Ok(vec![grads[0].as_ref().map(|grad| grad * 2.0)])
    }
}

#[test]
fn an_operation_started_in_a_hook_ends_while_backward_still_runs() {
    as_threads(2, PATIENCE, |rank, group| {
        let group: Arc<Group> = Arc::new(group);
        let (first, last) = (param(1.0), param(1.0 + rank as f64));
        let from_hook: Arc<Mutex<Option<Work>>> = Arc::default();
        let (travels, work) = (Mutex::new(last.shallow_clone()), Arc::clone(&from_hook));
        let in_hook = Arc::clone(&group);
        let _hooks = GradHooks::new(&[&last], move |_| {
            let grad = travels.lock().unwrap().grad();
            let started = in_hook.all_reduce(&[&grad], Reduction::Sum).unwrap();
            *work.lock().unwrap() = Some(started);
        })
        .unwrap();

        let hidden = apply(FirstLayer { from_hook }, &[&first])
            .unwrap()
            .swap_remove(0);
        (hidden * (rank as f64 + 1.0) * &last)
            .sum(Kind::Double)
            .backward();
        // d/d last = 2 · (rank + 1) · first, summed over both ranks.
        assert_eq!(numbers(&last.grad()), [6.0; 3]);
        // d/d first = 2 · (rank + 1) · last, this rank's alone.
        let own = 2.0 * (rank as f64 + 1.0) * (rank as f64 + 1.0);
        assert_eq!(numbers(&first.grad()), [own; 3]);
    });
}
