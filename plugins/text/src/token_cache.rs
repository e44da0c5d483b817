//! The token cache: one file of token ids per shard, made once, on demand and in parallel.
//!
//! Layout and bytes are the reference's, so that its cache can be used and the other way round:
//! `<cache>/<Class>/<variant id>/tokenized_chunks/<split>/chunk_<i>.bin`, a raw little-endian array. A sidecar
//! `chunk_<i>.json` of our own has what the ids do not tell. Reading windows is in [`crate::token_stream`].

use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use crate::{
    corpus::{Corpus, Split},
    document_cache::read_lengths,
    error::TextError,
    files::{AtomicFile, FileLock, create_folder, write_atomically},
    progress::{Progress, Watch},
    shards::Shards,
    tokenizer::{Encoder, Tokenizer},
};
use serde::{Deserialize, Serialize};

pub use crate::corpus::SEPARATOR;

/// Documents between two looks at the host's wish to stop.
pub(crate) const BATCH_DOCUMENTS: u64 = 256;

/// How a token id is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenWidth {
    /// Unsigned, one byte.
    U8,
    /// Signed, two bytes.
    I16,
    /// Signed, four bytes.
    I32,
    /// Signed, eight bytes.
    I64,
}

impl TokenWidth {
    /// The reference's rule: `uint8` below 256 pieces, `int16` below 2¹⁵−1, `int32` below 2³¹−1, else `int64`.
    pub fn for_vocab_size(vocab_size: usize) -> Self {
        match vocab_size {
            0..256 => Self::U8,
            256..0x7fff => Self::I16,
            0x7fff..0x7fff_ffff => Self::I32,
            _ => Self::I64,
        }
    }

    /// Bytes per id.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::I16 => 2,
            Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// The bytes of an id that is in the vocabulary.
    pub(crate) fn push(self, id: i32, out: &mut Vec<u8>) {
        // An id of 256 pieces or more would be cut in a `uint8`, but then the width is another one.
        out.extend_from_slice(&i64::from(id).to_le_bytes()[..self.bytes()]);
    }

    /// The ids of whole elements of bytes.
    pub(crate) fn ids(self, bytes: &[u8]) -> impl Iterator<Item = i64> + '_ {
        bytes.chunks_exact(self.bytes()).map(move |element| {
            let is_negative = self != Self::U8 && element.last().is_some_and(|&byte| byte >= 0x80);
            let mut wide = [if is_negative { 0xff } else { 0 }; 8];
            wide[..element.len()].copy_from_slice(element);
            i64::from_le_bytes(wide)
        })
    }
}

/// What the sidecar of a chunk says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct ChunkInfo {
    /// Token ids in the chunk.
    pub n_tokens: u64,
    /// Non-empty documents of the shard.
    pub n_documents: u64,
    /// UTF-8 bytes of the documents' text, separators not counted.
    pub utf8_bytes: u64,
}

/// The sidecar itself: what the chunk holds, and what it was made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sidecar {
    #[serde(flatten)]
    info: ChunkInfo,
    /// Fingerprint of the files of the shard; none for published ones, which do not change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shard: Option<String>,
    /// Fingerprint of the tokenizer in the folder of the vocabulary; none if it is elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
}

/// One complete file of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The file of ids.
    pub path: PathBuf,
    /// Ids in it.
    pub n_tokens: u64,
    /// UTF-8 bytes of its documents without separators; unknown in a cache that the reference made.
    pub utf8_bytes: Option<u64>,
}

/// How much of a split is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amount {
    /// Tokens; none for all of the split.
    pub limit: Option<u64>,
    /// At least so many chunks, however large they are.
    pub min_chunks: usize,
}

/// The cache of one corpus and vocabulary.
#[derive(Debug, Clone)]
pub struct TokenCache {
    folder: PathBuf,
    width: TokenWidth,
    contents: Contents,
}

/// What chunks hold. Each kind has a folder of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// One stream: documents with separators behind them.
    Stream,
    /// Documents without separators, whose lengths are kept beside the chunk.
    Documents,
}

impl TokenCache {
    /// `<cache>/C4/C4-en-8000` and the like; nothing is created yet.
    pub fn new(cache: &Path, corpus: &Corpus, vocab_size: usize) -> Self {
        Self {
            folder: cache.join(corpus.class).join(corpus.variant_id(vocab_size)),
            width: TokenWidth::for_vocab_size(vocab_size),
            contents: Contents::Stream,
        }
    }

    /// The cache of one corpus and tokenizer: the same folder for a tokenizer that lies in it, one of its own for
    /// every file from elsewhere (see [`Tokenizer::cache_suffix`]).
    pub fn for_tokenizer(cache: &Path, corpus: &Corpus, tokenizer: &Tokenizer) -> Self {
        let mut this = Self::new(cache, corpus, tokenizer.vocab_size());
        this.folder
            .as_mut_os_string()
            .push(tokenizer.cache_suffix());
        this
    }

    /// The same cache, but of documents that can be told apart.
    #[must_use]
    pub fn of_documents(self) -> Self {
        Self {
            contents: Contents::Documents,
            ..self
        }
    }

    /// The folder of this vocabulary, which also holds the tokenizer.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How ids are stored.
    pub fn width(&self) -> TokenWidth {
        self.width
    }

    /// The chunks of `split` that hold the wanted amount, made now where they are missing.
    ///
    /// Without a limit all shards are tokenized. With one, the first shard is, and then as many more as the ready
    /// ones predict, `⌈n_ready · limit / n_tokens⌉`, until the limit is reached. A chunk is always a whole shard, so
    /// the result holds more than the limit, or all there is. What a kill or an error leaves behind is whole chunks.
    ///
    /// # Errors
    /// A shard cannot be read, a file cannot be written, or the host cancelled.
    ///
    /// # Source
    /// Reference code `dataset/text/chunked_setencepiece_lm_dataset.py`.
    pub fn prepare(
        &self,
        split: Split,
        shards: &Shards,
        tokenizer: &Tokenizer,
        amount: Amount,
        n_threads: NonZeroUsize,
        watch: Watch<'_>,
    ) -> Result<Vec<Chunk>, TextError> {
        let origin = Origin {
            shards,
            tokenizer: tokenizer.short_fingerprint(),
        };
        // A complete cache may be one that we cannot write, or lock.
        let ready = self.ready_chunks(split, &origin);
        if is_enough(&ready, amount, shards.len()) {
            return Ok(ready);
        }
        let _lock = FileLock::of_folder(&self.folder, watch)?;
        create_folder(&self.split_folder(split))?;
        let work = Work {
            cache: self,
            split,
            origin: &origin,
            shards,
            tokenizer,
        };
        loop {
            watch.check()?;
            let ready = self.ready_chunks(split, &origin);
            if is_enough(&ready, amount, shards.len()) {
                return Ok(ready);
            }
            let mut missing = Vec::new();
            for index in ready.len()..chunks_needed(&ready, amount, shards.len()) {
                match self.find_chunk(split, index, &origin) {
                    Some(Ok(_)) => {}
                    Some(Err(damage)) => {
                        watch.tell(Progress::Warning(damage));
                        // It must not be there when the sidecar of the next one is.
                        let path = self.chunk_path(split, index);
                        fs::remove_file(&path)
                            .map_err(|source| TextError::io("remove", &path, source))?;
                        missing.push(index);
                    }
                    None => missing.push(index),
                }
            }
            work.tokenize_all(&missing, n_threads, watch)?;
        }
    }

    fn split_folder(&self, split: Split) -> PathBuf {
        let contents = match self.contents {
            Contents::Stream => "tokenized_chunks",
            Contents::Documents => "tokenized_documents",
        };
        self.folder.join(contents).join(split.name())
    }

    pub(crate) fn chunk_path(&self, split: Split, index: usize) -> PathBuf {
        self.split_folder(split).join(format!("chunk_{index}.bin"))
    }

    /// The unbroken row of good chunks from the first one on.
    fn ready_chunks(&self, split: Split, origin: &Origin<'_>) -> Vec<Chunk> {
        (0..origin.shards.len())
            .map_while(|index| self.find_chunk(split, index, origin)?.ok())
            .collect()
    }

    /// None if there is no such file; an explanation if it is damaged or outdated.
    fn find_chunk(
        &self,
        split: Split,
        index: usize,
        origin: &Origin<'_>,
    ) -> Option<Result<Chunk, String>> {
        let path = self.chunk_path(split, index);
        let n_bytes = fs::metadata(&path)
            .ok()
            .filter(fs::Metadata::is_file)?
            .len();
        let again =
            |why: String| Some(Err(format!("`{}` {why}; it is made again", path.display())));
        let width = self.width.bytes() as u64;
        if !n_bytes.is_multiple_of(width) {
            return again(format!("has {n_bytes} bytes, not a multiple of {width}"));
        }
        let n_tokens = n_bytes / width;
        let sidecar = fs::read(path.with_extension("json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Sidecar>(&bytes).ok());
        if let Some(sidecar) = &sidecar {
            let says = sidecar.info.n_tokens;
            if says != n_tokens {
                return again(format!(
                    "has {n_tokens} tokens, but its `.json` says {says}"
                ));
            }
            if sidecar.shard.as_deref() != origin.shards.fingerprint(index) {
                return again("was made from other files than are there".to_owned());
            }
            if sidecar.tokenizer.is_some() && sidecar.tokenizer != origin.tokenizer {
                return again("was made by another tokenizer than is there".to_owned());
            }
        } else if origin.shards.fingerprint(index).is_some() {
            return again("has no `.json` that says what it was made from".to_owned());
        }
        if self.contents == Contents::Documents {
            match read_lengths(&path) {
                Ok(lengths) if lengths.iter().map(|&n| u64::from(n)).sum::<u64>() == n_tokens => {}
                _ => return again("has no lengths of its documents beside it".to_owned()),
            }
        }
        Some(Ok(Chunk {
            path,
            n_tokens,
            utf8_bytes: sidecar.map(|sidecar| sidecar.info.utf8_bytes),
        }))
    }
}

/// What chunks are made from.
struct Origin<'a> {
    shards: &'a Shards,
    tokenizer: Option<String>,
}

fn is_enough(ready: &[Chunk], amount: Amount, n_shards: usize) -> bool {
    let n_tokens: u64 = ready.iter().map(|chunk| chunk.n_tokens).sum();
    ready.len() == n_shards
        || (!ready.is_empty()
            && ready.len() >= amount.min_chunks
            && amount.limit.is_some_and(|limit| n_tokens >= limit))
}

/// How many chunks to have next; more than are ready, at most all.
fn chunks_needed(ready: &[Chunk], amount: Amount, n_shards: usize) -> usize {
    let Some(limit) = amount.limit else {
        return n_shards;
    };
    let n_tokens: u64 = ready.iter().map(|chunk| chunk.n_tokens).sum();
    let predicted = match n_tokens {
        0 => 0,
        n_tokens => (ready.len() as u128 * u128::from(limit)).div_ceil(u128::from(n_tokens)),
    };
    // The minimum waits for the first chunk too, as in the reference.
    let minimum = if ready.is_empty() {
        1
    } else {
        amount.min_chunks
    };
    usize::try_from(predicted)
        .unwrap_or(usize::MAX)
        .max(minimum)
        .max(ready.len() + 1)
        .min(n_shards)
}

/// What every worker needs.
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) cache: &'a TokenCache,
    pub(crate) split: Split,
    origin: &'a Origin<'a>,
    pub(crate) shards: &'a Shards,
    pub(crate) tokenizer: &'a Tokenizer,
}

impl Work<'_> {
    /// Tokenizes shards, each by one thread. The calling thread only passes news on and asks whether to stop, so the
    /// host's callbacks need not be thread-safe.
    fn tokenize_all(
        self,
        shards: &[usize],
        n_threads: NonZeroUsize,
        watch: Watch<'_>,
    ) -> Result<(), TextError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let meter = self.shards.meter();
        meter.stop(false);
        let (news, inbox) = mpsc::channel();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..n_threads.get().min(shards.len()))
                .map(|_| {
                    let (news, next, stop) = (news.clone(), &next, &stop);
                    scope.spawn(move || {
                        let mut encoder = self.tokenizer.encoder();
                        while let Some(&shard) = shards.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let made = match self.cache.contents {
                                Contents::Stream => self.tokenize(shard, &mut encoder, &news, stop),
                                Contents::Documents => {
                                    self.tokenize_documents(shard, &mut encoder, &news, stop)
                                }
                            };
                            if let Err(error) = made {
                                stop.store(true, Ordering::Relaxed);
                                return Err(error);
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            drop(news);
            loop {
                match inbox.recv_timeout(Duration::from_millis(100)) {
                    Ok(piece) => watch.tell(piece),
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => break,
                }
                meter.news().into_iter().for_each(|piece| watch.tell(piece));
                if (watch.is_cancelled)() {
                    stop.store(true, Ordering::Relaxed);
                }
                if stop.load(Ordering::Relaxed) {
                    meter.stop(true);
                }
            }
            let mut outcome = Ok(());
            for worker in workers {
                let result = worker
                    .join()
                    .unwrap_or_else(|payload| std::panic::resume_unwind(payload));
                // A worker that was stopped because of another's error has nothing to say.
                if outcome.is_ok()
                    || matches!(outcome, Err(TextError::Cancelled)) && result.is_err()
                {
                    outcome = result;
                }
            }
            outcome
        })
    }

    /// Makes one chunk and its sidecar.
    fn tokenize(
        self,
        shard: usize,
        encoder: &mut Encoder<'_>,
        news: &mpsc::Sender<Progress>,
        stop: &AtomicBool,
    ) -> Result<(), TextError> {
        let path = self.cache.chunk_path(self.split, shard);
        let mut file = AtomicFile::create(&path)?;
        let mut info = ChunkInfo::default();
        let (mut ids, mut bytes) = (Vec::new(), Vec::new());
        // A receiver that is gone has stopped the work already.
        let tell = |piece| drop(news.send(piece));
        for document in self.shards.documents(shard)? {
            let mut text = document?;
            info.utf8_bytes += text.len() as u64;
            info.n_documents += 1;
            text.push_str(self.shards.separator());
            ids.clear();
            encoder.encode_into(&text, &mut ids)?;
            info.n_tokens += ids.len() as u64;
            bytes.clear();
            for &id in &ids {
                self.cache.width.push(id, &mut bytes);
            }
            file.write(&bytes)?;
            if info.n_documents.is_multiple_of(BATCH_DOCUMENTS) {
                if stop.load(Ordering::Relaxed) {
                    return Err(TextError::Cancelled);
                }
                let (n_documents, n_tokens) = (info.n_documents, info.n_tokens);
                tell(Progress::Tokenizing {
                    shard,
                    n_documents,
                    n_tokens,
                });
            }
        }
        if stop.load(Ordering::Relaxed) {
            return Err(TextError::Cancelled);
        }
        // The sidecar first: a chunk without one would pass for the reference's.
        write_atomically(&path.with_extension("json"), &self.sidecar(shard, info)?)?;
        file.finish()?;
        tell(Progress::ChunkDone {
            shard,
            n_tokens: info.n_tokens,
        });
        Ok(())
    }

    pub(crate) fn sidecar(self, shard: usize, info: ChunkInfo) -> Result<Vec<u8>, TextError> {
        let sidecar = Sidecar {
            info,
            shard: self.shards.fingerprint(shard).map(str::to_owned),
            tokenizer: self.origin.tokenizer.clone(),
        };
        serde_json::to_vec(&sidecar).map_err(|error| {
            let path = self.cache.chunk_path(self.split, shard);
            TextError::io("write", &path, error.into())
        })
    }
}

#[cfg(test)]
mod tests;
