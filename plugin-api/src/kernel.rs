//! What a kernel is: the grouped matrix product behind σ-MoE and SwitchHead (the reference's `cvmm`).

use crate::{DType, Device, Host, PluginError, TensorHandle};
use serde::{Deserialize, Serialize};

/// An implementation of the grouped matrix product, differentiable in `x`, `weight` and `gate`.
///
/// Shape letters: `R` rows of input, `M` selections, `f = M / R` selections per row, `E` experts, `K`/`N` inner and
/// outer width, `n` selections that are summed.
///
/// ```text
/// m-th selection: expert e(m), source row m / f
/// y_m  = x[m / f] · weight[e(m)]                     without gate: result [M, N]
/// y_i  = Σ_j gate[i, j] · y_{i·n + j}                with gate [M/n, n]: result [M/n, N]
/// ```
///
/// | use | x | f | gate | result |
/// |---|---|---|---|---|
/// | σ-MoE up | `[tokens, D]` | K | – | `[tokens·K, S]` |
/// | σ-MoE down | `[tokens·K, S]` | 1 | `[tokens, K]` | `[tokens, D]` |
/// | SwitchHead v | `[tokens, D]` | H·k | `[tokens·H, k]` | `[tokens·H, d]` |
/// | SwitchHead o | `[tokens·H, d]` | k | `[tokens, H·k]` | `[tokens, D]` |
///
/// # Source
/// Reference `layers/cvmm.py`.
pub trait Kernel: Sized + 'static {
    /// What a user types after `-moe.kernel`; `snake_case`.
    const NAME: &'static str;
    /// One line for lists.
    const SUMMARY: &'static str;

    /// Makes the kernel.
    ///
    /// # Errors
    /// If the machine lacks what it needs.
    fn new(host: &Host) -> Result<Self, PluginError>;

    /// What it can do, without trying.
    fn capabilities() -> Capabilities;

    /// The product above.
    ///
    /// # Errors
    /// For a dtype or device that [`Kernel::capabilities`] does not list, or shapes that do not fit.
    fn grouped_matmul(&self, call: GroupedMatmul) -> Result<TensorHandle, PluginError>;
}

/// What a kernel supports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Element types on the CPU; empty if it does not run there.
    pub cpu: Vec<DType>,
    /// Element types on CUDA devices; empty if it does not run there.
    pub cuda: Vec<DType>,
    /// Rank for `-moe.kernel auto`: the highest that supports device and element type is taken.
    pub speed_rank: u32,
    /// Whether two runs give the same bits.
    pub is_deterministic: bool,
    /// Whether a call may be captured in a CUDA graph.
    pub is_graph_safe: bool,
}

impl Capabilities {
    /// Whether a call with these would be accepted.
    pub fn supports(&self, device: Device, dtype: DType) -> bool {
        match device {
            Device::Cpu => self.cpu.contains(&dtype),
            Device::Cuda(_) => self.cuda.contains(&dtype),
        }
    }
}

/// One call of the grouped matrix product.
#[derive(Debug)]
pub struct GroupedMatmul {
    /// `[R, K]`.
    pub x: TensorHandle,
    /// `[E, K, N]`.
    pub weight: TensorHandle,
    /// Which selections go to which expert.
    pub selection: Selection,
    /// `[M / n, n]`, or nothing to get every product by itself.
    pub gate: Option<TensorHandle>,
}

/// `M` selections sorted by expert; made once and used by every product that shares the routing.
#[derive(Debug)]
pub struct Selection {
    /// Permutation that sorts the selections by expert, stable; int64 `[M]`.
    pub order: TensorHandle,
    /// Its inverse: where each selection stands in the sorted order; int64 `[M]`.
    pub inverse: TensorHandle,
    /// End of each expert's run in the sorted order; int32 `[E]`, the last is `M`.
    pub ends: TensorHandle,
}
