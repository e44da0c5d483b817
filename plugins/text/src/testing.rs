//! What several tests need: the shared fixtures, and small shards made on the spot.

use std::{env, io::Write, path::PathBuf};

use flate2::{Compression, write::GzEncoder};

use crate::{
    error::TextError,
    sentencepiece::{SentencePiece, train_bpe},
    token_cache::SEPARATOR,
};

/// The folder with fixtures and real text, or `None` where it is absent.
///
/// It is `$MOEUT_SHARED`, or `shared` beside the repository. On CI (`CI=true`) a missing folder fails the test.
pub(crate) fn shared() -> Option<PathBuf> {
    let folder = env::var_os("MOEUT_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if folder.is_dir() {
        return Some(folder);
    }
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "no shared folder at `{}`",
        folder.display()
    );
    eprintln!(
        "skipped: no shared folder at `{}` (set MOEUT_SHARED)",
        folder.display()
    );
    None
}

/// A file of `fixtures/tokenizer_json`, which Python's `tokenizers` made; see `make.py` there.
pub(crate) fn tokenizer_json(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokenizer_json");
    folder.join(name).with_extension("json")
}

/// A gzip member of JSON lines, one document each.
pub(crate) fn shard_of(documents: &[&str]) -> Vec<u8> {
    let mut lines = String::new();
    for text in documents {
        lines += &serde_json::json!({ "text": text, "url": "x" }).to_string();
        lines += "\n";
    }
    gzip(lines.as_bytes())
}

/// One gzip member.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Document `index`; all have the same number of tokens under [`tiny_tokenizer`].
pub(crate) fn sentence(index: usize) -> String {
    format!(
        "the cat {:04} sat on the mat and ate the rat",
        index % 10_000
    )
}

/// 64 pieces, learned from [`sentence`]s.
pub(crate) fn tiny_tokenizer() -> SentencePiece {
    let documents = (0..500).map(|i| Ok::<_, TextError>(sentence(i * 7) + SEPARATOR));
    SentencePiece::from_bytes(&train_bpe(documents, 64).unwrap()).unwrap()
}
