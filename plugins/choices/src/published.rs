//! Which files a set is made of, and how they are found: in a folder of the user's, or downloaded into the cache.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use moeut_plugin_api::{ArgSpec, Host, LogLevel, PluginError};
use moeut_text::{Progress, Watch, download::fetch};
use serde::Deserialize;

use crate::{
    archive::{is_meant, tar_gz_members, zip_members},
    error::ChoicesError,
    file::SetFile,
    questions::Questions,
};

/// The argument that every set has; it fills [`DataDir::dir`].
pub const DATA_DIR: ArgSpec = ArgSpec::text("data.dir", "none")
    .field("dir")
    .optional()
    .help("Folder with the files of evaluation sets, at any depth, instead of a download");

/// The configuration of a set whose only argument is [`DATA_DIR`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataDir {
    /// A folder with the files, at any depth.
    pub dir: Option<PathBuf>,
}

/// The published files of a set.
#[derive(Debug, Clone, Copy)]
pub struct Published {
    /// The set's name.
    pub set: &'static str,
    /// Names of the files, in the order of reading; `*` stands for any characters. A file of each name is there once.
    pub files: &'static [&'static str],
    /// Whether one of the files is enough.
    pub is_one_enough: bool,
    /// What is downloaded: the files, or an archive with them.
    pub urls: &'static [&'static str],
    /// Folder for it in the cache, the reference's.
    pub cache_folder: &'static str,
}

impl Published {
    /// Finds the files in `dir`, or downloads them, and has `read` make questions of them while the host listens.
    ///
    /// # Errors
    /// If a file is missing, there twice, or damaged, or no question is left.
    pub fn open(
        &self,
        dir: Option<&Path>,
        host: &Host,
        read: impl FnOnce(&[SetFile], Watch<'_>) -> Result<Questions, ChoicesError>,
    ) -> Result<Questions, PluginError> {
        let progress = |news: Progress| report(host, &news);
        let is_cancelled = || host.is_cancelled();
        let watch = Watch {
            progress: &progress,
            is_cancelled: &is_cancelled,
        };
        let files = self.read(dir, &host.info().cache_dir, watch)?;
        let questions = read(&files, watch)?;
        if questions.list.is_empty() {
            return Err(PluginError::from(ChoicesError::NothingLeft {
                set: self.set,
                n_skipped: questions.n_skipped,
            }));
        }
        Ok(questions)
    }

    /// The files, in the order of [`Published::files`].
    ///
    /// # Errors
    /// If one is missing, there twice, or cannot be read.
    pub fn read(
        &self,
        dir: Option<&Path>,
        cache_dir: &Path,
        watch: Watch<'_>,
    ) -> Result<Vec<SetFile>, ChoicesError> {
        if let Some(dir) = dir {
            let found = search(dir, self.files, watch)?;
            let files = found.iter().map(|path| self.read_file(path));
            return self.in_order(files.collect::<Result<_, _>>()?, |names, url| {
                ChoicesError::Missing {
                    set: self.set,
                    dir: dir.to_owned(),
                    names,
                    url,
                }
            });
        }
        let folder = cache_dir.join(self.cache_folder);
        let mut files = Vec::new();
        for url in self.urls {
            let path = folder.join(last_part(url));
            fetch(url, &path, watch)?;
            files.extend(self.read_download(&path, url, watch)?);
        }
        self.in_order(files, |names, url| ChoicesError::NotInArchive {
            archive: folder.join(last_part(url)),
            names,
            url,
        })
    }

    /// Where the file at a position of [`Published::files`] is published: by itself, or in an archive of them all.
    fn url(&self, position: usize) -> &'static str {
        self.urls.get(position).unwrap_or(&self.urls[0])
    }

    fn read_file(&self, path: &Path) -> Result<SetFile, ChoicesError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let position = self.files.iter().position(|file| is_meant(file, &name));
        let url = self.url(position.unwrap_or(0));
        SetFile::read(&name, path.display().to_string(), url, open(path)?)
    }

    /// The files in a download, which is one of them, or an archive.
    fn read_download(
        &self,
        path: &Path,
        url: &'static str,
        watch: Watch<'_>,
    ) -> Result<Vec<SetFile>, ChoicesError> {
        let place = path.display().to_string();
        let is_file = self.files.iter().any(|file| is_meant(file, url));
        match path.extension().and_then(|ending| ending.to_str()) {
            _ if is_file => Ok(vec![SetFile::read(url, place, url, open(path)?)?]),
            Some("zip") => zip_members(&place, url, open(path)?, self.files, watch),
            _ => tar_gz_members(&place, url, open(path)?, self.files, watch),
        }
    }

    /// Sorts files by their names, of which there must be one each; `missing` makes an error of names and address.
    fn in_order(
        &self,
        mut found: Vec<SetFile>,
        missing: impl FnOnce(Vec<&'static str>, &'static str) -> ChoicesError,
    ) -> Result<Vec<SetFile>, ChoicesError> {
        let mut files = Vec::new();
        let mut absent = Vec::new();
        for (position, &name) in self.files.iter().enumerate() {
            let is_same = |file: &SetFile| is_meant(name, &file.name);
            let (mut same, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(is_same);
            found = rest;
            if let [first, second, ..] = &same[..] {
                return Err(ChoicesError::Twice {
                    set: self.set,
                    name,
                    first: first.place.clone(),
                    second: second.place.clone(),
                });
            }
            match same.pop() {
                Some(file) => files.push(file),
                None => absent.push((position, name)),
            }
        }
        match absent.first() {
            Some(&(first, _)) if files.is_empty() || !self.is_one_enough => {
                let names = absent.into_iter().map(|(_, name)| name).collect();
                Err(missing(names, self.url(first)))
            }
            _ => Ok(files),
        }
    }
}

fn last_part(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

fn open(path: &Path) -> Result<File, ChoicesError> {
    File::open(path).map_err(|source| ChoicesError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Files in a folder and below it that one of `names` means, sorted by path.
///
/// Links are followed, but no folder or file is visited twice, so that a loop of links ends and a file that several links
/// lead to is found once. A folder below that cannot be read is left out with a warning: `lost+found` is on every disk.
fn search(dir: &Path, names: &[&str], watch: Watch<'_>) -> Result<Vec<PathBuf>, ChoicesError> {
    let mut folders = vec![dir.to_owned()];
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        watch.check()?;
        let entries = folder.canonicalize().and_then(|real| {
            if !seen.insert(real) {
                return Ok(Vec::new());
            }
            let paths = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path()));
            paths.collect::<io::Result<Vec<PathBuf>>>()
        });
        let mut paths = match entries {
            Ok(paths) => paths,
            Err(source) if folder == dir => {
                return Err(ChoicesError::Folder {
                    dir: folder,
                    source,
                });
            }
            Err(error) => {
                let place = folder.display();
                let text = format!("`{place}` is not searched for questions: {error}");
                watch.tell(Progress::Warning(text));
                continue;
            }
        };
        // Which of several links to a file is the one that is found does not depend on the file system's order.
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                folders.push(path);
            } else if path.is_file()
                && names.iter().any(|pattern| is_meant(pattern, &name))
                && path.canonicalize().is_ok_and(|real| seen.insert(real))
            {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn report(host: &Host, news: &Progress) {
    match news {
        Progress::WaitingForLock { path } => host.log(
            LogLevel::Info,
            &format!(
                "another process downloads the questions; waiting for `{}`",
                path.display()
            ),
        ),
        Progress::Downloading { url, done, total } => {
            host.progress(&format!("downloading {url}"), *done, *total);
        }
        Progress::Warning(text) => host.log(LogLevel::Warning, text),
        // `Progress` is open, and the rest of it is about tokens.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use moeut_plugin_api::{
        DType, Device, HostInfo,
        abi::client::{HostServices, KernelClient, host_in_process},
    };

    use super::*;

    const PAIR: Published = Published {
        set: "pair",
        files: &["valid.jsonl", "valid-*.lst"],
        is_one_enough: false,
        urls: &["https://a/valid.jsonl", "https://a/valid-labels.lst"],
        cache_folder: "Pair/data",
    };

    fn write(folder: &Path, path: &str, text: &str) {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(published: &Published, dir: &Path) -> Result<Vec<String>, ChoicesError> {
        let files = published.read(Some(dir), Path::new("no cache"), Watch::nobody())?;
        let texts = files.into_iter().map(|file| String::from_utf8(file.bytes));
        Ok(texts.map(Result::unwrap).collect())
    }

    fn parts(error: &ChoicesError, dir: &Path) -> [String; 3] {
        let shown = dir.display().to_string();
        [error.what(), error.to_string(), error.help()].map(|part| part.replace(&shown, "DIR"))
    }

    #[test]
    fn files_are_found_at_any_depth_whatever_links_there_are() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        write(dir, "z/deep/valid.jsonl", "questions");
        write(dir, "a/valid-labels.lst", "labels");
        write(dir, "a/invalid.jsonl", "another");
        fs::create_dir(dir.join("b/")).unwrap();
        for (target, link) in [
            (dir.to_owned(), "z/deep/loop"),
            (dir.join("z/deep/valid.jsonl"), "b/valid.jsonl"),
            (dir.join("nowhere"), "b/valid-nothing.lst"),
            (PathBuf::from("itself"), "b/itself"),
        ] {
            std::os::unix::fs::symlink(target, dir.join(link)).unwrap();
        }
        assert_eq!(read(&PAIR, dir).unwrap(), ["questions", "labels"]);
    }

    #[test]
    fn a_missing_file_is_named_with_where_to_get_it() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        write(dir, "valid.jsonl", "questions");
        assert_eq!(
            parts(&read(&PAIR, dir).unwrap_err(), dir),
            [
                "the questions of `pair` are missing",
                "no file in `DIR` or below is named `valid-*.lst`",
                "get it from https://a/valid-labels.lst and put it there, or leave out `-data.dir` to have it downloaded"
            ]
        );
        let any = Published {
            is_one_enough: true,
            ..PAIR
        };
        assert_eq!(read(&any, dir).unwrap(), ["questions"]);
        fs::remove_file(dir.join("valid.jsonl")).unwrap();
        let error = read(&any, dir).unwrap_err().to_string();
        assert!(
            error.ends_with(" is named `valid.jsonl` or `valid-*.lst`"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_there_twice_is_an_error_with_both_paths() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        write(dir, "b/valid.jsonl", "");
        write(dir, "a/valid.jsonl", "");
        assert_eq!(
            parts(&read(&PAIR, dir).unwrap_err(), dir),
            [
                "the questions of `pair` are there twice",
                "both `DIR/a/valid.jsonl` and `DIR/b/valid.jsonl` could be `valid.jsonl`",
                "name a folder with one of them only, or move the other one away"
            ]
        );
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("no");
        assert_eq!(
            parts(&read(&PAIR, &dir).unwrap_err(), &dir),
            [
                "`-data.dir DIR` cannot be used",
                "No such file or directory (os error 2)",
                "name a folder that you may read, or leave out `-data.dir` to have files downloaded"
            ]
        );
    }

    /// A host that keeps what it is told.
    struct Listener {
        cache_dir: PathBuf,
        is_cancelled: bool,
        news: Mutex<Vec<String>>,
    }

    impl HostServices for Listener {
        fn info(&self) -> HostInfo {
            HostInfo {
                n_ranks: 1,
                cache_dir: self.cache_dir.clone(),
                n_threads: 1,
                compat: false,
            }
        }

        fn log(&self, _: LogLevel, text: &str) {
            self.news.lock().unwrap().push(text.to_owned());
        }

        fn progress(&self, label: &str, done: u64, total: u64) {
            self.log(LogLevel::Info, &format!("{label} {done}/{total}"));
        }

        fn is_cancelled(&self) -> bool {
            self.is_cancelled
        }

        fn kernel(&self, _: &str, _: Device, _: DType) -> Result<KernelClient, PluginError> {
            Err(PluginError::new("no kernels"))
        }
    }

    #[test]
    fn the_host_listens_stops_and_hears_when_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "valid.jsonl", "questions");
        write(folder.path(), "valid-labels.lst", "labels");
        let open = |is_cancelled| {
            let listener = Arc::new(Listener {
                cache_dir: folder.path().join("cache"),
                is_cancelled,
                news: Mutex::default(),
            });
            let services: Arc<dyn HostServices> = listener.clone();
            let host = host_in_process(&services).unwrap();
            let opened = PAIR.open(Some(folder.path()), &host, |_, watch| {
                watch.tell(Progress::Warning("two are odd".to_owned()));
                watch.tell(Progress::Downloading {
                    url: "https://a".to_owned(),
                    done: 1,
                    total: 2,
                });
                Ok(Questions {
                    n_skipped: 2,
                    ..Questions::default()
                })
            });
            (opened.unwrap_err(), listener.news.lock().unwrap().clone())
        };
        let (error, news) = open(false);
        assert_eq!(news, ["two are odd", "downloading https://a 1/2"]);
        assert_eq!(error.what, "`pair` has no questions");
        assert_eq!(
            error.why,
            "its rules leave out all questions of its files: 2"
        );
        let (error, news) = open(true);
        assert_eq!((&*error.why, news.len()), ("the run was cancelled", 0));
    }

    /// A download that is there is not fetched again, so these need no network.
    #[test]
    fn downloads_are_files_or_archives_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path();
        write(cache, "Pair/data/valid.jsonl", "questions");
        write(cache, "Pair/data/valid-labels.lst", "labels");
        let files = PAIR.read(None, cache, Watch::nobody()).unwrap();
        let names: Vec<_> = files.iter().map(|file| &*file.name).collect();
        assert_eq!(names, ["valid.jsonl", "valid-labels.lst"]);

        let packed = Published {
            urls: &["https://a/Pair.tgz"],
            ..PAIR
        };
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(
            File::create(cache.join("Pair/data/Pair.tgz")).unwrap(),
            flate2::Compression::fast(),
        ));
        tar.append_path_with_name(cache.join("Pair/data/valid.jsonl"), "pair/valid.jsonl")
            .unwrap();
        tar.into_inner().unwrap().finish().unwrap();
        let error = packed.read(None, cache, Watch::nobody()).unwrap_err();
        assert_eq!(
            parts(&error, cache),
            [
                "a file of questions is damaged",
                "`DIR/Pair/data/Pair.tgz` has no file named `valid-*.lst`",
                "replace `DIR/Pair/data/Pair.tgz` by what is published as https://a/Pair.tgz"
            ]
        );
    }
}
