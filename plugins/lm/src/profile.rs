//! Arguments for a first run on a small machine.

use moeut_plugin_api::Profile;

/// [`SMALL`] under its name.
pub const SMALL_PROFILE: Profile = Profile {
    name: "small",
    help: "A small MoEUT that learns within minutes on two CPU cores",
    args: SMALL,
};

/// A small MoEUT and the steps that teach it something within minutes on two CPU cores.
///
/// On the corpus that the dataset `c4` embeds it reaches 1.86 bits per UTF-8 byte after 100 steps and 1.51 after 400, in
/// under three minutes. A vocabulary of 8000 cuts that text into 0.81M tokens, one of 2000 into 1.01M; few wide experts
/// keep matrix products large. Neither choice was compared in runs of otherwise equal settings.
pub const SMALL: &[(&str, &str)] = &[
    ("sentencepiece.n_pieces", "8000"),
    ("lm.unroll", "128"),
    ("lm.eval.enabled", "0"),
    ("lm.trafo.context_blocks", "0"),
    ("batch_size", "16"),
    ("stop_after", "400"),
    ("test_interval", "100"),
    ("save_interval", "100"),
    ("log_interval", "10"),
    ("lr", "0.003"),
    ("lr_sched.type", "cos"),
    ("lr_warmup", "50"),
    ("min_lr_multiplier", "0.05"),
    ("wd", "0.01"),
    ("grad_clip", "0.5"),
    ("state_size", "128"),
    ("transformer.variant", "preln_moe_universal"),
    ("transformer.encoder_n_layers", "4"),
    ("transformer.universal.group_size", "2"),
    ("transformer.n_heads", "4"),
    ("transformer.head_projection_size", "32"),
    ("moe.nonorm", "1"),
    ("moe.n_experts", "16"),
    ("moe.expert_size", "128"),
    ("pkm.n_heads", "2"),
    ("moe.perplexity_reg", "0.01"),
    ("moe.perplexity_reg_mode", "layers_time"),
    ("moe.att.enable", "1"),
    ("moe.att.n_experts", "4"),
    ("moe.att.k", "2"),
    ("moe.att.q_expert", "0"),
    ("moe.att.k_expert", "0"),
    ("moe.att.perplexity_reg", "0.001"),
];
