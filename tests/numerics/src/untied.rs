//! A recorded batch with every expert selected, in mixed precision.
//!
//! Nothing is recorded of it: the oracle is the model itself in fp64 with the first kernel, on the CPU, which reproduces
//! what *is* recorded, where fewer are selected. No expert can be chosen instead of another, so that gradients differ by
//! rounding alone, and every one of them can be compared.

use crate::Result;
use crate::error_of;
use crate::errors::{Errors, MixedBounds};
use crate::fixture::Fixture;
use crate::placement::Placement;
use crate::plugins::{self, KernelPlugin};
use crate::replay::{Pass, grad_like};
use crate::subject::Subject;
use moeut_plugin_api::DType;
use tch::Tensor;

/// How many experts are selected, and how many there are.
const TOP_K: [(&str, &str); 2] = [
    ("pkm.n_heads", "moe.n_experts"),
    ("moe.att.k", "moe.att.n_experts"),
];

/// Compares the fixture's first step with every expert selected.
///
/// # Errors
/// As [`crate::replay::replay`].
pub(crate) fn compare(
    fixture: &Fixture,
    placement: Placement,
    kernel: &KernelPlugin,
    errors: &mut Errors,
) -> Result<()> {
    let fixture = with_every_expert(fixture);
    let oracle = plugins::kernels()?;
    let oracle = oracle.first().ok_or("there is no kernel")?;
    let (exact_subject, exact) = first_step(&fixture, Placement::on_cpu(DType::F64), oracle)?;
    let (subject, pass) = first_step(&fixture, placement, kernel)?;

    let bounds = MixedBounds::new(placement);
    let logits = error_of::norm(&pass.logits, &exact.logits);
    errors.add("untied_logits", "step 0", logits, bounds.untied_logits);
    for name in exact.regularizers.keys() {
        let error = error_of::scalar(pass.regularizer(name), exact.regularizer(name));
        errors.add("untied_reg", name, error, bounds.untied_reg);
    }
    let (mut grads, mut exact_grads) = (Vec::new(), Vec::new());
    for (name, parameter) in &exact_subject.trainable {
        let expected = parameter.grad();
        if !expected.defined() {
            continue;
        }
        let grad = grad_like(&subject, name, &expected)?;
        let error = error_of::norm(&grad, &expected);
        errors.add("untied_grad", name, error, bounds.untied_grad);
        grads.push(grad);
        exact_grads.push(expected);
    }
    let error = error_of::norm_of_all(&grads, &exact_grads);
    errors.add("untied_grads", "step 0", error, bounds.untied_grads);
    Ok(())
}

/// The fixture with other arguments.
fn with_every_expert(fixture: &Fixture) -> Fixture {
    let mut meta = fixture.meta.clone();
    for (top_k, n_experts) in TOP_K {
        if let Some(n_experts) = fixture.meta.args_effective.get(n_experts) {
            let args = &mut meta.args_effective;
            args.insert(top_k.to_owned(), n_experts.clone());
        }
    }
    let tensors = fixture.tensors.iter();
    Fixture {
        name: fixture.name.clone(),
        meta,
        tensors: tensors
            .map(|(name, tensor)| (name.clone(), Tensor::shallow_clone(tensor)))
            .collect(),
    }
}

fn first_step(
    fixture: &Fixture,
    placement: Placement,
    kernel: &KernelPlugin,
) -> Result<(Subject, Pass)> {
    let mut subject = Subject::of(fixture, placement, kernel)?;
    let pass = Pass::run(fixture, 0, &mut subject, placement)?;
    Ok((subject, pass))
}
