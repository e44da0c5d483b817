//! `c4`: the C4 corpus as windows of SentencePiece tokens.
//!
//! Text comes from the hub, from a mirror of it, or from a small corpus inside the plugin: the books of the Rust
//! documentation (see `corpus/NOTICE`), so that a first run needs no download.

use moeut_plugin_api::{ArgSpec, PluginError};
use moeut_text::{Corpus, CorpusPlugin, Recipe, TextConfig, TextDataset, dataset};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(TextDataset<C4>);

/// One shard of the embedded corpus with its name.
macro_rules! embedded_shard {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../corpus/en/", $name)))
    };
}

/// C4 in one of its variants.
struct C4;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct C4Config {
    text: TextConfig,
    /// Which C4: `en`, `realnewslike`, …
    variant: String,
}

impl CorpusPlugin for C4 {
    const NAME: &'static str = "c4";
    const SUMMARY: &'static str = "C4 (Colossal Clean Crawled Corpus), or text of the same format";
    const ARGS: &'static [ArgSpec] = &[
        dataset::SOURCE
            .choices("hub|embedded")
            .help("Download C4, or use the small corpus inside the plugin"),
        dataset::DIR,
        dataset::URL,
        ArgSpec::text("data.variant", "en")
            .field("variant")
            .help("Variant of the corpus, a folder of the hub"),
        dataset::N_PIECES,
        dataset::TOKENIZER,
        dataset::FS_CACHE,
    ];
    /// The text inside the plugin, in the form of C4's own shards.
    const EMBEDDED: &'static [(&'static str, &'static [u8])] = &[
        embedded_shard!("c4-train.00000-of-01024.json.gz"),
        embedded_shard!("c4-train.00001-of-01024.json.gz"),
        embedded_shard!("c4-validation.00000-of-00008.json.gz"),
    ];
    type Config = C4Config;

    fn recipe(config: C4Config) -> Result<Recipe, PluginError> {
        Ok(Recipe {
            corpus: Corpus::c4(&config.variant),
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
        moeut_plugin_api::testing::check_args::<C4Config>(C4::ARGS, &[]);
    }
}
