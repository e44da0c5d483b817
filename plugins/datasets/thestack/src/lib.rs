//! `thestack`: source code of The Stack as windows of SentencePiece tokens, without separators between files, in the
//! reference's split, order of shards and order of windows.

use moeut_plugin_api::{ArgKind, ArgSpec, PluginError};
use moeut_text::{Corpus, CorpusPlugin, Recipe, TextConfig, TextDataset, dataset};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(TextDataset<TheStack>);

/// The Stack in some of its languages.
struct TheStack;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TheStackConfig {
    text: TextConfig,
    /// Folders of the corpus.
    languages: Vec<String>,
}

impl CorpusPlugin for TheStack {
    const NAME: &'static str = "thestack";
    const SUMMARY: &'static str = "The Stack (permissively licensed source code)";
    const ARGS: &'static [ArgSpec] = &[
        dataset::SOURCE.help("Download from the hub, for which `HF_TOKEN` must be set"),
        dataset::DIR,
        dataset::URL,
        ArgSpec::new(
            ArgKind::StrList,
            "thestack.languages",
            "python,html,c++,rust,javascript,haskell,scala,assembly",
        )
        .field("languages")
        .help("Languages of the corpus; of each the first tenth of the files, in random order, is for validation"),
        dataset::N_PIECES,
        dataset::TOKENIZER,
        dataset::FS_CACHE,
    ];
    type Config = TheStackConfig;

    fn recipe(config: TheStackConfig) -> Result<Recipe, PluginError> {
        let Some(corpus) = Corpus::the_stack(&config.languages) else {
            let known: Vec<&str> = Corpus::the_stack_languages().collect();
            let given = config.languages.join(",");
            return Err(
                PluginError::new(format!("`-thestack.languages {given}` cannot be used"))
                    .why("it must name at least one language, and only known ones")
                    .fix(format!("choose from `{}`", known.join(","))),
            );
        };
        Ok(Recipe {
            corpus,
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
        moeut_plugin_api::testing::check_args::<TheStackConfig>(TheStack::ARGS, &[]);
    }

    #[test]
    fn an_unknown_language_is_answered_with_the_known_ones() {
        let config = serde_json::json!({
            "text": { "vocab_size": 8000, "fs_cache_pattern": null },
            "languages": ["python", "cobol"],
        });
        let error = TheStack::recipe(serde_json::from_value(config).unwrap()).unwrap_err();
        assert_eq!(
            error.what,
            "`-thestack.languages python,cobol` cannot be used"
        );
        assert!(error.fix.contains("assembly,c++,haskell"), "{}", error.fix);
    }
}
