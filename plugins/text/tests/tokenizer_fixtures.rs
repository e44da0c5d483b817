//! The program behind `cargo xtask fixtures` tells a recorded tokenizer that agrees from one that does not.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where it is allowed")]

use std::{fs, path::Path, process::Command, sync::LazyLock};

use moeut_text::{
    SentencePiece, TextError, sentencepiece::train_bpe, shards::Documents, token_cache::SEPARATOR,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The smallest shard of the corpus inside the `c4` plugin.
const SHARD: &str = "c4-validation.00000-of-00008.json.gz";
const VOCAB_SIZE: usize = 300;

/// A tokenizer that agrees: model, vocabulary, and what is expected.
static RECORDED: LazyLock<(Vec<u8>, String, Value)> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../datasets/c4/corpus/en")
        .join(SHARD);
    let documents: Vec<String> =
        Documents::from_gzip(SHARD.to_owned(), fs::File::open(path).unwrap())
            .map(|text| text.unwrap() + SEPARATOR)
            .collect();
    let model = train_bpe(
        documents.iter().cloned().map(Ok::<_, TextError>),
        VOCAB_SIZE,
    )
    .unwrap();
    let tokenizer = SentencePiece::from_bytes(&model).unwrap();
    let ids: Vec<i32> = documents
        .iter()
        .flat_map(|text| tokenizer.encode(text).unwrap())
        .collect();
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| i16::try_from(id).unwrap().to_le_bytes())
        .collect();
    let expected = json!({
        "vocab_size": VOCAB_SIZE,
        "trained_on": [SHARD],
        "encoded": [SHARD],
        "n_docs": documents.len(),
        "n_tokens": ids.len(),
        "first_ids": ids[..9],
        "sha256_int16_le": format!("{:x}", Sha256::digest(bytes)),
        "rule": format!("each document text + \"{SEPARATOR}\""),
        "odd_strings": [["", []], ["ﬁ  rm", tokenizer.encode("ﬁ  rm").unwrap()]],
    });
    (model, tokenizer.vocab_file().unwrap(), expected)
});

/// Exit code and output for a folder two levels above a changed copy of the recorded tokenizer.
fn run_changed(change: impl FnOnce(&mut (Vec<u8>, String, Value))) -> (Option<i32>, String) {
    let mut recorded = RECORDED.clone();
    change(&mut recorded);
    let folder = tempfile::tempdir().unwrap();
    let fixture = folder.path().join("tokenizer/tiny");
    fs::create_dir_all(&fixture).unwrap();
    fs::write(fixture.join("tokenizer.model.model"), recorded.0).unwrap();
    fs::write(fixture.join("tokenizer.model.vocab"), recorded.1).unwrap();
    fs::write(fixture.join("expected.json"), recorded.2.to_string()).unwrap();
    run(folder.path())
}

fn run(folder: &Path) -> (Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_moeut-tokenizer-fixtures");
    let output = Command::new(program).arg(folder).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn one_that_agrees_passes() {
    let (code, output) = run_changed(|_| {});
    assert_eq!(code, Some(0), "{output}");
    assert!(
        output.ends_with("3 checks of tokenizers: 3 agree with the reference, 0 do not\n"),
        "{output}"
    );
    assert_eq!(output.matches("the same").count(), 3, "{output}");
}

#[test]
fn every_difference_fails_and_is_named() {
    type Change = fn(&mut (Vec<u8>, String, Value));
    let changes: [(Change, &str); 8] = [
        (
            |it| it.2["odd_strings"][1][1] = json!([1]),
            "FAILED tiny odd strings: ids of \"ﬁ  rm\": found [",
        ),
        (
            |it| it.2["sha256_int16_le"] = json!("00"),
            "FAILED tiny shards: SHA-256 of the ids: found",
        ),
        (
            |it| it.2["first_ids"][8] = json!(0),
            "FAILED tiny shards: first ids: found",
        ),
        (
            |it| it.2["n_tokens"] = json!(1),
            "FAILED tiny shards: ids: found",
        ),
        (
            |it| it.2["n_docs"] = json!(1),
            "FAILED tiny shards: no corpus has the shards",
        ),
        (
            |it| it.2["trained_on"] = json!(["c4-train.99999-of-01024.json.gz"]),
            "FAILED tiny shards: no corpus has",
        ),
        (
            |it| it.1 = it.1.replace("▁the\t", "▁teh\t"),
            "FAILED tiny training: piece",
        ),
        (|it| it.0.truncate(100), "FAILED tiny files: `"),
    ];
    for (change, line) in changes {
        let (code, output) = run_changed(change);
        assert_eq!(code, Some(1), "{output}");
        assert!(output.contains(line), "{line}\n{output}");
    }
}

#[test]
fn a_folder_without_tokenizers_does_not_pass() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(run(folder.path()).0, Some(1));
    let (code, output) = run(&folder.path().join("missing"));
    assert_eq!(code, Some(2), "{output}");
}
