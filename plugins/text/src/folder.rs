//! Any files of text below a folder: which there are, in what order, and which of them are for validation.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    corpus::Split,
    documents::{ENDINGS, Share, is_readable},
    error::TextError,
    shards::Shard,
};

/// Small files are tokenized together until they have this many bytes: a chunk for each of a million files would be a
/// million memory maps.
const SHARD_BYTES: u64 = 64 << 20;

/// Names, or parts of names, of files and folders whose documents are for validation.
const VALIDATION_WORDS: &[&str] = &["valid", "validation", "dev", "test"];

/// The paths of all files below a folder, relative to it, with `/` between folders, sorted. Links are followed, each
/// folder once; hidden files and folders are not looked at.
///
/// # Errors
/// A folder cannot be read, or a name is not UTF-8.
fn relative_files(root: &Path) -> Result<Vec<String>, TextError> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_owned(), String::new())];
    let mut seen = HashSet::new();
    while let Some((folder, prefix)) = folders.pop() {
        let unreadable = |source| TextError::io("read", &folder, source);
        if !seen.insert(folder.canonicalize().map_err(unreadable)?) {
            continue;
        }
        for name in names_in(&folder)? {
            let path = folder.join(&name);
            let relative = format!("{prefix}{name}");
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                folders.push((path, relative + "/"));
            } else {
                files.push(relative);
            }
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Names in a folder, sorted.
///
/// # Errors
/// It cannot be read, or a name is not UTF-8.
pub(crate) fn names_in(folder: &Path) -> Result<Vec<String>, TextError> {
    let unreadable = |source| TextError::io("read", folder, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        names.push(name.into_string().map_err(|name| {
            let why = std::io::Error::other("its name is not UTF-8");
            TextError::io("read", &folder.join(name), why)
        })?);
    }
    names.sort_unstable();
    Ok(names)
}

/// The shards of a split of any files. If some are for validation by their names, they are, and the others train; else
/// `valid_share` of all documents is.
///
/// # Errors
/// The folder cannot be read, or has no text for the split.
pub(crate) fn loose_files(
    root: &Path,
    split: Split,
    valid_share: f64,
) -> Result<(Vec<Shard>, Option<Share>), TextError> {
    if split == Split::Test {
        return Err(TextError::NoSplit {
            class: "text_files",
            split: split.name(),
        });
    }
    let wants_validation = split == Split::Validation;
    let mut files = relative_files(root)?;
    files.retain(|file| is_readable(file));
    let (for_validation, for_training): (Vec<String>, Vec<String>) =
        files.into_iter().partition(|file| is_for_validation(file));
    let (files, share) = if for_validation.is_empty() {
        let share = Share {
            validation: valid_share,
            wants_validation,
        };
        (for_training, Some(share))
    } else if wants_validation {
        (for_validation, None)
    } else {
        (for_training, None)
    };
    if files.is_empty() {
        return Err(TextError::NoShards {
            place: format!("`{}`", root.display()),
            pattern: ENDINGS.to_owned(),
            split: split.name(),
        });
    }
    let mut shards = Vec::new();
    let mut together: Vec<PathBuf> = Vec::new();
    let mut n_bytes = 0;
    for file in files {
        let path = root.join(file);
        let metadata =
            fs::metadata(&path).map_err(|source| TextError::io("read", &path, source))?;
        n_bytes += metadata.len();
        together.push(path);
        if n_bytes >= SHARD_BYTES {
            shards.push(Shard::of_files(std::mem::take(&mut together), root)?);
            n_bytes = 0;
        }
    }
    if !together.is_empty() {
        shards.push(Shard::of_files(together, root)?);
    }
    Ok((shards, share))
}

/// Whether a word of the path says so: `data/valid/a.txt`, `wiki.test.jsonl`, `dev-00.parquet`.
fn is_for_validation(path: &str) -> bool {
    path.to_ascii_lowercase()
        .split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| VALIDATION_WORDS.contains(&word))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{corpus::Corpus, shards::ShardSource, testing::shard_of};

    fn folder_of(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        folder
    }

    /// The documents of a split; a text file's text is its own path.
    fn texts(folder: &Path, split: Split) -> Result<Vec<String>, TextError> {
        let source = ShardSource::Folder(folder.to_owned());
        let shards = source.shards(&Corpus::loose("text", 0.5), split)?;
        let documents = (0..shards.len()).flat_map(|index| shards.documents(index).unwrap());
        documents.collect()
    }

    #[test]
    fn files_that_say_so_are_for_validation() {
        let folder = folder_of(&[
            "b/one.txt",
            "a.md",
            "b/valid/two.txt",
            "b/Dev-00.txt",
            "latest/contest.txt",
            "picture.png",
            ".hidden/x.txt",
        ]);
        assert_eq!(
            texts(folder.path(), Split::Validation).unwrap(),
            ["b/Dev-00.txt", "b/valid/two.txt"]
        );
        assert_eq!(
            texts(folder.path(), Split::Train).unwrap(),
            ["a.md", "b/one.txt", "latest/contest.txt"]
        );
    }

    #[test]
    fn else_a_share_of_the_documents_is() {
        let names: Vec<String> = (0..100).map(|i| format!("{i:02}.txt")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let folder = folder_of(&names);
        let train = texts(folder.path(), Split::Train).unwrap();
        let mut all = texts(folder.path(), Split::Validation).unwrap();
        assert!((30..70).contains(&all.len()), "{}", all.len());
        all.extend(train);
        all.sort();
        assert_eq!(all, names);
    }

    #[test]
    fn a_link_that_leads_round_is_followed_once() {
        let folder = folder_of(&["a/one.txt", "b/two.txt"]);
        symlink("../b", folder.path().join("a/to_b")).unwrap();
        symlink("../a", folder.path().join("b/to_a")).unwrap();
        let mut files = relative_files(folder.path()).unwrap();
        files.sort();
        assert_eq!(files.len(), 2, "{files:?}");
    }

    #[test]
    fn no_text_and_no_folder_are_errors() {
        let folder = folder_of(&["picture.png"]);
        let error = texts(folder.path(), Split::Train).unwrap_err();
        assert!(error.help().contains(".jsonl .json.gz"), "{}", error.help());
        assert!(texts(&folder.path().join("gone"), Split::Train).is_err());
        assert!(matches!(
            texts(folder.path(), Split::Test),
            Err(TextError::NoSplit { .. })
        ));
    }

    /// A fingerprint changes with what a shard is made of, and with nothing else.
    #[test]
    fn the_fingerprint_follows_the_files() {
        let folder = folder_of(&["one.txt"]);
        let path = folder.path().join("two.json.gz");
        let fingerprint = || {
            let source = ShardSource::Folder(folder.path().to_owned());
            let shards = source.shards(&Corpus::loose("text", 0.5), Split::Train);
            shards.unwrap().fingerprint(0).unwrap().to_owned()
        };
        let first = fingerprint();
        assert_eq!(fingerprint(), first);
        fs::write(&path, shard_of(&["a"])).unwrap();
        let second = fingerprint();
        assert_ne!(second, first);
        fs::rename(&path, folder.path().join("three.json.gz")).unwrap();
        assert_ne!(fingerprint(), second);
    }
}
