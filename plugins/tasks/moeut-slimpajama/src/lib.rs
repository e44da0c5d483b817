//! `moeut_slimpajama`: train MoEUT to predict the next token of SlimPajama, a deduplicated mixture of web, books and code.

use moeut_lm::{Data, SMALL_PROFILE};

moeut_plugin_api::export_plugin!();

/// The number of validation tokens is C4's: the reference evaluates as many on each corpus.
const DATA: Data = Data {
    dataset: "slimpajama",
    n_validation_tokens: Some(206_453_965),
};

moeut_lm::lm_task! {
    /// Language modelling on the dataset `slimpajama`, with the model that has the variant.
    MoeutSlimPajama {
        name: "moeut_slimpajama",
        aliases: ["slimpajama_transformer"],
        summary: "Language modelling with MoEUT on SlimPajama",
        data: DATA,
        args: moeut_lm::ARGS,
        profiles: [SMALL_PROFILE],
    }
}
