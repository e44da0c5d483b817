//! `pes2o`: the peS2o corpus of scientific papers as windows of SentencePiece tokens.

use moeut_plugin_api::{ArgSpec, PluginError};
use moeut_text::{Corpus, CorpusPlugin, Recipe, TextConfig, TextDataset, dataset};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(TextDataset<PeS2o>);

/// peS2o in one of its versions.
struct PeS2o;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeS2oConfig {
    text: TextConfig,
    /// Which peS2o: `v1`, `v2`.
    variant: String,
}

impl CorpusPlugin for PeS2o {
    const NAME: &'static str = "pes2o";
    const SUMMARY: &'static str = "peS2o (scientific papers), or text of the same format";
    const ARGS: &'static [ArgSpec] = &[
        dataset::SOURCE,
        dataset::DIR,
        dataset::URL,
        ArgSpec::text("data.variant", "v2")
            .field("variant")
            .help("Version of the corpus, a folder of the hub"),
        dataset::N_PIECES,
        dataset::TOKENIZER,
        dataset::FS_CACHE,
    ];
    type Config = PeS2oConfig;

    fn recipe(config: PeS2oConfig) -> Result<Recipe, PluginError> {
        Ok(Recipe {
            corpus: Corpus::pes2o(&config.variant),
            text: config.text,
            has_documents: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<PeS2oConfig>(PeS2o::ARGS, &[]);
    }
}
