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
            // An end that came too early is told at column 0 of the next line.
            let column = match error.column() {
                0 => String::new(),
                column => format!(" at column {column}"),
            };
            self.lines.malformed(format!("{reason}{column}"), &self.key)
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{gzip, parquet_of, shard_of};

    type Outcome = Result<Vec<String>, TextError>;

    /// Documents and number of skipped ones of a file of this name.
    fn read_all(name: &str, bytes: &[u8], share: Option<Share>) -> (Outcome, u64) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let source = Source {
            name: name.to_owned(),
            open: Box::new(|| Ok(Bytes::File(path))),
        };
        let mut documents = Documents::new(vec![source], "text", share, None);
        let read = documents.by_ref().collect();
        (read, documents.n_skipped())
    }

    fn texts(name: &str, bytes: &[u8]) -> Vec<String> {
        read_all(name, bytes, None).0.unwrap()
    }

    fn error(name: &str, bytes: &[u8]) -> TextError {
        read_all(name, bytes, None).0.unwrap_err()
    }

    fn zstd_of(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Many different lines, so that their packed form is long.
    fn many_lines() -> Vec<u8> {
        let line = |i: u64| {
            format!(
                "{{\"text\":\"{:x}\"}}\n",
                i.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            )
        };
        (1..50_000).map(line).collect::<String>().into_bytes()
    }

    #[test]
    fn all_members_are_read_and_empty_documents_left_out() {
        let bytes = [shard_of(&["one", "", "two\nlines"]), shard_of(&["drei"])].concat();
        let (read, n_skipped) = read_all("s.json.gz", &bytes, None);
        assert_eq!(read.unwrap(), ["one", "two\nlines", "drei"]);
        assert_eq!(n_skipped, 1);
        let streamed = Documents::from_gzip("s".to_owned(), std::io::Cursor::new(bytes));
        assert_eq!(streamed.map(Result::unwrap).count(), 3);
    }

    #[test]
    fn the_ending_says_how_a_file_is_read() {
        let lines = b"{\"text\":\"a\"}\n{\"text\":\"b\"}\n";
        let rows: [Option<&[u8]>; 2] = [Some(b"a"), Some(b"b")];
        for (name, bytes) in [
            ("x.jsonl", lines.to_vec()),
            ("x.json.gz", gzip(lines)),
            ("x.jsonl.gz", gzip(lines)),
            (
                "x.jsonl.zst",
                [zstd_of(&lines[..13]), zstd_of(&lines[13..])].concat(),
            ),
            ("x.zst", zstd_of(lines)),
            ("x.parquet", parquet_of("text", &rows, true)),
            ("y.parquet", parquet_of("text", &rows, false)),
        ] {
            assert!(is_readable(name));
            assert_eq!(texts(name, &bytes), ["a", "b"], "{name}");
        }
        for (name, bytes) in [
            ("x.txt", b"a\nb\n".to_vec()),
            ("x.md", b"a\nb\n".to_vec()),
            ("x.txt.gz", gzip(b"a\nb\n")),
            ("x.txt.zst", zstd_of(b"a\nb\n")),
        ] {
            assert!(is_readable(name));
            assert_eq!(texts(name, &bytes), ["a\nb\n"], "{name}");
        }
        for other in ["x.json", "x.gz", "x.parquet.gz", "x", "x.csv", "txt"] {
            assert!(!is_readable(other), "{other}");
        }
    }

    /// 2³¹ bytes is as far as zstd can refer back, and more than its decoder accepts by itself.
    #[test]
    fn long_zstd_windows_are_accepted() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(ZSTD_WINDOW_LOG - 1).unwrap();
        encoder.write_all(b"{\"text\":\"far\"}\n").unwrap();
        let bytes = encoder.finish().unwrap();
        assert!(zstd::decode_all(&bytes[..]).is_err(), "the window is short");
        assert_eq!(texts("x.jsonl.zst", &bytes), ["far"]);
    }

    #[test]
    fn a_malformed_line_is_named() {
        for (line, reason) in [
            ("{\"txt\":\"b\"}", "missing field `text` at column 11"),
            (
                "{\"text\":3}",
                "invalid type: integer `3`, expected a string at column 9",
            ),
            ("{\"text\":\"b\"", "EOF while parsing an object"),
            ("{\"text\":\"b\"} x", "trailing characters at column 14"),
            (
                "[1]",
                "invalid type: sequence, expected an object with a string `text`",
            ),
        ] {
            let bytes = format!("{{\"text\":\"a\"}}\n\n{line}\n{{\"text\":\"c\"}}\n");
            assert_eq!(
                error("s.jsonl", bytes.as_bytes()).to_string(),
                format!("`s.jsonl` line 3: {reason}; the line starts `{line}`")
            );
        }
        let error = error("s.jsonl", b"{\"text\":\"\xff\"}\n").to_string();
        assert!(
            error.starts_with("`s.jsonl` line 1: invalid unicode"),
            "{error}"
        );
    }

    #[test]
    fn what_follows_an_error_is_not_read() {
        let bytes = gzip(b"{\"text\":\"a\"}\n{}\n{\"text\":\"c\"}\n");
        let mut documents = Documents::from_gzip("s".to_owned(), std::io::Cursor::new(bytes));
        assert!(documents.next().unwrap().is_ok());
        assert!(documents.next().unwrap().is_err());
        assert!(documents.next().is_none());
    }

    #[test]
    fn a_cut_file_is_an_error_and_not_an_end() {
        let lines = many_lines();
        for (name, bytes, check) in [
            ("s.jsonl.gz", gzip(&lines), "gzip -t"),
            ("s.jsonl.zst", zstd_of(&lines), "zstd -t"),
        ] {
            assert_eq!(texts(name, &bytes).len(), 49_999);
            for length in [0, 5, bytes.len() / 2, bytes.len() - 1] {
                let error = error(name, &bytes[..length]);
                assert!(matches!(error, TextError::BrokenShard { .. }), "{error}");
                assert!(error.help().contains(check), "{}", error.help());
            }
        }
    }

    #[test]
    fn a_shard_may_be_empty() {
        for bytes in [gzip(b""), gzip(b"\n \n")] {
            assert!(texts("s.json.gz", &bytes).is_empty());
        }
        assert!(texts("s.jsonl.zst", &zstd_of(b"")).is_empty());
        assert!(texts("s.jsonl", b"").is_empty());
        assert!(texts("s.parquet", &parquet_of("text", &[], true)).is_empty());
    }

    #[test]
    fn a_column_is_read_over_all_groups_and_missing_values_are_empty() {
        let words: Vec<String> = (0..1000).map(|i| format!("row {i}")).collect();
        let rows: Vec<Option<&[u8]>> = words
            .iter()
            .enumerate()
            .map(|(i, word)| (i % 7 != 3).then_some(word.as_bytes()))
            .collect();
        let expected: Vec<&String> = (0..1000)
            .filter(|i| i % 7 != 3)
            .map(|i| &words[i])
            .collect();
        for is_snappy in [true, false] {
            let bytes = parquet_of("text", &rows, is_snappy);
            let (read, n_skipped) = read_all("s.parquet", &bytes, None);
            assert!(read.unwrap().iter().eq(expected.iter().copied()));
            assert_eq!(n_skipped, 143);
        }
    }

    #[test]
    fn a_parquet_file_that_cannot_be_used_says_why() {
        let good = parquet_of("content", &[Some(b"a"), Some(b"\xff")], true);
        let missing = error("s.parquet", &good);
        assert!(
            missing.to_string().ends_with(
                "has no column of strings `text`, but `size` (INT64), `content` (BYTE_ARRAY)"
            ),
            "{missing}"
        );
        assert!(missing.help().contains("-text_files.key"));
        let good = parquet_of("text", &[Some(b"a"), Some(b"\xff")], true);
        let not_text = error("s.parquet", &good);
        assert!(
            matches!(&not_text, TextError::NotText { file, .. } if file.ends_with("s.parquet row 2")),
            "{not_text}"
        );
        let words: Vec<String> = (0..1000u64).map(|i| i.pow(5).to_string()).collect();
        let rows: Vec<Option<&[u8]>> = words.iter().map(|it| Some(it.as_bytes())).collect();
        let good = parquet_of("text", &rows, true);
        let mut torn = good.clone();
        let middle = good.len() / 2;
        torn[middle..middle + 400].fill(0x55);
        for bytes in [&good[..good.len() - 1], &good[..good.len() / 2], b"", &torn] {
            let error = error("s.parquet", bytes);
            assert!(matches!(error, TextError::BadParquet { .. }), "{error}");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        let error = error("s.txt", b"good \xff bad");
        assert_eq!(
            error.to_string(),
            "`s.txt` is not a text: invalid utf-8 sequence of 1 bytes from index 5"
        );
    }

    /// Golden: the same rule in Python, `int.from_bytes(sha256(text).digest()[:8]) < 0.05·2⁶⁴`.
    #[test]
    fn the_hash_of_the_text_decides_what_validates() {
        let words: Vec<String> = (0..1000).map(|i| format!("document {i}")).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let side = |wants_validation| {
            let share = Share {
                validation: 0.05,
                wants_validation,
            };
            read_all("s.json.gz", &shard_of(&words), Some(share))
                .0
                .unwrap()
        };
        let (train, validation) = (side(false), side(true));
        assert_eq!(train.len() + validation.len(), 1000);
        assert_eq!(validation.len(), 66);
        assert_eq!(
            validation[..3],
            ["document 21", "document 22", "document 55"]
        );
        assert!(!train.iter().any(|text| validation.contains(text)));
    }

    /// The download's own error says more than "the gzip stream broke off".
    #[test]
    fn a_failed_download_comes_out_as_itself() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(std::io::Error::other(TextError::HttpStatus {
                    url: "https://hub/a".to_owned(),
                    status: 404,
                    has_token: false,
                }))
            }
        }
        let start = std::io::Cursor::new(shard_of(&["one", "two"])[..20].to_vec());
        let error = Documents::from_gzip("s".to_owned(), start.chain(Failing))
            .last()
            .unwrap()
            .unwrap_err();
        assert!(matches!(error, TextError::HttpStatus { .. }), "{error}");
    }

    proptest! {
        /// Bytes that nobody meant to be a shard end in an error or in nothing, never in a panic.
        #[test]
        fn garbage_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..6) {
            let (name, bytes) = match kind {
                0 => ("s.json.gz", bytes),
                1 => ("s.json.gz", gzip(&bytes)),
                2 => ("s.jsonl.zst", bytes),
                3 => ("s.jsonl.zst", zstd_of(&bytes)),
                4 => ("s.parquet", [b"PAR1", &bytes[..], b"\x10\0\0\0PAR1"].concat()),
                _ => ("s.txt", bytes),
            };
            let _ = read_all(name, &bytes, None);
        }
    }
}
