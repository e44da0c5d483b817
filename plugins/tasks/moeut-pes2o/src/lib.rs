//! `moeut_pes2o`: train MoEUT to predict the next token of peS2o, scientific papers.

use moeut_lm::{Data, SMALL_PROFILE};

moeut_plugin_api::export_plugin!();

/// The number of validation tokens is the reference's, counted with the paper's tokenizer.
const DATA: Data = Data {
    dataset: "pes2o",
    n_validation_tokens: Some(842_021_184),
};

moeut_lm::lm_task! {
    /// Language modelling on the dataset `pes2o`, with the model that has the variant.
    MoeutPes2o {
        name: "moeut_pes2o",
        aliases: ["pes2o_transformer"],
        summary: "Language modelling with MoEUT on peS2o",
        data: DATA,
        args: moeut_lm::ARGS,
        profiles: [SMALL_PROFILE],
    }
}
