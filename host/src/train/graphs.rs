//! CUDA graphs of a step: the forward and backward passes of its microbatches are captured once, and then each costs the
//! CPU one launch instead of thousands.
//!
//! Only *plain* steps are replayed: all their microbatches are alike, and nothing is to be told but the loss and the
//! regularizers. The others run as without graphs. What the two kinds of steps compute in is not shared, so that a run
//! with graphs holds its activations twice.

use super::batches::Microbatch;
use super::run::Run;
use super::{Output, Pass, TrainError, pass};
use moeut_plugin_api::{Past, PluginError, Wishes};
use moeut_torch::graph::Graph;
use moeut_torch::{OrPluginError, cuda};
use tch::Tensor;

/// Steps before the first capture: libraries are loaded, kernels compiled and workspaces made when they are first used,
/// which must not happen in a capture.
const N_WARMUP_STEPS: u32 = 2;

/// Captures of a run: more of them mean that microbatches are not alike for long.
const MAX_CAPTURES: u32 = 4;

/// The graphs of a run.
#[derive(Default)]
pub(crate) struct Graphs {
    is_on: bool,
    n_plain_steps: u32,
    n_captures: u32,
    step: Option<Step>,
}

/// Captured passes.
struct Step {
    shape: Shape,
    /// What the passes read, `[T + 1, size]`.
    tokens: Tensor,
    /// Of the first microbatch, which finds no gradients, and of all others, which add to them.
    passes: Vec<Replayed>,
    grads: Grads,
}

/// Gradients, and the indices of their parameters.
type Grads = Vec<(usize, Tensor)>;

struct Replayed {
    graph: Graph,
    kept: Kept,
}

/// What a replay leaves besides gradients, in the graph's memory.
struct Kept {
    share: Tensor,
    loss: Tensor,
    regularizers: Vec<(String, Tensor)>,
}

impl Kept {
    /// Nothing that is kept belongs to autograd, whose memory is the graph's again.
    fn of(pass: Pass) -> Self {
        let regularizers = pass.output.regularizers.into_iter();
        Self {
            share: pass.share.detach(),
            loss: pass.loss.detach(),
            regularizers: regularizers
                .map(|(name, value)| (name, value.detach()))
                .collect(),
        }
    }

    /// Copies that the next replay does not touch.
    fn copy(&self) -> Pass {
        let regularizers = self.regularizers.iter();
        Pass {
            share: self.share.copy(),
            loss: self.loss.copy(),
            output: Output {
                logits: Tensor::new(),
                regularizers: regularizers
                    .map(|(name, value)| (name.clone(), value.copy()))
                    .collect(),
                stats: Vec::new(),
                charts: Vec::new(),
                selections: Vec::new(),
            },
        }
    }
}

/// What is fixed by a capture.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    n_microbatches: usize,
    tokens: Vec<i64>,
    n_targets: usize,
    weight: f64,
}

impl Shape {
    /// That of all microbatches of a batch, if they have one.
    fn of(batch: &[Microbatch]) -> Option<Self> {
        let of_one = |microbatch: &Microbatch| Self {
            n_microbatches: batch.len(),
            tokens: microbatch.tokens.size(),
            n_targets: microbatch.n_targets,
            weight: microbatch.weight,
        };
        let mut shapes = batch.iter().map(of_one);
        let first = shapes.next()?;
        shapes.all(|shape| shape == first).then_some(first)
    }
}

impl Graphs {
    /// For a run that wants some, or does not.
    pub(super) fn new(is_on: bool) -> Self {
        Self {
            is_on,
            ..Self::default()
        }
    }

    /// No graphs from now on.
    fn give_up(&mut self, run: &Run, why: &str) {
        let more = if self.n_captures == 0 {
            ""
        } else {
            " any more"
        };
        *self = Self::default();
        run.monitor
            .warn(&format!("`-cuda_graphs` has no effect{more}: {why}"));
    }

    /// Gets ready to replay a batch, which may need a capture; whether [`Self::replay`] will do it.
    ///
    /// # Errors
    /// If what is done in a pass cannot be captured.
    pub(super) fn prepare(
        &mut self,
        run: &mut Run,
        batch: &[Microbatch],
    ) -> Result<bool, TrainError> {
        let is_plain = |index| run.monitor.is_plain(&run.state, (index, batch.len()));
        if !self.is_on {
            return Ok(false);
        }
        if self.step.is_none()
            && let Some(why) = obstacle(run)
        {
            self.give_up(run, why);
            return Ok(false);
        }
        if !(0..batch.len()).all(is_plain) {
            return Ok(false);
        }
        let Some(shape) = Shape::of(batch) else {
            self.give_up(run, "the microbatches of a step are not alike");
            return Ok(false);
        };
        if self.step.as_ref().is_some_and(|step| step.shape == shape) {
            return Ok(true);
        }
        self.step = None;
        self.n_plain_steps += 1;
        if self.n_plain_steps <= N_WARMUP_STEPS {
            return Ok(false);
        }
        if self.n_captures == MAX_CAPTURES {
            self.give_up(run, "microbatches change their shape again and again");
            return Ok(false);
        }
        if let Some(missing) = missing_memory(run) {
            self.give_up(run, &missing);
            return Ok(false);
        }
        self.n_captures += 1;
        self.step = Some(Step::capture(run, batch, shape)?);
        Ok(true)
    }

    /// Does microbatch number `index` of a batch that was prepared. Its gradients are those of the parameters then.
    ///
    /// # Errors
    /// If the driver refuses.
    pub(super) fn replay(
        &self,
        run: &Run,
        (index, microbatch): (usize, &Microbatch),
    ) -> Result<Pass, TrainError> {
        let step = self.step.as_ref();
        let (step, replayed) = step
            .and_then(|step| Some((step, step.passes.get(index).or(step.passes.last())?)))
            .ok_or_else(|| PluginError::new("no step has been captured"))?;
        let tokens = microbatch.tokens_on(run.device)?;
        let replay = || {
            step.tokens.shallow_clone().f_copy_(&tokens)?;
            replayed.graph.replay()
        };
        replay().or_plugin_error("a CUDA graph cannot be replayed")?;
        if index == 0 {
            run.optimizer.set_grads(&step.grads)?;
        }
        Ok(replayed.kept.copy())
    }
}

/// Why a run cannot have graphs.
fn obstacle(run: &Run) -> Option<&'static str> {
    let obstacles = [
        (!run.device.is_cuda(), "the device is no GPU"),
        (
            run.group.n_ranks() > 1,
            "several processes exchange gradients during the backward pass",
        ),
        (
            run.segments.is_on(),
            "the model's memory of earlier segments grows",
        ),
        (
            run.regularizers.are_decaying(),
            "`-reg_lin_decay` changes the objective in each step",
        ),
        (run.inspector.is_on(), "`-nan_detect` looks at each pass"),
        (
            run.monitor.is_profiled(),
            "`-profile_steps` would see no more than a launch",
        ),
        (
            !run.monitor.has_plain_steps(),
            "something is logged of each step",
        ),
        (
            !run.model.graph_safe().unwrap_or(false),
            "the model, with its kernel and arguments, does not say that it can be captured",
        ),
    ];
    let mut obstacles = obstacles.into_iter();
    obstacles.find_map(|(is_there, why)| is_there.then_some(why))
}

/// What is wrong if memory does not suffice for a second set of activations.
fn missing_memory(run: &Run) -> Option<String> {
    let stats = cuda::memory_stats(run.device).ok()?;
    let activations = stats.allocated_peak.saturating_sub(stats.allocated);
    let room = stats.free + stats.reserved.saturating_sub(stats.allocated);
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    (room < 2 * activations).then(|| {
        format!(
            "activations, {:.1} GiB, would be held twice, and {:.1} GiB are free",
            gib(activations),
            gib(room)
        )
    })
}

impl Step {
    fn capture(run: &mut Run, batch: &[Microbatch], shape: Shape) -> Result<Self, TrainError> {
        let first = batch.first();
        let first = first.ok_or_else(|| PluginError::new("the batch is empty"))?;
        let tokens = first.tokens_on(run.device)?;
        let mut passes: Vec<Replayed> = Vec::new();
        let mut grads = Grads::new();
        for (index, microbatch) in batch.iter().enumerate().take(2) {
            let neighbor = passes.last().map(|captured: &Replayed| &captured.graph);
            let capture = Graph::capture(run.device, neighbor, || {
                let place = (index, batch.len());
                let nothing = (Wishes::default(), Past::None);
                let pass = pass(run, (&tokens, microbatch), place, nothing);
                pass.map(Kept::of).map_err(Stop::Step)
            });
            let (graph, kept) = capture.map_err(Stop::explained)?;
            passes.push(Replayed { graph, kept });
            grads = run.optimizer.own_grads_by_index();
        }
        run.monitor
            .message("the passes of a step are CUDA graphs from here on");
        Ok(Self {
            shape,
            tokens,
            passes,
            grads,
        })
    }
}

/// Why a capture failed.
enum Stop {
    Step(TrainError),
    Capture(tch::TchError),
}

impl From<tch::TchError> for Stop {
    fn from(error: tch::TchError) -> Self {
        Self::Capture(error)
    }
}

impl Stop {
    fn explained(self) -> TrainError {
        const WHAT: &str = "a step cannot be captured as a CUDA graph";
        const FIX: &str = "set `-cuda_graphs 0`";
        let error = match self {
            Self::Step(TrainError::Component(error)) => {
                PluginError::new(WHAT).why(format!("{}: {}", error.what, error.why))
            }
            Self::Step(error) => return error,
            Self::Capture(error) => moeut_torch::plugin_error(WHAT, &error),
        };
        TrainError::Component(error.fix(FIX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn microbatch(n_tokens: i64, n_targets: usize, weight: f64) -> Microbatch {
        Microbatch {
            tokens: Tensor::zeros([n_tokens, 2], (Kind::Int64, Device::Cpu)),
            n_targets,
            weight,
            is_start: false,
        }
    }

    #[test]
    fn only_microbatches_that_are_alike_have_a_shape() {
        let alike = || microbatch(5, 8, 0.5);
        let shape = Shape::of(&[alike(), alike()]);
        assert!(shape.is_some());
        assert_eq!(shape, Shape::of(&[alike(), alike()]));
        assert_ne!(shape, Shape::of(&[alike()]));
        assert_eq!(Shape::of(&[]), None);
        for other in [
            microbatch(4, 8, 0.5),
            microbatch(5, 7, 0.5),
            microbatch(5, 8, 0.25),
        ] {
            assert_eq!(Shape::of(&[alike(), other]), None);
        }
    }
}
