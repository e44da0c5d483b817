//! `moeut_text_files`: train MoEUT to predict the next token of text of your own, in a folder.

use moeut_lm::{Data, SMALL_PROFILE};

moeut_plugin_api::export_plugin!();

const DATA: Data = Data {
    dataset: "text_files",
    n_validation_tokens: None,
};

moeut_lm::lm_task! {
    /// Language modelling on the dataset `text_files`, with the model that has the variant.
    MoeutTextFiles {
        name: "moeut_text_files",
        aliases: [],
        summary: "Language modelling with MoEUT on text files of your own",
        data: DATA,
        args: moeut_lm::OWN_TEXT_ARGS,
        profiles: [SMALL_PROFILE],
    }
}
