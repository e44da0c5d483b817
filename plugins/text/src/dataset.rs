//! A dataset plugin around a corpus: where the text comes from, where what is made of it is kept, and how the host is
//! told. A plugin adds the facts of its corpus and its arguments by implementing [`CorpusPlugin`].

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use moeut_plugin_api::{
    ArgSpec, DocumentCount, Host, HostInfo, LogLevel, PluginError, StreamInfo, StreamRequest,
    TokenDataset,
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
    shards::{ShardSource, Shards, short_hex},
    token_cache::{Amount, TokenCache},
    token_stream::{StreamOptions, TokenStream},
    tokenizer::{self, Tokenizer},
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

/// A tokenizer of the user's; a field `text.tokenizer`.
pub const TOKENIZER: ArgSpec = ArgSpec::text("tokenizer.path", "none")
    .field("text.tokenizer")
    .optional()
    .help("A SentencePiece `.model` or a Hugging Face `tokenizer.json`, instead of one that is trained");

/// Local disks for copies; a field `text.fs_cache_pattern`.
pub const FS_CACHE: ArgSpec = ArgSpec::text("fs_cache_pattern", "*")
    .field("text.fs_cache_pattern")
    .optional()
    .help("Mount points of local disks that keep copies of chunks on network file systems: a regular expression, `*` for all; none: read over the network");

/// Where text comes from: the values of [`SOURCE`], [`DIR`], [`URL`], [`N_PIECES`],
/// [`TOKENIZER`] and [`FS_CACHE`].
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
    /// File of a tokenizer; none for one that is found in the cache or trained.
    pub tokenizer: Option<PathBuf>,
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
    tokenizer: Tokenizer,
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
        let (windows, tokenizer) = open(&recipe, &place, request, host.info(), watch)?;
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
        let label = "counting documents, shard by shard";
        let progress = |done, total| host.progress(label, done, total);
        Ok(count(&shards, &progress, &|| host.is_cancelled())?)
    }
}

/// Reads all documents; `progress` is told how many of how many shards are done.
fn count(
    shards: &Shards,
    progress: &dyn Fn(u64, u64),
    is_cancelled: &dyn Fn() -> bool,
) -> Result<DocumentCount, TextError> {
    let mut count = DocumentCount::default();
    let n_shards = shards.len() as u64;
    for (shard, n_done) in (0..shards.len()).zip(0..) {
        progress(n_done, n_shards);
        let mut documents = shards.documents(shard)?;
        for document in documents.by_ref() {
            document?;
            count.n_documents += 1;
            if count.n_documents.is_multiple_of(1024) && is_cancelled() {
                return Err(TextError::Cancelled);
            }
        }
        count.n_skipped += documents.n_skipped();
    }
    progress(n_shards, n_shards);
    Ok(count)
}

fn open(
    recipe: &Recipe,
    place: &Place,
    request: &StreamRequest,
    host: &HostInfo,
    watch: Watch<'_>,
) -> Result<(Windows, Tokenizer), PluginError> {
    let corpus = &recipe.corpus;
    let pattern = recipe.text.fs_cache_pattern.as_deref();
    let pattern = pattern.map(Pattern::parse).transpose()?;
    let seq_len = window_len(request.seq_len)?;
    let shards = place.source.shards(corpus, request.split.into())?;
    let tokenizer = find_tokenizer(recipe, place, watch)?;
    let cache = TokenCache::for_tokenizer(&place.cache, corpus, &tokenizer);
    let amount = Amount {
        limit: request.token_limit,
        min_chunks: corpus.min_chunks,
    };
    let options = StreamOptions {
        seq_len,
        amount,
        vocab_size: tokenizer.vocab_size(),
        compat: host.compat,
    };
    let split = Split::from(request.split);
    let n_threads = NonZeroUsize::new(host.n_threads).unwrap_or(NonZeroUsize::MIN);
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

/// The user's tokenizer, that of the cache, or one trained on the first shards.
fn find_tokenizer(
    recipe: &Recipe,
    place: &Place,
    watch: Watch<'_>,
) -> Result<Tokenizer, TextError> {
    let (corpus, text) = (&recipe.corpus, &recipe.text);
    let cache = TokenCache::new(&place.cache, corpus, text.vocab_size);
    let shards = place.source.shards(corpus, Split::Train)?;
    if text.tokenizer.is_none() && !cache.folder().join(tokenizer::MODEL_FILE).exists() {
        // The trainer reads them; stored before, they are downloaded where the host can show it.
        shards.store(corpus.n_tokenizer_shards, watch)?;
    }
    tokenizer::open(
        text.tokenizer.as_deref(),
        cache.folder(),
        &shards,
        corpus.n_tokenizer_shards,
        text.vocab_size,
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
            // All bytes are read before all are tokenized; only `ChunkDone` ends the bar.
            let done = (*done).min(total.saturating_sub(1));
            host.progress(&format!("tokenizing {split} shard {shard}"), done, *total);
        }
        Progress::ChunkDone { shard, n_tokens } => {
            host.progress(&format!("tokenizing {split} shard {shard}"), 1, 1);
            let text = format!("{split} shard {shard} has {n_tokens} tokens");
            host.log(LogLevel::Debug, &text);
        }
        Progress::Warning(text) => host.log(LogLevel::Warning, text),
        // Bytes say better than documents how far a shard is.
        Progress::Tokenizing { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        numpy::Rng,
        testing::{parquet_of, sentence, shard_of},
    };

    struct Plugin;

    impl CorpusPlugin for Plugin {
        const NAME: &'static str = "plugin";
        const SUMMARY: &'static str = "";
        const ARGS: &'static [ArgSpec] = &[];
        type Config = Vec<String>;

        fn recipe(_: Vec<String>) -> Result<Recipe, PluginError> {
            Err(PluginError::new("not asked for"))
        }
    }

    fn recipe(corpus: Corpus, text: serde_json::Value) -> Recipe {
        let mut all = serde_json::json!({ "vocab_size": 64, "fs_cache_pattern": "*" });
        if let (Some(all), serde_json::Value::Object(more)) = (all.as_object_mut(), text) {
            all.extend(more);
        }
        Recipe {
            corpus,
            text: serde_json::from_value(all).unwrap(),
            has_documents: false,
        }
    }

    fn opened(
        recipe: &Recipe,
        cache: &Path,
        split: moeut_plugin_api::Split,
        token_limit: Option<u64>,
    ) -> Result<TextDataset<Plugin>, PluginError> {
        let request = StreamRequest {
            name: "x".to_owned(),
            dataset: "plugin".to_owned(),
            split,
            seq_len: 8,
            token_limit,
        };
        let host = HostInfo {
            n_ranks: 1,
            cache_dir: cache.to_owned(),
            n_threads: 2,
            compat: false,
        };
        let place = Place::of::<Plugin>(recipe, cache)?;
        let (windows, tokenizer) = open(recipe, &place, &request, &host, Watch::nobody())?;
        Ok(TextDataset {
            windows,
            tokenizer,
            plugin: std::marker::PhantomData,
        })
    }

    #[test]
    fn each_source_has_its_own_cache() {
        let dir = tempfile::tempdir().unwrap();
        let cache = |corpus: Corpus, text| {
            let place = Place::of::<Plugin>(&recipe(corpus, text), Path::new("cache")).unwrap();
            place.cache.to_str().unwrap().to_owned()
        };
        let json = |key: &str, value: &str| serde_json::json!({ key: value });
        let dir = dir.path().to_str().unwrap();
        let c4 = || Corpus::c4("en");
        assert_eq!(cache(c4(), json("source", "hub")), "cache");
        assert_eq!(cache(c4(), json("source", "embedded")), "cache/embedded");
        let mut others = vec![
            cache(c4(), json("url", "https://a.org/x/")),
            cache(c4(), json("url", "https://b.org/x")),
            cache(c4(), json("dir", dir)),
            cache(Corpus::loose("text", 0.1), json("dir", dir)),
            cache(Corpus::loose("body", 0.1), json("dir", dir)),
            cache(Corpus::loose("text", 0.2), json("dir", dir)),
        ];
        assert_eq!(others[0], cache(c4(), json("url", "https://a.org/x")));
        assert!(others[0].starts_with("cache/url-"), "{others:?}");
        assert!(others[2].starts_with("cache/folder-"), "{others:?}");
        others.sort();
        others.dedup();
        assert_eq!(others.len(), 6, "{others:?}");
    }

    #[test]
    fn contradictions_and_nowhere_are_refused() {
        let refused = |corpus, text| {
            let place = Place::of::<Plugin>(&recipe(corpus, text), Path::new("cache"));
            place.err().unwrap()
        };
        let both = serde_json::json!({ "dir": "/", "url": "https://a.org" });
        let error = refused(Corpus::c4("en"), both);
        assert_eq!(
            error.what,
            "`-data.dir /` and `-data.url https://a.org` are both given"
        );
        let error = refused(Corpus::c4("en"), serde_json::json!({ "url": "/mnt/c4" }));
        assert!(error.fix.contains("`-data.dir`"), "{error:?}");
        let error = refused(
            Corpus::slim_pajama(),
            serde_json::json!({ "dir": "/nowhere" }),
        );
        assert!(
            error
                .fix
                .contains("`train/chunk3/example_train_1579.jsonl.zst`"),
            "{error:?}"
        );
        let error = refused(Corpus::loose("text", 0.1), serde_json::json!({}));
        assert_eq!(error.what, "`-data.dir` is missing");
    }

    /// A mirror with two languages: chunks, separators, the order of shards and that of windows.
    #[test]
    fn the_stack_is_one_shuffled_stream_without_separators() {
        let folder = tempfile::tempdir().unwrap();
        let languages = ["python".to_owned(), "rust".to_owned()];
        let corpus = Corpus::the_stack(&languages).unwrap();
        let mut texts = Vec::new();
        for (number, file) in corpus.files(Split::Train).iter().take(6).enumerate() {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mine: Vec<String> = (0..40).map(|i| sentence(1640 * number + 41 * i)).collect();
            let rows: Vec<_> = mine.iter().map(|text| Some(text.as_bytes())).collect();
            fs::write(path, parquet_of("content", &rows, true)).unwrap();
            texts.extend(mine);
        }
        let text = serde_json::json!({ "dir": folder.path(), "vocab_size": 56 });
        let recipe = recipe(corpus, text);
        let cache = folder.path().join("cache");
        let train = moeut_plugin_api::Split::Train;
        let dataset = opened(&recipe, &cache, train, None).unwrap();
        let stream: Vec<i32> = texts
            .iter()
            .flat_map(|text| dataset.encode(text).unwrap())
            .collect();
        let info = dataset.info();
        assert_eq!(info.n_tokens, stream.len() as u64);
        let n_windows = u32::try_from(stream.len() / 8).unwrap();
        assert_eq!(info.n_windows, u64::from(n_windows));
        for (window, place) in (0..).zip(Rng::new(123).permutation(n_windows)) {
            let mut tokens = [0; 9];
            dataset.read(&[window], &mut tokens).unwrap();
            let start = place as usize * 8;
            let expected: Vec<i32> = (0..9).map(|k| stream[(start + k) % stream.len()]).collect();
            assert_eq!(tokens[..], expected, "window {window}");
        }
        // Both languages are there, however few tokens are wanted.
        let few = opened(&recipe, &cache, train, Some(8)).unwrap();
        assert!(few.info().n_tokens > 40);
        assert_eq!(few.info().n_windows, 1);
    }

    #[test]
    fn slim_pajama_has_a_test_split_and_c4_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let texts: Vec<String> = (0..200).map(sentence).collect();
        let lines = |texts: &[String]| {
            let line = |text| serde_json::json!({ "text": text }).to_string() + "\n";
            let lines: String = texts.iter().map(line).collect();
            zstd::encode_all(lines.as_bytes(), 1).unwrap()
        };
        let corpus = Corpus::slim_pajama();
        for (split, texts) in [(Split::Train, &texts[..]), (Split::Test, &texts[..5])] {
            let path = folder.path().join(&corpus.files(split)[3]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, lines(texts)).unwrap();
        }
        let cache = folder.path().join("cache");
        let mirror = serde_json::json!({ "dir": folder.path() });
        let test = moeut_plugin_api::Split::Test;
        let dataset = opened(&recipe(corpus, mirror.clone()), &cache, test, None).unwrap();
        let ids: usize = texts[..5]
            .iter()
            .map(|text| {
                dataset
                    .encode(&(text.clone() + "<STORY_SEP>"))
                    .unwrap()
                    .len()
            })
            .sum();
        assert_eq!(dataset.info().n_tokens, ids as u64);
        assert!(!dataset.info().has_documents);
        assert!(dataset.lengths(0, &mut [0]).is_err());
        let error = opened(&recipe(Corpus::c4("en"), mirror), &cache, test, None);
        assert_eq!(error.err().unwrap().what, "the dataset has no text");
    }

    #[test]
    fn documents_and_stream_share_a_tokenizer_and_no_chunk() {
        let folder = tempfile::tempdir().unwrap();
        let texts: Vec<String> = (0..200).map(sentence).chain([String::new()]).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        fs::write(folder.path().join("a.jsonl.gz"), shard_of(&texts)).unwrap();
        let cache = tempfile::tempdir().unwrap();
        let mut recipe = recipe(
            Corpus::loose("text", 0.25),
            serde_json::json!({ "dir": folder.path() }),
        );
        let open = |recipe: &Recipe, split| opened(recipe, cache.path(), split, None).unwrap();
        let validation = moeut_plugin_api::Split::Validation;
        let stream = open(&recipe, validation);
        recipe.has_documents = true;
        let documents = open(&recipe, validation);
        let train = open(&recipe, moeut_plugin_api::Split::Train);
        assert_eq!(documents.info().n_windows + train.info().n_windows, 200);
        assert!(documents.info().has_documents);
        assert!(
            documents.info().n_tokens < stream.info().n_tokens,
            "no separators"
        );
        recipe.has_documents = false;
        assert_eq!(open(&recipe, validation).info(), stream.info());

        let mut lengths = vec![0; usize::try_from(documents.info().n_windows).unwrap()];
        documents.lengths(0, &mut lengths).unwrap();
        assert!(lengths.iter().all(|&length| length == 9), "{lengths:?}");
        assert!(documents.lengths(1, &mut lengths).is_err());

        let place = Place::of::<Plugin>(&recipe, cache.path()).unwrap();
        let mut sum = DocumentCount::default();
        for split in [Split::Train, Split::Validation] {
            let shards = place.source.shards(&recipe.corpus, split).unwrap();
            let found = count(&shards, &|_, _| {}, &|| false).unwrap();
            sum.n_documents += found.n_documents;
            sum.n_skipped += found.n_skipped;
        }
        assert_eq!((sum.n_documents, sum.n_skipped), (200, 1));
    }
}
