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

#[cfg(test)]
mod tests {
    use std::{fs, num::NonZeroUsize, path::Path};

    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        progress::Watch,
        shards::ShardSource,
        testing::{sentence, shard_of, tiny_tokenizer},
        token_cache::{Amount, TokenCache},
        tokenizer::Tokenizer,
    };

    const VOCAB_SIZE: usize = 64;

    /// The chunks of documents of a folder with two shards.
    fn chunks_of(folder: &Path, tokenizer: &Tokenizer) -> Vec<Chunk> {
        let corpus = Corpus::loose("text", 0.0);
        for (name, texts) in [
            (
                "a.json.gz",
                vec![sentence(1), String::new(), "cat cat".to_owned()],
            ),
            ("b.json.gz", vec![sentence(2), sentence(3)]),
        ] {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let path = folder.join(name);
            // The same time of change each time, so that the chunks stay good.
            if !path.exists() {
                fs::write(path, shard_of(&texts)).unwrap();
            }
        }
        let source = ShardSource::Folder(folder.to_owned());
        let shards = source.shards(&corpus, Split::Train).unwrap();
        let cache = TokenCache::new(&folder.join(".cache"), &corpus, VOCAB_SIZE).of_documents();
        let amount = Amount::default();
        let watch = Watch::nobody();
        cache
            .prepare(
                Split::Train,
                &shards,
                tokenizer,
                amount,
                NonZeroUsize::MIN,
                watch,
            )
            .unwrap()
    }

    fn options(seq_len: usize, limit: Option<u64>) -> StreamOptions {
        StreamOptions {
            seq_len,
            amount: crate::token_cache::Amount {
                limit,
                min_chunks: 1,
            },
            vocab_size: VOCAB_SIZE,
            compat: false,
        }
    }

    #[test]
    fn a_window_is_one_document_cut_or_with_zeros_behind() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::of(tiny_tokenizer());
        let chunks = chunks_of(folder.path(), &tokenizer);
        let texts = [sentence(1), "cat cat".to_owned(), sentence(2), sentence(3)];
        let ids = texts.map(|text| tokenizer.encode(&text).unwrap());
        for seq_len in [1, 5, ids[0].len() - 1, ids[0].len() + 3] {
            let stream = DocumentStream::open(&chunks, options(seq_len, None)).unwrap();
            assert_eq!(stream.len(), 4);
            for (index, ids) in (0..).zip(&ids) {
                let mut window = vec![-1; seq_len + 1];
                stream.read_window(index, &mut window).unwrap();
                let length = stream.length(index).unwrap() as usize;
                assert_eq!(length, ids.len().min(seq_len + 1));
                assert_eq!(window[..length], ids[..length]);
                assert!(window[length..].iter().all(|&id| id == 0));
            }
            assert_eq!(stream.length(4), None);
        }
        let stream = DocumentStream::open(&chunks, options(5, None)).unwrap();
        let n_tokens: usize = ids.iter().map(Vec::len).sum();
        assert_eq!(stream.n_tokens(), n_tokens as u64);
    }

    #[test]
    fn a_limit_counts_tokens_as_cut() {
        let folder = tempfile::tempdir().unwrap();
        let chunks = chunks_of(folder.path(), &Tokenizer::of(tiny_tokenizer()));
        let n = |limit| {
            let stream = DocumentStream::open(&chunks, options(1, Some(limit)));
            stream.unwrap().len()
        };
        assert_eq!((n(1), n(2), n(3), n(100)), (1, 1, 2, 4));
        assert!(DocumentStream::open(&chunks, options(1, Some(0))).is_err());
    }

    /// A document of one token has nothing to predict; an empty file has no document.
    #[test]
    fn short_documents_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::of(tiny_tokenizer());
        let short = "t";
        let n_tokens = tokenizer.encode(short).unwrap().len();
        fs::write(folder.path().join("0.json.gz"), shard_of(&[short, " "])).unwrap();
        let chunks = chunks_of(folder.path(), &tokenizer);
        let stream = DocumentStream::open(&chunks, options(5, None)).unwrap();
        assert_eq!(stream.len(), if n_tokens < 2 { 4 } else { 5 });
    }

    #[test]
    fn lengths_that_do_not_fit_the_chunk_are_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::of(tiny_tokenizer());
        let chunks = chunks_of(folder.path(), &tokenizer);
        assert!(
            chunks[0]
                .path
                .ends_with(".cache/TextFiles/TextFiles-64/tokenized_documents/train/chunk_0.bin")
        );
        let lengths = chunks[0].path.with_extension("lengths");
        let good = fs::read(&lengths).unwrap();
        for bad in [&good[..4], &good[..3], b""] {
            fs::write(&lengths, bad).unwrap();
            assert_eq!(chunks_of(folder.path(), &tokenizer), chunks);
            assert_eq!(fs::read(&lengths).unwrap(), good);
        }
        fs::remove_file(&lengths).unwrap();
        chunks_of(folder.path(), &tokenizer);
        assert_eq!(fs::read(&lengths).unwrap(), good);
    }
}
