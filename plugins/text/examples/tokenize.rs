//! The text pipeline alone, timed: shards to a token cache, then windows out of it. Not shipped; the measurement
//! `tests/bench/tokenize.py` runs it.
//!
//! ```text
//! cargo run --release -p moeut-text --example tokenize -- <folder> <cache> <n_pieces> <n_threads> [<tokenizer>]
//! ```
//!
//! The folder has training shards named like C4's. Without a tokenizer file, one of `n_pieces` is taken from the cache or
//! trained. The cache should be empty, or there is nothing to measure. Prints one JSON object.

#![expect(
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

use std::{
    env,
    error::Error,
    hint::black_box,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Instant,
};

use moeut_text::{
    Amount, Corpus, ShardSource, Split, StreamOptions, TokenCache, TokenStream, Tokenizer, Watch,
    tokenizer,
};

/// The length of the paper's windows.
const SEQ_LEN: usize = 1024;
/// Tokens read for a measurement, some tenths of a second.
const N_READ: u64 = 100_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [folder, cache, n_pieces, n_threads, file @ ..] = &args[..] else {
        return Err("arguments: <folder> <cache> <n_pieces> <n_threads> [<tokenizer>]".into());
    };
    let (cache, n_pieces) = (Path::new(cache), n_pieces.parse()?);
    let file = file.first().map(Path::new);
    let corpus = Corpus::c4("en");
    let shards = ShardSource::Folder(folder.into()).shards(&corpus, Split::Train)?;

    let own = TokenCache::new(cache, &corpus, n_pieces);
    let open = || -> Result<Tokenizer, moeut_text::TextError> {
        let n_shards = corpus.n_tokenizer_shards;
        tokenizer::open(
            file,
            own.folder(),
            &shards,
            n_shards,
            n_pieces,
            Watch::nobody(),
        )
    };
    open()?;

    // A tokenizer is loaded again for the measurement, as every program must, and is not trained in it.
    let start = Instant::now();
    let tokenizer = open()?;
    let cache = TokenCache::for_tokenizer(cache, &corpus, &tokenizer);
    let amount = Amount::default();
    let n_threads: NonZeroUsize = n_threads.parse()?;
    let chunks = cache.prepare(
        Split::Train,
        &shards,
        &tokenizer,
        amount,
        n_threads,
        Watch::nobody(),
    )?;
    let tokenize_seconds = start.elapsed().as_secs_f64();

    let vocab_size = tokenizer.vocab_size();
    let options = StreamOptions {
        seq_len: SEQ_LEN,
        amount,
        vocab_size,
        compat: false,
    };
    let stream = TokenStream::open(&chunks, options)?;
    let mut window = vec![0; SEQ_LEN + 1];
    let n_passes = N_READ.div_ceil(stream.n_tokens());
    let start = Instant::now();
    for _ in 0..n_passes {
        for index in 0..stream.len() {
            stream.read_window(index, black_box(&mut window))?;
        }
    }
    let n_read = n_passes * stream.len() * SEQ_LEN as u64;
    let read_tokens_per_second = n_read as f64 / start.elapsed().as_secs_f64();

    let paths: Vec<&PathBuf> = chunks.iter().map(|chunk| &chunk.path).collect();
    let tokenizer_file =
        file.map_or_else(|| own.folder().join(tokenizer::MODEL_FILE), Path::to_owned);
    println!(
        "{}",
        serde_json::json!({
            "tokenizer": tokenizer_file,
            "chunks": paths,
            "n_tokens": stream.n_tokens(),
            "utf8_bytes": chunks.iter().filter_map(|chunk| chunk.utf8_bytes).sum::<u64>(),
            "tokenize_seconds": tokenize_seconds,
            "read_tokens_per_second": read_tokens_per_second,
        })
    );
    Ok(())
}
