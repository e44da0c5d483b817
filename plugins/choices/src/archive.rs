//! Members of the archives in which sets are published, read into memory. Nothing is unpacked to the disk, so a member's
//! path can do no harm; what an archive can do is be huge, so sizes and numbers are limited.

use std::io::{self, BufReader, Read, Seek};

use flate2::bufread::MultiGzDecoder;
use moeut_text::Watch;
use zip::{ZipArchive, result::ZipError};

use crate::{error::ChoicesError, file::SetFile};

/// Members of an archive; the published ones have less than a hundred.
const MAX_MEMBERS: usize = 100_000;
/// Bytes of the members that are kept: 1 GiB, thirty times the largest published ones.
const MAX_KEPT_BYTES: u64 = 1 << 30;
/// Bytes of an unpacked tar archive, most of which are passed over: 8 GiB, several times `CBTest.tgz`.
const MAX_TAR_BYTES: u64 = 8 << 30;

/// Whether a name is meant by `pattern`, in which `*` stands for any characters of a file's or folder's name.
///
/// A path is meant by its last parts: `b/*.txt` means `a/b/c.txt`. As in a shell, `*` does not mean a leading dot, so
/// that `._c.txt`, with which macOS fills archives, is not meant.
pub(crate) fn is_meant(pattern: &str, path: &str) -> bool {
    let mut parts = path.rsplit('/');
    pattern.rsplit('/').all(|pattern| {
        parts
            .next()
            .is_some_and(|part| is_part_meant(pattern, part))
    })
}

fn is_part_meant(pattern: &str, part: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == part;
    };
    let Some(tail) = part.strip_prefix(start) else {
        return false;
    };
    let is_hidden = start.is_empty() && part.starts_with('.');
    // The shortest match of a star is tried first, then ever longer ones.
    !is_hidden
        && tail
            .char_indices()
            .map(|(index, _)| index)
            .chain([tail.len()])
            .any(|index| is_part_meant(rest, &tail[index..]))
}

/// The members of a zip archive that one of `patterns` means, in the order of the archive.
///
/// # Errors
/// The archive is broken off, damaged, or larger than any published one.
pub fn zip_members(
    archive: &str,
    url: &'static str,
    bytes: impl Read + Seek,
    patterns: &[&str],
    watch: Watch<'_>,
) -> Result<Vec<SetFile>, ChoicesError> {
    let mut kept = Kept::new(archive, url, patterns);
    let unreadable =
        |error: ZipError| bad_archive(archive, url, &format!("is no whole zip archive: {error}"));
    let mut zip = ZipArchive::new(bytes).map_err(unreadable)?;
    for index in 0..zip.len() {
        watch.check()?;
        kept.count(index)?;
        let member = zip.by_index(index).map_err(unreadable)?;
        let name = member.name().map_err(unreadable)?.into_owned();
        if member.is_file() && kept.wants(&name) {
            kept.keep(&name, member)?;
        }
    }
    Ok(kept.files)
}

/// The members of a gzipped tar archive that one of `patterns` means, in the order of the archive.
///
/// # Errors
/// The archive is broken off, damaged, or larger than any published one.
pub fn tar_gz_members(
    archive: &str,
    url: &'static str,
    bytes: impl Read,
    patterns: &[&str],
    watch: Watch<'_>,
) -> Result<Vec<SetFile>, ChoicesError> {
    let mut kept = Kept::new(archive, url, patterns);
    let unreadable = |error: io::Error| {
        ChoicesError::of_reader(error, |error| {
            bad_archive(
                archive,
                url,
                &format!("is no whole tar.gz archive: {error}"),
            )
        })
    };
    let mut tar = tar::Archive::new(Limited {
        bytes: MultiGzDecoder::new(BufReader::new(bytes)),
        n_left: MAX_TAR_BYTES,
        watch,
    });
    // Raw, since a record of a long name is read into memory whatever its size; the names of the sets are short.
    for (index, member) in tar.entries().map_err(unreadable)?.raw(true).enumerate() {
        kept.count(index)?;
        let member = member.map_err(unreadable)?;
        let name = String::from_utf8_lossy(&member.path_bytes()).into_owned();
        if member.header().entry_type().is_file() && kept.wants(&name) {
            let size = member.size();
            // The crate takes the end of the archive for the end of the member.
            if kept.keep(&name, member)? < size {
                return Err(bad_archive(archive, url, &format!("ends within `{name}`")));
            }
        }
    }
    // What follows the last member has the checksum of the whole.
    io::copy(&mut tar.into_inner(), &mut io::sink()).map_err(unreadable)?;
    Ok(kept.files)
}

fn bad_archive(archive: &str, url: &'static str, reason: &str) -> ChoicesError {
    ChoicesError::BadFile {
        file: archive.to_owned(),
        reason: reason.to_owned(),
        url,
    }
}

/// The members that are wanted, as far as they are read.
struct Kept<'a> {
    archive: &'a str,
    url: &'static str,
    patterns: &'a [&'a str],
    files: Vec<SetFile>,
    n_bytes: u64,
}

impl<'a> Kept<'a> {
    fn new(archive: &'a str, url: &'static str, patterns: &'a [&'a str]) -> Self {
        Self {
            archive,
            url,
            patterns,
            files: Vec::new(),
            n_bytes: 0,
        }
    }

    fn count(&self, index: usize) -> Result<(), ChoicesError> {
        if index < MAX_MEMBERS {
            return Ok(());
        }
        let reason = format!("has more than {MAX_MEMBERS} members");
        Err(bad_archive(self.archive, self.url, &reason))
    }

    fn wants(&self, name: &str) -> bool {
        self.patterns.iter().any(|pattern| is_meant(pattern, name))
    }

    /// Reads a member, and says how many bytes it had.
    fn keep(&mut self, name: &str, bytes: impl Read) -> Result<u64, ChoicesError> {
        let file = SetFile::read(name, format!("{}:{name}", self.archive), self.url, bytes)?;
        let n_bytes = file.bytes.len() as u64;
        self.files.push(file);
        self.n_bytes += n_bytes;
        if self.n_bytes > MAX_KEPT_BYTES {
            let reason = format!("unpacks to more than {MAX_KEPT_BYTES} bytes");
            return Err(bad_archive(self.archive, self.url, &reason));
        }
        Ok(n_bytes)
    }
}

/// A reader that ends in an error once it gave so many bytes, or once the host wants to stop.
struct Limited<'a, R> {
    bytes: R,
    n_left: u64,
    watch: Watch<'a>,
}

impl<R: Read> Read for Limited<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.watch.check().map_err(io::Error::other)?;
        let n_read = self.bytes.read(buffer)?;
        self.n_left = self
            .n_left
            .checked_sub(n_read as u64)
            .ok_or_else(|| io::Error::other(format!("more than {MAX_TAR_BYTES} bytes")))?;
        Ok(n_read)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        io::{Cursor, Write},
    };

    use flate2::{Compression, write::GzEncoder};
    use moeut_text::TextError;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{overwritten, zip_of};

    const MEMBERS: [(&str, &str); 4] = [
        ("data/b.jsonl", "two"),
        ("__MACOSX/data/._b.jsonl", "junk"),
        ("data/notes.txt", "three"),
        ("data/a.jsonl", "one"),
    ];

    fn zip_of_members() -> Vec<u8> {
        zip_of(&MEMBERS.map(|(name, text)| (name, text.repeat(1000))))
    }

    fn tar_of_members() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, text) in MEMBERS {
            let text = text.repeat(1000);
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            tar.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    fn read_zip(bytes: &[u8]) -> Result<Vec<SetFile>, ChoicesError> {
        zip_members(
            "a.zip",
            "url",
            Cursor::new(bytes),
            &["data/*.jsonl"],
            Watch::nobody(),
        )
    }

    fn read_tar_gz(bytes: &[u8]) -> Result<Vec<SetFile>, ChoicesError> {
        tar_gz_members("a.tgz", "url", bytes, &["data/*.jsonl"], Watch::nobody())
    }

    #[test]
    fn members_are_meant_by_their_last_parts() {
        for (pattern, path, expected) in [
            ("a.txt", "a.txt", true),
            ("a.txt", "x/a.txt", true),
            ("a.txt", "ba.txt", false),
            ("a_*_b_*.txt", "x/a_CN_b_2ex.txt", true),
            ("a_*_b_*.txt", "a_CN_b.txt", false),
            ("a_*_b_*.txt", "a__b_b_b_.txt.txt", true),
            ("data/*.jsonl", "data/é.jsonl", true),
            ("data/*.jsonl", "x/data/a.jsonl", true),
            ("data/*.jsonl", "data/x/a.jsonl", false),
            ("data/*.jsonl", "data/._a.jsonl", false),
            ("data/*.jsonl", "a.jsonl", false),
        ] {
            assert_eq!(is_meant(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn wanted_members_come_out_of_both_kinds() {
        let (zip, tar_gz) = (zip_of_members(), gzip(&tar_of_members()));
        for (files, archive) in [
            (read_zip(&zip).unwrap(), "a.zip"),
            (read_tar_gz(&tar_gz).unwrap(), "a.tgz"),
        ] {
            let found: Vec<_> = files
                .iter()
                .map(|file| {
                    (
                        &*file.name,
                        &*file.place,
                        str::from_utf8(&file.bytes[..3]).unwrap(),
                    )
                })
                .collect();
            let place = |name| format!("{archive}:data/{name}");
            assert_eq!(
                found,
                [
                    ("b.jsonl", &*place("b.jsonl"), "two"),
                    ("a.jsonl", &*place("a.jsonl"), "one")
                ]
            );
        }
    }

    #[test]
    fn a_cut_archive_is_an_error_wherever_it_is_cut() {
        let (zip, tar) = (zip_of_members(), tar_of_members());
        let tar_gz = gzip(&tar);
        for end in (0..zip.len()).step_by(7) {
            let error = read_zip(&zip[..end]).unwrap_err().to_string();
            assert!(
                error.starts_with("`a.zip` is no whole zip archive: "),
                "{error}"
            );
        }
        for end in (0..tar_gz.len()).step_by(7) {
            assert!(read_tar_gz(&tar_gz[..end]).is_err(), "cut at byte {end}");
        }
        let error = read_tar_gz(&gzip(&tar[..1000])).unwrap_err();
        assert_eq!(error.to_string(), "`a.tgz` ends within `data/b.jsonl`");
    }

    #[test]
    fn a_changed_byte_in_a_zip_is_found_by_its_checksum() {
        let mut zip = zip_of_members();
        let text = zip.windows(4).position(|bytes| bytes == b"json").unwrap() + 5;
        zip[text + 2] ^= 1;
        let error = read_zip(&zip).unwrap_err().to_string();
        assert!(
            error.starts_with("`a.zip:data/b.jsonl` cannot be read: "),
            "{error}"
        );
    }

    #[test]
    fn reading_stops_at_the_limit() {
        let read = |n_left| {
            let mut limited = Limited {
                bytes: io::repeat(0),
                n_left,
                watch: Watch::nobody(),
            };
            limited
                .read(&mut [0; 10])
                .map_err(|error| error.to_string())
        };
        assert_eq!(read(10).unwrap(), 10);
        let error = read(9).unwrap_err();
        assert_eq!(error, "more than 8589934592 bytes");
    }

    #[test]
    fn the_host_can_stop_at_any_moment() {
        let tar_gz = gzip(&tar_of_members());
        let read = |n_more: u32| {
            let n_asked = Cell::new(0);
            let is_cancelled = || n_asked.replace(n_asked.get() + 1) >= n_more;
            let watch = Watch {
                is_cancelled: &is_cancelled,
                ..Watch::nobody()
            };
            tar_gz_members("a.tgz", "url", &*tar_gz, &["data/*.jsonl"], watch)
        };
        let stops = (0..1000).map(read).take_while(Result::is_err);
        let stops: Vec<_> = stops.collect();
        assert!(
            (10..1000).contains(&stops.len()),
            "asked {} times",
            stops.len()
        );
        for stop in stops {
            assert!(matches!(
                stop,
                Err(ChoicesError::Text(TextError::Cancelled))
            ));
        }
    }

    proptest! {
        /// Bytes that nobody meant to be an archive end in an error or in nothing, never in a panic.
        #[test]
        fn garbage_is_survived(
            place in any::<usize>(),
            garbage in prop::collection::vec(any::<u8>(), 1..40),
        ) {
            let _ = read_zip(&garbage);
            let _ = read_tar_gz(&garbage);
            let _ = read_zip(&overwritten(zip_of_members(), place, &garbage));
            let _ = read_tar_gz(&gzip(&overwritten(tar_of_members(), place, &garbage)));
        }
    }
}
