//! What a token dataset is: windows of token ids from a long stream of text, and the tokenizer that made them.

use crate::{ArgSpec, Host, PluginError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A stream of tokens cut into windows of `seq_len + 1` ids that overlap by one.
///
/// Window `i` holds tokens `i·seq_len ..= (i+1)·seq_len`: the inputs are its first `seq_len` ids, the targets its last.
/// A stream with [`StreamInfo::has_documents`] has one document in each window instead, and zeros behind its end.
pub trait TokenDataset: Sized + Send + Sync + 'static {
    /// The name that tasks use; `snake_case`.
    const NAME: &'static str;
    /// One line for lists.
    const SUMMARY: &'static str;
    /// The arguments that fill [`TokenDataset::Config`].
    const ARGS: &'static [ArgSpec] = &[];
    /// The typed arguments.
    type Config: DeserializeOwned;

    /// Opens one split; downloads, trains the tokenizer and tokenizes as needed.
    ///
    /// # Errors
    /// If the data is missing, unreadable or malformed.
    fn open(
        config: Self::Config,
        request: &StreamRequest,
        host: &Host,
    ) -> Result<Self, PluginError>;

    /// Sizes of the opened stream.
    fn info(&self) -> StreamInfo;

    /// Copies windows into `tokens`, row-major `[windows.len(), seq_len + 1]`.
    ///
    /// # Errors
    /// If a window does not exist or the data cannot be read.
    fn read(&self, windows: &[u64], tokens: &mut [i32]) -> Result<(), PluginError>;

    /// Text to token ids, without begin and end marks.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    fn encode(&self, text: &str) -> Result<Vec<i32>, PluginError>;

    /// Token ids to text.
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    fn decode(&self, ids: &[i32]) -> Result<String, PluginError>;

    /// Tokens in each of the windows `first..first + lengths.len()`, without the zeros behind a document's end: 2 to
    /// `seq_len + 1`. Asked only of a stream with [`StreamInfo::has_documents`].
    ///
    /// # Errors
    /// If a window does not exist.
    fn lengths(&self, first: u64, lengths: &mut [u32]) -> Result<(), PluginError> {
        let _ = (first, lengths);
        Err(
            PluginError::new(format!("`{}` has no documents", Self::NAME))
                .why("its windows are cut from one stream of tokens"),
        )
    }

    /// Reads all documents of a split and counts them, without a tokenizer.
    ///
    /// # Errors
    /// If the data is missing, unreadable or malformed, or the dataset cannot count.
    fn count(
        config: Self::Config,
        request: &StreamRequest,
        host: &Host,
    ) -> Result<DocumentCount, PluginError> {
        let _ = (config, request, host);
        Err(PluginError::new(format!(
            "`{}` cannot count its documents",
            Self::NAME
        )))
    }
}

/// Documents of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DocumentCount {
    /// Documents with text.
    pub n_documents: u64,
    /// Documents that are empty and so left out.
    pub n_skipped: u64,
}

/// Which part of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// For training.
    Train,
    /// Held out, for validation.
    Validation,
    /// Held out, for the final test.
    Test,
}

/// A task's wish for a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRequest {
    /// The name under which results are reported, such as `val`.
    pub name: String,
    /// Name of the dataset component.
    pub dataset: String,
    /// Which part of it.
    pub split: Split,
    /// Tokens that the model sees per sequence.
    pub seq_len: u64,
    /// Tokens after which the stream may end; no more than this needs to be downloaded.
    pub token_limit: Option<u64>,
}

/// Sizes of an opened stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamInfo {
    /// Number of distinct token ids.
    pub vocab_size: u64,
    /// Number of windows.
    pub n_windows: u64,
    /// Number of tokens in the stream.
    pub n_tokens: u64,
    /// UTF-8 bytes of document text per token, for losses in bits per byte; `None` if nobody counted.
    pub utf8_bytes_per_token: Option<f64>,
    /// Whether each window is one document, shorter or cut; else windows are cut from one stream.
    #[serde(default)]
    pub has_documents: bool,
}
