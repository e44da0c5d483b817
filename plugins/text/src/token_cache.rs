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

use serde::{Deserialize, Serialize};

use crate::{
    corpus::{Corpus, Split},
    error::TextError,
    files::{AtomicFile, FolderLock, create_folder, write_atomically},
    progress::{Progress, Watch},
    shards::Shards,
    tokenizer::{Encoder, Tokenizer},
};

/// Ends every document, as plain text; its pieces are ordinary ones.
pub const SEPARATOR: &str = "<STORY_SEP>";

/// Documents between two looks at the host's wish to stop.
const BATCH_DOCUMENTS: u64 = 256;

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
    fn push(self, id: i32, out: &mut Vec<u8>) {
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkInfo {
    /// Token ids in the chunk.
    pub n_tokens: u64,
    /// Non-empty documents of the shard.
    pub n_documents: u64,
    /// UTF-8 bytes of the documents' text, separators not counted.
    pub utf8_bytes: u64,
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
    separator: String,
}

impl TokenCache {
    /// `<cache>/C4/C4-en-8000` and the like; nothing is created yet.
    pub fn new(cache: &Path, corpus: &Corpus, vocab_size: usize) -> Self {
        Self {
            folder: cache.join(corpus.class).join(corpus.variant_id(vocab_size)),
            width: TokenWidth::for_vocab_size(vocab_size),
            separator: SEPARATOR.to_owned(),
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

    /// Ends documents with another text than [`SEPARATOR`]; with an empty one they are not told apart.
    #[must_use]
    pub fn with_separator(mut self, separator: &str) -> Self {
        separator.clone_into(&mut self.separator);
        self
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
        // A complete cache may be one that we cannot write, or lock.
        let ready = self.ready_chunks(split, shards.len());
        if is_enough(&ready, amount, shards.len()) {
            return Ok(ready);
        }
        let _lock = FolderLock::acquire(&self.folder, watch)?;
        create_folder(&self.split_folder(split))?;
        let work = Work {
            cache: self,
            split,
            shards,
            tokenizer,
        };
        loop {
            watch.check()?;
            let ready = self.ready_chunks(split, shards.len());
            if is_enough(&ready, amount, shards.len()) {
                return Ok(ready);
            }
            let mut missing = Vec::new();
            for index in ready.len()..chunks_needed(&ready, amount, shards.len()) {
                match self.find_chunk(split, index) {
                    Some(Ok(_)) => {}
                    Some(Err(damage)) => {
                        watch.tell(Progress::Warning(damage));
                        missing.push(index);
                    }
                    None => missing.push(index),
                }
            }
            work.tokenize_all(&missing, n_threads, watch)?;
        }
    }

    fn split_folder(&self, split: Split) -> PathBuf {
        self.folder.join("tokenized_chunks").join(split.name())
    }

    fn chunk_path(&self, split: Split, index: usize) -> PathBuf {
        self.split_folder(split).join(format!("chunk_{index}.bin"))
    }

    /// The unbroken row of good chunks from the first one on.
    fn ready_chunks(&self, split: Split, n_shards: usize) -> Vec<Chunk> {
        (0..n_shards)
            .map_while(|index| self.find_chunk(split, index)?.ok())
            .collect()
    }

    /// None if there is no such file; an explanation if it is damaged.
    fn find_chunk(&self, split: Split, index: usize) -> Option<Result<Chunk, String>> {
        let path = self.chunk_path(split, index);
        let n_bytes = fs::metadata(&path)
            .ok()
            .filter(fs::Metadata::is_file)?
            .len();
        let width = self.width.bytes() as u64;
        if !n_bytes.is_multiple_of(width) {
            let why = format!(
                "`{}` has {n_bytes} bytes, not a multiple of {width}; it is made again",
                path.display()
            );
            return Some(Err(why));
        }
        let n_tokens = n_bytes / width;
        let info = fs::read(path.with_extension("json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice::<ChunkInfo>(&bytes).ok());
        if let Some(info) = info.filter(|info| info.n_tokens != n_tokens) {
            let why = format!(
                "`{}` has {n_tokens} tokens, but its `.json` says {}; it is made again",
                path.display(),
                info.n_tokens
            );
            return Some(Err(why));
        }
        Some(Ok(Chunk {
            path,
            n_tokens,
            utf8_bytes: info.map(|info| info.utf8_bytes),
        }))
    }
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
struct Work<'a> {
    cache: &'a TokenCache,
    split: Split,
    shards: &'a Shards,
    tokenizer: &'a Tokenizer,
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
        let (news, inbox) = mpsc::channel();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..n_threads.get().min(shards.len()))
                .map(|_| {
                    let (news, next, stop) = (news.clone(), &next, &stop);
                    scope.spawn(move || {
                        let mut encoder = self.tokenizer.encoder();
                        while let Some(&shard) = shards.get(next.fetch_add(1, Ordering::Relaxed)) {
                            if let Err(error) = self.tokenize(shard, &mut encoder, &news, stop) {
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
                if (watch.is_cancelled)() {
                    stop.store(true, Ordering::Relaxed);
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
        let mut info = ChunkInfo {
            n_tokens: 0,
            n_documents: 0,
            utf8_bytes: 0,
        };
        let (mut ids, mut bytes) = (Vec::new(), Vec::new());
        // A receiver that is gone has stopped the work already.
        let tell = |piece| drop(news.send(piece));
        for document in self.shards.documents(shard)? {
            let mut text = document?;
            info.utf8_bytes += text.len() as u64;
            info.n_documents += 1;
            text.push_str(&self.cache.separator);
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
        write_atomically(&path.with_extension("json"), &sidecar(info))?;
        file.finish()?;
        tell(Progress::ChunkDone {
            shard,
            n_tokens: info.n_tokens,
        });
        Ok(())
    }
}

fn sidecar(info: ChunkInfo) -> Vec<u8> {
    let ChunkInfo {
        n_tokens,
        n_documents,
        utf8_bytes,
    } = info;
    serde_json::json!({ "n_tokens": n_tokens, "n_documents": n_documents, "utf8_bytes": utf8_bytes })
        .to_string()
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use sha2::{Digest, Sha256};

    use super::*;
    use crate::{
        shards::ShardSource,
        testing::{self, shard_of},
    };

    const ONE: NonZeroUsize = NonZeroUsize::MIN;

    /// A small corpus in a folder, whose shard `i` has `n_documents[i]` documents.
    struct Fixture {
        folder: tempfile::TempDir,
        shards: Shards,
        cache: TokenCache,
        tokenizer: Tokenizer,
    }

    impl Fixture {
        fn new(n_documents: &[usize]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let corpus = Corpus::c4("en");
            for (index, &n) in n_documents.iter().enumerate() {
                let texts: Vec<String> = (0..n).map(testing::sentence).collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                fs::write(
                    folder.path().join(corpus.file_name(Split::Train, index)),
                    shard_of(&texts),
                )
                .unwrap();
            }
            let shards = ShardSource::Folder(folder.path().to_owned())
                .shards(&corpus, Split::Train)
                .unwrap();
            let tokenizer = Tokenizer::of(testing::tiny_tokenizer());
            let cache = TokenCache::new(
                &folder.path().join("cache"),
                &corpus,
                tokenizer.vocab_size(),
            );
            Self {
                folder,
                shards,
                cache,
                tokenizer,
            }
        }

        fn prepare(&self, limit: Option<u64>, watch: Watch<'_>) -> Result<Vec<Chunk>, TextError> {
            let amount = Amount {
                limit,
                min_chunks: 1,
            };
            self.cache.prepare(
                Split::Train,
                &self.shards,
                &self.tokenizer,
                amount,
                ONE,
                watch,
            )
        }

        fn tokens_per_document(&self) -> u64 {
            self.tokenizer
                .encode(&(testing::sentence(0) + SEPARATOR))
                .unwrap()
                .len() as u64
        }
    }

    #[test]
    fn widths_follow_the_reference() {
        use TokenWidth::{I16, I32, I64, U8};
        for (vocab_size, width) in [
            (255, U8),
            (256, I16),
            (8000, I16),
            (32_766, I16),
            (32_767, I32),
            (2_147_483_646, I32),
            (2_147_483_647, I64),
        ] {
            assert_eq!(
                TokenWidth::for_vocab_size(vocab_size),
                width,
                "{vocab_size}"
            );
        }
        for width in [U8, I16, I32, I64] {
            let mut bytes = Vec::new();
            for id in [0, 1, 127, 200] {
                width.push(id, &mut bytes);
            }
            assert_eq!(width.ids(&bytes).collect::<Vec<_>>(), [0, 1, 127, 200]);
        }
    }

    #[test]
    fn the_amount_grows_by_prediction_and_stops_early() {
        let fixture = Fixture::new(&[10; 8]);
        let per_shard = 10 * fixture.tokens_per_document();
        let n_ready = |limit| fixture.prepare(limit, Watch::nobody()).unwrap().len();
        assert_eq!(n_ready(Some(1)), 1);
        assert_eq!(n_ready(Some(per_shard)), 1);
        assert_eq!(n_ready(Some(2 * per_shard + 1)), 3);
        assert_eq!(n_ready(None), 8);
        assert_eq!(n_ready(Some(1)), 8, "what is there is reused");
    }

    #[test]
    fn prediction_is_the_references() {
        let chunk = |n_tokens| Chunk {
            path: PathBuf::new(),
            n_tokens,
            utf8_bytes: None,
        };
        let needed = |ready: &[Chunk], limit, min_chunks| {
            chunks_needed(
                ready,
                Amount {
                    limit: Some(limit),
                    min_chunks,
                },
                1024,
            )
        };
        assert_eq!(needed(&[], 1000, 8), 1);
        assert_eq!(needed(&[chunk(100)], 1000, 8), 10);
        assert_eq!(needed(&[chunk(100)], 1001, 8), 11);
        assert_eq!(needed(&[chunk(100)], 200, 8), 8);
        assert_eq!(needed(&[chunk(0)], 200, 1), 2);
        assert_eq!(needed(&[chunk(1)], u64::MAX, 1), 1024);
    }

    #[test]
    fn the_sidecar_counts_documents_and_bytes() {
        let fixture = Fixture::new(&[3]);
        let chunk = fixture.prepare(None, Watch::nobody()).unwrap().remove(0);
        let n_bytes: usize = (0..3).map(|i| testing::sentence(i).len()).sum();
        assert_eq!(chunk.utf8_bytes, Some(n_bytes as u64));
        assert!(
            chunk
                .path
                .ends_with("cache/C4/C4-en-64/tokenized_chunks/train/chunk_0.bin"),
            "{}",
            chunk.path.display()
        );
        assert_eq!(
            fs::read_to_string(chunk.path.with_extension("json")).unwrap(),
            format!(
                "{{\"n_tokens\":{},\"n_documents\":3,\"utf8_bytes\":{n_bytes}}}",
                chunk.n_tokens
            )
        );
        // The reference's cache has none.
        fs::remove_file(chunk.path.with_extension("json")).unwrap();
        assert_eq!(
            fixture.prepare(None, Watch::nobody()).unwrap()[0].utf8_bytes,
            None
        );
    }

    #[test]
    fn a_torn_chunk_is_made_again_with_a_warning() {
        let fixture = Fixture::new(&[5, 5]);
        let made = fixture.prepare(None, Watch::nobody()).unwrap();
        let good = fs::read(&made[1].path).unwrap();
        fs::write(&made[1].path, &good[..good.len() - 1]).unwrap();
        let news = RefCell::new(Vec::new());
        let again = fixture
            .prepare(
                None,
                Watch {
                    progress: &|piece| news.borrow_mut().push(piece),
                    is_cancelled: &|| false,
                },
            )
            .unwrap();
        assert_eq!(again, made);
        assert_eq!(fs::read(&made[1].path).unwrap(), good);
        let n_warnings = news
            .borrow()
            .iter()
            .filter(|piece| matches!(piece, Progress::Warning(_)))
            .count();
        assert_eq!(n_warnings, 1, "{news:?}");
    }

    #[test]
    fn an_odd_number_of_bytes_is_torn() {
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(folder.path(), &Corpus::c4("en"), 8000);
        create_folder(&cache.split_folder(Split::Train)).unwrap();
        fs::write(cache.chunk_path(Split::Train, 0), [0; 7]).unwrap();
        let damage = cache.find_chunk(Split::Train, 0).unwrap().unwrap_err();
        assert!(
            damage.ends_with("has 7 bytes, not a multiple of 2; it is made again"),
            "{damage}"
        );
    }

    #[test]
    fn an_error_keeps_the_finished_chunks_and_leaves_no_rests() {
        let fixture = Fixture::new(&[5, 5, 5]);
        let third = fixture
            .folder
            .path()
            .join(Corpus::c4("en").file_name(Split::Train, 2));
        fs::write(third, testing::gzip(b"{}")).unwrap();
        let error = fixture.prepare(None, Watch::nobody()).unwrap_err();
        assert!(
            matches!(error, TextError::MalformedLine { line: 1, .. }),
            "{error}"
        );
        let chunks = fixture.cache.split_folder(Split::Train);
        let mut names: Vec<_> = fs::read_dir(chunks)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["chunk_0.bin", "chunk_0.json", "chunk_1.bin", "chunk_1.json"]
        );
    }

    #[test]
    fn the_host_can_cancel() {
        let fixture = Fixture::new(&[2000; 4]);
        let n_news = Cell::new(0);
        let watch = Watch {
            progress: &|_| n_news.set(n_news.get() + 1),
            is_cancelled: &|| n_news.get() > 0,
        };
        assert!(matches!(
            fixture.prepare(None, watch),
            Err(TextError::Cancelled)
        ));
        assert!(fixture.cache.ready_chunks(Split::Train, 4).len() < 4);
    }

    /// Golden: ids of both validation sets under the Python package's models, see `expected.json` beside these.
    #[test]
    fn validation_tokens_are_pythons() {
        let Some(shared) = testing::shared() else {
            return;
        };
        for (text, model) in [
            ("embedded_default_rustdocs", "rustdocs_2000"),
            ("c4_like", "c4_like_8000"),
        ] {
            let fixture = shared.join("fixtures/tokenizer").join(model);
            let expected: serde_json::Value =
                serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap();
            let tokenizer = Tokenizer::from_file(&fixture.join("tokenizer.model.model")).unwrap();
            let corpus = Corpus::c4("en");
            let shards = ShardSource::Folder(shared.join("data/lm").join(text))
                .shards(&corpus, Split::Validation)
                .unwrap();
            let folder = tempfile::tempdir().unwrap();
            let cache = TokenCache::new(folder.path(), &corpus, tokenizer.vocab_size());
            let chunks = cache
                .prepare(
                    Split::Validation,
                    &shards,
                    &tokenizer,
                    Amount::default(),
                    ONE,
                    Watch::nobody(),
                )
                .unwrap();
            let hash = Sha256::digest(fs::read(&chunks[0].path).unwrap());
            assert_eq!(
                format!("{hash:x}"),
                expected["sha256_int16_le"].as_str().unwrap(),
                "{model}"
            );
            assert_eq!(chunks[0].n_tokens, expected["n_tokens"].as_u64().unwrap());
        }
    }

    #[test]
    fn the_separator_ends_each_document() {
        let fixture = Fixture::new(&[3]);
        let ids_with = |separator: &str| {
            let folder = fixture.folder.path().join(format!("with{separator}"));
            let cache = TokenCache::new(&folder, &Corpus::c4("en"), 64).with_separator(separator);
            let (shards, tokenizer) = (&fixture.shards, &fixture.tokenizer);
            let all = Amount::default();
            let chunks = cache
                .prepare(Split::Train, shards, tokenizer, all, ONE, Watch::nobody())
                .unwrap();
            let bytes = fs::read(&chunks[0].path).unwrap();
            cache.width.ids(&bytes).collect::<Vec<_>>()
        };
        for separator in [SEPARATOR, "", " mat"] {
            let expected: Vec<i64> = (0..3)
                .flat_map(|i| {
                    let text = testing::sentence(i) + separator;
                    fixture.tokenizer.encode(&text).unwrap()
                })
                .map(i64::from)
                .collect();
            assert_eq!(ids_with(separator), expected, "{separator:?}");
        }
    }

    #[test]
    fn threads_change_nothing() {
        let fixture = Fixture::new(&[7, 300, 0, 20, 1, 50]);
        let other = TokenCache::new(&fixture.folder.path().join("other"), &Corpus::c4("en"), 64);
        let amount = Amount::default();
        let three = NonZeroUsize::new(3).unwrap();
        let parallel = other
            .prepare(
                Split::Train,
                &fixture.shards,
                &fixture.tokenizer,
                amount,
                three,
                Watch::nobody(),
            )
            .unwrap();
        let serial = fixture.prepare(None, Watch::nobody()).unwrap();
        for (a, b) in parallel.iter().zip(&serial) {
            assert_eq!(fs::read(&a.path).unwrap(), fs::read(&b.path).unwrap());
            assert_eq!(a.utf8_bytes, b.utf8_bytes);
        }
    }
}
