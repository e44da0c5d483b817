//! `slimpajama`: the SlimPajama corpus as windows of SentencePiece tokens, in the reference's order of shards.

use moeut_plugin_api::{ArgSpec, PluginError};
use moeut_text::{Corpus, CorpusPlugin, Recipe, TextConfig, TextDataset, dataset};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(TextDataset<SlimPajama>);

/// SlimPajama, which is there in one variant only.
struct SlimPajama;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SlimPajamaConfig {
    text: TextConfig,
}

impl CorpusPlugin for SlimPajama {
    const NAME: &'static str = "slimpajama";
    const SUMMARY: &'static str =
        "SlimPajama (RedPajama without duplicates), or text of the same format";
    const ARGS: &'static [ArgSpec] = &[
        dataset::SOURCE,
        dataset::DIR,
        dataset::URL,
        dataset::N_PIECES,
        dataset::TOKENIZER,
        dataset::FS_CACHE,
    ];
    type Config = SlimPajamaConfig;

    fn recipe(config: SlimPajamaConfig) -> Result<Recipe, PluginError> {
        Ok(Recipe {
            corpus: Corpus::slim_pajama(),
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
        moeut_plugin_api::testing::check_args::<SlimPajamaConfig>(SlimPajama::ARGS, &[]);
    }
}
