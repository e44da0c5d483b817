//! SentencePiece models: what is loaded must encode, the same with and without remembered words, and decode.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moeut_text::Tokenizer;

const TEXTS: [&str; 4] = [
    "",
    "the cat  0042\tsat\r\non the mat <STORY_SEP>",
    "ﬁ ½ … \u{a0}e\u{301}\u{200b}▁ ▁▁\u{0}\u{1} Ａ① 日本語 👩‍👩‍👧 ﷺ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\0\0\0\0\0\0",
];

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.model");
    std::fs::write(&path, bytes).expect("a file");
    let Ok(tokenizer) = Tokenizer::from_file(&path) else {
        return;
    };
    let mut encoder = tokenizer.encoder();
    for text in TEXTS.into_iter().chain(TEXTS) {
        let plain = tokenizer.encode(text);
        let mut remembered = Vec::new();
        let outcome = encoder.encode_into(text, &mut remembered);
        let Ok(ids) = plain else {
            continue;
        };
        assert!(
            outcome.is_ok() && remembered == ids,
            "{text:?}: {ids:?}, remembered {remembered:?}"
        );
        for &id in &ids {
            assert!(
                usize::try_from(id).is_ok_and(|id| id < tokenizer.vocab_size()),
                "{id}"
            );
        }
        tokenizer.decode(&ids).expect("ids of its own");
    }
});
