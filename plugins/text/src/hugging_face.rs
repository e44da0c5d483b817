//! A tokenizer out of Hugging Face's `tokenizer.json`, by their own library; ids are those of the Python package.
//!
//! Only text to ids and back: what the file says about begin and end marks, truncation and padding is left out,
//! because a token cache holds whole documents.

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
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
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

fn refused(error: &tokenizers::Error) -> TextError {
    TextError::Encode {
        reason: error.to_string(),
    }
}
