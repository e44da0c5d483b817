//! The loss of next-token prediction: which tokens a model must say, and how surprised it is.
//!
//! ```text
//! loss_n = log Σ_v exp(logit_nv) − logit_n,target       nats; 0 where the target is behind a document's end
//! mean   = Σ_n loss_n / n_targets
//! ```
//! Logits are the largest tensor of a step, and nothing else of their size exists but the gradient that the model needs
//! anyway. A training asks the kernel that its model computes with for the loss, if that kernel has a call for it:
//! [`moeut_plugin_api::Kernel::cross_entropy`]. Where it has none, and in a validation, logits are taken in parts of
//! [`CHUNK_ROWS`], so that nothing of their size is in float32 when they are of 16 bits, and their gradient
//! `softmax − one-hot` is computed in the same pass.

use super::device::Placement;
use super::stream::BEHIND_END;
use crate::kernels::cross_entropy;
use crate::services::Services;
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::client::KernelClient;
use moeut_plugin_api::kernel::FusedCall;
use moeut_torch::OrPluginError;
use moeut_torch::autocast::Autocast;
use moeut_torch::function::{Context, Function, FunctionError, apply};
use moeut_torch::optim::unscale_;
use tch::{Device, Kind, Reduction, TchError, Tensor};

/// Rows of logits in one part: 131 MB of float32 with a vocabulary of 8000.
const CHUNK_ROWS: i64 = 4096;

/// Cross-entropy of each target, in nats, at least in float32; `[seq_len · batch]`. No gradient is asked for.
///
/// # Errors
/// If memory does not suffice.
pub(crate) fn token_losses(
    logits_tbv: &Tensor,
    targets_tb: &Tensor,
) -> Result<Tensor, PluginError> {
    let losses = || -> Result<Tensor, TchError> {
        let (logits_nv, targets_n) = rows(logits_tbv, targets_tb)?;
        let parts: Vec<Tensor> = chunks(&logits_nv, &targets_n)?
            .map(|chunk| {
                let (_, logits, targets) = chunk?;
                log_probabilities(&logits)?.f_nll_loss(
                    &targets,
                    None::<&Tensor>,
                    Reduction::None,
                    BEHIND_END,
                )
            })
            .collect::<Result<_, _>>()?;
        Tensor::f_cat(&parts, 0)
    };
    losses().or_plugin_error("the loss cannot be computed")
}

/// The loss of a training.
pub struct Loss {
    fused: Option<Fused>,
}

/// A kernel that computes the loss of some logits.
struct Fused {
    kernel: KernelClient,
    device: Device,
    kind: Kind,
}

impl Loss {
    /// By the kernel that the model got from these services, if it has the call.
    ///
    /// # Errors
    /// If the kernel cannot be made again.
    pub(super) fn of_model(
        services: &Services,
        Placement {
            device,
            compute_dtype,
            ..
        }: Placement,
    ) -> Result<Self, PluginError> {
        let kernel = services.kernel_of_model(FusedCall::CrossEntropy, device, compute_dtype)?;
        let fused = kernel.map(|kernel| Fused {
            kernel,
            device: moeut_torch::device(device),
            kind: moeut_torch::kind(compute_dtype),
        });
        Ok(Self { fused })
    }

    /// The mean cross-entropy of the `n_targets` that are not behind the end of a document; a scalar.
    ///
    /// # Errors
    /// If memory does not suffice, and whatever the kernel says.
    pub(super) fn mean(
        &self,
        logits_tbv: &Tensor,
        targets_tb: &Tensor,
        n_targets: usize,
    ) -> Result<Tensor, PluginError> {
        const WHAT: &str = "the loss cannot be computed";
        let (logits_nv, targets_n) = rows(logits_tbv, targets_tb).or_plugin_error(WHAT)?;
        let fits =
            |fused: &&Fused| (fused.device, fused.kind) == (logits_nv.device(), logits_nv.kind());
        let sum = if let Some(Fused { kernel, .. }) = self.fused.as_ref().filter(fits) {
            let losses_n = cross_entropy(kernel, &logits_nv, &targets_n)?;
            losses_n.f_sum(losses_n.kind())
        } else {
            let is_padded = targets_n.numel() > n_targets;
            apply(CrossEntropy { is_padded }, &[&logits_nv, &targets_n])
                .map(|mut outputs| outputs.swap_remove(0))
        };
        sum.and_then(|sum| sum.f_div_scalar(n_targets as f64))
            .or_plugin_error(WHAT)
    }
}

/// Cuts `[seq_len + 1, batch]` into what the model sees, with token 0 behind the end of a document, and what it must say.
pub(crate) fn inputs_and_targets(tokens_tb: &Tensor) -> (Tensor, Tensor) {
    let seq_len = tokens_tb.size()[0] - 1;
    (
        tokens_tb.narrow(0, 0, seq_len).clamp_min(0),
        tokens_tb.narrow(0, 1, seq_len),
    )
}

/// The sum of the losses of `logits [N, V]` and `targets [N]`.
struct CrossEntropy {
    /// Whether some targets are behind the end of a document.
    is_padded: bool,
}

impl Function for CrossEntropy {
    fn forward(&self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>, FunctionError> {
        let [logits_nv, targets_n] = inputs else {
            return Err("logits and targets are needed".into());
        };
        let _full_precision = Autocast::new(logits_nv.device(), None)?;
        let grad_nv = if ctx.needs_input_grad(0) {
            Some(logits_nv.f_empty_like()?)
        } else {
            None
        };
        let mut sum = Tensor::f_zeros([], (wide(logits_nv.kind()), logits_nv.device()))?;
        for chunk in chunks(logits_nv, targets_n)? {
            let (first, logits, targets) = chunk?;
            let mut log_p = log_probabilities(&logits)?;
            let loss = log_p.f_nll_loss(&targets, None::<&Tensor>, Reduction::Sum, BEHIND_END)?;
            let _ = sum.f_add_(&loss)?;
            if let Some(grad_nv) = &grad_nv {
                let target = targets.f_clamp_min(0)?.f_unsqueeze(1)?;
                let minus_one = target.f_full_like(-1.0)?.f_to_kind(log_p.kind())?;
                let mut grad = log_p.f_exp_()?;
                let mut grad = grad.f_scatter_add_(1, &target, &minus_one)?;
                if self.is_padded {
                    let has_target = targets.f_ne(BEHIND_END)?.f_unsqueeze(1)?;
                    grad = grad.f_mul_(&has_target)?;
                }
                let rows = logits.size()[0];
                grad_nv.f_narrow(0, first, rows)?.f_copy_(&grad)?;
            }
        }
        if let Some(grad_nv) = &grad_nv {
            ctx.save(&[grad_nv])?;
        }
        Ok(vec![sum])
    }

    fn backward(
        &self,
        ctx: &Context,
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>, FunctionError> {
        let Some(Some(of_sum)) = grads.first() else {
            return Ok(vec![None, None]);
        };
        // In place, so that there are no two of them: a second backward pass finds that it was changed, and ends.
        let mut grad_nv = ctx.saved()?.swap_remove(0);
        scale_(&mut grad_nv, of_sum)?;
        Ok(vec![Some(grad_nv), None])
    }
}

/// Multiplies by a number that the device knows, in the type of that number. A plain product with a tensor without axes
/// rounds it to 16 bits first where `grad_nv` has no more, and takes a GPU twice as long.
fn scale_(grad_nv: &mut Tensor, factor: &Tensor) -> Result<(), TchError> {
    if factor.kind() == Kind::Double {
        grad_nv.f_mul_(factor).map(drop)
    } else {
        unscale_(&[grad_nv], factor, &factor.f_zeros_like()?)
    }
}

/// `[N, V]` and `[N]`.
fn rows(logits_tbv: &Tensor, targets_tb: &Tensor) -> Result<(Tensor, Tensor), TchError> {
    let vocab_size = logits_tbv.size()[2];
    Ok((
        logits_tbv.f_reshape([-1, vocab_size])?,
        targets_tb.f_reshape([-1])?,
    ))
}

/// Parts of the rows: the first row's number, logits, targets.
fn chunks(
    logits_nv: &Tensor,
    targets_n: &Tensor,
) -> Result<impl Iterator<Item = Result<(i64, Tensor, Tensor), TchError>>, TchError> {
    let n_rows = logits_nv.size2()?.0;
    let (logits_nv, targets_n) = (logits_nv.shallow_clone(), targets_n.shallow_clone());
    let step = usize::try_from(CHUNK_ROWS).unwrap_or(usize::MAX);
    Ok((0..n_rows).step_by(step).map(move |first| {
        let n = CHUNK_ROWS.min(n_rows - first);
        Ok((
            first,
            logits_nv.f_narrow(0, first, n)?,
            targets_n.f_narrow(0, first, n)?,
        ))
    }))
}

fn log_probabilities(logits_nv: &Tensor) -> Result<Tensor, TchError> {
    logits_nv.f_log_softmax(-1, wide(logits_nv.kind()))
}

/// The type that sums are taken in.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plugin_api::kernel::{self, Fused as Listed};
    use moeut_plugin_api::{Capabilities, DType, GroupedMatmul, Host, Kernel, TensorHandle};
    use moeut_torch::{IntoHandle, IntoTensor};

    const PLAIN: Loss = Loss { fused: None };

    /// libtorch's own loss, over the whole of the logits.
    fn plain(logits_tbv: &Tensor, targets_tb: &Tensor, n_targets: usize) -> Tensor {
        let logits_nv = logits_tbv.reshape([-1, logits_tbv.size()[2]]);
        let losses = logits_nv
            .to_kind(wide(logits_nv.kind()))
            .cross_entropy_loss(
                &targets_tb.reshape([-1]),
                None::<&Tensor>,
                Reduction::Sum,
                BEHIND_END,
                0.0,
            );
        losses / n_targets as f64
    }

    /// More rows than one part, and some targets behind the end of documents.
    fn example(kind: Kind) -> (Tensor, Tensor, usize) {
        let (seq_len, batch) = (700, 7);
        let logits = Tensor::randn([seq_len, batch, 11], (Kind::Double, Device::Cpu)) * 3.0;
        let targets = Tensor::randint(11, [seq_len, batch], (Kind::Int64, Device::Cpu));
        let _ = targets
            .narrow(0, 600, 100)
            .narrow(1, 2, 3)
            .fill_(BEHIND_END);
        let n_targets = usize::try_from(seq_len * batch - 300).unwrap();
        let logits = logits.to_kind(kind).set_requires_grad(true);
        (logits, targets, n_targets)
    }

    fn gradient(loss: &Tensor, logits: &mut Tensor) -> Tensor {
        // The loss is a share of the whole batch's, and may be scaled.
        (loss * 0.25).backward();
        let grad = logits.grad().copy();
        logits.zero_grad();
        grad
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
            .abs()
            .max()
            .double_value(&[])
    }

    #[test]
    fn loss_and_gradient_are_those_of_libtorch() {
        moeut_torch::rng::seed(3).unwrap();
        for (kind, loss_error, grad_error) in [
            (Kind::Double, 1e-12, 1e-16),
            (Kind::Float, 2e-6, 1e-10),
            // The gradient, at most 5e-5 here, is rounded to 8 bits once in both.
            (Kind::BFloat16, 2e-6, 4e-7),
        ] {
            let (mut logits, targets, n_targets) = example(kind);
            // The first rows have no end of a document among them.
            let whole = (logits.narrow(0, 0, 600), targets.narrow(0, 0, 600));
            let ours = PLAIN.mean(&whole.0, &whole.1, 4200).unwrap();
            let theirs = plain(&whole.0, &whole.1, 4200);
            assert!(distance(&ours, &theirs) <= loss_error, "{kind:?}");
            let (our_grad, their_grad) =
                (gradient(&ours, &mut logits), gradient(&theirs, &mut logits));
            assert!(distance(&our_grad, &their_grad) <= grad_error, "{kind:?}");

            let ours = PLAIN.mean(&logits, &targets, n_targets).unwrap();
            let theirs = plain(&logits, &targets, n_targets);
            assert!(distance(&ours, &theirs) <= loss_error, "{kind:?}");
            let our_grad = gradient(&ours, &mut logits);
            assert_eq!(our_grad.kind(), kind);
            let their_grad = gradient(&theirs, &mut logits);
            let error = distance(&our_grad, &their_grad);
            assert!(error <= grad_error, "{kind:?}: {error:e}");
        }
    }

    #[test]
    fn losses_of_single_tokens_add_up_to_the_mean() {
        let (logits, targets, n_targets) = example(Kind::Double);
        let losses = token_losses(&logits, &targets).unwrap();
        assert_eq!(losses.size(), [4900]);
        let mean = losses.sum(Kind::Double) / n_targets as f64;
        assert!(distance(&mean, &plain(&logits, &targets, n_targets)) <= 1e-12);
    }

    #[test]
    fn nothing_is_learned_behind_the_end() {
        let (mut logits, targets, n_targets) = example(Kind::Float);
        let loss = PLAIN.mean(&logits, &targets, n_targets).unwrap();
        let grad = gradient(&loss, &mut logits);
        let behind = grad.narrow(0, 600, 100).narrow(1, 2, 3);
        assert!(!behind.any().int64_value(&[]).is_positive());
    }

    #[test]
    fn a_gradient_is_handed_out_once() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let (logits, targets, n_targets) = example(kind);
            let loss = PLAIN.mean(&logits, &targets, n_targets).unwrap();
            let gradient = || Tensor::f_run_backward(&[&loss], &[&logits], true, false);
            assert!(gradient().is_ok());
            let error = gradient().unwrap_err().to_string();
            assert!(
                error.contains("modified by an inplace operation"),
                "{error}"
            );
        }
    }

    /// Twice the loss, in float32 only, so that one sees who has computed it.
    struct Doubled;

    impl Kernel for Doubled {
        const NAME: &'static str = "doubled";
        const SUMMARY: &'static str = "twice the loss";

        fn new(_: &Host) -> Result<Self, PluginError> {
            Ok(Self)
        }

        fn capabilities() -> Capabilities {
            Capabilities {
                fused: vec![Listed {
                    call: FusedCall::CrossEntropy,
                    activations: Vec::new(),
                    cpu: vec![DType::F32],
                    cuda: Vec::new(),
                }],
                ..Capabilities::default()
            }
        }

        fn grouped_matmul(&self, _: GroupedMatmul) -> Result<TensorHandle, PluginError> {
            unreachable!("nobody asks for it")
        }

        fn cross_entropy(&self, call: kernel::CrossEntropy) -> Result<TensorHandle, PluginError> {
            let (logits, targets) = (call.logits.into_tensor(), call.targets.into_tensor());
            let log_p = logits.log_softmax(-1, Kind::Float) * 2.0;
            log_p
                .f_nll_loss(&targets, None::<&Tensor>, Reduction::None, BEHIND_END)
                .map(IntoHandle::into_handle)
                .or_plugin_error("no loss")
        }
    }

    #[test]
    fn a_kernel_computes_the_loss_of_what_it_takes() {
        let loss = Loss {
            fused: Some(Fused {
                kernel: KernelClient::in_process(Doubled).unwrap(),
                device: Device::Cpu,
                kind: Kind::Float,
            }),
        };
        for (kind, factor) in [
            (Kind::Float, 2.0),
            (Kind::Double, 1.0),
            (Kind::BFloat16, 1.0),
        ] {
            let (mut logits, targets, n_targets) = example(kind);
            let ours = loss.mean(&logits, &targets, n_targets).unwrap();
            let theirs = plain(&logits, &targets, n_targets) * factor;
            assert!(distance(&ours, &theirs) <= 4e-6, "{kind:?}");
            let ours = gradient(&ours, &mut logits);
            let theirs = gradient(&theirs, &mut logits);
            assert!(distance(&ours, &theirs) <= 4e-7, "{kind:?}");
        }
    }

    #[test]
    fn the_model_sees_token_0_where_there_is_none() {
        let tokens = Tensor::from_slice(&[5_i64, 6, BEHIND_END]).unsqueeze(1);
        let (inputs, targets) = inputs_and_targets(&tokens);
        assert_eq!(Vec::<i64>::try_from(inputs.view([-1])).unwrap(), [5, 6]);
        assert_eq!(
            Vec::<i64>::try_from(targets.reshape([-1])).unwrap(),
            [6, BEHIND_END]
        );
    }
}
