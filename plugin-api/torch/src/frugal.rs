//! Tensors that are made again in the backward pass instead of being kept for it, one by one.
//!
//! [`crate::recompute`] repeats whole stretches of a model; here an author names the tensors that cost little to make
//! and much to keep, and says how they are made. Whoever saves such a tensor, or a view of it, libtorch's operations and
//! functions of other libraries alike, saves the recipe. It is followed once for all who ask in a pass, and what it
//! makes is dropped when the last of them has it.
//!
//! What is named may have been saved before: `ReLU` saves its result as it returns it.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ptr;

use tch::{TchError, Tensor};

use crate::FunctionError;
use crate::ffi::{self, RawLedger, check};
use crate::list::List;
use crate::saving::{Saving, boxed};

/// Runs `body`, in which [`give_away`] has an effect.
///
/// From here on, backward passes that this thread starts stay on it, also those of CUDA devices.
///
/// # Errors
/// If libtorch has no memory.
pub fn frugally<T>(body: impl FnOnce() -> T) -> Result<T, TchError> {
    let mut saving = ptr::null_mut();
    // SAFETY: the shim writes a scope, or returns an error.
    unsafe { check(ffi::moeut_frugal_begin(true, &raw mut saving)) }?;
    let _saving = Saving::of(saving);
    Ok(body())
}

/// Runs `body`, and counts what operations save in it: for tests of what a model keeps.
///
/// # Errors
/// If libtorch has no memory.
pub fn counted<T>(body: impl FnOnce() -> T) -> Result<(T, Count), TchError> {
    let (mut ledger, mut saving) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the shim writes a ledger and a scope, or returns an error.
    unsafe { check(ffi::moeut_count_begin(&raw mut ledger, &raw mut saving)) }?;
    let count = Count(ledger);
    let _saving = Saving::of(saving);
    Ok((body(), count))
}

/// What was saved in [`counted`], without keeping it.
#[derive(Debug)]
pub struct Count(*mut RawLedger);

impl Count {
    /// Bytes of the memory of saved tensors that is still in use, by whomever, wholly where views were saved.
    pub fn n_bytes(&self) -> usize {
        // SAFETY: the ledger is alive, and belongs to this thread as its pointer does.
        unsafe { ffi::moeut_count_bytes(self.0) }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        // SAFETY: made by `moeut_count_begin`, freed once.
        unsafe { ffi::moeut_count_free(self.0) };
    }
}

/// Inside of [`frugally`], lets the backward pass make `tensor` with `again` from the tensors `from`, which are kept, or
/// were given away themselves. Elsewhere it does nothing, and neither where the tensor shares its memory with more than
/// views of it.
///
/// `again` runs without gradients and without the autocast of the forward pass. Its result must have the shape, type and
/// device of the tensor, and stands for it in the backward pass: gradients are the same to the bit if it is. It may hold
/// what belongs to this thread, but nothing with a history in the graph.
///
/// # Errors
/// If libtorch has no memory. An error or panic of `again`, or a result of another shape, is an error of the backward pass.
pub fn give_away<const N: usize, F>(
    tensor: &Tensor,
    from: [&Tensor; N],
    again: F,
) -> Result<(), TchError>
where
    F: Fn([Tensor; N]) -> Result<Tensor, FunctionError> + 'static,
{
    let from = List::of(&from)?;
    let (callbacks, user) = boxed(move |given: Vec<Tensor>| {
        let given = <[Tensor; N]>::try_from(given)
            .map_err(|given| format!("{} tensors in place of {N}", given.len()))?;
        Ok(vec![again(given)?])
    });
    // SAFETY: the shim owns `user` from here on and drops it once; tensor and list live through the call.
    unsafe {
        check(ffi::moeut_frugal_give_away(
            tensor.as_ptr(),
            from.as_ptr(),
            callbacks,
            user,
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use tch::{Device, Kind};

    use super::*;
    use crate::one_line;
    use crate::recompute::recomputed;

    const N: i64 = 1000;

    /// 8000 bytes.
    fn leaf() -> Tensor {
        let values = Tensor::arange(N, (Kind::Double, Device::Cpu)).sin();
        values.set_requires_grad(true)
    }

    /// For [`give_away`]: `exp(x²)` times `factor`; counts how often it runs.
    fn curve_again(
        factor: f64,
        n_again: &Rc<Cell<usize>>,
    ) -> impl Fn([Tensor; 1]) -> Result<Tensor, FunctionError> + use<> {
        let n_again = Rc::clone(n_again);
        move |[x]| {
            n_again.set(n_again.get() + 1);
            let curve = x.square().exp() * factor;
            assert!(!curve.requires_grad());
            Ok(curve)
        }
    }

    /// `Σ e²` of `e = exp(x²)`, which `exp` saves as it returns it and the squares save as views.
    fn loss(x: &Tensor, give_away: impl Fn(&Tensor)) -> Tensor {
        let e = x.square().exp();
        give_away(&e);
        let (left, right) = (e.narrow(0, 0, 400), e.narrow(0, 400, 600));
        let right = right.view([20, 30]).tr().square().tr().reshape([600]);
        Tensor::cat(&[left.square(), right], 0).sum(Kind::Double)
    }

    /// The loss with `e` given away, in a scope.
    fn frugal_loss(x: &Tensor, factor: f64) -> (Tensor, Rc<Cell<usize>>, usize) {
        let n_again = Rc::new(Cell::new(0));
        let give = |e: &Tensor| give_away(e, [x], curve_again(factor, &n_again)).unwrap();
        let (loss, count) = counted(|| frugally(|| loss(x, give))).unwrap();
        (loss.unwrap(), n_again, count.n_bytes())
    }

    fn gradient(loss: &Tensor, x: &Tensor) -> Tensor {
        Tensor::run_backward(&[loss], &[x], false, false).swap_remove(0)
    }

    #[test]
    fn gradients_are_the_same_while_the_tensor_is_gone() {
        let x = leaf();
        let (kept, count) = counted(|| loss(&x, |_| ())).unwrap();
        let (frugal, n_again, n_fewer) = frugal_loss(&x, 1.0);
        assert_eq!(count.n_bytes() - n_fewer, 8000);
        assert_eq!(n_again.get(), 0);
        assert!(gradient(&kept, &x).equal(&gradient(&frugal, &x)));
        assert_eq!(n_again.get(), 1);
    }

    /// Both factors of each product of the chain rule are what was made the second time.
    #[test]
    fn what_was_made_again_is_used() {
        let x = leaf();
        let expected = gradient(&loss(&x, |_| ()), &x) * 4.0;
        assert!(gradient(&frugal_loss(&x, 2.0).0, &x).equal(&expected));
    }

    #[test]
    fn a_graph_that_is_retained_makes_it_once_for_each_pass() {
        let x = leaf();
        let (loss, n_again, _) = frugal_loss(&x, 1.0);
        let pass = |keeps| Tensor::run_backward(&[&loss], &[&x], keeps, false).swap_remove(0);
        assert!(pass(true).equal(&pass(false)));
        assert_eq!(n_again.get(), 2);
    }

    #[test]
    fn the_closure_ends_with_the_graph() {
        let x = leaf();
        let (loss, n_again, _) = frugal_loss(&x, 1.0);
        assert_eq!(Rc::strong_count(&n_again), 2);
        let _ = gradient(&loss, &x);
        assert_eq!(Rc::strong_count(&n_again), 1);
        let (loss, n_again, _) = tch::no_grad(|| frugal_loss(&x, 1.0));
        assert!(!loss.requires_grad());
        assert_eq!(Rc::strong_count(&n_again), 1);
    }

    #[test]
    fn what_is_made_from_what_was_given_away_is_made_in_turn() {
        let x = leaf();
        let body = |gives: bool| {
            let e = x.exp();
            let s = e.sin();
            let (t, n_again) = (s.tanh(), Rc::new(Cell::new(0)));
            let counted = |again: fn(&Tensor) -> Tensor| {
                let n_again = Rc::clone(&n_again);
                move |[x]: [Tensor; 1]| {
                    n_again.set(n_again.get() + 1);
                    Ok(again(&x))
                }
            };
            if gives {
                // The last one first: order does not matter.
                give_away(&t, [&s], counted(Tensor::tanh)).unwrap();
                give_away(&e, [&x], counted(Tensor::exp)).unwrap();
                give_away(&s, [&e], counted(Tensor::sin)).unwrap();
            }
            ((t.square() * x.cos()).sum(Kind::Double), n_again)
        };
        let ((kept, _), all) = counted(|| body(false)).unwrap();
        let (frugal, fewer) = counted(|| frugally(|| body(true))).unwrap();
        let (frugal, n_again) = frugal.unwrap();
        // Of `e` and `t`; `s` nobody keeps, and `x` everybody.
        assert_eq!(all.n_bytes() - fewer.n_bytes(), 2 * 8000);
        assert!(gradient(&kept, &x).equal(&gradient(&frugal, &x)));
        assert_eq!(n_again.get(), 3, "each once, for all who ask");
    }

    #[test]
    fn what_fails_or_has_another_shape_ends_the_backward_pass() {
        let x = leaf();
        let failing = |again: fn([Tensor; 1]) -> Result<Tensor, FunctionError>| {
            let give = |e: &Tensor| give_away(e, [&x], again).unwrap();
            let loss = frugally(|| loss(&x, give)).unwrap();
            one_line(&loss.f_backward().unwrap_err())
        };
        let error = failing(|_| Err("no kernel for this shape".into()));
        assert!(error.contains("again: no kernel for this shape"), "{error}");
        let error = failing(|_| panic!("lost"));
        assert!(error.contains("again: panic: lost"), "{error}");
        let error = failing(|[x]| Ok(x.narrow(0, 0, 10)));
        assert!(
            error.contains("again is Double [10], at first it was double [1000]"),
            "{error}"
        );
    }

    #[test]
    fn what_is_kept_must_not_change() {
        let x = leaf();
        let (loss, ..) = frugal_loss(&x, 1.0);
        let _ = x.detach().g_add_scalar_(0.0);
        let error = one_line(&loss.f_backward().unwrap_err());
        assert!(error.contains("changed in place"), "{error}");
    }

    /// What lies beside a view would not be made with it.
    #[test]
    fn parts_of_larger_tensors_are_kept() {
        let x = leaf();
        let of_part = |gives: bool| {
            let n_again = Rc::new(Cell::new(0));
            let e = x.square().exp();
            let part = e.narrow(0, 0, 10);
            if gives {
                let again = curve_again(3.0, &n_again);
                give_away(&part, [&x.narrow(0, 0, 10)], again).unwrap();
            }
            (
                (e.square().sum(Kind::Double) + part.square().sum(Kind::Double)),
                n_again,
            )
        };
        let (kept, _) = of_part(false);
        let (frugal, n_again) = frugally(|| of_part(true)).unwrap();
        assert!(gradient(&kept, &x).equal(&gradient(&frugal, &x)));
        assert_eq!(n_again.get(), 0);
    }

    #[test]
    fn outside_of_a_frugal_scope_nothing_is_given_away() {
        let x = leaf();
        let give = || {
            let n_again = Rc::new(Cell::new(0));
            let e = x.square().exp();
            give_away(&e, [&x], curve_again(3.0, &n_again)).unwrap();
            (e, Rc::strong_count(&n_again))
        };
        assert_eq!(give().1, 1);
        assert_eq!(counted(give).unwrap().0.1, 1);
        assert_eq!(frugally(give).unwrap().1, 2);
    }

    /// A count sees what other scopes inside decide.
    #[test]
    fn counts_include_what_inner_scopes_keep() {
        let x = leaf();
        let count = |body: &dyn Fn() -> Tensor| {
            let (loss, count) = counted(body).unwrap();
            let n_bytes = count.n_bytes();
            drop(loss);
            assert_eq!(count.n_bytes(), 8000, "what is not the graph's");
            n_bytes
        };
        let all = count(&|| loss(&x, |_| ()));
        let inside = count(&|| frugally(|| loss(&x, |_| ())).unwrap());
        let of_again = x.shallow_clone();
        let short = count(&|| {
            let x = of_again.shallow_clone();
            let again = move || {
                let _ = loss(&x, |_| ());
                Ok(())
            };
            recomputed(again, || loss(&of_again, |_| ())).unwrap()
        });
        assert_eq!((all, all - short), (inside, 8000));
    }
}
