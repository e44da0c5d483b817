//! Documents of text out of gzip-JSONL shards, from a folder, a hub or the program itself.
//! Memory is bounded by the longest line. Nothing here knows about tokens.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;

use crate::{
    corpus::{Corpus, Split},
    error::TextError,
    hub::Hub,
};

/// The longest accepted line: 256 MiB, ten times the longest document that is plausible. It keeps a file without
/// line ends from filling the memory.
const MAX_LINE_BYTES: u64 = 256 << 20;
const BUFFER_BYTES: usize = 1 << 17;

/// Where the shards of a corpus are.
#[derive(Debug, Clone)]
pub enum ShardSource {
    /// A folder with the shards directly in it or in a folder named after the variant (`en/`). Whatever is there
    /// is the corpus: two shards of 1024 make a small C4.
    Folder(PathBuf),
    /// All published shards, streamed.
    Hub(Hub),
    /// File names and gzip bytes compiled into the program.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl ShardSource {
    /// Finds the shards of one split, in the order of their names.
    ///
    /// # Errors
    /// The folder cannot be read, or there is no shard of the split.
    pub fn shards(&self, corpus: &Corpus, split: Split) -> Result<Shards, TextError> {
        let none_in = |place: String| TextError::NoShards {
            place,
            pattern: format!("{}/{}", corpus.variant, corpus.file_name(split, 0)),
            split: split.name(),
        };
        let (list, place) = match self {
            Self::Folder(folder) => (
                shards_in_folder(folder, corpus, split)?,
                format!("`{}`", folder.display()),
            ),
            Self::Hub(hub) => {
                let files = (0..corpus.n_shards(split)).map(|index| corpus.hub_file(split, index));
                (
                    files.map(|file| Shard::Hub(hub.clone(), file)).collect(),
                    hub.endpoint.clone(),
                )
            }
            Self::Embedded(files) => {
                let mut found: Vec<_> = files
                    .iter()
                    .filter(|(name, _)| corpus.is_shard(split, file_name_of(name)))
                    .collect();
                found.sort_by_key(|(name, _)| *name);
                let list = found
                    .into_iter()
                    .map(|&(name, bytes)| Shard::Embedded(name, bytes))
                    .collect();
                (list, "the embedded text".to_owned())
            }
        };
        let shards: Vec<Shard> = list;
        if shards.is_empty() {
            Err(none_in(place))
        } else {
            Ok(Shards { shards })
        }
    }
}

fn file_name_of(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn shards_in_folder(folder: &Path, corpus: &Corpus, split: Split) -> Result<Vec<Shard>, TextError> {
    let below = folder.join(&corpus.variant);
    let folder = if below.is_dir() {
        below.as_path()
    } else {
        folder
    };
    let unreadable = |source| TextError::io("read", folder, source);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let is_shard = path
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| corpus.is_shard(split, name));
        if is_shard && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths.into_iter().map(Shard::File).collect())
}

/// The shards of one split, in order.
#[derive(Debug, Clone)]
pub struct Shards {
    shards: Vec<Shard>,
}

#[derive(Debug, Clone)]
enum Shard {
    File(PathBuf),
    Hub(Hub, String),
    Embedded(&'static str, &'static [u8]),
}

impl Shards {
    /// Number of shards; at least one.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.shards.len()
    }

    /// The documents of shard `index`, in order.
    ///
    /// # Errors
    /// The shard cannot be opened. What goes wrong later comes out of the iterator, which then ends.
    ///
    /// # Panics
    /// If there is no such shard, which is a bug in the caller.
    pub fn documents(&self, index: usize) -> Result<Documents, TextError> {
        assert!(index < self.len(), "shard {index} of {}", self.len());
        Ok(match &self.shards[index] {
            Shard::File(path) => {
                let file =
                    File::open(path).map_err(|source| TextError::io("read", path, source))?;
                Documents::from_gzip(path.display().to_string(), file)
            }
            Shard::Hub(hub, file) => {
                let opened = hub.open(file)?;
                Documents::from_gzip(opened.url().to_owned(), opened)
            }
            Shard::Embedded(name, bytes) => Documents::from_gzip((*name).to_owned(), *bytes),
        })
    }
}

/// The non-empty documents of one shard.
pub struct Documents {
    shard: String,
    lines: BufReader<Box<dyn Read + Send>>,
    line: Vec<u8>,
    n_lines: u64,
    is_over: bool,
}

/// The part of a line that counts.
#[derive(Deserialize)]
struct Row {
    text: String,
}

impl Documents {
    /// Reads gzip JSON lines. All members are read: C4's files have several, where a plain decoder stops after one.
    pub fn from_gzip(shard: String, bytes: impl Read + Send + 'static) -> Self {
        let unpacked = MultiGzDecoder::new(BufReader::with_capacity(BUFFER_BYTES, bytes));
        Self {
            shard,
            lines: BufReader::with_capacity(BUFFER_BYTES, Box::new(unpacked)),
            line: Vec::new(),
            n_lines: 0,
            is_over: false,
        }
    }

    fn read_document(&mut self) -> Result<Option<String>, TextError> {
        loop {
            self.line.clear();
            let read = self
                .lines
                .by_ref()
                .take(MAX_LINE_BYTES)
                .read_until(b'\n', &mut self.line);
            let n_bytes = read.map_err(|source| self.broken(source))?;
            if n_bytes == 0 {
                return Ok(None);
            }
            self.n_lines += 1;
            if n_bytes as u64 == MAX_LINE_BYTES && self.line.last() != Some(&b'\n') {
                return Err(self.malformed(format!("longer than {MAX_LINE_BYTES} bytes")));
            }
            if self.line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Row>(&self.line) {
                Ok(row) if row.text.is_empty() => {}
                Ok(row) => return Ok(Some(row.text)),
                Err(error) => {
                    // serde counts lines within ours; only its column means something here.
                    let text = error.to_string();
                    let reason = text.split(" at line ").next().unwrap_or_default();
                    return Err(self.malformed(format!("{reason} at column {}", error.column())));
                }
            }
        }
    }

    /// A download carries its own error in the reader's; that one says more.
    fn broken(&self, source: std::io::Error) -> TextError {
        match source.downcast::<TextError>() {
            Ok(inner) => inner,
            Err(source) => TextError::BrokenShard {
                shard: self.shard.clone(),
                line: self.n_lines,
                source,
            },
        }
    }

    fn malformed(&self, reason: String) -> TextError {
        let start = &self.line[..self.line.len().min(240)];
        let excerpt = String::from_utf8_lossy(start)
            .trim_end()
            .chars()
            .take(60)
            .collect();
        TextError::MalformedLine {
            shard: self.shard.clone(),
            line: self.n_lines,
            reason,
            excerpt,
        }
    }
}

impl Iterator for Documents {
    type Item = Result<String, TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let next = self.read_document().transpose();
        self.is_over = !matches!(next, Some(Ok(_)));
        next
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{gzip, shard_of};

    fn documents(bytes: Vec<u8>) -> Vec<Result<String, TextError>> {
        Documents::from_gzip("s.json.gz".to_owned(), std::io::Cursor::new(bytes)).collect()
    }

    #[test]
    fn all_members_are_read_and_empty_documents_left_out() {
        let bytes = [shard_of(&["one", "", "two\nlines"]), shard_of(&["drei"])].concat();
        let texts: Vec<String> = documents(bytes).into_iter().map(Result::unwrap).collect();
        assert_eq!(texts, ["one", "two\nlines", "drei"]);
    }

    #[test]
    fn a_malformed_line_is_named() {
        let read = documents(gzip(
            b"{\"text\":\"a\"}\n\n{\"txt\":\"b\"}\n{\"text\":\"c\"}\n",
        ));
        assert_eq!(read.len(), 2, "nothing comes after an error");
        assert_eq!(
            read[1].as_ref().unwrap_err().to_string(),
            "`s.json.gz` line 3: missing field `text` at column 11; the line starts `{\"txt\":\"b\"}`"
        );
    }

    #[test]
    fn a_cut_shard_is_an_error_and_not_an_end() {
        let mut bytes = shard_of(&["one", "two"]);
        bytes.truncate(bytes.len() - 5);
        assert!(documents(bytes).last().unwrap().is_err());
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
            let texts: Vec<String> = (0..shards.len())
                .flat_map(|i| shards.documents(i).unwrap())
                .map(Result::unwrap)
                .collect();
            assert_eq!(texts, ["a", "b"]);
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
        assert_eq!(shards.len(), 2);
        assert!(
            shards
                .documents(0)
                .unwrap()
                .shard
                .contains("c4-train.00000")
        );
        let error = source
            .shards(&Corpus::pes2o("v2"), Split::Train)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "the embedded text has no file like `v2/train-00000-of-00020.json.gz`"
        );
    }

    /// The download's own error says more than "the gzip stream broke off".
    #[test]
    fn a_failed_download_comes_out_as_itself() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                let url = "https://hub/a".to_owned();
                Err(std::io::Error::other(TextError::HttpStatus {
                    url,
                    status: 404,
                    has_token: false,
                }))
            }
        }
        let start = shard_of(&["one", "two"]);
        let start = std::io::Cursor::new(start[..20].to_vec());
        let error = Documents::from_gzip("s".to_owned(), start.chain(Failing))
            .last()
            .unwrap()
            .unwrap_err();
        assert!(matches!(error, TextError::HttpStatus { .. }), "{error}");
    }

    proptest! {
        /// Bytes that nobody meant to be a shard end in an error or in nothing, never in a panic.
        #[test]
        fn garbage_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), wrap in any::<bool>()) {
            let _ = documents(if wrap { gzip(&bytes) } else { bytes });
        }
    }
}
