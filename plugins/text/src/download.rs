//! Files from the web that are stored: whole or absent, resumed where an earlier process stopped, and downloaded by one
//! process at a time.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{
    error::TextError,
    files::{FileLock, beside, create_folder, give_name, write_atomically},
    hub::{Hub, HubFile},
    progress::{Progress, Watch},
};

const BUFFER_BYTES: usize = 1 << 17;
/// Bytes between two pieces of news, and between two looks at the host's wish to stop.
const NEWS_BYTES: u64 = 1 << 20;

/// Makes `path` hold the complete file at `url`; does nothing if it exists. Folders are created as needed.
///
/// What is there of the file is in `<path>.part`, and is kept when the download fails; the next call asks the server
/// for the rest only, on condition that the file is still the same (which `<path>.part.tag` can tell). `<path>.lock` keeps
/// other processes away meanwhile. An address on huggingface.co is looked for at `$HF_ENDPOINT`, if that is set.
///
/// # Errors
/// The server refuses, the connection fails again and again, `$HF_HUB_OFFLINE` forbids it, the content is not the
/// announced one, the file cannot be written, or the host cancelled.
pub fn fetch(url: &str, path: &Path, watch: Watch<'_>) -> Result<(), TextError> {
    fetch_with(&Hub::from_env(), url, path, watch)
}

/// [`fetch`] with a hub of one's own; `file` is given as for [`Hub::url`].
///
/// # Errors
/// As [`fetch`].
pub(crate) fn fetch_with(
    hub: &Hub,
    file: &str,
    path: &Path,
    watch: Watch<'_>,
) -> Result<(), TextError> {
    if path.exists() {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        create_folder(folder)?;
    }
    let lock = beside(path, ".lock");
    let _held = FileLock::acquire(&lock, watch)?;
    // Another process may have finished it while this one waited.
    if path.exists() {
        return Ok(());
    }
    Part::new(path).complete(hub, file, watch)?;
    // Whoever waits for the lock, or makes another one, will see the file. One that stays does no harm.
    let _ = fs::remove_file(lock);
    Ok(())
}

/// A file in the making.
struct Part<'a> {
    path: &'a Path,
    unfinished: PathBuf,
    tag: PathBuf,
}

impl<'a> Part<'a> {
    fn new(path: &'a Path) -> Self {
        Self {
            path,
            unfinished: beside(path, ".part"),
            tag: beside(path, ".part.tag"),
        }
    }

    fn complete(&self, hub: &Hub, file: &str, watch: Watch<'_>) -> Result<(), TextError> {
        let unwritable = |source| TextError::io("write", &self.unfinished, source);
        let mut part = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&self.unfinished)
            .map_err(unwritable)?;
        let n_bytes = part.metadata().map_err(unwritable)?.len();
        let validator = fs::read_to_string(&self.tag).ok();
        let mut source = hub.open_at(file, n_bytes, validator)?;
        // Shortened before the tag is written, which must never stand beside bytes of another file.
        part.set_len(source.position()).map_err(unwritable)?;
        match source.validator() {
            Some(validator) => write_atomically(&self.tag, validator.as_bytes())?,
            None => drop(fs::remove_file(&self.tag)),
        }
        part.seek(SeekFrom::End(0)).map_err(unwritable)?;
        self.copy(&mut source, &mut part, watch)?;
        self.check(&source, &mut part)?;
        give_name(&part, &self.unfinished, self.path)
            .map_err(|source| TextError::io("write", self.path, source))?;
        // It describes nothing any more, and a new download writes its own.
        let _ = fs::remove_file(&self.tag);
        Ok(())
    }

    fn copy(
        &self,
        source: &mut HubFile,
        part: &mut File,
        watch: Watch<'_>,
    ) -> Result<(), TextError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut next_news = 0;
        loop {
            if source.position() >= next_news {
                watch.check()?;
                watch.tell(Progress::Downloading {
                    url: source.url().to_owned(),
                    done: source.position(),
                    total: source.length().unwrap_or(0),
                });
                next_news = source.position() + NEWS_BYTES;
            }
            let n = source
                .read(&mut buffer)
                .map_err(|error| TextError::from_reader(error, source.url()))?;
            if n == 0 {
                let done = source.position();
                watch.tell(Progress::Downloading {
                    url: source.url().to_owned(),
                    done,
                    total: done,
                });
                return Ok(());
            }
            part.write_all(&buffer[..n])
                .map_err(|source| TextError::io("write", &self.unfinished, source))?;
        }
    }

    /// Compares with the announced checksum, if there is one. A wrong file is removed, or it would be "resumed" for
    /// ever.
    fn check(&self, source: &HubFile, part: &mut File) -> Result<(), TextError> {
        let Some(expected) = source.sha256() else {
            return Ok(());
        };
        let mut hasher = Sha256::new();
        let read = part
            .seek(SeekFrom::Start(0))
            .and_then(|_| io::copy(part, &mut hasher));
        read.map_err(|source| TextError::io("read", &self.unfinished, source))?;
        let found = format!("{:x}", hasher.finalize());
        if found == expected {
            return Ok(());
        }
        fs::remove_file(&self.unfinished)
            .map_err(|source| TextError::io("remove", &self.unfinished, source))?;
        Err(TextError::Checksum {
            url: source.url().to_owned(),
            found,
            expected: expected.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing::{Answer, Server};

    fn content() -> Vec<u8> {
        (0..100_000u32).flat_map(u32::to_le_bytes).collect()
    }

    fn sha256(bytes: &[u8]) -> String {
        format!("{:x}", Sha256::digest(bytes))
    }

    fn fetched(server: &Server, path: &Path) -> Result<(), TextError> {
        fetch_with(&server.hub(), "a/b.zip", path, Watch::nobody())
    }

    fn names(folder: &Path) -> Vec<PathBuf> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn stored_once_below_made_folders_and_nothing_else_stays() {
        let server = Server::start(|request, _| Answer::file(request, &content(), "\"a\""));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x/y/b.zip");
        for _ in 0..2 {
            fetched(&server, &path).unwrap();
        }
        assert!(fs::read(&path).unwrap() == content());
        assert_eq!(server.paths(), ["/a/b.zip"]);
        assert_eq!(names(path.parent().unwrap()), [PathBuf::from("b.zip")]);
    }

    /// The server falls silent at byte 150,000 for the first process; the second asks for the rest only.
    #[test]
    fn a_partial_file_is_resumed_by_range() {
        let server = Server::start(|request, n_before| match n_before {
            0 => Answer::file(request, &content(), "\"a\"").cut(150_000),
            1..=3 => Answer::status(503),
            _ => Answer::file(request, &content(), "\"a\""),
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.zip");
        let error = fetched(&server, &path).unwrap_err();
        assert!(
            matches!(
                error,
                TextError::Network {
                    position: 150_000,
                    ..
                }
            ),
            "{error}"
        );
        assert!(!path.exists());
        fetched(&server, &path).unwrap();
        assert!(fs::read(&path).unwrap() == content());
        let last = server.requests().pop().unwrap();
        assert_eq!(last.start(), 150_000);
        assert_eq!(last.header("if-range"), Some("\"a\""));
        assert_eq!(names(folder.path()), [PathBuf::from("b.zip")]);
    }

    #[test]
    fn a_part_of_a_file_that_changed_is_thrown_away() {
        for changed in [
            |request: &crate::testing::Request| Answer::file(request, b"another", "\"b\""),
            // A server without ranges and tags.
            |_: &crate::testing::Request| Answer::whole(b"another"),
            // One that does not know `If-Range`.
            |request: &crate::testing::Request| match request.start() {
                0 => Answer::whole(b"another").with("ETag", "\"b\""),
                _ => Answer::status(416),
            },
        ] {
            let server = Server::start(move |request, n_before| match n_before {
                0 => Answer::file(request, &content(), "\"a\"").cut(150_000),
                1..=2 => Answer::status(500),
                _ => changed(request),
            });
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("b.zip");
            assert!(fetched(&server, &path).is_err());
            fetched(&server, &path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"another");
        }
    }

    #[test]
    fn a_server_that_ignores_ranges_is_read_up_to_the_place() {
        let server = Server::start(|_, n_before| {
            let answer = Answer::whole(&content()).with("ETag", "\"a\"");
            match n_before {
                0 => answer.cut(150_000),
                1..=2 => Answer::status(429).with("Retry-After", "0"),
                _ => answer,
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.zip");
        assert!(fetched(&server, &path).is_err());
        fetched(&server, &path).unwrap();
        assert!(fs::read(&path).unwrap() == content());
    }

    /// Length and checksum come with the hub's redirect; the other host never sees the token.
    #[test]
    fn the_hubs_checksum_is_compared_and_its_token_stays_with_it() {
        for (announced, is_right) in [(sha256(&content()), true), (sha256(b"other"), false)] {
            let storage = Server::start(|request, _| {
                let tag = format!("\"{}\"", sha256(b"the tag of the storage is no checksum"));
                Answer::file(request, &content(), &tag)
            });
            let target = format!("{}/blob", storage.url());
            let server = Server::start(move |_, _| {
                Answer::status(302)
                    .with("Location", target.clone())
                    .with("X-Linked-ETag", format!("\"{announced}\""))
            });
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("b.zip");
            let mut hub = server.hub();
            hub.token = Some("t0ken".to_owned());
            let outcome = fetch_with(&hub, "a/b.zip", &path, Watch::nobody());
            let seen = |server: &Server| {
                let request = server.requests().pop().unwrap();
                request.header("authorization").map(str::to_owned)
            };
            assert_eq!(seen(&server).as_deref(), Some("bearer t0ken"));
            assert_eq!(seen(&storage), None);
            if is_right {
                outcome.unwrap();
                assert!(fs::read(&path).unwrap() == content());
            } else {
                let error = outcome.unwrap_err();
                assert!(matches!(error, TextError::Checksum { .. }), "{error}");
                assert!(!path.exists() && !beside(&path, ".part").exists());
            }
        }
    }

    #[test]
    fn one_of_many_processes_downloads() {
        let server = Server::start(|request, _| Answer::file(request, &content(), "\"a\""));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.zip");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| fetched(&server, &path).unwrap());
            }
        });
        assert_eq!(server.paths().len(), 1);
        assert!(fs::read(&path).unwrap() == content());
    }

    #[test]
    fn the_host_can_cancel_and_the_part_stays() {
        let server = Server::start(|request, _| Answer::file(request, &vec![7; 3 << 20], "\"a\""));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b.zip");
        let n_asked = AtomicUsize::new(0);
        let is_cancelled = || n_asked.fetch_add(1, Ordering::Relaxed) > 1;
        let watch = Watch {
            progress: &|_| {},
            is_cancelled: &is_cancelled,
        };
        let outcome = fetch_with(&server.hub(), "b.zip", &path, watch);
        assert!(matches!(outcome, Err(TextError::Cancelled)));
        assert!(fs::metadata(beside(&path, ".part")).unwrap().len() >= NEWS_BYTES);
    }

    #[test]
    fn offline_means_offline() {
        let server = Server::start(|_, _| Answer::status(200));
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub {
            is_offline: true,
            ..server.hub()
        };
        let error = fetch_with(&hub, "b.zip", &folder.path().join("b"), Watch::nobody());
        let error = error.unwrap_err();
        assert!(error.help().contains("unset HF_HUB_OFFLINE"), "{error}");
        assert_eq!(server.paths().len(), 0);
    }

    #[test]
    fn an_address_of_the_public_hub_is_looked_for_at_the_endpoint() {
        let server = Server::start(|_, _| Answer::whole(b"x"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b");
        let url = "https://huggingface.co/datasets/a/resolve/main/b";
        fetch_with(&server.hub(), url, &path, Watch::nobody()).unwrap();
        assert_eq!(server.paths(), ["/datasets/a/resolve/main/b"]);
        let elsewhere = "https://example.org/huggingface.co/b";
        assert_eq!(server.hub().url(elsewhere), elsewhere);
    }
}
