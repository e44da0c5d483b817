//! The argument table: the reference's flags and defaults beside the fields of [`crate::config::Config`].

use moeut_nn::lm::SHELL_ARGS;
use moeut_plugin_api::{ArgKind, ArgSpec, joined};

/// All arguments of the model.
pub(crate) const ARGS: &[ArgSpec] =
    &joined::<_, { SHELL_ARGS.len() + OWN_ARGS.len() }>(SHELL_ARGS, OWN_ARGS);

/// Those of the experts.
const OWN_ARGS: &[ArgSpec] = &[
    ArgSpec::flag("moe.nonorm", "0").field("is_peri").help("peri-layernorm: norms before routers and q/k only"),
    ArgSpec::text("moe.kernel", "auto").field("kernel").help("grouped matrix product; auto: the fastest that fits"),
    ArgSpec::text("moe.router_dtype", "f32").field("router_dtype").choices("f32|tf32|mixed|amp").help("with -amp, routers compute in: f32; tf32, a GPU's fast single precision; mixed, amp's operands and f32 logits; amp, as everything else, like the reference's"),
    // Feed-forward experts.
    ArgSpec::int("moe.n_experts", "128").field("moe.n_experts").help("feed-forward experts"),
    ArgSpec::int("moe.expert_size", "128").field("moe.d_expert").help("hidden units of an expert"),
    ArgSpec::int("pkm.n_heads", "1").field("moe.top_k").help("feed-forward experts that a token uses"),
    ArgSpec::text("moe.selection_mode", "sigmoid").field("moe.scoring").choices("gate|sigmoid").help("gate: softmax over experts"),
    ArgSpec::flag("moe.activation_after_topk", "0").field("moe.scores_after_top_k").help("gates see the selected logits only"),
    ArgSpec::flag("moe.bias", "0").field("moe.has_bias").help("biases of hidden units and output"),
    ArgSpec::flag("moe.sel_bias", "0").field("moe.has_router_bias").help("bias of the router"),
    ArgSpec::float("moe.drop_expert", "0.0").field("moe.expert_dropout").unit("probability").help("that an expert is not eligible, while training"),
    ArgSpec::float("moe.selection_dropout", "0.0").field("moe.router_dropout").unit("probability").help("dropout of the router's input"),
    ArgSpec::float("moe.init_scale", "1.0").field("moe.init_scale").help("initial deviations are multiplied by its root"),
    ArgSpec::float("moe.layer_std_constant", "2.0").field("moe.layer_std_constant").help("c of the initial deviation √(c / layers) with `preln`"),
    ArgSpec::float("moe.perplexity_reg", "0.0").field("moe.balance.weight").help("weight of the load-balancing entropy"),
    ArgSpec::text("moe.perplexity_reg_mode", "step")
        .field("moe.balance.mode")
        .choices("step|global|time|layers_time")
        .help("what the router's distribution is averaged over"),
    ArgSpec::flag("moe.sync_distributed", "1").field("moe.balance.is_everywhere").help("`global` averages over all processes that train, too"),
    // Attention experts.
    ArgSpec::flag("moe.att.enable", "0").field("attention.has_experts").help("SwitchHead instead of dense attention"),
    ArgSpec::int("moe.att.n_experts", "4").field("attention.n_experts").help("experts of a head"),
    ArgSpec::int("moe.att.k", "2").field("attention.top_k").help("experts that a token uses per head"),
    ArgSpec::flag("moe.att.q_expert", "1").field("attention.q").help("queries have experts"),
    ArgSpec::flag("moe.att.k_expert", "1").field("attention.k").help("keys have experts"),
    ArgSpec::flag("moe.att.v_expert", "1").field("attention.v").help("values have experts"),
    ArgSpec::flag("moe.att.o_expert", "1").field("attention.o").help("the output has experts"),
    ArgSpec::int("moe.att.v_size", "none").field("attention.d_value").optional().help("width of a value head; none: as the head"),
    ArgSpec::flag("moe.att.same_sel", "0").field("attention.same_sel").help("values share the output's selection"),
    ArgSpec::flag("moe.att.separate_kq_sel", "0").field("attention.separate_kq_sel").help("queries and keys have selections of their own"),
    ArgSpec::text("moe.att.selection_mode", "sigmoid").field("attention.scoring").choices("sigmoid|softmax|gumbel_sigmoid").help("how logits become gates; the last is refused, as the reference's fails"),
    ArgSpec::flag("moe.att.norm_init", "0").field("attention.has_norm_init").help("expert projections start with unit norm over the experts"),
    ArgSpec::float("moe.att.dropout", "0.0").field("attention.dropout").unit("probability").help("dropout of the keys; of the queries without attention experts"),
    ArgSpec::float("moe.att.selection_dropout", "0.0").field("attention.router_dropout").unit("probability").help("dropout of the routers' input"),
    ArgSpec::float("moe.att.drop_expert", "none").field("attention.expert_dropout").optional().unit("probability").help("none: as `moe.drop_expert`"),
    ArgSpec::float("moe.att.perplexity_reg", "none").field("attention.balance_weight").optional().help("none: as `moe.perplexity_reg`"),
    ArgSpec::text("moe.att.perplexity_reg_mode", "none")
        .field("attention.balance_mode")
        .optional()
        .choices("step|global|time|layers_time")
        .help("none: as `moe.perplexity_reg_mode`"),
    // Accepted because the reference's sweeps and commands set them.
    ArgSpec::retired(ArgKind::Str, "moe.layer_encoding", "the reference no longer has it; its sweeps set it to `none`"),
    ArgSpec::retired(ArgKind::Float, "moe.att.expert_dropout", "the reference never reads it; the live one is `moe.att.drop_expert`"),
    ArgSpec::retired(ArgKind::Float, "moe.dropout_factor", "the reference never applies it"),
];

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<crate::config::Config>(super::ARGS, &[]);
    }
}
