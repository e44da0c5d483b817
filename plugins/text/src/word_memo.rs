//! Encoding many texts: the ids of a word are computed once.
//!
//! SentencePiece normalizes and merges every word anew, at a few MB/s; natural text repeats most of its words. Where
//! a model lets text be cut into words that do not see each other ([`crate::sentencepiece_model::Cuts`]), looking them up gives the same ids.

use std::collections::HashMap;

use crate::{error::TextError, sentencepiece::SentencePiece, sentencepiece_model::SPACE};

/// Words held at most, about 10 MB; the memory starts anew when it is full, so that it follows the text.
const MAX_WORDS: usize = 1 << 17;
/// Longer words are rarely seen twice.
const MAX_WORD_BYTES: usize = 32;

/// The words that one thread has seen.
#[derive(Debug, Default)]
pub(crate) struct WordMemo {
    /// Where the ids of a word lie in `ids`.
    words: HashMap<Box<str>, (usize, usize)>,
    ids: Vec<i32>,
}

impl WordMemo {
    /// Appends the ids of `text`. One memo is for one model.
    pub(crate) fn encode_into(
        &mut self,
        sentencepiece: &SentencePiece,
        text: &str,
        ids: &mut Vec<i32>,
    ) -> Result<(), TextError> {
        // A text may have the sign of a space itself, which is then not collapsed as a space is.
        let Some(cuts) = sentencepiece.cuts().filter(|_| !text.contains(SPACE)) else {
            return sentencepiece.encode_into(text, ids);
        };
        for word in cuts.words(text) {
            if let Some(&(start, end)) = self.words.get(word) {
                ids.extend_from_slice(&self.ids[start..end]);
                continue;
            }
            let n_before = ids.len();
            sentencepiece.encode_into(word, ids)?;
            if word.len() <= MAX_WORD_BYTES {
                if self.words.len() == MAX_WORDS {
                    *self = Self::default();
                }
                let start = self.ids.len();
                self.ids.extend_from_slice(&ids[n_before..]);
                self.words.insert(word.into(), (start, self.ids.len()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        corpus::{Corpus, Split},
        shards::ShardSource,
        testing,
        token_cache::SEPARATOR,
    };

    fn remembered(memo: &mut WordMemo, sentencepiece: &SentencePiece, text: &str) -> Vec<i32> {
        let mut ids = Vec::new();
        memo.encode_into(sentencepiece, text, &mut ids).unwrap();
        ids
    }

    /// What normalization treats in its own way: it becomes a space or begins with one, vanishes, joins what is
    /// before it, becomes many characters, or is the sign of a space.
    const ODD: &[&str] = &[
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\u{b}",
        "\u{c}",
        "\u{85}",
        "\u{a0}",
        "\u{1680}",
        "\u{2003}",
        "\u{2028}",
        "\u{3000}",
        "\u{0}",
        "\u{1}",
        "\u{7f}",
        "\u{ad}",
        "\u{200b}",
        "\u{200d}",
        "\u{feff}",
        "\u{2060}",
        "▁",
        "▁▁",
        "¨",
        "´",
        "\u{301}",
        "\u{345}",
        "e\u{301}",
        "\u{1100}\u{1161}",
        "Ａ",
        "①",
        "ﬁ",
        "ﷺ",
        "½",
        "…",
        "\u{fffd}",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "a",
        "the",
        "cat",
        "0004",
        "rat",
        "ß",
        "漢",
        "🦀",
        "👩‍👩‍👧",
    ];

    fn odd_text() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            4 => prop::sample::select(ODD).prop_map(str::to_owned),
            1 => any::<char>().prop_map(String::from),
            1 => "[a-z ]{0,80}",
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// The memory changes no id, of whatever text and in whatever order.
        #[test]
        fn remembered_ids_are_the_librarys(texts in prop::collection::vec(odd_text(), 1..6)) {
            thread_local! {
                static TINY: SentencePiece = testing::tiny_tokenizer();
            }
            TINY.with(|tiny| {
                let mut memo = WordMemo::default();
                for text in texts.iter().chain(&texts) {
                    prop_assert_eq!(remembered(&mut memo, tiny, text), tiny.encode(text).unwrap(), "{:?}", text);
                }
                Ok(())
            })?;
        }
    }

    #[test]
    fn a_full_memory_starts_anew() {
        let tiny = testing::tiny_tokenizer();
        let mut memo = WordMemo::default();
        for i in 0..=MAX_WORDS {
            remembered(&mut memo, &tiny, &i.to_string());
        }
        assert_eq!(memo.words.len(), 1);
        for text in ["0", "131072", "131073", "the 0 cat"] {
            assert_eq!(
                remembered(&mut memo, &tiny, text),
                tiny.encode(text).unwrap()
            );
        }
        let long = "1".repeat(MAX_WORD_BYTES + 1);
        assert_eq!(
            remembered(&mut memo, &tiny, &long),
            tiny.encode(&long).unwrap()
        );
        assert!(!memo.words.contains_key(long.as_str()));
    }

    /// Golden: every document of real corpora, under models of the Python package that were made from two of them.
    #[test]
    fn real_text_gives_the_librarys_ids() {
        let Some(shared) = testing::shared() else {
            return;
        };
        let rust_docs = ("embedded_default_rustdocs", Corpus::c4("en"));
        let web = ("c4_like", Corpus::c4("en"));
        let papers = ("pes2o_like", Corpus::pes2o("v2"));
        let mut n_documents = 0;
        for (model, corpora) in [
            ("rustdocs_2000", vec![rust_docs.clone()]),
            ("c4_like_8000", vec![rust_docs, web, papers]),
        ] {
            let file = shared
                .join("fixtures/tokenizer")
                .join(model)
                .join("tokenizer.model.model");
            let sentencepiece = SentencePiece::from_file(&file).unwrap();
            let mut memo = WordMemo::default();
            for (text, corpus) in corpora {
                let source = ShardSource::Folder(shared.join("data/lm").join(text));
                for split in [Split::Train, Split::Validation] {
                    let shards = source.shards(&corpus, split).unwrap();
                    for document in (0..shards.len()).flat_map(|i| shards.documents(i).unwrap()) {
                        let document = document.unwrap() + SEPARATOR;
                        let ids = remembered(&mut memo, &sentencepiece, &document);
                        assert!(
                            ids == sentencepiece.encode(&document).unwrap(),
                            "{document}"
                        );
                        n_documents += 1;
                    }
                }
            }
        }
        assert!(n_documents > 1000, "{n_documents}");
    }
}
