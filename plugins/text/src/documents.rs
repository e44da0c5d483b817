//! Documents of text out of one shard: JSON lines, Parquet and plain text, packed or not.
//! Memory is bounded by the longest line, page or text file. Nothing here knows about tokens or where files are.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    sync::Arc,
};

use flate2::bufread::MultiGzDecoder;
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor},
};
use sha2::{Digest, Sha256};

use crate::{
    error::TextError,
    meter::{Counted, Meter},
    parquet::Column,
};

/// The longest accepted line or text: 256 MiB, ten times the longest document that is plausible. It keeps a file
/// without line ends from filling the memory.
const MAX_BYTES: u64 = 256 << 20;
const BUFFER_BYTES: usize = 1 << 17;
/// SlimPajama's frames refer back as far as zstd can.
const ZSTD_WINDOW_LOG: u32 = 31;

/// Where the bytes of a file come from.
pub(crate) enum Bytes {
    /// On this machine.
    File(PathBuf),
    /// From wherever; how many, if that is known.
    Stream(Box<dyn Read + Send>, Option<u64>),
}

impl Bytes {
    /// What can only be read from its end.
    fn file(self, name: &str) -> Result<PathBuf, TextError> {
        match self {
            Self::File(path) => Ok(path),
            Self::Stream(..) => {
                let why = "its directory is at its end, so that it cannot be streamed";
                Err(TextError::io("read", name.as_ref(), io::Error::other(why)))
            }
        }
    }
}

/// How bytes become documents, which the ending of a file's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Lines(Packing),
    Text(Packing),
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// Endings of the names of files that can be read.
pub(crate) const ENDINGS: &str =
    ".txt .md .txt.gz .txt.zst .jsonl .json.gz .jsonl.gz .jsonl.zst .zst .parquet";

impl Format {
    fn of(name: &str) -> Option<Self> {
        let (stem, packing) = if let Some(stem) = name.strip_suffix(".gz") {
            (stem, Packing::Gzip)
        } else if let Some(stem) = name.strip_suffix(".zst") {
            (stem, Packing::Zstd)
        } else {
            (name, Packing::Plain)
        };
        let ends = |endings: &[&str]| endings.iter().any(|ending| stem.ends_with(ending));
        if ends(&[".txt", ".md"]) {
            Some(Self::Text(packing))
        } else if ends(&[".jsonl"])
            || ends(&[".json"]) && packing != Packing::Plain
            || packing == Packing::Zstd
        {
            Some(Self::Lines(packing))
        } else if packing == Packing::Plain && ends(&[".parquet"]) {
            Some(Self::Parquet)
        } else {
            None
        }
    }
}

/// Whether documents can be read from a file of this name.
pub(crate) fn is_readable(name: &str) -> bool {
    Format::of(name).is_some()
}

/// Whether a file of this name must lie on this machine, because its directory is at its end.
pub(crate) fn needs_seeking(name: &str) -> bool {
    Format::of(name) == Some(Format::Parquet)
}

/// Which documents of a file without a split of its own belong to a split: the hash of the text decides, so that the
/// choice is the same on every machine, and the same text never is on both sides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Share {
    /// Share of the documents for validation, 0 to 1.
    pub(crate) validation: f64,
    /// Whether these are wanted, or the others.
    pub(crate) wants_validation: bool,
}

impl Share {
    fn takes(self, text: &str) -> bool {
        let hash = Sha256::digest(text.as_bytes());
        let first = hash[..8]
            .iter()
            .fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
        let is_validation = (first as f64) < self.validation * 2f64.powi(64);
        is_validation == self.wants_validation
    }
}

/// A file of a shard that is not opened yet.
pub(crate) struct Source {
    /// Path or address; its ending says the format.
    pub(crate) name: String,
    pub(crate) open: Box<dyn FnOnce() -> Result<Bytes, TextError> + Send>,
}

/// The non-empty documents of one shard.
pub struct Documents {
    sources: std::vec::IntoIter<Source>,
    reader: Option<Box<dyn DocumentReader>>,
    key: Arc<str>,
    share: Option<Share>,
    meter: Option<Counted>,
    n_skipped: u64,
    is_over: bool,
}

/// Reads the documents of one file, the empty ones included.
trait DocumentReader: Send {
    fn next_document(&mut self) -> Result<Option<String>, TextError>;
}

impl Documents {
    /// The documents of several files, one after the other.
    pub(crate) fn new(
        sources: Vec<Source>,
        key: &str,
        share: Option<Share>,
        meter: Option<(Arc<Meter>, usize)>,
    ) -> Self {
        Self {
            sources: sources.into_iter(),
            reader: None,
            key: key.into(),
            share,
            meter: meter.map(|(meter, shard)| Counted::new(meter, shard)),
            n_skipped: 0,
            is_over: false,
        }
    }

    /// Reads gzip JSON lines with the key `text`. All members are read: C4's files have several, where a plain decoder
    /// stops after one.
    pub fn from_gzip(shard: String, bytes: impl Read + Send + 'static) -> Self {
        let reader = JsonLines {
            lines: Lines::new(shard, Box::new(bytes), Packing::Gzip),
            key: "text".into(),
        };
        Self {
            reader: Some(Box::new(reader)),
            ..Self::new(Vec::new(), "text", None, None)
        }
    }

    /// Empty documents so far, which are left out.
    pub fn n_skipped(&self) -> u64 {
        self.n_skipped
    }

    fn read_document(&mut self) -> Result<Option<String>, TextError> {
        loop {
            let Some(reader) = self.reader.as_mut() else {
                match self.sources.next() {
                    Some(source) => self.reader = Some(self.open(source)?),
                    None => return Ok(None),
                }
                continue;
            };
            match reader.next_document()? {
                None => self.reader = None,
                Some(text) if self.share.is_some_and(|share| !share.takes(&text)) => {}
                Some(text) if text.is_empty() => self.n_skipped += 1,
                Some(text) => return Ok(Some(text)),
            }
        }
    }

    fn open(&self, source: Source) -> Result<Box<dyn DocumentReader>, TextError> {
        let name = source.name;
        // Whoever lists files takes readable ones only; a published name is one.
        let format = Format::of(&name).unwrap_or(Format::Lines(Packing::Plain));
        let bytes = (source.open)()?;
        Ok(match format {
            Format::Parquet => Box::new(Column::open(
                &bytes.file(&name)?,
                &self.key,
                self.meter.clone(),
            )?),
            Format::Text(packing) => Box::new(WholeText {
                bytes: Some(unpacked(self.counted(bytes)?, packing)),
                name,
            }),
            Format::Lines(packing) => Box::new(JsonLines {
                lines: Lines::new(name, self.counted(bytes)?, packing),
                key: Arc::clone(&self.key),
            }),
        })
    }

    /// A reader whose bytes show on the meter.
    fn counted(&self, bytes: Bytes) -> Result<Box<dyn Read + Send>, TextError> {
        let (bytes, total): (Box<dyn Read + Send>, _) = match bytes {
            Bytes::Stream(bytes, total) => (bytes, total),
            Bytes::File(path) => {
                let file =
                    File::open(&path).map_err(|source| TextError::io("read", &path, source))?;
                let total = file.metadata().ok().map(|metadata| metadata.len());
                (Box::new(file), total)
            }
        };
        Ok(match &self.meter {
            Some(counted) => Box::new(counted.reader(bytes, total.unwrap_or(0))),
            None => bytes,
        })
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

impl DocumentReader for Column {
    fn next_document(&mut self) -> Result<Option<String>, TextError> {
        self.next_value()
    }
}

fn unpacked(bytes: Box<dyn Read + Send>, packing: Packing) -> Box<dyn BufRead + Send> {
    let packed = BufReader::with_capacity(BUFFER_BYTES, bytes);
    let buffered = |bytes: Box<dyn Read + Send>| BufReader::with_capacity(BUFFER_BYTES, bytes);
    match packing {
        Packing::Plain => Box::new(packed),
        Packing::Gzip => Box::new(buffered(Box::new(MultiGzDecoder::new(packed)))),
        Packing::Zstd => Box::new(buffered(Box::new(Zstd::Closed(Some(packed))))),
    }
}

/// Zstandard frames; opened by the first read, which may then say that there are none.
enum Zstd<R: BufRead> {
    Closed(Option<R>),
    Open(zstd::Decoder<'static, R>),
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Self::Closed(bytes) = self {
            let mut bytes = bytes
                .take()
                .ok_or_else(|| io::Error::other("reading goes on after an error"))?;
            if bytes.fill_buf()?.is_empty() {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the file has no zstd frame",
                ));
            }
            let mut decoder = zstd::Decoder::with_buffer(bytes)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            *self = Self::Open(decoder);
        }
        match self {
            Self::Open(decoder) => decoder.read(buffer),
            Self::Closed(_) => Ok(0),
        }
    }
}

/// One document per line, at a key of its JSON object.
struct JsonLines {
    lines: Lines,
    key: Arc<str>,
}

impl DocumentReader for JsonLines {
    fn next_document(&mut self) -> Result<Option<String>, TextError> {
        let Some(line) = self.lines.next_line()? else {
            return Ok(None);
        };
        let mut json = serde_json::Deserializer::from_slice(line);
        let read = TextAt(&self.key)
            .deserialize(&mut json)
            .and_then(|text| json.end().map(|()| text));
        read.map(Some).map_err(|error| {
            // serde counts lines within ours; only its column means something here.
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default();
            let reason = format!("{reason} at column {}", error.column());
            self.lines.malformed(reason, &self.key)
        })
    }
}

/// Lines that are not blank.
struct Lines {
    name: String,
    bytes: Box<dyn BufRead + Send>,
    line: Vec<u8>,
    /// Lines so far, the blank ones too.
    n_read: u64,
}

impl Lines {
    fn new(name: String, bytes: Box<dyn Read + Send>, packing: Packing) -> Self {
        Self {
            name,
            bytes: unpacked(bytes, packing),
            line: Vec::new(),
            n_read: 0,
        }
    }

    fn next_line(&mut self) -> Result<Option<&[u8]>, TextError> {
        loop {
            self.line.clear();
            let read = self
                .bytes
                .by_ref()
                .take(MAX_BYTES)
                .read_until(b'\n', &mut self.line);
            let n_bytes = read.map_err(|source| broken(&self.name, self.n_read, source))?;
            if n_bytes == 0 {
                return Ok(None);
            }
            self.n_read += 1;
            if n_bytes as u64 == MAX_BYTES && self.line.last() != Some(&b'\n') {
                return Err(self.malformed(format!("longer than {MAX_BYTES} bytes"), ""));
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(&self.line));
            }
        }
    }

    fn malformed(&self, reason: String, key: &str) -> TextError {
        let start = &self.line[..self.line.len().min(240)];
        let excerpt = String::from_utf8_lossy(start)
            .trim_end()
            .chars()
            .take(60)
            .collect();
        TextError::MalformedLine {
            shard: self.name.clone(),
            line: self.n_read,
            reason,
            excerpt,
            key: key.to_owned(),
        }
    }
}

/// A download carries its own error in the reader's; that one says more.
fn broken(name: &str, line: u64, source: io::Error) -> TextError {
    match source.downcast::<TextError>() {
        Ok(inner) => inner,
        Err(source) => TextError::BrokenShard {
            shard: name.to_owned(),
            line,
            source,
        },
    }
}

/// A file that is one document.
struct WholeText {
    name: String,
    /// None once read.
    bytes: Option<Box<dyn BufRead + Send>>,
}

impl DocumentReader for WholeText {
    fn next_document(&mut self) -> Result<Option<String>, TextError> {
        let Some(bytes) = self.bytes.take() else {
            return Ok(None);
        };
        let mut text = Vec::new();
        bytes
            .take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(|source| broken(&self.name, 0, source))?;
        let unusable = |reason: String| TextError::NotText {
            file: self.name.clone(),
            reason,
        };
        if text.len() as u64 > MAX_BYTES {
            return Err(unusable(format!("longer than {MAX_BYTES} bytes")));
        }
        String::from_utf8(text)
            .map(Some)
            .map_err(|error| unusable(error.utf8_error().to_string()))
    }
}

/// Reads one string of a JSON object and skips the rest.
struct TextAt<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for TextAt<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextAt<'_> {
    type Value = String;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "an object with a string `{}`", self.0)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        let mut text = None;
        while let Some(is_wanted) = map.next_key_seed(IsKey(self.0))? {
            if is_wanted {
                text = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        text.ok_or_else(|| A::Error::custom(format_args!("missing field `{}`", self.0)))
    }
}

/// Compares a key without copying it.
struct IsKey<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for IsKey<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_identifier(self)
    }
}

impl Visitor<'_> for IsKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}
