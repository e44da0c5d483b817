//! The argument table: the reference's flags and defaults beside the fields of [`crate::config::Config`].

use moeut_nn::lm::SHELL_ARGS;
use moeut_plugin_api::{ArgSpec, joined};

/// All arguments of the model.
pub(crate) const ARGS: &[ArgSpec] = &joined::<_, { SHELL_ARGS.len() + OWN.len() }>(SHELL_ARGS, OWN);

const OWN: &[ArgSpec] = &[
    ArgSpec::text("moe.kernel", "auto").field("kernel").help("grouped matrix product; auto: the fastest that fits"),
    ArgSpec::text("moe.router_dtype", "f32").field("router_dtype").choices("f32|tf32|mixed|amp").help("with -amp, the scores of routers and halting are computed in: f32; tf32, a GPU's fast single precision; mixed, amp's operands and f32 scores; amp, as everything else, like the reference's"),
    // Attention experts.
    ArgSpec::int("moe.att.expert_size", "256").field("attention.d_expert").help("width of a SUT's attention expert: a multiple of the width of a head"),
    ArgSpec::int("moe.att.n_experts", "4").field("attention.n_experts").help("attention experts"),
    ArgSpec::int("moe.att.k", "2").field("attention.top_k").help("attention experts that a token uses"),
    ArgSpec::float("moe.att.dropout", "0.0").field("attention.dropout").unit("probability").help("dropout of the attention probabilities"),
    ArgSpec::int("sut.max_relative_positions", "64").field("attention.max_distance").help("keys at least so far back, less one, share a learned position"),
    ArgSpec::int("sut.sample_topk", "0").field("attention.n_drawn").help("attention experts of a token that are drawn while training, not the best"),
    // Feed-forward experts.
    ArgSpec::int("moe.n_experts", "128").field("moe.n_experts").help("feed-forward experts"),
    ArgSpec::int("moe.expert_size", "128").field("moe.d_expert").help("hidden units of an expert"),
    ArgSpec::int("pkm.n_heads", "1").field("moe.top_k").help("feed-forward experts that a token uses"),
    // Routers and halting.
    ArgSpec::float("sut.drop_gate", "0.0").field("router_dropout").unit("probability").help("dropout inside the routers"),
    ArgSpec::float("moa.cvloss", "0.0").field("losses.cv").help("weight of the squared variation of the experts' gates"),
    ArgSpec::float("moa.switchloss", "0.0").field("losses.switch").help("weight of the Switch Transformer's balance loss"),
    ArgSpec::float("moa.zloss", "0.0").field("losses.z").help("weight of the router logits' squared log-sum-exp; with `-compat 1` no effect, as in the reference"),
    ArgSpec::float("moa.miloss", "0.0").field("losses.mi").help("weight of minus the mutual information of tokens and experts; with `-compat 1` of the sum of both entropies, as in the reference"),
    ArgSpec::float("transformer.act_loss", "0.0").field("act_loss").help("weight of the tokens' mean depth, summed over layers"),
];

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<crate::config::Config>(super::ARGS, &[]);
    }
}
