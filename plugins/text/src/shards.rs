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
    shards: Vec<Shard>,
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
            shards,
            key: corpus.key.clone(),
            separator: corpus.separator,
            share,
            meter: Arc::default(),
        }
    }

    /// Number of shards; at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.shards.len()
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
        let places = &self.shards[index].places;
        Ok(Documents::new(
            places.iter().map(|it| it.source(&self.meter)).collect(),
            &self.key,
            self.share,
            Some((Arc::clone(&self.meter), index)),
        ))
    }

    /// What a chunk made of shard `index` must be made again for when it changes.
    pub(crate) fn fingerprint(&self, index: usize) -> Option<&str> {
        self.shards[index].fingerprint.as_deref()
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
        let places = self.shards.iter().take(n).flat_map(|shard| &shard.places);
        for place in places {
            if let Place::Stored(hub, address, path) = place {
                fetch_with(hub, address, path, watch)?;
            }
        }
        Ok(())
    }
}
