//! A dataset plugin around a corpus: where the text comes from, where what is made of it is kept, and how the host is
//! told. A plugin adds the facts of its corpus and its arguments by implementing [`CorpusPlugin`].

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use moeut_plugin_api::{
    ArgSpec, DocumentCount, Host, LogLevel, PluginError, StreamInfo, StreamRequest, TokenDataset,
};
use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{
    corpus::{Corpus, Split},
    document_stream::DocumentStream,
    error::TextError,
    fs_cache::{Pattern, local_copies},
    hub::Hub,
    progress::{Progress, Watch},
    sentencepiece::SentencePiece,
    shards::{ShardSource, Shards, short_hex},
    token_cache::{Amount, TokenCache},
    token_stream::{StreamOptions, TokenStream},
    tokenizer,
};

/// Folder of a mirror; a field `text.dir`.
pub const DIR: ArgSpec = ArgSpec::text("data.dir", "none")
    .field("text.dir")
    .optional()
    .help("Folder with files named as on the hub, instead of `data.source`; what is there is the corpus");

/// Address of a mirror; a field `text.url`.
pub const URL: ArgSpec = ArgSpec::text("data.url", "none")
    .field("text.url")
    .optional()
    .help("Address below which the files are as on the hub, instead of `data.source`");

/// The only source of a corpus that no plugin embeds; a field `text.source`.
pub const SOURCE: ArgSpec = ArgSpec::text("data.source", "hub")
    .field("text.source")
    .choices("hub")
    .help("Download from the hub; `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and proxies count");

/// Size of the vocabulary; a field `text.vocab_size`.
pub const N_PIECES: ArgSpec = ArgSpec::int("sentencepiece.n_pieces", "8000")
    .field("text.vocab_size")
    .unit("pieces")
    .help("Vocabulary of the tokenizer, which is trained if there is none");

/// Local disks for copies; a field `text.fs_cache_pattern`.
pub const FS_CACHE: ArgSpec = ArgSpec::text("fs_cache_pattern", "*")
    .field("text.fs_cache_pattern")
    .optional()
    .help("Mount points of local disks that keep copies of chunks on network file systems: a regular expression, `*` for all; none: read over the network");

/// Where text comes from: the values of [`SOURCE`], [`DIR`], [`URL`], [`N_PIECES`] and [`FS_CACHE`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Hub or embedded text, unless a folder or an address is given.
    #[serde(default)]
    pub source: Source,
    /// A folder with files.
    #[serde(default)]
    pub dir: Option<PathBuf>,
    /// An address with files below it.
    #[serde(default)]
    pub url: Option<String>,
    /// Pieces of the tokenizer.
    pub vocab_size: usize,
    /// Mount points for local copies; none for no copies.
    pub fs_cache_pattern: Option<String>,
}

/// Where published text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// On the hub.
    #[default]
    Hub,
    /// In the plugin.
    Embedded,
}

/// What a plugin says about its corpus.
pub trait CorpusPlugin: Send + Sync + 'static {
    /// As [`TokenDataset::NAME`].
    const NAME: &'static str;
    /// As [`TokenDataset::SUMMARY`].
    const SUMMARY: &'static str;
    /// As [`TokenDataset::ARGS`].
    const ARGS: &'static [ArgSpec];
    /// Files inside the plugin: name and gzip bytes.
    const EMBEDDED: &'static [(&'static str, &'static [u8])] = &[];
    /// As [`TokenDataset::Config`].
    type Config: DeserializeOwned;

    /// The corpus of a configuration.
    ///
    /// # Errors
    /// If the arguments contradict each other.
    fn recipe(config: Self::Config) -> Result<Recipe, PluginError>;
}

/// What a configuration asks for.
#[derive(Debug)]
pub struct Recipe {
    /// The corpus.
    pub corpus: Corpus,
    /// Where its text comes from.
    pub text: TextConfig,
    /// Whether each window is one document.
    pub has_documents: bool,
}

/// An opened split of the corpus of `P`.
pub struct TextDataset<P> {
    windows: Windows,
    tokenizer: SentencePiece,
    plugin: std::marker::PhantomData<P>,
}

enum Windows {
    Stream(TokenStream),
    Documents(DocumentStream),
}

impl<P: CorpusPlugin> TokenDataset for TextDataset<P> {
    const NAME: &'static str = P::NAME;
    const SUMMARY: &'static str = P::SUMMARY;
    const ARGS: &'static [ArgSpec] = P::ARGS;
    type Config = P::Config;

    fn open(config: P::Config, request: &StreamRequest, host: &Host) -> Result<Self, PluginError> {
        let recipe = P::recipe(config)?;
        let place = Place::of::<P>(&recipe, &host.info().cache_dir)?;
        let split = Split::from(request.split);
        let progress = |news: Progress| report(host, split, &news);
        let watch = Watch {
            progress: &progress,
            is_cancelled: &|| host.is_cancelled(),
        };
        let (windows, tokenizer) = open(&recipe, &place, request, host, watch)?;
        Ok(Self {
            windows,
            tokenizer,
            plugin: std::marker::PhantomData,
        })
    }

    fn info(&self) -> StreamInfo {
        let (n_windows, n_tokens, utf8_bytes_per_token) = match &self.windows {
            Windows::Stream(it) => (it.len(), it.n_tokens(), it.utf8_bytes_per_token()),
            Windows::Documents(it) => (it.len(), it.n_tokens(), it.utf8_bytes_per_token()),
        };
        StreamInfo {
            vocab_size: self.tokenizer.vocab_size() as u64,
            n_windows,
            n_tokens,
            utf8_bytes_per_token,
            has_documents: matches!(self.windows, Windows::Documents(_)),
        }
    }

    fn read(&self, windows: &[u64], tokens: &mut [i32]) -> Result<(), PluginError> {
        let width = tokens.len() / windows.len().max(1);
        for (&window, row) in windows.iter().zip(tokens.chunks_exact_mut(width.max(1))) {
            match &self.windows {
                Windows::Stream(stream) => stream.read_window(window, row)?,
                Windows::Documents(stream) => stream.read_window(window, row)?,
            }
        }
        Ok(())
    }

    fn encode(&self, text: &str) -> Result<Vec<i32>, PluginError> {
        Ok(self.tokenizer.encode(text)?)
    }

    fn decode(&self, ids: &[i32]) -> Result<String, PluginError> {
        Ok(self.tokenizer.decode(ids)?)
    }

    fn lengths(&self, first: u64, lengths: &mut [u32]) -> Result<(), PluginError> {
        let Windows::Documents(stream) = &self.windows else {
            return Err(
                PluginError::new(format!("`{}` has no documents here", P::NAME))
                    .why("its windows are cut from one stream of tokens"),
            );
        };
        for (index, length) in (first..).zip(lengths) {
            *length = stream.length(index).ok_or_else(|| {
                PluginError::new(format!("there is no document {index}"))
                    .why(format!("the stream has {}", stream.len()))
            })?;
        }
        Ok(())
    }

    fn count(
        config: P::Config,
        request: &StreamRequest,
        host: &Host,
    ) -> Result<DocumentCount, PluginError> {
        let recipe = P::recipe(config)?;
        let place = Place::of::<P>(&recipe, &host.info().cache_dir)?;
        let shards = place.source.shards(&recipe.corpus, request.split.into())?;
        let mut count = DocumentCount::default();
        let n_shards = shards.len() as u64;
        for (shard, number) in (0..shards.len()).zip(0..) {
            host.progress("counting documents, shard by shard", number, n_shards);
            let mut documents = shards.documents(shard)?;
            for document in documents.by_ref() {
                document?;
                count.n_documents += 1;
                if count.n_documents.is_multiple_of(1024) && host.is_cancelled() {
                    return Err(TextError::Cancelled.into());
                }
            }
            count.n_skipped += documents.n_skipped();
        }
        host.progress("counting documents, shard by shard", n_shards, n_shards);
        Ok(count)
    }
}

fn open(
    recipe: &Recipe,
    place: &Place,
    request: &StreamRequest,
    host: &Host,
    watch: Watch<'_>,
) -> Result<(Windows, SentencePiece), PluginError> {
    let (corpus, vocab_size) = (&recipe.corpus, recipe.text.vocab_size);
    let pattern = recipe.text.fs_cache_pattern.as_deref();
    let pattern = pattern.map(Pattern::parse).transpose()?;
    let seq_len = window_len(request.seq_len)?;
    let shards = place.source.shards(corpus, request.split.into())?;
    let cache = TokenCache::new(&place.cache, corpus, vocab_size);
    let train_shards = place.source.shards(corpus, Split::Train)?;
    let tokenizer = find_tokenizer(&cache, &train_shards, corpus, vocab_size, watch)?;
    let amount = Amount {
        limit: request.token_limit,
        min_chunks: corpus.min_chunks,
    };
    let options = StreamOptions {
        seq_len,
        amount,
        vocab_size,
        compat: host.info().compat,
    };
    let split = Split::from(request.split);
    let n_threads = NonZeroUsize::new(host.info().n_threads).unwrap_or(NonZeroUsize::MIN);
    let windows = if recipe.has_documents {
        let cache = cache.of_documents();
        let chunks = cache.prepare(split, &shards, &tokenizer, amount, n_threads, watch)?;
        Windows::Documents(DocumentStream::open(&chunks, options)?)
    } else {
        let mut chunks = cache.prepare(split, &shards, &tokenizer, amount, n_threads, watch)?;
        if let Some(pattern) = pattern {
            chunks = local_copies(chunks, &pattern, watch)?;
        }
        let stream = TokenStream::open(&chunks, options)?;
        Windows::Stream(if corpus.is_shuffled {
            stream.shuffled()?
        } else {
            stream
        })
    };
    Ok((windows, tokenizer))
}

/// The tokenizer of the cache, or one trained on the first shards.
fn find_tokenizer(
    cache: &TokenCache,
    shards: &Shards,
    corpus: &Corpus,
    vocab_size: usize,
    watch: Watch<'_>,
) -> Result<SentencePiece, TextError> {
    if !cache.folder().join(tokenizer::MODEL_FILE).exists() {
        // The trainer reads them; stored before, they are downloaded where the host can show it.
        shards.store(corpus.n_tokenizer_shards, watch)?;
    }
    tokenizer::find_or_train(
        cache.folder(),
        shards,
        corpus.n_tokenizer_shards,
        vocab_size,
        watch,
    )
}

/// The text, and the folder for what is made from it.
struct Place {
    source: ShardSource,
    cache: PathBuf,
}

impl Place {
    /// Only the published corpus may use the reference's own cache folder: another text under that name would be taken
    /// for it by the next run.
    fn of<P: CorpusPlugin>(recipe: &Recipe, cache_dir: &Path) -> Result<Self, PluginError> {
        let text = &recipe.text;
        let corpus = &recipe.corpus;
        let web = |base: Option<String>, cache: PathBuf| Self {
            source: ShardSource::Web {
                hub: Hub::from_env(),
                base,
                raw: cache.join(corpus.class).join("raw"),
            },
            cache,
        };
        match (&text.dir, &text.url, text.source) {
            (Some(dir), Some(url), _) => {
                let both = format!(
                    "`-data.dir {}` and `-data.url {url}` are both given",
                    dir.display()
                );
                Err(PluginError::new(both)
                    .why("the text comes from one place")
                    .fix("set one of them to `none`"))
            }
            (Some(dir), None, _) => {
                let example = corpus.files(Split::Train).into_iter().next();
                let real = dir.canonicalize().map_err(|error| {
                    PluginError::new(format!("`-data.dir {}` cannot be used", dir.display()))
                        .why(error.to_string())
                        .fix(match example {
                            Some(file) => format!("name a folder with files such as `{file}`"),
                            None => "name a folder with files of text".to_owned(),
                        })
                })?;
                // The same folder is another corpus under another key or share.
                let identity = format!("{}\0{:?}", corpus.key, corpus.valid_share());
                let bytes = [real.as_os_str().as_encoded_bytes(), identity.as_bytes()];
                Ok(Self {
                    source: ShardSource::Folder(real.clone()),
                    cache: cache_dir.join(format!("folder-{}", hash_of(&bytes))),
                })
            }
            (None, Some(url), _) => {
                if !url.starts_with("http://") && !url.starts_with("https://") {
                    return Err(
                        PluginError::new(format!("`-data.url {url}` cannot be used"))
                            .why("it is no address of a web server")
                            .fix("begin it with `https://`, or name a folder with `-data.dir`"),
                    );
                }
                let base = url.trim_end_matches('/').to_owned();
                let folder = format!("url-{}", hash_of(&[base.as_bytes()]));
                Ok(web(Some(base), cache_dir.join(folder)))
            }
            (None, None, _) if corpus.valid_share().is_some() => {
                Err(PluginError::new("`-data.dir` is missing")
                    .why(format!("`{}` reads a folder, and none is named", P::NAME))
                    .fix("name a folder with files of text: `-data.dir <folder>`"))
            }
            (None, None, Source::Embedded) => Ok(Self {
                source: ShardSource::Embedded(P::EMBEDDED),
                cache: cache_dir.join("embedded"),
            }),
            (None, None, Source::Hub) => Ok(web(None, cache_dir.to_owned())),
        }
    }
}

fn hash_of(parts: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    short_hex(&hasher.finalize())
}

fn window_len(seq_len: u64) -> Result<usize, PluginError> {
    usize::try_from(seq_len)
        .ok()
        .filter(|&seq_len| seq_len > 0)
        .ok_or_else(|| PluginError::new(format!("a window of {seq_len} tokens cannot be read")))
}

fn report(host: &Host, split: Split, news: &Progress) {
    let split = split.name();
    match news {
        Progress::WaitingForLock { path } => host.log(
            LogLevel::Info,
            &format!(
                "another process prepares this data; waiting for `{}`",
                path.display()
            ),
        ),
        Progress::Downloading { url, done, total } => {
            let name = url.rsplit('/').next().unwrap_or(url);
            host.progress(&format!("downloading {name}"), *done, *total);
        }
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
        Progress::Reading { shard, done, total } => {
            host.progress(&format!("tokenizing {split} shard {shard}"), *done, *total);
        }
        Progress::ChunkDone { shard, n_tokens } => {
            // Ends its bar.
            host.progress(&format!("tokenizing {split} shard {shard}"), 1, 1);
            let text = format!("{split} shard {shard} has {n_tokens} tokens");
            host.log(LogLevel::Debug, &text);
        }
        Progress::Warning(text) => host.log(LogLevel::Warning, text),
        // Bytes say better than documents how far a shard is.
        Progress::Tokenizing { .. } => {}
    }
}
