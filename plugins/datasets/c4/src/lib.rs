//! `c4`: the C4 corpus as windows of SentencePiece tokens.
//!
//! Text comes from the hub, from a folder with shards of the same names, or from a small corpus inside the plugin:
//! the books of the Rust documentation (see `corpus/NOTICE`), so that a first run needs no download.

use moeut_plugin_api::{
    ArgSpec, Host, LogLevel, PluginError, Split, StreamInfo, StreamRequest, TokenDataset,
};
use moeut_text::{
    Amount, Corpus, Hub, Progress, ShardSource, StreamOptions, TokenCache, TokenStream, Tokenizer,
    Watch, token_cache::SEPARATOR, tokenizer,
};
use serde::Deserialize;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_token_dataset!(C4);

/// One shard of the embedded corpus with its name.
macro_rules! embedded_shard {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../corpus/en/", $name)))
    };
}

/// The text inside the plugin, in the form of C4's own shards.
const EMBEDDED: &[(&str, &[u8])] = &[
    embedded_shard!("c4-train.00000-of-01024.json.gz"),
    embedded_shard!("c4-train.00001-of-01024.json.gz"),
    embedded_shard!("c4-validation.00000-of-00008.json.gz"),
];

/// Where the text comes from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct C4Config {
    /// Hub or embedded text, unless `dir` is given.
    source: Source,
    /// A folder with shards.
    dir: Option<PathBuf>,
    /// Which C4: `en`, `realnewslike`, …
    variant: String,
    /// Pieces of the tokenizer.
    vocab_size: usize,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Source {
    Hub,
    Embedded,
}

/// An opened split of C4.
struct C4 {
    stream: TokenStream,
    tokenizer: Tokenizer,
}

impl TokenDataset for C4 {
    const NAME: &'static str = "c4";
    const SUMMARY: &'static str = "C4 (Colossal Clean Crawled Corpus), or text of the same format";
    const ARGS: &'static [ArgSpec] = &[
        ArgSpec::text("data.source", "hub")
            .field("source")
            .choices("hub|embedded")
            .help("Download C4, or use the small corpus inside the plugin"),
        ArgSpec::text("data.dir", "none")
            .field("dir")
            .optional()
            .help("Folder with shards named like C4's, instead of `data.source`"),
        ArgSpec::text("data.variant", "en")
            .field("variant")
            .help("Variant of the corpus, a folder of the hub"),
        ArgSpec::int("sentencepiece.n_pieces", "8000")
            .field("vocab_size")
            .unit("pieces")
            .help("Vocabulary of the tokenizer, which is trained if there is none"),
    ];
    type Config = C4Config;

    fn open(config: C4Config, request: &StreamRequest, host: &Host) -> Result<Self, PluginError> {
        let corpus = Corpus::c4(&config.variant);
        let (source, cache_dir) = config.source_and_cache(&host.info().cache_dir)?;
        let cache = TokenCache::new(&cache_dir, &corpus, config.vocab_size);
        let split = match request.split {
            Split::Train => moeut_text::Split::Train,
            Split::Validation => moeut_text::Split::Validation,
            Split::Test => {
                return Err(PluginError::new("C4 has no test split")
                    .why("it was published with `train` and `validation` only")
                    .fix("ask for `validation`"));
            }
        };

        let progress = |news: Progress| report(host, split, &news);
        let is_cancelled = || host.is_cancelled();
        let watch = Watch {
            progress: &progress,
            is_cancelled: &is_cancelled,
        };
        let train_shards = source.shards(&corpus, moeut_text::Split::Train)?;
        let tokenizer = tokenizer::find_or_train(
            cache.folder(),
            &train_shards,
            corpus.n_tokenizer_shards,
            config.vocab_size,
            SEPARATOR,
            watch,
        )?;
        let shards = source.shards(&corpus, split)?;
        let amount = Amount {
            limit: request.token_limit,
            min_chunks: 1,
        };
        let n_threads = NonZeroUsize::new(host.info().n_threads).unwrap_or(NonZeroUsize::MIN);
        let chunks = cache.prepare(split, &shards, &tokenizer, amount, n_threads, watch)?;
        let options = StreamOptions {
            seq_len: window_len(request.seq_len)?,
            amount,
            vocab_size: config.vocab_size,
            compat: host.info().compat,
        };
        Ok(Self {
            stream: TokenStream::open(&chunks, options)?,
            tokenizer,
        })
    }

    fn info(&self) -> StreamInfo {
        StreamInfo {
            vocab_size: self.tokenizer.vocab_size() as u64,
            n_windows: self.stream.len(),
            n_tokens: self.stream.n_tokens(),
            utf8_bytes_per_token: self.stream.utf8_bytes_per_token(),
            has_documents: false,
        }
    }

    fn read(&self, windows: &[u64], tokens: &mut [i32]) -> Result<(), PluginError> {
        let width = tokens.len() / windows.len().max(1);
        for (&window, row) in windows.iter().zip(tokens.chunks_exact_mut(width.max(1))) {
            self.stream.read_window(window, row)?;
        }
        Ok(())
    }

    fn encode(&self, text: &str) -> Result<Vec<i32>, PluginError> {
        Ok(self.tokenizer.encode(text)?)
    }

    fn decode(&self, ids: &[i32]) -> Result<String, PluginError> {
        Ok(self.tokenizer.decode(ids)?)
    }
}

impl C4Config {
    /// The text, and the folder for what is made from it.
    ///
    /// Only the published corpus may use the reference's own cache folder: another text under that name would be
    /// taken for C4 by the next run.
    fn source_and_cache(&self, cache_dir: &Path) -> Result<(ShardSource, PathBuf), PluginError> {
        match (&self.dir, self.source) {
            (Some(dir), _) => {
                let real = dir.canonicalize().map_err(|error| {
                    PluginError::new(format!("`-data.dir {}` cannot be used", dir.display()))
                        .why(error.to_string())
                        .fix("name a folder with shards such as `c4-train.00000-of-01024.json.gz`")
                })?;
                let mut hasher = DefaultHasher::new();
                real.hash(&mut hasher);
                let folder = format!("folder-{:016x}", hasher.finish());
                Ok((ShardSource::Folder(real), cache_dir.join(folder)))
            }
            (None, Source::Embedded) => {
                Ok((ShardSource::Embedded(EMBEDDED), cache_dir.join("embedded")))
            }
            (None, Source::Hub) => Ok((ShardSource::Hub(Hub::from_env()), cache_dir.to_owned())),
        }
    }
}

fn window_len(seq_len: u64) -> Result<usize, PluginError> {
    usize::try_from(seq_len)
        .ok()
        .filter(|&seq_len| seq_len > 0)
        .ok_or_else(|| PluginError::new(format!("a window of {seq_len} tokens cannot be read")))
}

fn report(host: &Host, split: moeut_text::Split, news: &Progress) {
    let split = split.name();
    match news {
        Progress::WaitingForLock { path } => host.log(
            LogLevel::Info,
            &format!(
                "another process prepares this data; waiting for `{}`",
                path.display()
            ),
        ),
        Progress::ReadingForTokenizer { n_documents } => {
            host.progress("reading documents for the tokenizer", *n_documents, 0);
        }
        Progress::TrainingTokenizer { vocab_size } => {
            host.progress(
                &format!("training a tokenizer of {vocab_size} pieces"),
                0,
                0,
            );
        }
        Progress::Tokenizing {
            shard, n_tokens, ..
        } => {
            host.progress(&format!("tokenizing {split} shard {shard}"), *n_tokens, 0);
        }
        Progress::ChunkDone { shard, n_tokens } => host.log(
            LogLevel::Debug,
            &format!("{split} shard {shard} has {n_tokens} tokens"),
        ),
        Progress::Warning(text) => host.log(LogLevel::Warning, text),
        // `Progress` is open: a kind of news that is unknown here is not worth failing for.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<C4Config>(C4::ARGS, &[]);
    }

    #[test]
    fn each_source_has_its_own_cache() {
        let dir = std::env::temp_dir();
        let cache = |source, dir| {
            let config = C4Config {
                source,
                dir,
                variant: "en".into(),
                vocab_size: 8000,
            };
            config.source_and_cache(Path::new("cache")).unwrap().1
        };
        assert_eq!(cache(Source::Hub, None), Path::new("cache"));
        assert_eq!(cache(Source::Embedded, None), Path::new("cache/embedded"));
        assert!(
            cache(Source::Hub, Some(dir))
                .to_str()
                .unwrap()
                .starts_with("cache/folder-")
        );
    }
}
