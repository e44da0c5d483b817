//! Windows that are one document each, over the chunks of a cache of documents.
//! Making these chunks is in [`crate::document_cache`].

use crate::{
    document_cache::read_lengths,
    error::TextError,
    token_cache::{Chunk, TokenWidth},
    token_stream::{MappedChunk, StreamOptions},
};

/// The documents of a split, in order, cut after `seq_len + 1` tokens.
///
/// ```text
/// window(i) = first min(length_i, seq_len + 1) tokens of document i, then zeros
/// n_windows = documents that begin before the limit, counted in tokens of the documents before, as cut
/// ```
#[derive(Debug)]
pub struct DocumentStream {
    chunks: Vec<MappedChunk>,
    /// Of each document: its chunk, its first token there, and its tokens before it is cut.
    documents: Vec<Document>,
    n_tokens: u64,
    options: StreamOptions,
    utf8_bytes_per_token: Option<f64>,
}

#[derive(Debug, Clone, Copy)]
struct Document {
    chunk: u32,
    length: u32,
    start: u64,
}

impl DocumentStream {
    /// Maps the chunks and finds their documents.
    ///
    /// # Errors
    /// A chunk or its lengths cannot be opened, or there is no document.
    pub fn open(chunks: &[Chunk], options: StreamOptions) -> Result<Self, TextError> {
        let width = TokenWidth::for_vocab_size(options.vocab_size);
        let limit = options.amount.limit.unwrap_or(u64::MAX);
        let mut documents = Vec::new();
        let (mut n_tokens, mut n_used) = (0, 0);
        for (chunk, number) in chunks.iter().zip(0..) {
            let mut start = 0;
            for length in read_lengths(&chunk.path)? {
                if n_used < limit {
                    documents.push(Document {
                        chunk: number,
                        length,
                        start,
                    });
                    n_used += u64::from(length).min(options.seq_len as u64 + 1);
                }
                start += u64::from(length);
            }
            n_tokens += start;
        }
        if documents.is_empty() {
            return Err(TextError::TooShort {
                n_tokens,
                seq_len: options.seq_len,
            });
        }
        let utf8_bytes: Option<u64> = chunks.iter().map(|chunk| chunk.utf8_bytes).sum();
        Ok(Self {
            chunks: chunks
                .iter()
                .map(|chunk| MappedChunk::open(chunk, width))
                .collect::<Result<_, _>>()?,
            documents,
            n_tokens,
            options,
            utf8_bytes_per_token: utf8_bytes.map(|bytes| bytes as f64 / n_tokens as f64),
        })
    }

    /// Number of windows; at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.documents.len() as u64
    }

    /// Tokens of all documents, before they are cut.
    pub fn n_tokens(&self) -> u64 {
        self.n_tokens
    }

    /// UTF-8 bytes of document text per token.
    pub fn utf8_bytes_per_token(&self) -> Option<f64> {
        self.utf8_bytes_per_token
    }

    /// Tokens of the document in window `index`, at most `seq_len + 1`; none if there is no such window.
    pub fn length(&self, index: u64) -> Option<u32> {
        let document = self.documents.get(usize::try_from(index).ok()?)?;
        let most = u32::try_from(self.options.seq_len + 1).unwrap_or(u32::MAX);
        Some(document.length.min(most))
    }

    /// Reads window `index` into `tokens`.
    ///
    /// # Shapes
    /// - `tokens`: `seq_len + 1`
    ///
    /// # Errors
    /// A file of the cache holds an id that the tokenizer does not have.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`] or `tokens` has another length, which are bugs in the caller.
    pub fn read_window(&self, index: u64, tokens: &mut [i32]) -> Result<(), TextError> {
        let n_windows = self.len();
        assert!(index < n_windows, "window {index} of {n_windows}");
        assert_eq!(
            tokens.len(),
            self.options.seq_len + 1,
            "length of the window"
        );
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        let document = self.documents[place];
        let length = tokens.len().min(document.length as usize);
        let (text, behind) = tokens.split_at_mut(length);
        behind.fill(0);
        self.chunks[document.chunk as usize].read(document.start, text, self.options.vocab_size)?;
        Ok(())
    }
}
