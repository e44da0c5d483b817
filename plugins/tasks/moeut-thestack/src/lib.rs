//! `moeut_thestack`: train MoEUT to predict the next token of The Stack, source code in several languages.

use moeut_lm::{Data, SMALL_PROFILE};

moeut_plugin_api::export_plugin!();

/// The number of validation tokens is C4's: the reference evaluates as many on each corpus.
const DATA: Data = Data {
    dataset: "thestack",
    n_validation_tokens: Some(206_453_965),
};

moeut_lm::lm_task! {
    /// Language modelling on the dataset `thestack`, with the model that has the variant.
    MoeutTheStack {
        name: "moeut_thestack",
        aliases: ["thestack_transformer"],
        summary: "Language modelling with MoEUT on The Stack",
        data: DATA,
        args: moeut_lm::ARGS,
        profiles: [SMALL_PROFILE],
    }
}
