//! What the host is told while a dataset is prepared, and how it says stop. Nothing is printed here.

use std::path::PathBuf;

use crate::error::TextError;

/// One piece of news. More kinds may come.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// Another process holds the lock of the cache; sent once, then the wait begins.
    WaitingForLock {
        /// The lock file.
        path: PathBuf,
    },
    /// A file is being stored.
    Downloading {
        /// Its address.
        url: String,
        /// Bytes on the disk.
        done: u64,
        /// Bytes of the whole file; 0 if unknown.
        total: u64,
    },
    /// The tokenizer's trainer has read this many documents.
    ReadingForTokenizer {
        /// Documents so far.
        n_documents: u64,
    },
    /// All documents are read and merges are being learned, which takes a while and says nothing.
    TrainingTokenizer {
        /// Pieces to be found.
        vocab_size: usize,
    },
    /// A shard is being tokenized.
    Tokenizing {
        /// Index of the shard.
        shard: usize,
        /// Documents of it so far.
        n_documents: u64,
        /// Tokens of it so far.
        n_tokens: u64,
    },
    /// A shard is being read; told while it is tokenized.
    Reading {
        /// Index of the shard.
        shard: usize,
        /// Bytes of its files so far, packed as they are.
        done: u64,
        /// Bytes of all its files that are known; 0 if none is.
        total: u64,
    },
    /// A chunk of the cache is complete.
    ChunkDone {
        /// Index of the shard.
        shard: usize,
        /// Its tokens.
        n_tokens: u64,
    },
    /// Something the user should know, although the work goes on.
    Warning(String),
}

/// The host's ear and its veto, lent to every long operation.
///
/// Both are called on the caller's thread only, whatever runs in parallel.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Is told the news.
    pub progress: &'a dyn Fn(Progress),
    /// True once the work is to stop; asked for every batch of documents.
    pub is_cancelled: &'a dyn Fn() -> bool,
}

impl Watch<'static> {
    /// Nobody listens and nobody stops the work.
    pub fn nobody() -> Self {
        Self {
            progress: &|_| {},
            is_cancelled: &|| false,
        }
    }
}

impl Watch<'_> {
    /// Passes one piece of news on.
    pub fn tell(&self, news: Progress) {
        (self.progress)(news);
    }

    /// # Errors
    /// [`TextError::Cancelled`] if the host wants to stop.
    pub fn check(&self) -> Result<(), TextError> {
        if (self.is_cancelled)() {
            Err(TextError::Cancelled)
        } else {
            Ok(())
        }
    }
}
