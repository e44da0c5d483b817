//! The tokenizer of a dataset: a file that the user named, or the one in the cache, trained on the first shards if it
//! is not there.

use std::{cell::Cell, fs, path::Path};

use sha2::{Digest, Sha256};

use crate::{
    error::TextError,
    files::{FileLock, write_atomically},
    hugging_face::HuggingFace,
    progress::{Progress, Watch},
    sentencepiece::{SentencePiece, train_bpe},
    shards::Shards,
    word_memo::WordMemo,
};

/// File of the model in the folder of a vocabulary; the doubled ending is the reference's.
pub const MODEL_FILE: &str = "tokenizer.model.model";
/// File of the pieces, for people to read.
pub const VOCAB_FILE: &str = "tokenizer.model.vocab";
/// Pieces of a tokenizer whose size nobody asked for.
pub const DEFAULT_VOCAB_SIZE: usize = 8000;

/// Documents between two looks at the host's wish to stop.
const BATCH_DOCUMENTS: u64 = 1024;

/// Text to ids and back, from any thread.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    fingerprint: String,
    is_external: bool,
}

#[derive(Debug)]
enum Kind {
    SentencePiece(SentencePiece),
    HuggingFace(Box<HuggingFace>),
}

impl Tokenizer {
    /// Reads somebody's file: a Hugging Face `tokenizer.json` if it ends with `.json`, else a SentencePiece model.
    ///
    /// Of a `tokenizer.json`, begin and end marks, truncation and padding have no effect.
    ///
    /// # Errors
    /// The file cannot be read, is neither, or is one whose ids would not be the same in every run.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let bytes = read(path)?;
        let is_json = path
            .extension()
            .is_some_and(|end| end.eq_ignore_ascii_case("json"));
        let kind = if is_json {
            HuggingFace::from_bytes(&bytes).map(|it| Kind::HuggingFace(Box::new(it)))
        } else {
            SentencePiece::from_bytes(&bytes)
                .map(Kind::SentencePiece)
                .map_err(|error| match error {
                    TextError::BadModel { reason, .. } => reason,
                    other => other.to_string(),
                })
        };
        Ok(Self {
            kind: kind.map_err(|reason| TextError::BadTokenizer {
                path: path.to_owned(),
                reason,
            })?,
            fingerprint: fingerprint(&bytes),
            is_external: true,
        })
    }

    /// Number of ids; they are `0..vocab_size`.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::SentencePiece(it) => it.vocab_size(),
            Kind::HuggingFace(it) => it.vocab_size(),
        }
    }

    /// SHA-256 of the file, in hexadecimal digits.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The beginning of the fingerprint, as chunks of the token cache remember it; none if the file is unknown.
    pub(crate) fn short_fingerprint(&self) -> Option<String> {
        self.fingerprint.get(..16).map(str::to_owned)
    }

    /// What the folder of the token cache is called behind its variant id, so that ids of two tokenizers are never
    /// taken for each other's: nothing for the one that lies in that folder itself, `-` and the first 12 digits of
    /// the fingerprint for a file that the user named (`C4-en-8000-3f6c0a1b2d4e`).
    pub fn cache_suffix(&self) -> String {
        if self.is_external {
            format!("-{}", &self.fingerprint[..12])
        } else {
            String::new()
        }
    }

    /// The ids of one text, without begin and end marks; [`Self::encoder`] is faster for many.
    ///
    /// # Errors
    /// The library refuses the text; no such text is known.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, TextError> {
        let mut ids = Vec::new();
        match &self.kind {
            Kind::SentencePiece(it) => it.encode_into(text, &mut ids),
            Kind::HuggingFace(it) => it.encode_into(text, &mut ids),
        }?;
        Ok(ids)
    }

    /// The text of `ids`.
    ///
    /// # Errors
    /// An id is not in `0..vocab_size`.
    pub fn decode(&self, ids: &[i32]) -> Result<String, TextError> {
        match &self.kind {
            Kind::SentencePiece(it) => it.decode(ids),
            Kind::HuggingFace(it) => it.decode(ids),
        }
    }

    /// Encodes many texts, remembering words; one for each thread.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder {
            tokenizer: self,
            memo: WordMemo::default(),
        }
    }
}

/// A tokenizer and the words that it has seen. The ids are those of [`Tokenizer::encode`].
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    memo: WordMemo,
}

impl Encoder<'_> {
    /// Appends the ids of `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_into(&mut self, text: &str, ids: &mut Vec<i32>) -> Result<(), TextError> {
        match &self.tokenizer.kind {
            Kind::SentencePiece(it) => self.memo.encode_into(it, text, ids),
            Kind::HuggingFace(it) => it.encode_into(text, ids),
        }
    }
}

/// The tokenizer of a corpus: the file at `path` if the user named one, else `<folder>/tokenizer.model.model`, which is
/// trained on the first `n_shards` of `shards` if it is missing.
///
/// A file says itself how many pieces it has, so `vocab_size` may be [`DEFAULT_VOCAB_SIZE`] beside one; another number
/// was typed and must be right.
///
/// # Errors
/// The file is damaged or of another size, the text cannot be read, does not suffice, or the host cancelled.
pub fn open(
    path: Option<&Path>,
    folder: &Path,
    shards: &Shards,
    n_shards: usize,
    vocab_size: usize,
    watch: Watch<'_>,
) -> Result<Tokenizer, TextError> {
    let Some(path) = path else {
        return find_or_train(folder, shards, n_shards, vocab_size, watch);
    };
    let tokenizer = Tokenizer::from_file(path)?;
    let found = tokenizer.vocab_size();
    if found != vocab_size && vocab_size != DEFAULT_VOCAB_SIZE {
        return Err(TextError::OtherVocabSize {
            path: path.to_owned(),
            found,
            expected: vocab_size,
        });
    }
    Ok(tokenizer)
}

/// Loads `<folder>/tokenizer.model.model`; if it is missing, trains it on the first `n_shards` of `shards` (all of
/// them, if there are fewer) and stores it with its `.vocab`. Documents end with the separator, as in the token cache.
///
/// Numbers comparable with published ones need the published file: put it there before the first run.
///
/// # Errors
/// The file is damaged or of another size, the text cannot be read, does not suffice, or the host cancelled.
pub fn find_or_train(
    folder: &Path,
    shards: &Shards,
    n_shards: usize,
    vocab_size: usize,
    watch: Watch<'_>,
) -> Result<Tokenizer, TextError> {
    let path = folder.join(MODEL_FILE);
    if !path.exists() {
        let _lock = FileLock::of_folder(folder, watch)?;
        // Another process may have trained it while this one waited.
        if !path.exists() {
            let model = train(shards, n_shards, vocab_size, watch)?;
            let vocab = SentencePiece::from_bytes(&model)?.vocab_file()?;
            // The model last, because it is the file that is looked for.
            write_atomically(&folder.join(VOCAB_FILE), vocab.as_bytes())?;
            write_atomically(&path, &model)?;
        }
    }
    let sentencepiece = SentencePiece::from_file(&path)?;
    match sentencepiece.vocab_size() {
        found if found == vocab_size => Ok(Tokenizer {
            kind: Kind::SentencePiece(sentencepiece),
            fingerprint: fingerprint(&read(&path)?),
            is_external: false,
        }),
        found => Err(TextError::VocabSize {
            path,
            found,
            expected: vocab_size,
        }),
    }
}

fn train(
    shards: &Shards,
    n_shards: usize,
    vocab_size: usize,
    watch: Watch<'_>,
) -> Result<Vec<u8>, TextError> {
    let n_documents = Cell::new(0u64);
    let documents =
        (0..n_shards.min(shards.len())).flat_map(|index| match shards.documents(index) {
            Ok(documents) => Box::new(documents) as Box<dyn Iterator<Item = _>>,
            Err(error) => Box::new(std::iter::once(Err(error))),
        });
    let watched = documents.map(|document| {
        let n = n_documents.get() + 1;
        n_documents.set(n);
        if n.is_multiple_of(BATCH_DOCUMENTS) {
            watch.tell(Progress::ReadingForTokenizer { n_documents: n });
            watch.check()?;
        }
        document.map(|text| text + shards.separator())
    });
    let end = std::iter::from_fn(|| {
        watch.tell(Progress::TrainingTokenizer { vocab_size });
        None
    });
    watch.check()?;
    train_bpe(watched.chain(end), vocab_size)
}

fn read(path: &Path) -> Result<Vec<u8>, TextError> {
    fs::read(path).map_err(|source| TextError::io("read", path, source))
}

fn fingerprint(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        shards::ShardSource,
        testing::{self, sentence, shard_of},
        token_cache::TokenCache,
    };

    impl Tokenizer {
        /// One that lies in the folder of its cache.
        pub(crate) fn of(sentencepiece: SentencePiece) -> Self {
            Self {
                kind: Kind::SentencePiece(sentencepiece),
                fingerprint: "a".repeat(64),
                is_external: false,
            }
        }

        /// The same under another fingerprint.
        pub(crate) fn renamed(mut self, name: &str) -> Self {
            self.fingerprint = fingerprint(name.as_bytes());
            self
        }
    }

    fn corpus_in(folder: &Path) -> Shards {
        let texts: Vec<String> = (0..500).map(sentence).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let corpus = Corpus::c4("en");
        fs::write(
            folder.join(corpus.file_name(Split::Train, 0)),
            shard_of(&texts),
        )
        .unwrap();
        // Never read: the tokenizer is trained on the first shard alone.
        fs::write(folder.join(corpus.file_name(Split::Train, 1)), b"damaged").unwrap();
        ShardSource::Folder(folder.to_owned())
            .shards(&corpus, Split::Train)
            .unwrap()
    }

    #[test]
    fn trained_once_and_then_found() {
        let folder = tempfile::tempdir().unwrap();
        let shards = corpus_in(folder.path());
        let cache = folder.path().join("cache");
        let n_trained = Cell::new(0);
        let tell = |piece| {
            if matches!(piece, Progress::TrainingTokenizer { .. }) {
                n_trained.set(n_trained.get() + 1);
            }
        };
        let watch = Watch {
            progress: &tell,
            is_cancelled: &|| false,
        };
        for _ in 0..2 {
            let tokenizer = find_or_train(&cache, &shards, 1, 64, watch).unwrap();
            let Kind::SentencePiece(sentencepiece) = &tokenizer.kind else {
                panic!("{tokenizer:?}");
            };
            assert_eq!(
                fs::read_to_string(cache.join(VOCAB_FILE)).unwrap(),
                sentencepiece.vocab_file().unwrap()
            );
            assert_eq!(tokenizer.cache_suffix(), "");
        }
        assert_eq!(n_trained.get(), 1);
    }

    #[test]
    fn a_model_of_another_size_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let shards = corpus_in(folder.path());
        find_or_train(folder.path(), &shards, 1, 64, Watch::nobody()).unwrap();
        let error = find_or_train(folder.path(), &shards, 1, 65, Watch::nobody()).unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("has 64 pieces, but 65 are asked for"),
            "{error}"
        );
    }

    #[test]
    fn a_named_file_is_used_and_has_a_cache_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let shards = corpus_in(folder.path());
        let cache = folder.path().join("cache");
        let own = find_or_train(&cache, &shards, 1, 64, Watch::nobody()).unwrap();
        let json = testing::tokenizer_json("unigram");
        for (path, vocab_size) in [(cache.join(MODEL_FILE), 64), (json, 800)] {
            for typed in [DEFAULT_VOCAB_SIZE, vocab_size] {
                let nowhere = folder.path().join("nowhere");
                let tokenizer =
                    open(Some(&path), &nowhere, &shards, 1, typed, Watch::nobody()).unwrap();
                assert_eq!(tokenizer.vocab_size(), vocab_size);
                assert!(!nowhere.exists(), "nothing was trained");
                let hash = format!("{:x}", Sha256::digest(fs::read(&path).unwrap()));
                assert_eq!(tokenizer.fingerprint(), hash);
                let expected = folder
                    .path()
                    .join(format!("C4/C4-en-{vocab_size}-{}", &hash[..12]));
                let token_cache =
                    TokenCache::for_tokenizer(folder.path(), &Corpus::c4("en"), &tokenizer);
                assert_eq!(token_cache.folder(), expected);
                let text = sentence(3);
                assert_eq!(
                    tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(),
                    text
                );
            }
            let error = open(Some(&path), &cache, &shards, 1, 65, Watch::nobody()).unwrap_err();
            assert_eq!(
                error.help(),
                format!("leave out `-sentencepiece.n_pieces`, or set it to {vocab_size}")
            );
        }
        let own_cache = TokenCache::for_tokenizer(folder.path(), &Corpus::c4("en"), &own);
        assert_eq!(own_cache.folder(), folder.path().join("C4/C4-en-64"));
    }

    #[test]
    fn what_is_no_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("a.model", &b"no model"[..]),
            ("tokenizer.json", b"no JSON"),
            ("b.JSON", b"{}"),
        ] {
            let path = folder.path().join(name);
            fs::write(&path, bytes).unwrap();
            let error = Tokenizer::from_file(&path).unwrap_err();
            assert!(matches!(error, TextError::BadTokenizer { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let missing = Tokenizer::from_file(&folder.path().join("missing.json")).unwrap_err();
        assert!(
            matches!(missing, TextError::Io { doing: "read", .. }),
            "{missing}"
        );
    }

    #[test]
    fn damaged_text_leaves_no_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let shards = corpus_in(folder.path());
        let cache = folder.path().join("cache");
        assert!(find_or_train(&cache, &shards, 2, 64, Watch::nobody()).is_err());
        assert!(!cache.join(MODEL_FILE).exists());
    }
}
