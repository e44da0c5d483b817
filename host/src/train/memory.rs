//! How much memory a run takes, by kind, and what to do when there is not enough.

use super::TrainError;
use super::run::Run;
use super::timing::Phase;
use moeut_plugin_api::PluginError;
use tch::{Device, Tensor};

/// Bytes by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Parameters and buffers of the model.
    pub parameters: u64,
    /// Their gradients at this moment.
    pub gradients: u64,
    /// State of the optimizer.
    pub optimizer: u64,
    /// The most so far: of tensors on a GPU; on the CPU of the whole process, as far as it was resident.
    pub peak: Option<u64>,
}

impl Memory {
    /// What a run takes now, and at most so far.
    pub fn of(run: &Run) -> Self {
        let grads: Vec<Tensor> = run
            .optimizer
            .own_grads()
            .into_iter()
            .map(|(_, g)| g)
            .collect();
        Self {
            parameters: bytes(run.parameters.iter().map(|(_, tensor)| tensor)),
            gradients: bytes(grads.iter()),
            optimizer: run.optimizer.n_bytes(),
            peak: peak(run.device),
        }
    }

    /// What is left of the peak: activations mostly, on the CPU the program itself, too.
    pub fn rest(&self) -> Option<u64> {
        Some(
            self.peak?
                .saturating_sub(self.parameters + self.gradients + self.optimizer),
        )
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "parameters {}, gradients {}, optimizer {}",
            mebibytes(self.parameters),
            mebibytes(self.gradients),
            mebibytes(self.optimizer)
        )?;
        match (self.peak, self.rest()) {
            (Some(peak), Some(rest)) => write!(
                f,
                ", activations and the rest {}; peak {}",
                mebibytes(rest),
                mebibytes(peak)
            ),
            _ => write!(f, "; peak unknown"),
        }
    }
}

/// Bytes of tensors.
fn bytes<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> u64 {
    tensors
        .map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64)
        .sum()
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The most bytes so far; see [`Memory::peak`]. Asking makes nobody wait.
pub fn peak(device: Device) -> Option<u64> {
    if device.is_cuda() {
        let stats = moeut_torch::cuda::memory_stats(device).ok()?;
        return Some(stats.allocated_peak);
    }
    of_process("VmHWM:")
}

/// The bytes of this moment, of the same kind as [`peak`].
pub fn current(device: Device) -> Option<u64> {
    if device.is_cuda() {
        return Some(moeut_torch::cuda::memory_stats(device).ok()?.allocated);
    }
    of_process("VmRSS:")
}

/// Bytes that the system counts of this process under a name.
fn of_process(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// How libtorch says that memory is used up, on GPUs and on the CPU; a plugin's panic quotes it.
const OUT_OF_MEMORY: [&str; 7] = [
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "Cannot allocate memory",
    "std::bad_alloc",
];

/// Whether an error text of libtorch, or of a plugin that quotes it, is about memory.
fn is_out_of_memory(text: &str) -> bool {
    OUT_OF_MEMORY.iter().any(|sign| text.contains(sign))
}

/// Says by kind what memory went to, and which flag to change, if `error` is about memory; else returns it as it is.
pub(super) fn explain(error: TrainError, run: &Run) -> TrainError {
    let TrainError::Component(cause) = error else {
        return error;
    };
    if !is_out_of_memory(&cause.what) && !is_out_of_memory(&cause.why) {
        return TrainError::Component(cause);
    }
    let shape = run.batches.shape();
    let sizes = shape.microbatch_sizes();
    let situation = Situation {
        phase: run.monitor.phase(),
        step: run.state.step,
        batch_size: shape.batch_size,
        microbatch_size: sizes.first().copied().unwrap_or(1),
        n_microbatches: sizes.len(),
        eval_batch_size: run.eval_batch_size,
        seq_len: shape.seq_len,
        has_graphs: run.config.cuda_graphs,
    };
    TrainError::Component(situation.explain(&cause.why, &Memory::of(run)))
}

/// Where in a run memory was used up.
struct Situation {
    phase: Phase,
    step: u64,
    batch_size: usize,
    microbatch_size: usize,
    n_microbatches: usize,
    eval_batch_size: usize,
    seq_len: usize,
    has_graphs: bool,
}

impl Situation {
    fn explain(&self, cause: &str, memory: &Memory) -> PluginError {
        let Self {
            step,
            batch_size,
            microbatch_size,
            n_microbatches,
            eval_batch_size,
            seq_len,
            ..
        } = self;
        let (size, place, fix) = if self.phase == Phase::Validate {
            (
                *eval_batch_size,
                format!("validating after step {step}"),
                format!("`-test_batch_size {}`", eval_batch_size.div_ceil(2)),
            )
        } else {
            (
                *microbatch_size,
                format!("in step {}", step + 1),
                format!(
                    "`-n_microbatch {}`, or `-per_device_batch_size {}` instead of `-n_microbatch`",
                    (2 * n_microbatches).min(*batch_size),
                    microbatch_size.div_ceil(2)
                ),
            )
        };
        let once = if self.has_graphs {
            ", or hold activations once: `-cuda_graphs 0`"
        } else {
            ""
        };
        let fix = if size > 1 {
            format!("compute fewer sequences at once: {fix}")
        } else {
            "one sequence at a time is the least: lower `-lm.unroll`, or make the model smaller"
                .to_owned()
        };
        PluginError::new(format!("out of memory {place}"))
            .why(format!(
                "batch {batch_size}, {size} sequences of {seq_len} tokens at once ({n_microbatches} microbatches); {memory}; {}",
                request(cause)
            ))
            .fix(format!("{fix}{once}"))
    }
}

/// The sentence of libtorch's text that says how much was asked for, without the stack and the advice around it.
fn request(cause: &str) -> String {
    let start = OUT_OF_MEMORY
        .iter()
        .filter_map(|sign| cause.find(sign))
        .min();
    let text = &cause[start.unwrap_or(0)..];
    let end = ["\\n", "\n", "Exception raised", "Of the allocated memory"]
        .iter()
        .filter_map(|mark| text.find(mark))
        .min();
    let text = text[..end.unwrap_or(text.len())].trim();
    format!("libtorch says: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use insta::assert_snapshot;
    use tch::Kind;

    const CUDA: &str = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch";
    const PANIC: &str = "called `Result::unwrap()` on an `Err` value: Torch(\"[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000000 bytes. Error code 12 (Cannot allocate memory)\\nException raised from …\")";

    fn situation(phase: Phase, microbatch_size: usize) -> Situation {
        Situation {
            phase,
            step: 11,
            batch_size: 64,
            microbatch_size,
            n_microbatches: 64 / microbatch_size,
            eval_batch_size: 32,
            seq_len: 1024,
            has_graphs: false,
        }
    }

    const MEMORY: Memory = Memory {
        parameters: 3 << 19,
        gradients: 1 << 20,
        optimizer: 3 << 20,
        peak: Some(100 << 20),
    };

    #[test]
    fn the_sizes_and_the_flag_are_named() {
        let error = situation(Phase::ForwardBackward, 32).explain(CUDA, &MEMORY);
        assert_snapshot!([error.what, error.why, error.fix].join("\n"), @r"
        out of memory in step 12
        batch 64, 32 sequences of 1024 tokens at once (2 microbatches); parameters 1.5 MiB, gradients 1.0 MiB, optimizer 3.0 MiB, activations and the rest 94.5 MiB; peak 100.0 MiB; libtorch says: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free.
        compute fewer sequences at once: `-n_microbatch 4`, or `-per_device_batch_size 16` instead of `-n_microbatch`
        ");
        let error = situation(Phase::Validate, 32).explain(PANIC, &MEMORY);
        assert_eq!(error.what, "out of memory validating after step 11");
        assert_eq!(
            error.fix,
            "compute fewer sequences at once: `-test_batch_size 16`"
        );
        assert!(error.why.ends_with(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000000 bytes. Error code 12 (Cannot allocate memory)"
        ));
        let error = situation(Phase::Optimizer, 1).explain(CUDA, &MEMORY);
        assert!(error.fix.contains("`-lm.unroll`"));
        let with_graphs = Situation {
            has_graphs: true,
            ..situation(Phase::Optimizer, 32)
        };
        let error = with_graphs.explain(CUDA, &MEMORY);
        assert!(
            error
                .fix
                .ends_with(", or hold activations once: `-cuda_graphs 0`")
        );
    }

    /// What the allocator of this libtorch really says.
    #[test]
    fn the_real_text_is_recognized() {
        let error = Tensor::f_zeros([1 << 46], (Kind::Float, Device::Cpu)).unwrap_err();
        let error = moeut_torch::plugin_error("a tensor cannot be made", &error);
        assert!(is_out_of_memory(&error.why), "{}", error.why);
        assert!(is_out_of_memory(CUDA) && is_out_of_memory(PANIC));
        assert!(!is_out_of_memory(
            "mat1 and mat2 shapes cannot be multiplied"
        ));
    }

    #[test]
    fn a_tensor_has_its_bytes_and_the_process_its_peak() {
        let tensor = Tensor::zeros([3, 5], (Kind::BFloat16, Device::Cpu));
        assert_eq!(bytes([&tensor].into_iter()), 30);
        let now = current(Device::Cpu).unwrap();
        assert!(now > 1 << 20 && peak(Device::Cpu).unwrap() >= now);
    }
}
