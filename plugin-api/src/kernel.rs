//! What a kernel is: the grouped matrix product behind σ-MoE and SwitchHead (the reference's `cvmm`), and calls that
//! fuse more of a layer, which a kernel may offer. What a layer does where a call is not offered is the layer's matter.

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
/// The other calls are optional: callers ask [`Capabilities::provides`] and otherwise compose the same from grouped
/// products and plain tensor operations. They are differentiable in every floating-point tensor of the call.
///
/// | call | covers | result |
/// |---|---|---|
/// | [`Kernel::route`] | layernorm, router, scores, top-k, sort by expert | [`Routed`] |
/// | [`Kernel::moe_mlp`] | σ-MoE up, activation, σ-MoE down | `[tokens, D]` |
/// | [`Kernel::moe_project`] | `route` and SwitchHead q, k or v | [`Projected`] |
/// | [`Kernel::residual_norm`] | residual addition, rounding, layernorm | [`ResidualNormed`] |
/// | [`Kernel::select`] | router, top-k, gates, sort by expert, mean probabilities | [`Selected`] |
/// | [`Kernel::rotate`] | rotary positions | as `x` |
/// | [`Kernel::cross_entropy`] | loss of each token | `[tokens]` |
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

    /// Routes tokens to experts; see [`Route`].
    ///
    /// # Errors
    /// As [`Kernel::grouped_matmul`]; without a body of its own the kernel does not provide the call.
    fn route(&self, _call: Route) -> Result<Routed, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::Route))
    }

    /// A whole σ-MoE layer after its routing; see [`MoeMlp`].
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn moe_mlp(&self, _call: MoeMlp) -> Result<TensorHandle, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::MoeMlp))
    }

    /// A SwitchHead projection with its routing; see [`MoeProject`].
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn moe_project(&self, _call: MoeProject) -> Result<Projected, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::MoeProject))
    }

    /// The residual stream where a layer reads it; see [`ResidualNorm`].
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn residual_norm(&self, _call: ResidualNorm) -> Result<ResidualNormed, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::ResidualNorm))
    }

    /// Routes tokens by sigmoid gates; see [`Select`].
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn select(&self, _call: Select) -> Result<Selected, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::Select))
    }

    /// Rotary positions; see [`Rotate`].
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn rotate(&self, _call: Rotate) -> Result<TensorHandle, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::Rotate))
    }

    /// The loss of each token; see [`CrossEntropy`]. The host asks the kernel that the model computes with for it.
    ///
    /// # Errors
    /// As [`Kernel::route`].
    fn cross_entropy(&self, _call: CrossEntropy) -> Result<TensorHandle, PluginError> {
        Err(not_provided(Self::NAME, FusedCall::CrossEntropy))
    }
}

/// What a kernel supports.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Element types on the CPU; empty if it does not run there.
    pub cpu: Vec<DType>,
    /// Element types on CUDA devices; empty if it does not run there.
    pub cuda: Vec<DType>,
    /// Rank for `-moe.kernel auto`: the highest that supports device and element type, and computes a small layer rightly
    /// when the host starts, is taken.
    pub speed_rank: u32,
    /// Whether two runs give the same bits, if libtorch was told to use deterministic algorithms.
    pub is_deterministic: bool,
    /// Whether a call may be captured in a CUDA graph.
    pub is_graph_safe: bool,
    /// Bytes of which the widths of all matrices are multiples where it is fastest; others it pads inside. 0: any.
    #[serde(default)]
    pub alignment_bytes: u32,
    /// The optional calls that it provides.
    #[serde(default)]
    pub fused: Vec<Fused>,
}

/// One optional call, and where it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fused {
    /// Which one.
    pub call: FusedCall,
    /// For calls with an activation: those that it knows.
    #[serde(default)]
    pub activations: Vec<Activation>,
    /// Element types on the CPU.
    pub cpu: Vec<DType>,
    /// Element types on CUDA devices.
    pub cuda: Vec<DType>,
}

/// The optional calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FusedCall {
    /// [`Kernel::route`].
    Route,
    /// [`Kernel::moe_mlp`].
    MoeMlp,
    /// [`Kernel::moe_project`].
    MoeProject,
    /// [`Kernel::residual_norm`].
    ResidualNorm,
    /// [`Kernel::select`].
    Select,
    /// [`Kernel::rotate`].
    Rotate,
    /// [`Kernel::cross_entropy`].
    CrossEntropy,
    /// One of a newer version of this interface; nobody can ask for it.
    #[serde(other)]
    Unknown,
}

/// The non-linearity inside a fused call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x · Φ(x)`, exact.
    Gelu,
    /// One of a newer version of this interface; kernels refuse it.
    #[serde(other)]
    Unknown,
}

/// How router logits become gates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScoring {
    /// Sigmoid of each selected logit.
    Sigmoid,
    /// Softmax over the experts of a group, then the selection; gates do not sum to one.
    Softmax,
    /// Softmax over the selected logits; gates sum to one.
    SelectedSoftmax,
    /// One of a newer version of this interface; kernels refuse it.
    #[serde(other)]
    Unknown,
}

impl Capabilities {
    /// Whether an optional call with these would be accepted; `activation` for the calls that have one.
    pub fn provides(
        &self,
        call: FusedCall,
        activation: Option<Activation>,
        device: Device,
        dtype: DType,
    ) -> bool {
        let is_unknown = call == FusedCall::Unknown || activation == Some(Activation::Unknown);
        let mut of_call = self.fused.iter().filter(|fused| fused.call == call);
        !is_unknown
            && of_call.any(|fused| {
                let dtypes = match device {
                    Device::Cpu => &fused.cpu,
                    Device::Cuda(_) => &fused.cuda,
                };
                dtypes.contains(&dtype)
                    && activation.is_none_or(|wanted| fused.activations.contains(&wanted))
            })
    }

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

/// One call of [`Kernel::route`].
///
/// Shape letters: `T` tokens, `D` their width, `G` groups that select for themselves (SwitchHead: heads; σ-MoE: 1),
/// `E` experts per group, `k` selected in each.
///
/// ```text
/// r_t    = LN(x_t) · norm_weight (+ norm_bias)    x_t itself without norm_weight
/// z_tg   = weight[g] · r_t (+ bias[g])            in fp32, or fp64 for fp64
/// e, g   = top_k(z_tg), scoring(z_tg)[e]          in no order within the k
/// id     = g·E + e
/// ```
///
/// Dropout is not part of it: layers that have some route by themselves.
#[derive(Debug)]
pub struct Route {
    /// `[T, D]`.
    pub x: TensorHandle,
    /// `[D]`; without it there is no normalization.
    pub norm_weight: Option<TensorHandle>,
    /// `[D]`.
    pub norm_bias: Option<TensorHandle>,
    /// `[G·E, D]`.
    pub weight: TensorHandle,
    /// `[G·E]`.
    pub bias: Option<TensorHandle>,
    /// Its numbers.
    pub options: RouteOptions,
}

/// The numbers of a [`Route`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RouteOptions {
    /// `G`.
    pub n_groups: u32,
    /// `k`.
    pub top_k: u32,
    /// From logits to gates.
    pub scoring: RouterScoring,
    /// Added to the variance by the normalization.
    pub norm_eps: f64,
}

/// What [`Kernel::route`] finds, for the products, the regularizer and statistics.
#[derive(Debug)]
pub struct Routed {
    /// `z`: `[T, G·E]`.
    pub logits: TensorHandle,
    /// `[T·G, k]`, in the element type of `logits`.
    pub gate: TensorHandle,
    /// `id`: int64 `[T·G, k]`.
    pub ids: TensorHandle,
    /// The `T·G·k` ids sorted.
    pub selection: Selection,
}

/// One call of [`Kernel::moe_mlp`].
///
/// Shape letters: `T` tokens, `D` their width, `E` experts of `S` hidden units, `K` selected for each token.
///
/// ```text
/// y_t = Σ_j gate[t, j] · act(x_t · w1[e] (+ b1[e])) · w2[e]        e = e(t·K + j)
/// ```
///
/// The product is in the element type of `x`; each gradient in that of its input.
#[derive(Debug)]
pub struct MoeMlp {
    /// `[T, D]`.
    pub x: TensorHandle,
    /// `[E, D, S]`.
    pub w1: TensorHandle,
    /// `[E, S]`.
    pub b1: Option<TensorHandle>,
    /// `[E, S, D]`.
    pub w2: TensorHandle,
    /// `[T, K]`.
    pub gate: TensorHandle,
    /// Of the `T·K` selections.
    pub selection: Selection,
    /// What is not a tensor.
    pub options: MoeMlpOptions,
}

/// What of a [`MoeMlp`] is not a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoeMlpOptions {
    /// Between the two products.
    pub activation: Activation,
    /// Whether the backward pass should compute the hidden units again instead of finding them kept, with the same
    /// result. A wish: a kernel that does not know it keeps them.
    #[serde(default)]
    pub keeps_less: bool,
}

/// One call of [`Kernel::moe_project`]; shape letters as in [`Route`], `N` the width of a head.
///
/// ```text
/// y_tg = Σ_j gate[tg, j] · x_t · weight[id[tg, j]]
/// ```
#[derive(Debug)]
pub struct MoeProject {
    /// Selects; its `x` may be another one than what is projected.
    pub route: Route,
    /// `[T, D]`.
    pub x: TensorHandle,
    /// `[G·E, D, N]`.
    pub weight: TensorHandle,
}

/// What [`Kernel::moe_project`] finds.
#[derive(Debug)]
pub struct Projected {
    /// `[T·G, N]`, in the element type of the projected `x`.
    pub y: TensorHandle,
    /// The routing, which other projections may share.
    pub routed: Routed,
}

/// One call of [`Kernel::residual_norm`], over the first `D` channels of the last axis, `P`.
///
/// ```text
/// sum    = x (+ update)
/// plain  = sum, rounded to the type of the call
/// normed = (sum - mean) / √(var + eps) · weight + bias
/// ```
///
/// Rows may have more channels than are normalized, `P > D`, so that they begin at aligned addresses; `normed` is 0
/// in those. The call has the type of its products, which the options say. Statistics are never in a half type. A
/// kernel may compute the gradient of the layernorm from `plain`, so that nothing in the type of the stream need be
/// kept. Nor need `normed`: a call whose `x` is the `plain` of an earlier one, in a half type, makes it again but for that
/// rounding, and has `x` itself as `sum` and `plain`. Such a call has neither an update nor gradients.
#[derive(Debug)]
pub struct ResidualNorm {
    /// The stream, `[.., P]`; fp32, or rounded already, where the call has a half type, else in its type.
    pub x: TensorHandle,
    /// What a layer adds to it, as `x`, in the type of the call.
    pub update: Option<TensorHandle>,
    /// `[D]`, in the type of `x`.
    pub weight: TensorHandle,
    /// `[D]`, in the type of `x`.
    pub bias: TensorHandle,
    /// What is not a tensor.
    pub options: ResidualNormOptions,
}

/// What of a [`ResidualNorm`] is not a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResidualNormOptions {
    /// Added to the variance.
    pub eps: f64,
    /// The type of the call.
    pub dtype: DType,
    /// Whether `normed` is in the type of `x`, for routers that are more precise than the products.
    pub is_wide: bool,
}

/// What [`Kernel::residual_norm`] finds, each in the shape of `x`.
#[derive(Debug)]
pub struct ResidualNormed {
    /// In the type of `x`; without an update it is `x`.
    pub sum: TensorHandle,
    /// In the type of the call.
    pub plain: TensorHandle,
    /// In the type of the call, or in that of `x`.
    pub normed: TensorHandle,
}

/// One call of [`Kernel::select`]; shape letters as in [`Route`], and `B` sequences of `T / B` tokens.
///
/// ```text
/// z_tg   = weight[g] · x_t                       sums in fp32, or fp64 for fp64
/// e, g   = top_k(z_tg), sigmoid(z_tg)[e]         equal logits: lower experts first
/// id     = g·E + e
/// m_bge  = log mean_t softmax(z_tg)[e]           over the tokens of a sequence
/// ```
///
/// Differentiable in `x` and `weight`, from `gate` and `m`. A group has at most [`Select::MAX_EXPERTS`] experts, of
/// which at most [`Select::MAX_SELECTED`] are selected, and there are at most [`Select::MAX_IDS`] experts in all.
#[derive(Debug)]
pub struct Select {
    /// `[T, D]`. The call has its type; operands of products are rounded to it.
    pub x: TensorHandle,
    /// `[G·E, D]`.
    pub weight: TensorHandle,
    /// What is not a tensor.
    pub options: SelectOptions,
}

impl Select {
    /// Largest `E`.
    pub const MAX_EXPERTS: i64 = 1024;
    /// Largest `k`.
    pub const MAX_SELECTED: i64 = 32;
    /// Largest `G·E`.
    pub const MAX_IDS: i64 = 2048;
}

/// What of a [`Select`] is not a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectOptions {
    /// `G`.
    pub n_groups: i64,
    /// `k`.
    pub top_k: i64,
    /// `B`, a divisor of `T`.
    pub n_sequences: i64,
    /// Whether operands in fp32 may be rounded to TF32.
    pub allows_tf32: bool,
    /// Whether the backward pass should compute the logits again instead of finding them kept, with the same result. A
    /// wish, as [`MoeMlpOptions::keeps_less`].
    #[serde(default)]
    pub keeps_less: bool,
}

/// What [`Kernel::select`] finds.
#[derive(Debug)]
pub struct Selected {
    /// `[T·G, k]`, best first, at least in fp32.
    pub gate: TensorHandle,
    /// `m`: `[B, G, E]`, at least in fp32.
    pub log_means: TensorHandle,
    /// `id`: int32 `[T·G, k]`.
    pub ids: TensorHandle,
    /// The `T·G·k` ids sorted.
    pub selection: Selection,
}

/// One call of [`Kernel::rotate`], in the type of `x`. The first `2·n` channels of each head are rotated.
///
/// ```text
/// (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin),   x₁ = x[..n], x₂ = x[n..2n]
/// ```
#[derive(Debug)]
pub struct Rotate {
    /// `[B, T, H, d]`.
    pub x: TensorHandle,
    /// `[T, n]`, fp32, or fp64 for fp64.
    pub cos: TensorHandle,
    /// As `cos`.
    pub sin: TensorHandle,
}

/// One call of [`Kernel::cross_entropy`], in the type of `logits`; `N` tokens, `V` ids.
///
/// ```text
/// loss_n = log Σ_v exp(logits_nv) − logits_n,target       nats; 0 where there is no target
/// ```
///
/// The losses `[N]` are at least in fp32, and so is all that is computed of logits; their gradient has the type of
/// `logits`. Logits may be of any size. A target of `V` or more is refused, or has a loss that is not a number.
#[derive(Debug)]
pub struct CrossEntropy {
    /// `[N, V]`.
    pub logits: TensorHandle,
    /// int64 `[N]`; below 0: none.
    pub targets: TensorHandle,
}

/// The answer of a kernel without an optional call.
pub(crate) fn not_provided(kernel: &str, call: FusedCall) -> PluginError {
    let call = match call {
        FusedCall::Route => "route",
        FusedCall::MoeMlp => "moe_mlp",
        FusedCall::MoeProject => "moe_project",
        FusedCall::ResidualNorm => "residual_norm",
        FusedCall::Select => "select",
        FusedCall::Rotate => "rotate",
        FusedCall::CrossEntropy => "cross_entropy",
        FusedCall::Unknown => "unknown",
    };
    PluginError::new(format!("kernel `{kernel}` has no fused call `{call}`"))
        .why("the call is optional, and its capabilities do not list it")
        .fix("ask `Capabilities::provides` first, and compose the layer from grouped products otherwise")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel built against ABI 1.0 says nothing of what came later.
    #[test]
    fn capabilities_of_an_older_kernel_provide_no_fused_call() {
        let old = r#"{"cpu":["f32"],"cuda":[],"speed_rank":1,"is_deterministic":true,"is_graph_safe":false}"#;
        let capabilities: Capabilities = serde_json::from_str(old).unwrap();
        assert!(capabilities.supports(Device::Cpu, DType::F32));
        assert!(!capabilities.provides(FusedCall::Route, None, Device::Cpu, DType::F32));
    }

    /// What a newer kernel can beyond this version must not make the rest unreadable.
    #[test]
    fn calls_and_activations_of_a_newer_kernel_are_skipped() {
        let new = r#"{"cpu":["f32"],"cuda":[],"speed_rank":1,"is_deterministic":true,"is_graph_safe":false,
            "fused":[{"call":"whole_model","cpu":["f32"],"cuda":[]},
                     {"call":"moe_mlp","activations":["swish","relu"],"cpu":["f32"],"cuda":[]}]}"#;
        let capabilities: Capabilities = serde_json::from_str(new).unwrap();
        let provides =
            |call, activation, device| capabilities.provides(call, activation, device, DType::F32);
        let (relu, gelu) = (Some(Activation::Relu), Some(Activation::Gelu));
        assert!(provides(FusedCall::MoeMlp, relu, Device::Cpu));
        assert!(!provides(FusedCall::MoeMlp, gelu, Device::Cpu));
        assert!(!provides(FusedCall::MoeMlp, relu, Device::Cuda(0)));
        assert!(!provides(FusedCall::Unknown, None, Device::Cpu));
        assert!(!provides(
            FusedCall::MoeMlp,
            Some(Activation::Unknown),
            Device::Cpu
        ));
    }
}
