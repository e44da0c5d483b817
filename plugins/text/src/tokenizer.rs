//! The tokenizer of a dataset: taken from the cache, or trained on the first shards if it is not there.

use std::{cell::Cell, path::Path};

use crate::{
    error::TextError,
    files::{FileLock, write_atomically},
    progress::{Progress, Watch},
    sentencepiece::{SentencePiece, train_bpe},
    shards::Shards,
};

/// File of the model in the folder of a vocabulary; the doubled ending is the reference's.
pub const MODEL_FILE: &str = "tokenizer.model.model";
/// File of the pieces, for people to read.
pub const VOCAB_FILE: &str = "tokenizer.model.vocab";

/// Documents between two looks at the host's wish to stop.
const BATCH_DOCUMENTS: u64 = 1024;

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
) -> Result<SentencePiece, TextError> {
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
    let tokenizer = SentencePiece::from_file(&path)?;
    match tokenizer.vocab_size() {
        found if found == vocab_size => Ok(tokenizer),
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        shards::ShardSource,
        testing::{sentence, shard_of},
    };

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
            assert_eq!(
                fs::read_to_string(cache.join(VOCAB_FILE)).unwrap(),
                tokenizer.vocab_file().unwrap()
            );
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
    fn damaged_text_leaves_no_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let shards = corpus_in(folder.path());
        let cache = folder.path().join("cache");
        assert!(find_or_train(&cache, &shards, 2, 64, Watch::nobody()).is_err());
        assert!(!cache.join(MODEL_FILE).exists());
    }
}
