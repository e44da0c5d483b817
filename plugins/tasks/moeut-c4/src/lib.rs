//! `moeut_c4`: train MoEUT to predict the next token of C4, the paper's main experiment.

use moeut_lm::{Data, SMALL, SMALL_PROFILE};
use moeut_plugin_api::{Profile, joined};

moeut_plugin_api::export_plugin!();

/// The number of validation tokens is the reference's, counted with the paper's tokenizer.
const DATA: Data = Data {
    dataset: "c4",
    n_validation_tokens: Some(206_453_965),
};

moeut_lm::lm_task! {
    /// Language modelling on the dataset `c4`, with the model that has the variant.
    MoeutC4 {
        name: "moeut_c4",
        aliases: ["c4_transformer"],
        summary: "Language modelling with MoEUT on C4",
        data: DATA,
        args: moeut_lm::ARGS,
        profiles: [
            Profile {
                name: "demo",
                help: "A small MoEUT that learns from the embedded corpus within minutes on two CPU cores",
                args: &joined::<_, { SMALL.len() + 1 }>(SMALL, &[("data.source", "embedded")]),
            },
            SMALL_PROFILE,
        ],
    }
}
