//! SentencePiece: a safe face on Google's C++ library, for encoding, decoding and training BPE models.
//!
//! It is not a tokenizer of our own: ids and pieces are bit-equal to those of the Python package, which the
//! published MoEUT models depend on. The C++ side is `cpp/sentencepiece_shim.cc`.

#![expect(
    unsafe_code,
    reason = "calls the C++ shim; every block says what the shim guarantees"
)]

use std::{
    any::Any,
    ffi::{c_char, c_void},
    fmt::Write as _,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    ptr::NonNull,
};

// Nothing of its Rust face is used, but it brings the library that the shim calls.
use sentencepiece_sys as _;

use crate::{
    error::TextError,
    sentencepiece_model::{self, Cuts},
};

type ByteSink = extern "C" fn(*mut c_void, *const c_char, usize);
type IdSink = extern "C" fn(*mut c_void, *const i32, usize);
type NextDocument = extern "C" fn(*mut c_void, *mut *const c_char, *mut usize) -> i32;

unsafe extern "C" {
    fn moeut_sp_load(
        model: *const c_char,
        len: usize,
        err: *mut c_void,
        sink: ByteSink,
    ) -> *mut c_void;
    fn moeut_sp_free(processor: *mut c_void);
    fn moeut_sp_vocab_size(processor: *const c_void) -> i32;
    fn moeut_sp_piece(
        processor: *const c_void,
        id: i32,
        score: *mut f32,
        state: *mut c_void,
        sink: ByteSink,
    ) -> i32;
    fn moeut_sp_encode(
        processor: *const c_void,
        text: *const c_char,
        len: usize,
        state: *mut c_void,
        sink: IdSink,
        err: *mut c_void,
        err_sink: ByteSink,
    ) -> i32;
    fn moeut_sp_decode(
        processor: *const c_void,
        ids: *const i32,
        len: usize,
        state: *mut c_void,
        sink: ByteSink,
        err: *mut c_void,
        err_sink: ByteSink,
    ) -> i32;
    fn moeut_sp_train(
        vocab_size: i32,
        documents: *mut c_void,
        next: NextDocument,
        state: *mut c_void,
        sink: ByteSink,
        err: *mut c_void,
        err_sink: ByteSink,
    ) -> i32;
}

/// A loaded SentencePiece model. Cheap to share: encoding and decoding take `&self` from any thread.
#[derive(Debug)]
pub struct SentencePiece {
    processor: NonNull<c_void>,
    vocab_size: usize,
    cuts: Option<Cuts>,
}

// SAFETY: the C++ processor is owned by this value alone and has no thread affinity.
unsafe impl Send for SentencePiece {}
// SAFETY: after loading, only `const` methods of the processor are called; SentencePiece documents these as
// thread-safe, and `threads_agree` in the tests encodes from several threads at once.
unsafe impl Sync for SentencePiece {}

impl SentencePiece {
    /// Reads a model file (`tokenizer.model.model`).
    ///
    /// # Errors
    /// The file cannot be read, or is not a SentencePiece model.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        let bytes = std::fs::read(path).map_err(|source| TextError::io("read", path, source))?;
        Self::load(&bytes, &path.display().to_string())
    }

    /// Takes the bytes of a model file.
    ///
    /// # Errors
    /// The bytes are not a SentencePiece model.
    pub fn from_bytes(model: &[u8]) -> Result<Self, TextError> {
        Self::load(model, "the model in memory")
    }

    fn load(model: &[u8], name: &str) -> Result<Self, TextError> {
        let bad = |reason| TextError::BadModel {
            name: name.to_owned(),
            reason,
        };
        let cuts = sentencepiece_model::check(model).map_err(bad)?;
        let mut message = Vec::new();
        // SAFETY: the slice is valid for the call, `take_bytes` is given the `Vec<u8>` that it expects.
        let processor = unsafe {
            moeut_sp_load(
                model.as_ptr().cast(),
                model.len(),
                state_of(&mut message),
                take_bytes,
            )
        };
        let Some(processor) = NonNull::new(processor) else {
            return Err(bad(lossy(&message)));
        };
        // SAFETY: `processor` was just made by `moeut_sp_load`.
        let vocab_size = unsafe { moeut_sp_vocab_size(processor.as_ptr()) };
        // The value exists from here on, so that an early return frees the processor.
        let loaded = Self {
            processor,
            vocab_size: usize::try_from(vocab_size).unwrap_or(0),
            cuts,
        };
        if loaded.vocab_size == 0 {
            return Err(bad("it has no pieces".to_owned()));
        }
        Ok(loaded)
    }

    /// Number of pieces, special ones included; ids are `0..vocab_size`.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Where texts may be cut, if this model has such places.
    pub(crate) fn cuts(&self) -> Option<&Cuts> {
        self.cuts.as_ref()
    }

    /// The ids of `text`, without begin and end marks.
    ///
    /// # Errors
    /// SentencePiece refuses the text; no such text is known.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, TextError> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids)?;
        Ok(ids)
    }

    /// Appends the ids of `text`; see [`Self::encode`].
    pub(crate) fn encode_into(&self, text: &str, ids: &mut Vec<i32>) -> Result<(), TextError> {
        let mut message = Vec::new();
        // SAFETY: the text is valid for the call; each sink gets the type that it expects.
        let rc = unsafe {
            moeut_sp_encode(
                self.processor.as_ptr(),
                text.as_ptr().cast(),
                text.len(),
                state_of(ids),
                take_ids,
                state_of(&mut message),
                take_bytes,
            )
        };
        if rc == 0 {
            Ok(())
        } else {
            Err(TextError::Encode {
                reason: lossy(&message),
            })
        }
    }

    /// The text of `ids`.
    ///
    /// # Errors
    /// An id is not in `0..vocab_size`.
    pub fn decode(&self, ids: &[i32]) -> Result<String, TextError> {
        for &id in ids {
            self.check_id(id)?;
        }
        let mut text = Vec::new();
        let mut message = Vec::new();
        // SAFETY: the slice is valid for the call and every id was checked; each sink gets the type it expects.
        let rc = unsafe {
            moeut_sp_decode(
                self.processor.as_ptr(),
                ids.as_ptr(),
                ids.len(),
                state_of(&mut text),
                take_bytes,
                state_of(&mut message),
                take_bytes,
            )
        };
        if rc == 0 {
            Ok(lossy(&text))
        } else {
            Err(TextError::Encode {
                reason: lossy(&message),
            })
        }
    }

    /// The piece of `id`, where `▁` (U+2581) stands for a space.
    ///
    /// # Errors
    /// The id is not in `0..vocab_size`.
    pub fn piece(&self, id: i32) -> Result<String, TextError> {
        self.piece_and_score(id).map(|(piece, _)| piece)
    }

    /// The text of the `.vocab` file that SentencePiece's own trainer writes beside a model:
    /// one line `piece <tab> score` per id.
    ///
    /// # Errors
    /// None in practice: every id asked for exists.
    pub fn vocab_file(&self) -> Result<String, TextError> {
        let mut text = String::new();
        for id in 0..i32::try_from(self.vocab_size).unwrap_or(i32::MAX) {
            let (piece, score) = self.piece_and_score(id)?;
            // Writing to a `String` cannot fail.
            let _ = writeln!(text, "{piece}\t{score}");
        }
        Ok(text)
    }

    fn piece_and_score(&self, id: i32) -> Result<(String, f32), TextError> {
        self.check_id(id)?;
        let (mut piece, mut score) = (Vec::new(), 0.0);
        // SAFETY: the id was checked, `score` is a valid place, the sink gets the type that it expects.
        let rc = unsafe {
            moeut_sp_piece(
                self.processor.as_ptr(),
                id,
                &raw mut score,
                state_of(&mut piece),
                take_bytes,
            )
        };
        if rc == 0 {
            Ok((lossy(&piece), score))
        } else {
            Err(TextError::Encode {
                reason: lossy(&piece),
            })
        }
    }

    fn check_id(&self, id: i32) -> Result<(), TextError> {
        match usize::try_from(id) {
            Ok(index) if index < self.vocab_size => Ok(()),
            _ => Err(TextError::IdOutOfRange {
                id: i64::from(id),
                vocab_size: self.vocab_size,
            }),
        }
    }
}

impl Drop for SentencePiece {
    fn drop(&mut self) {
        // SAFETY: made by `moeut_sp_load`, and freed nowhere else.
        unsafe { moeut_sp_free(self.processor.as_ptr()) };
    }
}

/// Trains a BPE model on `documents` and returns the bytes of its model file.
///
/// Settings of the reference: BPE, digits split, all else SentencePiece's default (`nmt_nfkc`, character coverage
/// 0.9995, ids 0 1 2 = unknown, begin, end; documents longer than 4192 bytes are skipped by the trainer).
/// All documents are held in memory while it runs.
///
/// # Errors
/// The first error of the iterator, as it came; or SentencePiece's own, for instance that `vocab_size` is more
/// than these documents can fill.
///
/// # Source
/// Reference code `tokenizers/sentencepiece.py`.
pub fn train_bpe<I, E>(documents: I, vocab_size: usize) -> Result<Vec<u8>, E>
where
    I: IntoIterator<Item = Result<String, E>>,
    E: From<TextError>,
{
    let n_pieces = i32::try_from(vocab_size).map_err(|_| TextError::Train {
        reason: format!("a vocabulary of {vocab_size} is too large"),
    })?;
    let mut pulled = Pulled {
        documents: documents.into_iter(),
        current: String::new(),
        error: None,
        panic: None,
    };
    let (mut model, mut message) = (Vec::new(), Vec::new());
    // SAFETY: `next_document` is given the `Pulled` that it expects, which outlives the call, and does not unwind;
    // each sink gets the type that it expects.
    let rc = unsafe {
        moeut_sp_train(
            n_pieces,
            state_of(&mut pulled),
            next_document::<I::IntoIter, E>,
            state_of(&mut model),
            take_bytes,
            state_of(&mut message),
            take_bytes,
        )
    };
    if let Some(payload) = pulled.panic {
        resume_unwind(payload);
    }
    match pulled.error {
        Some(error) => Err(error),
        None if rc == 0 => Ok(model),
        None => Err(TextError::Train {
            reason: lossy(&message),
        }
        .into()),
    }
}

/// What the C++ trainer pulls documents from.
struct Pulled<I, E> {
    documents: I,
    /// Lent to C++ until the next call.
    current: String,
    error: Option<E>,
    panic: Option<Box<dyn Any + Send>>,
}

extern "C" fn next_document<I, E>(
    state: *mut c_void,
    text: *mut *const c_char,
    len: *mut usize,
) -> i32
where
    I: Iterator<Item = Result<String, E>>,
{
    // SAFETY: `train_bpe` passed a `Pulled<I, E>` that nothing else touches while the trainer runs.
    let pulled = unsafe { &mut *state.cast::<Pulled<I, E>>() };
    // The iterator is not asked again after a panic, so nobody sees what the panic left behind.
    match catch_unwind(AssertUnwindSafe(|| pulled.documents.next())) {
        Ok(Some(Ok(document))) => {
            pulled.current = document;
            // SAFETY: the shim passes valid places for both results.
            unsafe {
                *text = pulled.current.as_ptr().cast();
                *len = pulled.current.len();
            }
            1
        }
        Ok(None) => 0,
        Ok(Some(Err(error))) => {
            pulled.error = Some(error);
            -1
        }
        Err(payload) => {
            pulled.panic = Some(payload);
            -1
        }
    }
}

fn state_of<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// `state` is a `Vec<u8>`.
extern "C" fn take_bytes(state: *mut c_void, bytes: *const c_char, len: usize) {
    // SAFETY: every caller in this file passes a `Vec<u8>` that is not otherwise used during the call.
    let out = unsafe { &mut *state.cast::<Vec<u8>>() };
    if len > 0 {
        // SAFETY: the shim passes `len` valid bytes.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(bytes.cast(), len) });
    }
}

/// `state` is a `Vec<i32>`.
extern "C" fn take_ids(state: *mut c_void, ids: *const i32, len: usize) {
    // SAFETY: every caller in this file passes a `Vec<i32>` that is not otherwise used during the call.
    let out = unsafe { &mut *state.cast::<Vec<i32>>() };
    if len > 0 {
        // SAFETY: the shim passes `len` valid integers.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(ids, len) });
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::{fs, thread};

    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        shards::ShardSource,
        testing,
        token_cache::SEPARATOR,
    };

    /// Golden: the models that the Python package trained on the same shards. The files differ by the
    /// `model_prefix` that Python notes in them; the pieces, their order and scores must not.
    #[test]
    fn training_finds_pythons_pieces() {
        let Some(shared) = testing::shared() else {
            return;
        };
        for (text, model, vocab_size) in [
            ("embedded_default_rustdocs", "rustdocs_2000", 2000),
            ("c4_like", "c4_like_8000", 8000),
        ] {
            let source = ShardSource::Folder(shared.join("data/lm").join(text));
            let shards = source.shards(&Corpus::c4("en"), Split::Train).unwrap();
            let documents = (0..shards.len())
                .flat_map(|index| shards.documents(index).unwrap())
                .map(|document| document.map(|text| text + SEPARATOR));
            let trained =
                SentencePiece::from_bytes(&train_bpe(documents, vocab_size).unwrap()).unwrap();
            let python = fs::read_to_string(
                shared
                    .join("fixtures/tokenizer")
                    .join(model)
                    .join("tokenizer.model.vocab"),
            )
            .unwrap();
            assert_eq!(trained.vocab_size(), vocab_size);
            assert!(trained.vocab_file().unwrap() == python, "{model}");
        }
    }

    /// Golden: odd strings under the Python package.
    #[test]
    fn odd_strings_are_pythons() {
        let Some(shared) = testing::shared() else {
            return;
        };
        for model in ["rustdocs_2000", "c4_like_8000"] {
            let fixture = shared.join("fixtures/tokenizer").join(model);
            let expected: serde_json::Value =
                serde_json::from_slice(&fs::read(fixture.join("expected.json")).unwrap()).unwrap();
            let odd: Vec<(String, Vec<i32>)> =
                serde_json::from_value(expected["odd_strings"].clone()).unwrap();
            assert!(odd.len() > 5);
            let tokenizer =
                SentencePiece::from_file(&fixture.join("tokenizer.model.model")).unwrap();
            for (text, ids) in odd {
                assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
            }
        }
    }

    #[test]
    fn decoding_inverts_encoding() {
        let tokenizer = testing::tiny_tokenizer();
        let text = testing::sentence(42);
        assert_eq!(
            tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(),
            text
        );
        assert_eq!(tokenizer.piece(0).unwrap(), "<unk>");
        assert!(
            tokenizer
                .vocab_file()
                .unwrap()
                .starts_with("<unk>\t0\n<s>\t0\n</s>\t0\n")
        );
    }

    #[test]
    fn foreign_ids_are_refused() {
        let tokenizer = testing::tiny_tokenizer();
        for id in [-1, 64, i32::MAX, i32::MIN] {
            assert!(
                matches!(tokenizer.piece(id), Err(TextError::IdOutOfRange { .. })),
                "{id}"
            );
            assert!(
                matches!(
                    tokenizer.decode(&[3, id]),
                    Err(TextError::IdOutOfRange { .. })
                ),
                "{id}"
            );
        }
    }

    #[test]
    fn threads_agree() {
        let tokenizer = testing::tiny_tokenizer();
        let encode_all = || {
            (0..500)
                .map(|i| tokenizer.encode(&testing::sentence(i)).unwrap())
                .collect::<Vec<_>>()
        };
        let expected = encode_all();
        thread::scope(|scope| {
            let others: Vec<_> = (0..4).map(|_| scope.spawn(encode_all)).collect();
            for other in others {
                assert!(other.join().unwrap() == expected);
            }
        });
    }

    #[test]
    fn what_is_no_model_is_refused() {
        for bytes in [&b""[..], b"\0", b"not a model", &[0xff; 100]] {
            assert!(
                matches!(
                    SentencePiece::from_bytes(bytes),
                    Err(TextError::BadModel { .. })
                ),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn the_iterators_error_comes_out_as_it_is() {
        let documents = (0..100).map(|i| {
            if i < 50 {
                Ok(testing::sentence(i))
            } else {
                Err(TextError::Cancelled)
            }
        });
        assert!(matches!(
            train_bpe(documents, 64),
            Err(TextError::Cancelled)
        ));
    }

    #[test]
    fn the_iterators_panic_passes_by_the_cpp_frames() {
        let caught = catch_unwind(|| {
            train_bpe(
                (0..9).map(|i| {
                    if i < 5 {
                        Ok::<_, TextError>(testing::sentence(i))
                    } else {
                        panic!("five")
                    }
                }),
                64,
            )
        });
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"five"));
    }

    #[test]
    fn text_that_cannot_fill_the_vocabulary_is_an_error() {
        for documents in [vec![], vec![" "], vec!["a"], vec!["one two three"]] {
            let documents = documents
                .into_iter()
                .map(|text| Ok::<_, TextError>(text.to_owned()));
            let error = train_bpe(documents, 8000).unwrap_err();
            assert!(matches!(error, TextError::Train { .. }), "{error}");
        }
    }
}
