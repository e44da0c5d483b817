//! Text datasets: from shards of documents to windows of token ids. A library, not a plugin: a dataset plugin links
//! it statically and adds its corpus and its arguments.
//!
//! Reading order is the way of the data:
//! [`corpus`] names the files, [`shards`] finds them (over [`hub`] and [`download`], if they are on one), `documents`
//! reads text out of them, [`tokenizer`] opens a file or trains a [`sentencepiece`] model, [`token_cache`] stores ids,
//! [`token_stream`] or [`document_stream`] cuts windows out of them, and [`dataset`] makes a plugin of it all.
//! [`progress`] is how the host listens and says stop, [`error`] is what it hears when something fails.
//!
//! ```no_run
//! use std::{num::NonZeroUsize, path::Path};
//! use moeut_text::{Amount, Corpus, ShardSource, Split, StreamOptions, TokenCache, TokenStream, Watch, tokenizer};
//!
//! # fn main() -> Result<(), moeut_text::TextError> {
//! let (corpus, vocab_size, seq_len) = (Corpus::c4("en"), 8000, 1024);
//! let shards = ShardSource::Folder("c4".into()).shards(&corpus, Split::Train)?;
//! let cache = TokenCache::new(Path::new("cache"), &corpus, vocab_size);
//! let watch = Watch::nobody();
//! let n_shards = corpus.n_tokenizer_shards;
//! let tokenizer = tokenizer::open(None, cache.folder(), &shards, n_shards, vocab_size, watch)?;
//! let amount = Amount { limit: Some(6_560_153_600), min_chunks: 1 };
//! let n_threads = NonZeroUsize::MIN;
//! let chunks = cache.prepare(Split::Train, &shards, &tokenizer, amount, n_threads, watch)?;
//! let stream = TokenStream::open(&chunks, StreamOptions { seq_len, amount, vocab_size, compat: false })?;
//! let mut window = vec![0; seq_len + 1];
//! stream.read_window(0, &mut window)?;
//! # Ok(())
//! # }
//! ```

pub mod corpus;
pub mod dataset;
mod document_cache;
pub mod document_stream;
mod documents;
pub mod download;
pub mod error;
mod files;
mod folder;
mod fs_cache;
pub mod hub;
mod hugging_face;
mod meter;
mod numpy;
mod parquet;
pub mod progress;
pub mod sentencepiece;
mod sentencepiece_model;
pub mod shards;
#[cfg(test)]
mod testing;
pub mod token_cache;
pub mod token_stream;
pub mod tokenizer;
mod word_memo;

pub use corpus::{Corpus, Split};
pub use dataset::{CorpusPlugin, Recipe, TextConfig, TextDataset};
pub use error::TextError;
pub use hub::Hub;
pub use progress::{Progress, Watch};
pub use sentencepiece::SentencePiece;
pub use shards::{Documents, ShardSource, Shards};
pub use token_cache::{Amount, Chunk, TokenCache};
pub use token_stream::{StreamOptions, TokenStream};
pub use tokenizer::Tokenizer;
