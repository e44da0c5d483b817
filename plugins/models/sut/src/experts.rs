//! The weights of one linear map per expert.

use moeut_nn::{Init, Params};
use tch::Tensor;

/// Weight `[E, in, out]`, and perhaps a bias `[E, out]`.
#[derive(Debug)]
pub(crate) struct Experts {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Experts {
    /// Adds `w ~ U(±1/in)` and, if `has_bias`, `b ~ U(±1/√out)`.
    ///
    /// Both are the reference's: narrower than usual for the weight, and for the bias the root of the *output* width,
    /// because it measures the transposed weight.
    pub(crate) fn new(
        params: &Params,
        n_experts: i64,
        d_in: i64,
        d_out: i64,
        has_bias: bool,
    ) -> Self {
        let weight = Init::Uniform(1.0 / d_in as f64);
        let bias = Init::Bias(1.0 / (d_out as f64).sqrt());
        Self {
            weight: params.parameter("w", &[n_experts, d_in, d_out], weight),
            bias: has_bias.then(|| params.parameter("b", &[n_experts, d_out], bias)),
        }
    }
}
