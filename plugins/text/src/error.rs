//! What can go wrong between a shard of text and a window of tokens, with advice as data.
//!
//! `Display` is the *why*; [`TextError::what`] and [`TextError::help`] are the other two parts of a user error.

use std::{
    io,
    path::{Path, PathBuf},
};

use moeut_plugin_api::PluginError;

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A file or folder could not be used.
    #[error("cannot {doing} `{}`: {source}", path.display())]
    Io {
        /// The verb: `read`, `write`, `lock`.
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A shard broke off or could not be unpacked.
    #[error("shard `{shard}` cannot be read after line {line}: {source}")]
    BrokenShard {
        /// File name or address.
        shard: String,
        /// Lines read before it happened.
        line: u64,
        /// The reader's answer.
        source: io::Error,
    },
    /// A line is not a JSON object with a string `text`.
    #[error("`{shard}` line {line}: {reason}; the line starts `{excerpt}`")]
    MalformedLine {
        /// File name or address.
        shard: String,
        /// Counted from 1.
        line: u64,
        /// What the JSON reader says.
        reason: String,
        /// At most 60 characters of it.
        excerpt: String,
        /// The key that has the text.
        key: String,
    },
    /// A text is not UTF-8, or too long.
    #[error("`{file}` is not a text: {reason}")]
    NotText {
        /// File name or address, and row.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A Parquet file broke off or is none.
    #[error("`{file}` cannot be read after row {row}: {reason}")]
    BadParquet {
        /// File name.
        file: String,
        /// Rows read before it happened.
        row: u64,
        /// The reader's answer.
        reason: String,
    },
    /// A Parquet file has no column of strings of the wanted name.
    #[error("`{file}` has no column of strings `{column}`, but {columns}")]
    NoColumn {
        /// File name.
        file: String,
        /// The column that was looked for.
        column: String,
        /// What there is.
        columns: String,
    },
    /// A corpus was not published with such a split.
    #[error("`{class}` was published without a {split} split")]
    NoSplit {
        /// The corpus.
        class: &'static str,
        /// `train`, `validation` or `test`.
        split: &'static str,
    },
    /// A source has no shard of a split.
    #[error("{place} has no file like `{pattern}`")]
    NoShards {
        /// Where was looked.
        place: String,
        /// The name that was looked for.
        pattern: String,
        /// `train` or `validation`.
        split: &'static str,
    },
    /// The server answered with an error that trying again does not cure.
    #[error("`{url}` answered {status}")]
    HttpStatus {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
        /// Whether there is a token of the hub to send.
        has_token: bool,
    },
    /// The hub is to be left alone.
    #[error("`{url}` is not on this machine, and `HF_HUB_OFFLINE` is set")]
    Offline {
        /// The address.
        url: String,
    },
    /// The file is another one than when its reading began.
    #[error("`{url}` changed on the server when {position} bytes of it had been read")]
    FileChanged {
        /// The address.
        url: String,
        /// Bytes read of the file that it was.
        position: u64,
    },
    /// A downloaded file is not the one that the server announced.
    #[error("`{url}` has SHA-256 {found}, but the server announced {expected}")]
    Checksum {
        /// The address.
        url: String,
        /// Of what was received.
        found: String,
        /// Of what should have been.
        expected: String,
    },
    /// The connection failed again and again.
    #[error("`{url}` failed {attempts} times in a row at byte {position}: {reason}")]
    Network {
        /// The address.
        url: String,
        /// Attempts without one new byte.
        attempts: u32,
        /// Bytes received so far.
        position: u64,
        /// The last failure.
        reason: String,
    },
    /// Not a SentencePiece model.
    #[error("`{name}` is not a SentencePiece model: {reason}")]
    BadModel {
        /// File name, or what it is.
        name: String,
        /// SentencePiece's message.
        reason: String,
    },
    /// The model in the cache has another size than its folder says.
    #[error("`{}` has {found} pieces, but {expected} are asked for", path.display())]
    VocabSize {
        /// The model file.
        path: PathBuf,
        /// Its pieces.
        found: usize,
        /// The pieces asked for.
        expected: usize,
    },
    /// A file that the user named is no tokenizer of use.
    #[error("`{}` is no tokenizer that can be used: {reason}", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that the user named has another size than the user says.
    #[error("`{}` has {found} pieces, but `-sentencepiece.n_pieces` is {expected}", path.display())]
    OtherVocabSize {
        /// The file.
        path: PathBuf,
        /// Its pieces.
        found: usize,
        /// The pieces asked for.
        expected: usize,
    },
    /// SentencePiece's trainer gave up.
    #[error("SentencePiece says: {reason}")]
    Train {
        /// Its message.
        reason: String,
    },
    /// SentencePiece refused to encode or decode.
    #[error("SentencePiece says: {reason}")]
    Encode {
        /// Its message.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is not in 0..{vocab_size}")]
    IdOutOfRange {
        /// The id.
        id: i64,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A token id outside the vocabulary, in a file of the cache.
    #[error("`{}` holds token id {id} at position {position}, which is not in 0..{vocab_size}", path.display())]
    BadToken {
        /// The chunk.
        path: PathBuf,
        /// Index of the token in the chunk.
        position: u64,
        /// The id.
        id: i64,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The stream is shorter than one window.
    #[error("{n_tokens} tokens do not fill one window of {seq_len}")]
    TooShort {
        /// Tokens in the stream.
        n_tokens: u64,
        /// Tokens per window.
        seq_len: usize,
    },
    /// More windows than can be put in random order.
    #[error("{n_windows} windows are more than can be shuffled, 2³²−1")]
    TooManyWindows {
        /// Windows of the stream.
        n_windows: u64,
    },
    /// Not a pattern.
    #[error("`{pattern}` is not a regular expression: {reason}")]
    BadPattern {
        /// What was typed.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The host asked to stop.
    #[error("the run was cancelled")]
    Cancelled,
}

impl TextError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    /// The error that a download hides in its reader's, or else one about reading `file`.
    pub(crate) fn from_reader(error: io::Error, file: &str) -> Self {
        match error.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self::io("read", Path::new(file), source),
        }
    }

    /// What failed, in the user's words.
    pub fn what(&self) -> &'static str {
        match self {
            Self::Io { .. } => "a file of the dataset cannot be used",
            Self::BrokenShard { .. }
            | Self::MalformedLine { .. }
            | Self::NotText { .. }
            | Self::BadParquet { .. }
            | Self::NoColumn { .. } => "a shard of text cannot be used",
            Self::NoShards { .. } | Self::NoSplit { .. } => "the dataset has no text",
            Self::HttpStatus { .. }
            | Self::Network { .. }
            | Self::Offline { .. }
            | Self::FileChanged { .. }
            | Self::Checksum { .. } => "the dataset cannot be downloaded",
            Self::BadModel { .. }
            | Self::VocabSize { .. }
            | Self::BadTokenizer { .. }
            | Self::OtherVocabSize { .. } => "the tokenizer cannot be used",
            Self::Train { .. } => "the tokenizer cannot be trained",
            Self::Encode { .. } | Self::IdOutOfRange { .. } => "the text cannot be tokenized",
            Self::BadToken { .. } => "the token cache is damaged",
            Self::TooShort { .. } => "the dataset is too small",
            Self::TooManyWindows { .. } => "the dataset is too large",
            Self::BadPattern { .. } => "`-fs_cache_pattern` cannot be used",
            Self::Cancelled => "the dataset was not prepared",
        }
    }

    /// Something to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Io { doing: "lock", .. } => "check that the cache's file system supports file locks".to_owned(),
            Self::Io { path, .. } => {
                format!("check that the file exists, its permissions and the free space: `ls -l {0}; df -h {0}`", path.display())
            }
            Self::BrokenShard { shard, .. } if Path::new(shard).extension() == Some("zst".as_ref()) => {
                format!("fetch `{shard}` again, then check it with `zstd -t`")
            }
            Self::BrokenShard { shard, .. } => format!("fetch `{shard}` again, then check it with `gzip -t`"),
            Self::MalformedLine { key, .. } if key.is_empty() => "cut the line into several documents".to_owned(),
            Self::MalformedLine { key, .. } => {
                format!("every line must be a JSON object with a string `{key}`; correct or delete the line")
            }
            Self::NotText { .. } => "convert it to UTF-8 (`iconv -t UTF-8`), or take it out of the folder".to_owned(),
            Self::BadParquet { file, .. } => format!("`rm {file}` and fetch it again"),
            Self::NoColumn { .. } => "name the column of the text with `-text_files.key`".to_owned(),
            Self::NoSplit { .. } => "ask for another split".to_owned(),
            Self::NoShards { pattern, split, .. } => {
                format!("put at least one {split} shard there, named like `{pattern}`")
            }
            Self::HttpStatus { status: 401 | 403, has_token: false, .. } => {
                "accept the dataset's terms on its page, then `export HF_TOKEN=…` with a token that may read it".to_owned()
            }
            Self::HttpStatus { status: 401 | 403, .. } => {
                "accept the dataset's terms on its page, and check that the token of `HF_TOKEN` is valid and may read it"
                    .to_owned()
            }
            Self::Offline { .. } => {
                "`unset HF_HUB_OFFLINE`, or download the files elsewhere and name their folder".to_owned()
            }
            Self::FileChanged { .. } => "start again: the file is then read from its beginning".to_owned(),
            Self::Checksum { .. } => {
                "start again: the file is then downloaded anew; if it stays wrong, `export HF_ENDPOINT=https://…` with another mirror"
                    .to_owned()
            }
            Self::HttpStatus { .. } => {
                "check the address in a browser; for a mirror `export HF_ENDPOINT=https://…`, or download the shards and name their folder".to_owned()
            }
            Self::Network { .. } => {
                "check the connection and start again: finished shards are kept; for a mirror `export HF_ENDPOINT=https://…`".to_owned()
            }
            Self::BadModel { name, .. } => format!("delete `{name}` to have it trained again"),
            Self::VocabSize { path, found, .. } => {
                format!("ask for a vocabulary of {found}, or delete `{}` to have it trained again", path.display())
            }
            Self::BadTokenizer { .. } => {
                "name a SentencePiece `.model` or a Hugging Face `tokenizer.json`, or leave out `-tokenizer.path`".to_owned()
            }
            Self::OtherVocabSize { found, .. } => {
                format!("leave out `-sentencepiece.n_pieces`, or set it to {found}")
            }
            Self::Train { reason } => {
                // In the trainer's words: `… 3 vs 93. Increase vocab_size …`, `… set it to a value <= 23306.`
                if let Some(least) = number_after(reason, " vs ") {
                    format!("set `-sentencepiece.n_pieces` to {least} or more")
                } else if let Some(most) = number_after(reason, "a value <= ") {
                    format!("set `-sentencepiece.n_pieces` to at most {most}, or give it more text")
                } else {
                    "give it more text, or set `-sentencepiece.n_pieces` to another number".to_owned()
                }
            }
            Self::Encode { .. } | Self::IdOutOfRange { .. } => {
                "check that the tokenizer is the one the tokens were made with".to_owned()
            }
            Self::BadToken { path, .. } => format!("`rm {}` to have it made again", path.display()),
            Self::TooShort { n_tokens, .. } => format!("ask for windows of at most {n_tokens} tokens, or give it more text"),
            Self::TooManyWindows { .. } => "set a longer `-lm.unroll`, or `-stop_after`".to_owned(),
            Self::BadPattern { .. } => {
                "give a regular expression on mount points, such as `^/scratch`, or `*` for all, or `none`".to_owned()
            }
            Self::Cancelled => "start again: finished shards are kept".to_owned(),
        }
    }
}

/// The whole number behind the first such words.
fn number_after(text: &str, words: &str) -> Option<u64> {
    let (_, rest) = text.split_once(words)?;
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

impl From<TextError> for PluginError {
    fn from(error: TextError) -> Self {
        Self::new(error.what())
            .why(error.to_string())
            .fix(error.help())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_error_has_all_three_parts() {
        let error = TextError::HttpStatus {
            url: "https://hub/a".to_owned(),
            status: 403,
            has_token: false,
        };
        let plugin_error = PluginError::from(error);
        assert_eq!(plugin_error.what, "the dataset cannot be downloaded");
        assert_eq!(plugin_error.why, "`https://hub/a` answered 403");
        assert!(
            plugin_error.fix.contains("export HF_TOKEN="),
            "{}",
            plugin_error.fix
        );
    }

    #[test]
    fn a_vocabulary_too_small_or_too_large_has_opposite_fixes() {
        for (reason, fix) in [
            (
                "Vocabulary size is smaller than required_chars. 3 vs 93. Increase vocab_size",
                "set `-sentencepiece.n_pieces` to 93 or more",
            ),
            (
                "Vocabulary size too high (100000). Please set it to a value <= 23306.",
                "set `-sentencepiece.n_pieces` to at most 23306, or give it more text",
            ),
            (
                "out of luck",
                "give it more text, or set `-sentencepiece.n_pieces` to another number",
            ),
        ] {
            let reason = reason.to_owned();
            assert_eq!(TextError::Train { reason }.help(), fix);
        }
    }
}
