//! Hugging Face's `tokenizer.json`: what is loaded must encode into its vocabulary, or refuse the text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moeut_text::Tokenizer;

const TEXTS: [&str; 3] = [
    "",
    "the cat  0042\tsat\r\non the mat <STORY_SEP> <|endoftext|> </s>",
    "ﬁ ½ … \u{a0}e\u{301}\u{200b}▁ ▁▁\u{0}\u{1} Ａ① 日本語 👩‍👩‍👧 ﷺ",
];

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, bytes).expect("a file");
    let Ok(tokenizer) = Tokenizer::from_file(&path) else {
        return;
    };
    for text in TEXTS {
        let Ok(ids) = tokenizer.encode(text) else {
            continue;
        };
        for &id in &ids {
            assert!(
                usize::try_from(id).is_ok_and(|id| id < tokenizer.vocab_size()),
                "{id}"
            );
        }
        let _ = tokenizer.decode(&ids);
    }
});
