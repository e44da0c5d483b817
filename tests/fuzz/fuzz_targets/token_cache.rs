//! The token cache: a chunk and its sidecar of whatever bytes are used, or made again; windows hold ids of the tokenizer.
#![no_main]

use std::{fs, num::NonZeroUsize, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use moeut_text::{
    Amount, Corpus, ShardSource, Shards, Split, StreamOptions, TextError, TokenCache, TokenStream,
    Tokenizer, Watch, sentencepiece::train_bpe,
};

/// One shard of one document, `{"text": "the cat sat"}`, stored in gzip without compression.
static DATA: LazyLock<(Shards, Tokenizer)> = LazyLock::new(|| {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    std::io::Write::write_all(&mut encoder, b"{\"text\": \"the cat sat\"}\n")
        .expect("memory takes all");
    let shard: &'static [u8] = encoder.finish().expect("memory takes all").leak();
    let files = vec![("c4-train.00000-of-00001.json.gz", shard)].leak();
    let shards = ShardSource::Embedded(files)
        .shards(&Corpus::c4("en"), Split::Train)
        .expect("a shard");

    let documents =
        (0..300).map(|i| Ok::<_, TextError>(format!("the cat {i} sat on the mat and ate the rat")));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tokenizer.model");
    fs::write(&path, train_bpe(documents, 48).expect("a model")).expect("a file");
    (shards, Tokenizer::from_file(&path).expect("a tokenizer"))
});

fuzz_target!(|bytes: &[u8]| {
    let Some((&length, bytes)) = bytes.split_first() else {
        return;
    };
    let (chunk, sidecar) = bytes.split_at(bytes.len().min(length.into()));
    let (shards, tokenizer) = &*DATA;
    let folder = tempfile::tempdir().expect("a folder");
    // The width follows the size that is asked for; this one is stored in two bytes.
    let cache = TokenCache::new(folder.path(), &Corpus::c4("en"), 8000);
    let chunks = cache.folder().join("tokenized_chunks/train");
    fs::create_dir_all(&chunks).expect("a folder");
    fs::write(chunks.join("chunk_0.bin"), chunk).expect("a file");
    fs::write(chunks.join("chunk_0.json"), sidecar).expect("a file");
    let amount = Amount::default();
    let ready = cache
        .prepare(
            Split::Train,
            shards,
            tokenizer,
            amount,
            NonZeroUsize::MIN,
            Watch::nobody(),
        )
        .expect("it can be made again");
    let options = StreamOptions {
        seq_len: 3,
        amount,
        vocab_size: 8000,
        compat: false,
    };
    let Ok(stream) = TokenStream::open(&ready, options) else {
        return;
    };
    let mut window = [0; 4];
    for index in 0..stream.len() {
        if stream.read_window(index, &mut window).is_ok() {
            assert!(window.iter().all(|id| (0..8000).contains(id)), "{window:?}");
        }
    }
});
