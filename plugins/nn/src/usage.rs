//! How evenly experts are used.

use tch::{Kind, Tensor};

/// `exp(H(p)) / E` of the selection counts `[E]`: 1 if all experts are used alike, `1/E` if only one is.
pub fn relative_perplexity(counts_e: &Tensor) -> Tensor {
    let counts_e = counts_e.to_kind(Kind::Float);
    let n_experts = counts_e.numel() as f64;
    let p_e = &counts_e / counts_e.sum(None);
    p_e.special_entr().sum(None).exp() / n_experts
}

/// Share of the experts in counts `[E]` that nothing selected.
pub fn dead_share(counts_e: &Tensor) -> Tensor {
    counts_e.eq(0).to_kind(Kind::Float).mean(None)
}
