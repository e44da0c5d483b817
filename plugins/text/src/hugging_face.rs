//! A tokenizer out of Hugging Face's `tokenizer.json`, by their own library; ids are those of the Python package.
//!
//! Only text to ids and back: what the file says about begin and end marks, truncation and padding is left out,
//! because a token cache holds whole documents.

use std::{any::Any, panic::catch_unwind};

use tokenizers::{ModelWrapper, Tokenizer};

use crate::error::TextError;

/// A loaded `tokenizer.json`.
#[derive(Debug)]
pub(crate) struct HuggingFace {
    tokenizer: Tokenizer,
    vocab_size: usize,
}

impl HuggingFace {
    /// Takes the bytes of a file; what is wrong with it.
    pub(crate) fn from_bytes(json: &[u8]) -> Result<Self, String> {
        // Where a file breaks off in its decoder, the library panics instead of returning an error.
        let mut tokenizer = catch_unwind(|| Tokenizer::from_bytes(json))
            .map_err(|payload| panic_message(payload.as_ref()))?
            .map_err(|error| error.to_string())?;
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && let Some(dropout) = model.dropout.filter(|&dropout| dropout != 0.0)
        {
            return Err(format!(
                "it drops merges at random (`dropout` is {dropout}), so no two runs would see the same tokens"
            ));
        }
        tokenizer
            .with_truncation(None)
            .map_err(|error| error.to_string())?
            .with_padding(None);
        // Ids need not be without gaps; an embedding needs a row up to the last.
        let last = tokenizer.get_vocab(true).into_values().max();
        match last.map(i32::try_from) {
            Some(Ok(last)) => Ok(Self {
                tokenizer,
                vocab_size: usize::try_from(last).unwrap_or(0) + 1,
            }),
            Some(Err(_)) => Err(format!(
                "its last id is {}, more than 2³¹−1",
                last.unwrap_or(0)
            )),
            None => Err("it has no pieces".to_owned()),
        }
    }

    /// The last id + 1.
    pub(crate) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Appends the ids of `text`.
    pub(crate) fn encode_into(&self, text: &str, ids: &mut Vec<i32>) -> Result<(), TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|error| refused(&error))?;
        ids.extend(encoding.get_ids().iter().map(|&id| id.cast_signed()));
        Ok(())
    }

    /// The text of `ids`.
    pub(crate) fn decode(&self, ids: &[i32]) -> Result<String, TextError> {
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| match u32::try_from(id) {
                Ok(id) if (id as usize) < self.vocab_size => Ok(id),
                _ => Err(TextError::IdOutOfRange {
                    id: i64::from(id),
                    vocab_size: self.vocab_size,
                }),
            })
            .collect::<Result<_, _>>()?;
        self.tokenizer
            .decode(&ids, false)
            .map_err(|error| refused(&error))
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("the library `tokenizers` panicked")
        .to_owned()
}

fn refused(error: &tokenizers::Error) -> TextError {
    TextError::Encode {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use serde::Deserialize;
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        shards::ShardSource,
        testing,
        token_cache::SEPARATOR,
    };

    /// What `fixtures/tokenizer_json/make.py` wrote about one tokenizer.
    #[derive(Deserialize)]
    struct Expected {
        vocab_size: usize,
        /// Text, ids, and the text of these.
        odd_strings: Vec<(String, Vec<i32>, String)>,
        n_validation_tokens: usize,
        validation_sha256_int16_le: String,
    }

    /// Golden: ids and texts of the Python package, for strings that are odd and for a shard of real text. The file
    /// of the byte-level one also asks for an end mark, truncation and padding.
    #[test]
    fn ids_are_pythons() {
        let expected = fs::read(testing::tokenizer_json("expected")).unwrap();
        let expected: std::collections::BTreeMap<String, Expected> =
            serde_json::from_slice(&expected).unwrap();
        assert!(expected.keys().eq(["byte_level", "unigram"]));
        for (name, expected) in expected {
            let json = fs::read(testing::tokenizer_json(&name)).unwrap();
            let tokenizer = HuggingFace::from_bytes(&json).unwrap();
            assert_eq!(tokenizer.vocab_size(), expected.vocab_size);
            let encode = |text: &str| {
                let mut ids = Vec::new();
                tokenizer.encode_into(text, &mut ids).unwrap();
                ids
            };
            for (text, ids, decoded) in expected.odd_strings {
                assert_eq!(encode(&text), ids, "{name}: {text:?}");
                assert_eq!(tokenizer.decode(&ids).unwrap(), decoded, "{name}: {text:?}");
            }
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/c4/corpus");
            let source = ShardSource::Folder(corpus);
            let shards = source.shards(&Corpus::c4("en"), Split::Validation).unwrap();
            let (mut n_ids, mut hash) = (0, Sha256::new());
            for document in shards.documents(0).unwrap() {
                for id in encode(&(document.unwrap() + SEPARATOR)) {
                    n_ids += 1;
                    hash.update(i16::try_from(id).unwrap().to_le_bytes());
                }
            }
            assert_eq!(n_ids, expected.n_validation_tokens, "{name}");
            let hash = format!("{:x}", hash.finalize());
            assert_eq!(hash, expected.validation_sha256_int16_le, "{name}");
        }
    }

    #[test]
    fn foreign_ids_are_refused() {
        let json = fs::read(testing::tokenizer_json("byte_level")).unwrap();
        let tokenizer = HuggingFace::from_bytes(&json).unwrap();
        for id in [-1, 800, i32::MAX] {
            let error = tokenizer.decode(&[id]).unwrap_err();
            assert!(matches!(error, TextError::IdOutOfRange { .. }), "{error}");
        }
    }

    #[test]
    fn what_gives_no_ids_or_other_ones_each_time_is_refused() {
        let json = fs::read_to_string(testing::tokenizer_json("byte_level")).unwrap();
        let model = r#""model":{"type":"BPE","dropout":null"#;
        assert!(json.contains(model));
        let dropping = json.replace(model, &model.replace("null", "0.1"));
        let empty = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"BPE","vocab":{},"merges":[]}}"#;
        let decoder = json.find("\"decoder\":{").unwrap();
        for (json, why) in [
            (&json[..decoder + 20], "EOF while parsing"),
            (dropping.as_str(), "`dropout` is 0.1"),
            (empty, "it has no pieces"),
            ("{}", "Model missing"),
            ("nothing", "expected ident"),
        ] {
            let error = HuggingFace::from_bytes(json.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
