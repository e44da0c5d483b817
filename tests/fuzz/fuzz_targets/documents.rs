//! Shards of documents: bytes as they are, and as lines inside a whole gzip member.
#![no_main]

use std::io::{Cursor, Write};

use flate2::{Compression, write::GzEncoder};
use libfuzzer_sys::fuzz_target;
use moeut_text::shards::Documents;

fuzz_target!(|bytes: &[u8]| {
    let Some((wrap, bytes)) = bytes.split_first() else {
        return;
    };
    let shard = if wrap % 2 == 0 {
        bytes.to_owned()
    } else {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::none());
        encoder.write_all(bytes).expect("memory takes all");
        encoder.finish().expect("memory takes all")
    };
    let mut is_over = false;
    for document in Documents::from_gzip("shard".to_owned(), Cursor::new(shard)) {
        assert!(!is_over, "nothing comes after an error");
        match document {
            Ok(text) => assert!(!text.is_empty()),
            Err(error) => {
                is_over = true;
                assert!(!error.to_string().is_empty() && !error.help().is_empty());
            }
        }
    }
});
