//! What the tests of the sets share: files made on the spot, real files, and bytes that nobody meant to be a file.

use std::{
    env,
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use moeut_text::Watch;
use zip::{ZipWriter, write::SimpleFileOptions};

use crate::{error::ChoicesError, file::SetFile, published::Published, questions::Questions};

/// The published files of a set, or `None` where there is no folder with them.
///
/// The folder is `data/eval` of `$MOEUT_SHARED`, or of `shared` beside the repository.
///
/// # Panics
/// If they cannot be read, or if the folder is missing on CI (`CI=true`).
pub fn published_files(published: &Published) -> Option<Vec<SetFile>> {
    let shared = env::var_os("MOEUT_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let folder = shared.join("data/eval");
    if !folder.is_dir() {
        assert!(
            env::var_os("CI").is_none_or(|ci| ci != "true"),
            "no folder `{}`; set MOEUT_SHARED",
            folder.display()
        );
        return None;
    }
    match published.read(Some(&folder), Path::new(""), Watch::nobody()) {
        Ok(files) => Some(files),
        Err(error) => panic!("{error}"),
    }
}

/// `valid` with a piece of it overwritten, as a broken disk or an editor leaves it.
pub fn overwritten(mut valid: Vec<u8>, place: usize, garbage: &[u8]) -> Vec<u8> {
    let start = place % valid.len().max(1);
    for (byte, garbage) in valid[start..].iter_mut().zip(garbage) {
        *byte = *garbage;
    }
    valid
}

/// A file that is nowhere.
pub fn set_file(name: &str, bytes: &[u8]) -> SetFile {
    SetFile {
        name: name.to_owned(),
        place: name.to_owned(),
        url: "https://published",
        bytes: bytes.to_owned(),
    }
}

/// A zip archive of these members.
///
/// # Panics
/// If two of them have the same name.
#[expect(
    clippy::unwrap_used,
    reason = "for tests, and writing into memory does not fail"
)]
pub fn zip_of(members: &[(&str, String)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, text) in members {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Why no questions can be made.
///
/// # Panics
/// If they can.
pub fn why(outcome: Result<Questions, ChoicesError>) -> String {
    match outcome {
        Ok(questions) => panic!("{} questions instead of an error", questions.list.len()),
        Err(error) => error.to_string(),
    }
}
