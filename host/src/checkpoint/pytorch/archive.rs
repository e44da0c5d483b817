//! The zip archive around a `torch.save` file: its table of contents, and byte ranges of its uncompressed entries.
//!
//! Not a zip library. `torch.save` only stores and never compresses, and whoever reads 10 GB wants ranges, not whole
//! entries. A file is untrusted input: every length is compared with the size of the file before it is used.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use super::crc::crc32;

const END: &[u8] = b"PK\x05\x06";
const END_BYTES: usize = 22;
/// A comment may follow the end record.
const MAX_COMMENT_BYTES: usize = 0xffff;
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END64_LOCATOR_BYTES: usize = 20;
const END64: &[u8] = b"PK\x06\x06";
const END64_BYTES: usize = 56;
const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";
const DIRECTORY_ENTRY_BYTES: usize = 46;
const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const LOCAL_HEADER_BYTES: usize = 30;
/// Stands in a 32-bit field whose value is in the zip64 extra field.
const IN_ZIP64: u64 = 0xffff_ffff;
const ZIP64_EXTRA: u16 = 1;
/// A checkpoint has an entry of about 100 bytes per tensor; 600,000 tensors fit.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// An opened archive.
#[derive(Debug)]
pub(super) struct Archive {
    file: File,
    n_bytes: u64,
    entries: BTreeMap<String, Entry>,
}

/// Where an entry is.
#[derive(Debug)]
struct Entry {
    header_at: u64,
    bytes: u64,
    crc: u32,
    is_stored: bool,
}

impl Archive {
    /// Opens `path` and reads its directory.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let mut file = File::open(path).map_err(|error| error.to_string())?;
        let n_bytes = file.metadata().map_err(|error| error.to_string())?.len();
        let directory = directory(&mut file, n_bytes)?;
        let entries = entries(&directory, n_bytes)?;
        Ok(Self {
            file,
            n_bytes,
            entries,
        })
    }

    /// Size of the file.
    pub(super) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Names of all entries, sorted.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Size of an entry.
    pub(super) fn bytes_of(&self, name: &str) -> Result<u64, String> {
        Ok(self.entry(name)?.bytes)
    }

    /// Reads a range of an entry's bytes. The checksum is compared if the range is the whole entry.
    pub(super) fn read(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, String> {
        let entry = self.entry(name)?;
        if range.start > range.end || range.end > entry.bytes {
            return Err(format!(
                "bytes {}..{} of `{name}` are asked for, it has {}",
                range.start, range.end, entry.bytes
            ));
        }
        if !entry.is_stored {
            return Err(format!("`{name}` is compressed"));
        }
        let header = read_range(&self.file, entry.header_at, LOCAL_HEADER_BYTES as u64)?;
        if !header.starts_with(LOCAL_HEADER) {
            return Err(format!(
                "there is no header of `{name}` at byte {}",
                entry.header_at
            ));
        }
        let header_bytes = LOCAL_HEADER_BYTES as u64
            + u64::from(u16_at(&header, 26)?)
            + u64::from(u16_at(&header, 28)?);
        let begin = entry.header_at + header_bytes;
        if begin
            .checked_add(entry.bytes)
            .is_none_or(|end| end > self.n_bytes)
        {
            return Err(format!("`{name}` reaches beyond the end of the file"));
        }
        let bytes = read_range(&self.file, begin + range.start, range.end - range.start)?;
        if range.end - range.start == entry.bytes {
            let crc = crc32(&bytes);
            if crc != entry.crc {
                return Err(format!(
                    "the CRC-32 of `{name}` is {crc:08x}, {:08x} was written",
                    entry.crc
                ));
            }
        }
        Ok(bytes)
    }

    fn entry(&self, name: &str) -> Result<&Entry, String> {
        self.entries
            .get(name)
            .ok_or_else(|| format!("it has no entry `{name}`"))
    }
}

/// The bytes of the central directory.
fn directory(file: &mut File, n_bytes: u64) -> Result<Vec<u8>, String> {
    let tail_bytes = n_bytes.min((END_BYTES + MAX_COMMENT_BYTES) as u64);
    let tail = read_range(file, n_bytes - tail_bytes, tail_bytes)?;
    let end = tail
        .windows(END_BYTES)
        .rposition(|window| window.starts_with(END))
        .ok_or("it is no zip archive, or its end is missing")?;
    let mut bytes = u64::from(u32_at(&tail, end + 12)?);
    let mut at = u64::from(u32_at(&tail, end + 16)?);
    // PyTorch always writes the 64-bit record, whether or not a field needs it.
    let locator = end.checked_sub(END64_LOCATOR_BYTES);
    if let Some(locator) = locator.filter(|&at| tail[at..].starts_with(END64_LOCATOR)) {
        let end64 = read_range(file, u64_at(&tail, locator + 8)?, END64_BYTES as u64)?;
        if !end64.starts_with(END64) {
            return Err("its 64-bit end record is damaged".to_owned());
        }
        bytes = u64_at(&end64, 40)?;
        at = u64_at(&end64, 48)?;
    }
    if bytes > MAX_DIRECTORY_BYTES || at.checked_add(bytes).is_none_or(|end| end > n_bytes) {
        return Err(format!(
            "its directory claims bytes {at} to {at} + {bytes}, the file has {n_bytes}"
        ));
    }
    read_range(file, at, bytes)
}

fn entries(directory: &[u8], n_bytes: u64) -> Result<BTreeMap<String, Entry>, String> {
    let mut entries = BTreeMap::new();
    let mut rest = directory;
    while !rest.is_empty() {
        if !rest.starts_with(DIRECTORY_ENTRY) {
            return Err("its directory is damaged".to_owned());
        }
        let [name_bytes, extra_bytes, comment_bytes] =
            [28, 30, 32].map(|at| u16_at(rest, at).map(usize::from));
        let name_end = DIRECTORY_ENTRY_BYTES + name_bytes?;
        let extra_end = name_end + extra_bytes?;
        let next = extra_end + comment_bytes?;
        let cut = || "its directory is cut off".to_owned();
        let name = rest.get(DIRECTORY_ENTRY_BYTES..name_end).ok_or_else(cut)?;
        let extra = rest.get(name_end..extra_end).ok_or_else(cut)?;
        let mut fields = [24, 20, 42].map(|at| u32_at(rest, at).map(u64::from));
        for (field, wide) in fields
            .iter_mut()
            .filter(|field| matches!(field, Ok(IN_ZIP64)))
            .zip(zip64_fields(extra))
        {
            *field = Ok(wide);
        }
        let [bytes, compressed, header_at] = fields;
        let entry = Entry {
            header_at: header_at?,
            bytes: bytes?,
            crc: u32_at(rest, 16)?,
            is_stored: u16_at(rest, 10)? == 0,
        };
        let name = String::from_utf8_lossy(name).into_owned();
        if entry.is_stored && entry.bytes != compressed? {
            return Err(format!("`{name}` has two different sizes"));
        }
        if entry.header_at > n_bytes || (entry.is_stored && entry.bytes > n_bytes) {
            return Err(format!("`{name}` reaches beyond the end of the file"));
        }
        entries.insert(name, entry);
        rest = rest.get(next..).ok_or_else(cut)?;
    }
    Ok(entries)
}

/// The 64-bit values that replace those of an entry's 32-bit fields that are full, in order.
fn zip64_fields(mut extra: &[u8]) -> impl Iterator<Item = u64> {
    let mut values = Vec::new();
    while let (Ok(id), Ok(bytes)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let end = 4 + usize::from(bytes);
        let Some(body) = extra.get(4..end) else { break };
        if id == ZIP64_EXTRA {
            values = body
                .chunks_exact(8)
                .filter_map(|word| u64_at(word, 0).ok())
                .collect();
        }
        extra = &extra[end..];
    }
    values.into_iter()
}

/// Never allocates more than the file has.
fn read_range(mut file: &File, at: u64, n_bytes: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(at))
        .and_then(|_| file.take(n_bytes).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 == n_bytes {
        Ok(bytes)
    } else {
        Err(format!("it ends inside bytes {at} to {at} + {n_bytes}"))
    }
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], String> {
    bytes
        .get(at..at + N)
        .and_then(|word| word.try_into().ok())
        .ok_or_else(|| "a record is cut off".to_owned())
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, String> {
    word(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    word(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, String> {
    word(bytes, at).map(u64::from_le_bytes)
}
