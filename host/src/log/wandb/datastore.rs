//! The file of a W&B run, `run-<id>.wandb`, which W&B's own programs read: records in the framing of `LevelDB`'s logs.
//!
//! ```text
//! file    = ":W&B" | 0xBEE1 u16 | version 0 u8 | chunks, in blocks of 32 KiB of which the first holds these 7 bytes, too
//! chunk   = CRC-32 of kind and data u32 | length u16 | kind u8 | data        (little endian)
//! kind    = 1 a whole record, 2 its first part, 3 a middle one, 4 the last
//! ```
//! No chunk crosses the end of a block; fewer than 7 bytes there are zeros. The checksum is the IEEE one, not masked.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::super::SinkError;

const MAGIC: &[u8; 7] = b":W&B\xe1\xbe\x00";
const BLOCK: usize = 32 * 1024;
const CHUNK_HEADER: usize = 7;

const WHOLE: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;

/// Appends records to a file of its own.
#[derive(Debug)]
pub(super) struct DataStore {
    path: PathBuf,
    file: File,
    /// Bytes of whole records; one that was torn by a full disk is cut back to this.
    n_bytes: usize,
}

impl DataStore {
    /// Starts a file.
    ///
    /// # Errors
    /// If there is one, or it cannot be written.
    pub(super) fn create(path: &Path) -> Result<Self, SinkError> {
        let mut file = File::options()
            .append(true)
            .create_new(true)
            .open(path)
            .map_err(SinkError::io("create", path))?;
        file.write_all(MAGIC)
            .map_err(SinkError::io("write", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            n_bytes: MAGIC.len(),
        })
    }

    /// Appends all records with one call to the system, or none of them.
    ///
    /// # Errors
    /// If the system takes less.
    pub(super) fn append(&mut self, records: &[Vec<u8>]) -> Result<(), SinkError> {
        let mut framed = Vec::new();
        for record in records {
            frame(record, self.n_bytes, &mut framed);
        }
        if let Err(error) = self.file.write_all(&framed) {
            // Readers stop at a torn record, and whoever follows the file reads it again.
            let _ = self.file.set_len(self.n_bytes as u64);
            return Err(SinkError::io("write", &self.path)(error));
        }
        self.n_bytes += framed.len();
        Ok(())
    }

    /// Waits until the disk has everything.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(super) fn sync(&self) -> Result<(), SinkError> {
        self.file
            .sync_all()
            .map_err(SinkError::io("sync", &self.path))
    }
}

/// Adds a record to `framed`, which will stand at byte `offset` of the file.
fn frame(record: &[u8], offset: usize, framed: &mut Vec<u8>) {
    let mut rest = record;
    let mut is_first = true;
    loop {
        let left = BLOCK - (offset + framed.len()) % BLOCK;
        if left < CHUNK_HEADER {
            framed.resize(framed.len() + left, 0);
            continue;
        }
        let (data, tail) = rest.split_at(rest.len().min(left - CHUNK_HEADER));
        let kind = match (is_first, tail.is_empty()) {
            (true, true) => WHOLE,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        framed.extend_from_slice(&checksum(kind, data).to_le_bytes());
        // Below the size of a block.
        framed.extend_from_slice(&u16::try_from(data.len()).unwrap_or_default().to_le_bytes());
        framed.push(kind);
        framed.extend_from_slice(data);
        if tail.is_empty() {
            return;
        }
        (rest, is_first) = (tail, false);
    }
}

fn checksum(kind: u8, data: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[kind]);
    crc.update(data);
    crc.finalize()
}

/// The records of a file, up to the first that is torn or damaged.
pub(super) fn records(file: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    if !file.starts_with(MAGIC) {
        return records;
    }
    let mut offset = MAGIC.len();
    let mut record = Vec::new();
    while let Some((kind, data, next)) = chunk(file, offset) {
        if matches!(kind, WHOLE | FIRST) {
            record.clear();
        }
        record.extend_from_slice(data);
        if matches!(kind, WHOLE | LAST) {
            records.push(std::mem::take(&mut record));
        }
        offset = next;
    }
    records
}

/// The chunk at `offset` or behind the zeros there, and where the next one is.
fn chunk(file: &[u8], mut offset: usize) -> Option<(u8, &[u8], usize)> {
    let left = BLOCK - offset % BLOCK;
    if left < CHUNK_HEADER {
        offset += left;
    }
    let header = file.get(offset..offset + CHUNK_HEADER)?;
    let (crc, length, kind) = (&header[..4], &header[4..6], header[6]);
    let length = usize::from(u16::from_le_bytes(length.try_into().ok()?));
    let start = offset + CHUNK_HEADER;
    let data = file.get(start..start + length)?;
    let is_whole = crc == checksum(kind, data).to_le_bytes();
    is_whole.then_some((kind, data, start + length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(records: &[Vec<u8>]) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.wandb");
        let mut store = DataStore::create(&path).unwrap();
        for record in records {
            store.append(std::slice::from_ref(record)).unwrap();
        }
        store.sync().unwrap();
        std::fs::read(&path).unwrap()
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        // The check value of CRC-32/ISO-HDLC in the algorithms' catalogue; the kind is its first byte here.
        assert_eq!(checksum(b'1', b"23456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_file_begins_as_wandb_knows_it() {
        let file = written(&[b"ab".to_vec()]);
        assert_eq!(&file[..7], b":W&B\xe1\xbe\x00");
        assert_eq!(&file[11..], b"\x02\x00\x01ab");
    }

    proptest! {
        /// Lengths around the size of a block are those that a mistake in the framing would not survive.
        #[test]
        fn records_are_read_back(lengths in prop::collection::vec(prop_oneof![
            0usize..40, BLOCK - 40..BLOCK + 40, 2 * BLOCK..2 * BLOCK + 40,
        ], 0..6)) {
            let wanted: Vec<Vec<u8>> = lengths.iter().zip(1u8..).map(|(&n, byte)| vec![byte; n]).collect();
            prop_assert_eq!(records(&written(&wanted)), wanted);
        }
    }

    #[test]
    fn what_is_torn_or_damaged_is_where_reading_ends() {
        let all = [b"first".to_vec(), b"second".to_vec()];
        let file = written(&all);
        let first_end = 7 + 7 + 5;
        for length in first_end..file.len() {
            assert_eq!(records(&file[..length]), all[..1], "{length}");
        }
        let mut damaged = file;
        damaged[first_end + 10] ^= 1;
        assert_eq!(records(&damaged), all[..1]);
        assert!(records(b"something else").is_empty());
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.wandb");
        DataStore::create(&path).unwrap();
        assert!(DataStore::create(&path).is_err());
    }
}
