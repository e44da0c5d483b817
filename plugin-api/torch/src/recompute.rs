//! Activations that are computed again in the backward pass instead of being kept for it.
//!
//! The graph is the one that would be without: the same nodes, so the same gradients, in the same order of sums. Only
//! the tensors that its nodes save are missing until one of them is asked for; then the stretch runs once more, with all
//! of them kept until each is used. `torch.utils.checkpoint` without `use_reentrant` works the same way.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ptr;

use tch::TchError;

use crate::FunctionError;
use crate::ffi::{self, check};
use crate::saving::{Saving, boxed};

/// Runs `first`, of which libtorch keeps nothing for the backward pass, and whose operations `again` must repeat: the
/// same, on the same tensors, in the same order, with the same random numbers and the same autocast.
///
/// `again` runs in the backward pass, with gradients recorded. It may hold what belongs to this thread: from here on,
/// backward passes that this thread starts stay on it, also those of CUDA devices.
///
/// # Errors
/// If libtorch has no memory. An error or panic of `again`, or a repetition that is not one, is an error of the backward
/// pass.
pub fn recomputed<T, F>(again: F, first: impl FnOnce() -> T) -> Result<T, TchError>
where
    F: Fn() -> Result<(), FunctionError> + 'static,
{
    let (callbacks, user) = boxed(move |_| again().map(|()| Vec::new()));
    let mut saving = ptr::null_mut();
    // SAFETY: the shim owns `user` from here on and drops it once; it writes a scope, or returns an error.
    unsafe { check(ffi::moeut_recompute_begin(callbacks, user, &raw mut saving)) }?;
    let _saving = Saving::of(saving);
    Ok(first())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{Context, Function, apply, one_line};

    fn leaf(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor).unwrap()
    }

    /// `x · exp(sin(x))`, four saved tensors.
    fn curve(x: &Tensor, factor: f64) -> Tensor {
        x * (x * factor).sin().exp()
    }

    /// The curve of `x` without activations, and how often it was computed again, there with another factor.
    fn recomputed_curve(x: &Tensor, second: f64) -> (Tensor, Rc<Cell<usize>>) {
        let n_again = Rc::new(Cell::new(0));
        let (counter, again_x) = (Rc::clone(&n_again), x.shallow_clone());
        let again = move || {
            counter.set(counter.get() + 1);
            assert!(curve(&again_x, second).requires_grad());
            Ok(())
        };
        (recomputed(again, || curve(x, 1.0)).unwrap(), n_again)
    }

    #[test]
    fn gradients_are_the_same_and_one_more_run_suffices() {
        let (x, y) = (leaf(&[0.3, -1.2, 2.0]), leaf(&[0.3, -1.2, 2.0]));
        // What is before and behind is kept as ever.
        let loss =
            |x: &Tensor, curve: &dyn Fn(&Tensor) -> Tensor| curve(&(x * x)).cos().sum(Kind::Double);
        loss(&x, &|x| curve(x, 1.0)).backward();
        let n_again = Cell::new(None);
        let shortened = loss(&y, &|y| {
            let (curve, counter) = recomputed_curve(y, 1.0);
            n_again.set(Some(counter));
            curve
        });
        let n_again = n_again.take().unwrap();
        assert_eq!(n_again.get(), 0);
        shortened.backward();
        assert_eq!(n_again.get(), 1);
        assert_eq!(values(&x.grad()), values(&y.grad()));
    }

    /// The gradient is that of the second run, so the first one's activations were not kept.
    #[test]
    fn nothing_of_the_first_run_is_kept() {
        let (x, y) = (leaf(&[0.3, -1.2]), leaf(&[0.3, -1.2]));
        let (short, _) = recomputed_curve(&x, 1.5);
        short.sum(Kind::Double).backward();
        // d(x · e) = e + x · e · cos(factor · x), the inner derivative 1 of the recorded graph.
        let y = y.detach();
        let e = (&y * 1.5).sin().exp();
        let expected = &e + &y * &e * (&y * 1.5).cos();
        for (is, expected) in values(&x.grad()).into_iter().zip(values(&expected)) {
            assert!((is - expected).abs() < 1e-12, "{is} {expected}");
        }
    }

    #[test]
    fn a_graph_that_is_retained_is_computed_once_for_each_pass() {
        let x = leaf(&[0.3, -1.2]);
        let (y, n_again) = recomputed_curve(&x, 1.0);
        let y = y.sum(Kind::Double);
        let pass = |keeps| values(&Tensor::run_backward(&[&y], &[&x], keeps, false)[0]);
        assert_eq!(pass(true), pass(false));
        assert_eq!(n_again.get(), 2);
    }

    #[test]
    fn without_grad_nothing_runs_again_and_the_closure_ends_with_the_call() {
        let x = leaf(&[0.3]);
        let (y, n_again) = tch::no_grad(|| recomputed_curve(&x, 1.0));
        assert!(!y.requires_grad());
        assert_eq!((n_again.get(), Rc::strong_count(&n_again)), (0, 1));

        let (y, n_again) = recomputed_curve(&x, 1.0);
        assert_eq!(Rc::strong_count(&n_again), 2);
        y.sum(Kind::Double).backward();
        assert_eq!(Rc::strong_count(&n_again), 1, "the graph is used up");
    }

    #[test]
    fn an_error_or_panic_of_the_second_run_ends_the_backward_pass() {
        let x = leaf(&[0.3]);
        let failing = |again: fn() -> Result<(), FunctionError>| {
            let y = recomputed(again, || curve(&x, 1.0)).unwrap();
            one_line(&y.f_backward().unwrap_err())
        };
        let error = failing(|| Err("no kernel for this shape".into()));
        assert!(error.contains("again: no kernel for this shape"), "{error}");
        let error = failing(|| panic!("lost"));
        assert!(error.contains("again: panic: lost"), "{error}");
    }

    #[test]
    fn a_repetition_that_is_none_is_an_error() {
        let x = leaf(&[0.3]);
        let failing = |again: fn(&Tensor) -> Tensor| {
            let of_again = x.shallow_clone();
            let again = move || {
                let _ = again(&of_again);
                Ok(())
            };
            let y = recomputed(again, || curve(&x, 1.0)).unwrap();
            one_line(&y.f_backward().unwrap_err())
        };
        let error = failing(Tensor::sin);
        assert!(error.contains("saved 1 tensors, the first one"), "{error}");
        let error = failing(|x| curve(&x.expand([5, 1], false), 1.0));
        assert!(
            error.contains("[5, 1], the first one was Double [1]"),
            "{error}"
        );
    }

    /// What a custom function saves is not kept, either; a kernel's nodes are such functions.
    #[test]
    fn what_custom_functions_save_is_computed_again() {
        struct Square;
        impl Function for Square {
            fn forward(
                &self,
                ctx: &mut Context,
                inputs: &[Tensor],
            ) -> Result<Vec<Tensor>, FunctionError> {
                ctx.save(&[&inputs[0]])?;
                Ok(vec![&inputs[0] * &inputs[0]])
            }

            fn backward(
                &self,
                ctx: &Context,
                grads: &[Option<Tensor>],
            ) -> Result<Vec<Option<Tensor>>, FunctionError> {
                let saved = ctx.saved()?;
                Ok(vec![grads[0].as_ref().map(|grad| grad * &saved[0] * 2.0)])
            }
        }
        let x = leaf(&[3.0]);
        let (n_again, of_again) = (Rc::new(Cell::new(0)), x.shallow_clone());
        let counter = Rc::clone(&n_again);
        let again = move || {
            counter.set(counter.get() + 1);
            // As if the input had been another one: the gradient tells which one was used.
            let _ = apply(Square, &[&(&of_again * 10.0)])?;
            Ok(())
        };
        let y = recomputed(again, || apply(Square, &[&x])).unwrap().unwrap();
        y[0].backward();
        assert_eq!((n_again.get(), values(&x.grad())), (1, vec![60.0]));
    }

    /// What the closure holds may belong to its thread, so that another one gets an error instead of it.
    #[test]
    fn a_backward_pass_on_another_thread_is_refused() {
        let x = leaf(&[0.3]);
        let (y, n_again) = recomputed_curve(&x, 1.0);
        let other = std::thread::spawn(move || one_line(&y.f_backward().unwrap_err()));
        let error = other.join().unwrap();
        assert!(error.contains("on another thread"), "{error}");
        assert_eq!(n_again.get(), 0);
    }

    /// Autocast keeps casts of weights for one forward pass; the second run has its own.
    #[test]
    fn autocast_changes_nothing() {
        use crate::Autocast;
        let mixed = || Autocast::new(Device::Cpu, Some(Kind::BFloat16)).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let (x, w) = (
            Tensor::randn([4, 4], options),
            Tensor::randn([4, 4], options),
        );
        let layer = |x: &Tensor, w: &Tensor| x.matmul(w).tanh();
        let pass = |is_short: bool| {
            let w = w.copy().set_requires_grad(true);
            let y = {
                let _mixed = mixed();
                let mut y = x.shallow_clone();
                for _ in 0..3 {
                    let (again_y, again_w) = (y.shallow_clone(), w.shallow_clone());
                    let again = move || {
                        let _mixed = mixed();
                        let _ = layer(&again_y, &again_w);
                        Ok(())
                    };
                    y = if is_short {
                        recomputed(again, || layer(&y, &w)).unwrap()
                    } else {
                        layer(&y, &w)
                    };
                }
                y
            };
            y.sum(Kind::Float).backward();
            w.grad()
        };
        assert!(pass(true).equal(&pass(false)));
    }
}
