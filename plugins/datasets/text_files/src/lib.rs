//! `text_files`: any folder of text as windows of SentencePiece tokens.
//!
//! A line of a JSON-lines file, a row of a Parquet file, or a whole `.txt` or `.md` file is a document. Files whose
//! path has the word `valid`, `validation`, `dev` or `test` are for validation; if there are none, a share of the
//! documents is, chosen by the hash of the text: the same documents on every machine, and never a text on both sides.

use moeut_plugin_api::{ArgSpec, PluginError};
use moeut_text::{Corpus, CorpusPlugin, Recipe, TextConfig, TextDataset, dataset};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(TextDataset<TextFiles>);

/// Files of a folder.
struct TextFiles;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TextFilesConfig {
    text: TextConfig,
    /// Key of the text in a JSON line, or column of a Parquet file.
    key: String,
    /// Share of the documents for validation, 0 to 1.
    valid_share: f64,
    /// Whether a window is one document.
    has_documents: bool,
}

impl CorpusPlugin for TextFiles {
    const NAME: &'static str = "text_files";
    const SUMMARY: &'static str =
        "Any folder of .txt, .md, .jsonl and .parquet files, also packed by gzip or zstd";
    const ARGS: &'static [ArgSpec] = &[
        dataset::DIR.help("Folder with files of text, searched with all folders in it; required"),
        ArgSpec::text("text_files.key", "text")
            .field("key")
            .help("Key of the text in a JSON line, or column of a Parquet file"),
        ArgSpec::float("text_files.valid_share", "0.05")
            .field("valid_share")
            .unit("fraction")
            .help("Share of the documents for validation, if no file's path has the word `valid`, `validation`, `dev` or `test`"),
        ArgSpec::flag("text_files.documents", "0")
            .field("has_documents")
            .help("One document per window, cut at its end, instead of one stream of all documents"),
        dataset::N_PIECES,
        dataset::TOKENIZER,
        dataset::FS_CACHE,
    ];
    type Config = TextFilesConfig;

    fn recipe(config: TextFilesConfig) -> Result<Recipe, PluginError> {
        let share = config.valid_share;
        if !(0.0..=1.0).contains(&share) {
            return Err(
                PluginError::new(format!("`text_files.valid_share` is {share}"))
                    .why("it is a share of the documents")
                    .fix("set `-text_files.valid_share` between 0 and 1"),
            );
        }
        Ok(Recipe {
            corpus: Corpus::loose(&config.key, share),
            text: config.text,
            has_documents: config.has_documents,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<TextFilesConfig>(TextFiles::ARGS, &[]);
    }
}
