//! The shards of a split of a corpus: in a folder, on a hub or another server, or in the program itself.
//! What is in them is [`crate::documents`]'s business.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

pub use crate::documents::Documents;
use crate::{
    corpus::{Corpus, Split},
    documents::{Bytes, Share, Source, needs_seeking},
    download::fetch_with,
    error::TextError,
    folder::{loose_files, names_in},
    hub::Hub,
    meter::Meter,
    progress::Watch,
};

/// Where the shards of a corpus are.
#[derive(Debug, Clone)]
pub enum ShardSource {
    /// A folder with the files of the hub; the first folder of their names may be left out. Whatever is there is the
    /// corpus: two shards of 1024 make a small C4.
    Folder(PathBuf),
    /// All published shards.
    Web {
        /// How servers are spoken to.
        hub: Hub,
        /// Address of a server with the files of the hub; none for the hub itself.
        base: Option<String>,
        /// Files that cannot be streamed are stored here.
        raw: PathBuf,
    },
    /// File names and gzip bytes compiled into the program.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl ShardSource {
    /// Finds the shards of one split, in their logical order.
    ///
    /// # Errors
    /// The folder cannot be read, there is no such split, or no shard of it.
    pub fn shards(&self, corpus: &Corpus, split: Split) -> Result<Shards, TextError> {
        let published = corpus.files(split);
        if let (Self::Folder(folder), Some(valid_share)) = (self, corpus.valid_share()) {
            let (shards, share) = loose_files(folder, split, valid_share)?;
            return Ok(Shards::new(shards, share, corpus));
        }
        let Some(first) = published.first() else {
            return Err(TextError::NoSplit {
                class: corpus.class,
                split: split.name(),
            });
        };
        let (shards, place) = match self {
            Self::Folder(folder) => (
                shards_in_folder(folder, corpus, split, &published)?,
                format!("`{}`", folder.display()),
            ),
            Self::Web { hub, base, raw } => {
                let base = match base {
                    Some(base) => base.trim_end_matches('/').to_owned(),
                    None => hub.url(corpus.hub_path),
                };
                let hub = Arc::new(hub.clone());
                let place = |file: &String| {
                    let address = format!("{base}/{file}");
                    let hub = Arc::clone(&hub);
                    if needs_seeking(file) {
                        let path = raw.join(file.replace('/', "_"));
                        Place::Stored(hub, address, path)
                    } else {
                        Place::Streamed(hub, address)
                    }
                };
                let shards = published.iter().map(|file| Shard::of(place(file)));
                (shards.collect(), base.clone())
            }
            Self::Embedded(files) => {
                let mut found: Vec<_> = files
                    .iter()
                    .filter(|(name, _)| corpus.is_numbered_shard(split, name))
                    .collect();
                found.sort_by_key(|(name, _)| *name);
                let shards = found
                    .into_iter()
                    .map(|&(name, bytes)| Shard::of(Place::Embedded(name, bytes)));
                (shards.collect(), "the embedded text".to_owned())
            }
        };
        if shards.is_empty() {
            return Err(TextError::NoShards {
                place,
                pattern: first.clone(),
                split: split.name(),
            });
        }
        Ok(Shards::new(shards, None, corpus))
    }
}

/// The published files that are there, in their order; of numbered ones all, whatever number of them there is.
fn shards_in_folder(
    folder: &Path,
    corpus: &Corpus,
    split: Split,
    published: &[String],
) -> Result<Vec<Shard>, TextError> {
    // Says if it is no folder at all.
    names_in(folder)?;
    for n_left_out in 0..=corpus.n_optional_folders {
        let short = |file: &String| Some(file.splitn(n_left_out + 1, '/').last()?.to_owned());
        let published: Vec<String> = published.iter().filter_map(short).collect();
        let parent = |file: &str| file.rsplit_once('/').map_or("", |(it, _)| it).to_owned();
        let parents: BTreeSet<String> = published.iter().map(|file| parent(file)).collect();
        let mut there = BTreeSet::new();
        for parent in parents {
            let below = folder.join(&parent);
            if below.is_dir() {
                let prefix = if parent.is_empty() {
                    parent
                } else {
                    parent + "/"
                };
                let names = names_in(&below)?.into_iter();
                there.extend(names.map(|name| format!("{prefix}{name}")));
            }
        }
        let numbered = there
            .iter()
            .filter(|file| corpus.is_numbered_shard(split, file));
        let mut files: Vec<&String> = numbered.collect();
        if files.is_empty() {
            files = published.iter().filter(|it| there.contains(*it)).collect();
        }
        if !files.is_empty() {
            let shard = |file: &String| Shard::of_files(vec![folder.join(file)], folder);
            return files.into_iter().map(shard).collect();
        }
    }
    Ok(Vec::new())
}

/// The shards of one split, in order.
#[derive(Debug, Clone)]
pub struct Shards {
    list: Vec<Shard>,
    key: String,
    separator: &'static str,
    share: Option<Share>,
    meter: Arc<Meter>,
}

/// Files that are tokenized together.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    places: Vec<Place>,
    /// Changes with names, sizes and times of files in a folder; none for files that are published once and for all.
    fingerprint: Option<String>,
}

#[derive(Debug, Clone)]
enum Place {
    File(PathBuf),
    /// An address, read as it comes.
    Streamed(Arc<Hub>, String),
    /// An address, and the file that keeps its content.
    Stored(Arc<Hub>, String, PathBuf),
    Embedded(&'static str, &'static [u8]),
}

impl Shard {
    fn of(place: Place) -> Self {
        Self {
            places: vec![place],
            fingerprint: None,
        }
    }

    /// Files below `root`, by whose names in there they are known.
    pub(crate) fn of_files(files: Vec<PathBuf>, root: &Path) -> Result<Self, TextError> {
        let mut hasher = Sha256::new();
        for file in &files {
            let metadata =
                fs::metadata(file).map_err(|source| TextError::io("read", file, source))?;
            let name = file.strip_prefix(root).unwrap_or(file);
            hasher.update(name.as_os_str().as_encoded_bytes());
            for number in [
                metadata.len().cast_signed(),
                metadata.mtime(),
                metadata.mtime_nsec(),
            ] {
                hasher.update(number.to_le_bytes());
            }
        }
        Ok(Self {
            places: files.into_iter().map(Place::File).collect(),
            fingerprint: Some(short_hex(&hasher.finalize())),
        })
    }
}

/// The first 16 hexadecimal digits of a hash.
pub(crate) fn short_hex(hash: &[u8]) -> String {
    hash.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Place {
    fn source(&self, meter: &Arc<Meter>) -> Source {
        let place = self.clone();
        let meter = Arc::clone(meter);
        let name = match self {
            Self::File(path) | Self::Stored(_, _, path) => path.display().to_string(),
            Self::Streamed(_, address) => address.clone(),
            Self::Embedded(name, _) => (*name).to_owned(),
        };
        Source {
            name,
            open: Box::new(move || place.open(&meter)),
        }
    }

    fn open(self, meter: &Meter) -> Result<Bytes, TextError> {
        Ok(match self {
            Self::File(path) => Bytes::File(path),
            Self::Streamed(hub, address) => {
                let file = hub.open(&address)?;
                let total = file.length();
                Bytes::Stream(Box::new(file), total)
            }
            Self::Stored(hub, address, path) => {
                let watch = Watch {
                    progress: &|_| {},
                    is_cancelled: &|| meter.is_stopped(),
                };
                fetch_with(&hub, &address, &path, watch)?;
                Bytes::File(path)
            }
            Self::Embedded(_, bytes) => Bytes::Stream(Box::new(bytes), Some(bytes.len() as u64)),
        })
    }
}

impl Shards {
    fn new(shards: Vec<Shard>, share: Option<Share>, corpus: &Corpus) -> Self {
        Self {
            list: shards,
            key: corpus.key.clone(),
            separator: corpus.separator,
            share,
            meter: Arc::default(),
        }
    }

    /// Number of shards; at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Put behind every document before it is tokenized; may be empty.
    pub fn separator(&self) -> &'static str {
        self.separator
    }

    /// The documents of shard `index`, in order.
    ///
    /// # Errors
    /// None here: what goes wrong comes out of the iterator, which then ends.
    ///
    /// # Panics
    /// If there is no such shard, which is a bug in the caller.
    pub fn documents(&self, index: usize) -> Result<Documents, TextError> {
        assert!(index < self.len(), "shard {index} of {}", self.len());
        let places = &self.list[index].places;
        Ok(Documents::new(
            places.iter().map(|it| it.source(&self.meter)).collect(),
            &self.key,
            self.share,
            Some((Arc::clone(&self.meter), index)),
        ))
    }

    /// What a chunk made of shard `index` must be made again for when it changes.
    pub(crate) fn fingerprint(&self, index: usize) -> Option<&str> {
        self.list[index].fingerprint.as_deref()
    }

    /// How far the reading of shards is.
    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Stores those of the first `n` shards that are not streamed, one after the other, so that the host can show how
    /// far it is.
    ///
    /// # Errors
    /// As [`crate::download::fetch`].
    pub fn store(&self, n: usize, watch: Watch<'_>) -> Result<(), TextError> {
        let places = self.list.iter().take(n).flat_map(|shard| &shard.places);
        for place in places {
            if let Place::Stored(hub, address, path) = place {
                fetch_with(hub, address, path, watch)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Answer, Server, shard_of};

    fn texts(shards: &Shards) -> Vec<String> {
        (0..shards.len())
            .flat_map(|index| shards.documents(index).unwrap())
            .map(Result::unwrap)
            .collect()
    }

    fn the_stack() -> Corpus {
        let languages: Vec<String> = Corpus::the_stack_languages().map(str::to_owned).collect();
        Corpus::the_stack(&languages).unwrap()
    }

    #[test]
    fn folder_takes_what_is_there_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let variant = folder.path().join("en");
        fs::create_dir(&variant).unwrap();
        for (index, text) in [(7, "b"), (2, "a")] {
            let name = Corpus::c4("en").file_name(Split::Train, index);
            fs::write(variant.join(name), shard_of(&[text])).unwrap();
        }
        for root in [folder.path(), &variant] {
            let shards = ShardSource::Folder(root.to_owned())
                .shards(&Corpus::c4("en"), Split::Train)
                .unwrap();
            assert_eq!(texts(&shards), ["a", "b"]);
        }
        let error = ShardSource::Folder(variant.clone())
            .shards(&Corpus::c4("en"), Split::Validation)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "`{}` has no file like `en/c4-validation.00000-of-00008.json.gz`",
                variant.display()
            )
        );
    }

    #[test]
    fn embedded_shards_are_those_of_the_split() {
        let bytes: &'static [u8] = shard_of(&["text"]).leak();
        let files = vec![
            ("en/c4-train.00001-of-01024.json.gz", bytes),
            ("en/c4-validation.00000-of-00008.json.gz", bytes),
            ("NOTICE", &b"words"[..]),
            ("en/c4-train.00000-of-01024.json.gz", bytes),
        ];
        let source = ShardSource::Embedded(files.leak());
        let shards = source.shards(&Corpus::c4("en"), Split::Train).unwrap();
        assert_eq!(texts(&shards), ["text", "text"]);
        let error = source
            .shards(&Corpus::pes2o("v2"), Split::Train)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "the embedded text has no file like `v2/train-00000-of-00020.json.gz`"
        );
    }

    #[test]
    fn a_split_that_was_not_published_is_refused() {
        let source = ShardSource::Folder("/".into());
        let error = source.shards(&Corpus::c4("en"), Split::Test).unwrap_err();
        assert_eq!(error.to_string(), "`C4` was published without a test split");
    }

    #[test]
    fn addresses_are_those_of_the_hub_or_below_another() {
        let server = Server::start(|request, _| Answer::whole(&shard_of(&[&request.path])));
        let raw = tempfile::tempdir().unwrap();
        let first = |base: Option<String>| {
            let source = ShardSource::Web {
                hub: server.hub(),
                base,
                raw: raw.path().to_owned(),
            };
            let shards = source.shards(&Corpus::pes2o("v2"), Split::Train).unwrap();
            assert_eq!(shards.len(), 20);
            shards.documents(0).unwrap().next().unwrap().unwrap()
        };
        assert_eq!(
            first(None),
            "/datasets/allenai/peS2o/resolve/main/data/v2/train-00000-of-00020.json.gz"
        );
        assert_eq!(
            first(Some(server.url() + "/mirror/")),
            "/mirror/v2/train-00000-of-00020.json.gz"
        );
    }

    /// Parquet files are stored under their path, once, with the token; a refusal says what to set.
    #[test]
    fn the_stack_is_stored_and_needs_a_token() {
        let rows: [Option<&[u8]>; 1] = [Some(b"fn main() {}")];
        let file = testing::parquet_of("content", &rows, true);
        let server = Server::start(move |request, _| match request.header("authorization") {
            Some("bearer t0ken") => Answer::file(request, &file, "\"a\""),
            _ => Answer::status(401),
        });
        let raw = tempfile::tempdir().unwrap();
        let shards = |token: Option<&str>| {
            let source = ShardSource::Web {
                hub: Hub {
                    token: token.map(str::to_owned),
                    ..server.hub()
                },
                base: None,
                raw: raw.path().to_owned(),
            };
            source.shards(&the_stack(), Split::Train).unwrap()
        };
        let error = shards(None).documents(0).unwrap().next().unwrap();
        let error = error.unwrap_err();
        assert!(matches!(error, TextError::HttpStatus { status: 401, .. }));
        assert!(
            error.help().contains("`export HF_TOKEN=…`"),
            "{}",
            error.help()
        );
        assert!(shards(Some("bad")).store(1, Watch::nobody()).is_err());
        let good = shards(Some("t0ken"));
        good.store(1, Watch::nobody()).unwrap();
        let stored = raw
            .path()
            .join("data_assembly_train-00002-of-00003.parquet");
        assert!(stored.exists());
        let documents: Vec<_> = good.documents(0).unwrap().map(Result::unwrap).collect();
        assert_eq!(documents, ["fn main() {}"]);
        assert_eq!(server.paths().len(), 3, "{:?}", server.paths());
    }

    /// Golden: number of files and documents, and a hash of all texts, each with a zero byte behind it, in the order of
    /// the reference; made with Python's `gzip`, `zstandard`, `pyarrow` and NumPy.
    #[test]
    fn real_shards_are_read_as_python_reads_them() {
        let Some(shared) = testing::shared() else {
            return;
        };
        for (folder, corpus, split, n_shards, n_documents, hash) in [
            (
                "c4_like",
                Corpus::c4("en"),
                Split::Train,
                4,
                2070,
                "576e12aeb1b80224",
            ),
            (
                "c4_like",
                Corpus::c4("en"),
                Split::Validation,
                1,
                114,
                "12e6484e905a2637",
            ),
            (
                "pes2o_like",
                Corpus::pes2o("v2"),
                Split::Train,
                2,
                103,
                "a90c124de699169d",
            ),
            (
                "pes2o_like",
                Corpus::pes2o("v2"),
                Split::Validation,
                1,
                7,
                "44aaa0fdad6f5260",
            ),
            (
                "slimpajama_like",
                Corpus::slim_pajama(),
                Split::Train,
                3,
                1121,
                "a4d7713e95371f17",
            ),
            (
                "slimpajama_like",
                Corpus::slim_pajama(),
                Split::Validation,
                1,
                49,
                "5ae8682d99e1d790",
            ),
            (
                "thestack_like",
                the_stack(),
                Split::Train,
                8,
                569,
                "13de3265d54500d0",
            ),
            (
                "thestack_like",
                the_stack(),
                Split::Validation,
                8,
                77,
                "0b9f1f541b89cee2",
            ),
        ] {
            let source = ShardSource::Folder(shared.join("data/lm").join(folder));
            let shards = source.shards(&corpus, split).unwrap();
            let texts = texts(&shards);
            let mut hasher = Sha256::new();
            for text in &texts {
                hasher.update(text);
                hasher.update([0]);
            }
            let found = (shards.len(), texts.len(), short_hex(&hasher.finalize()));
            assert_eq!(found, (n_shards, n_documents, hash.to_owned()), "{folder}");
        }
    }
}
