//! The text of the figure on code: source files below any folder, as documents.
//!
//! ```text
//! <folder>/train-<n>.jsonl   documents to train on
//! <folder>/valid.jsonl       those of every twentieth file, held out as a whole
//! ```
//! A document is a piece of a file, cut at the end of a line: the trainer of the tokenizer passes over whatever is longer
//! than 4192 bytes, which most source files are, and would be left with too little text for a whole vocabulary.

use crate::files;
use crate::make::say;
use moeut_host::error::HostError;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Endings of source files.
const ENDINGS: [&str; 8] = ["rs", "py", "c", "h", "cpp", "java", "js", "go"];
/// The longest document, bytes.
const MAX_PIECE: usize = 4000;
/// One of so many files is held out.
const HELD_OUT: usize = 20;
/// Bytes of documents in a file, several of which are read at once.
const SHARD: usize = 8_000_000;

/// How much is taken, bytes.
pub(crate) struct Amount {
    /// With less there is no figure.
    pub(crate) least: usize,
    /// More is left where it is.
    pub(crate) enough: usize,
}

/// Writes the documents into `folder`, unless that was done: then they stay what runs were trained on.
///
/// # Errors
/// If there is too little source below `from`, or a file cannot be written.
pub(crate) fn write(from: &Path, folder: &Path, amount: &Amount) -> Result<(), HostError> {
    if folder.is_dir() {
        let there = folder.display();
        say(&format!(
            "{there}: the code is there; another one needs another `-out`"
        ));
        return Ok(());
    }
    let found = Documents::find(from, amount.enough);
    if found.n_bytes < amount.least {
        return Err(too_little(from, &found, amount));
    }
    let wrong = |error: std::io::Error| {
        HostError::new(
            format!("`{}` cannot be made", folder.display()),
            error.to_string(),
            "check permissions and free space, or set `-out` to another folder",
        )
    };
    // Under its name it is whole, or not there.
    let unfinished = folder.with_extension("unfinished");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished).map_err(wrong)?;
    }
    for (index, shard) in found.train.iter().enumerate() {
        let name = format!("train-{index:03}.jsonl");
        files::write(&unfinished.join(name), shard.as_bytes())?;
    }
    if !found.held_out.is_empty() {
        let path = unfinished.join("valid.jsonl");
        files::write(&path, found.held_out.as_bytes())?;
    }
    std::fs::rename(&unfinished, folder).map_err(wrong)
}

fn too_little(from: &Path, found: &Documents, amount: &Amount) -> HostError {
    HostError::new(
        "there is too little code for the figure on code",
        format!(
            "the files below `{}` that end in {} have {:.1} MB, and {:.1} MB are needed",
            from.display(),
            ENDINGS.map(|ending| format!(".{ending}")).join(" "),
            found.n_bytes as f64 / 1e6,
            amount.least as f64 / 1e6
        ),
        "set `-code` to a folder with more: a clone of this project, `~/.cargo/registry/src` or `/usr`, say; folders named \
         `.…` or `target` in it do not count, nor lines of more than 4000 bytes",
    )
}

/// Lines of JSON.
#[derive(Debug, Default)]
struct Documents {
    train: Vec<String>,
    held_out: String,
    /// Of source.
    n_bytes: usize,
}

impl Documents {
    /// Takes files in the order of their paths until there are `enough` bytes.
    fn find(from: &Path, enough: usize) -> Self {
        let mut paths = Vec::new();
        find_files(from, &mut paths);
        paths.sort();
        let mut documents = Self::default();
        // What is no text is no source.
        let texts = paths
            .iter()
            .filter_map(|path| std::fs::read_to_string(path).ok());
        for (index, text) in texts.enumerate() {
            // Not the first one: it may be the only one.
            documents.add(&text, index % HELD_OUT == 1);
            if documents.n_bytes >= enough {
                break;
            }
        }
        documents
    }

    fn add(&mut self, text: &str, is_held_out: bool) {
        for piece in pieces(text) {
            self.n_bytes += piece.len();
            let line = format!("{}\n", json!({ "text": piece }));
            if is_held_out {
                self.held_out.push_str(&line);
                continue;
            }
            match self.train.last_mut() {
                Some(shard) if shard.len() < SHARD => shard.push_str(&line),
                _ => self.train.push(line),
            }
        }
    }
}

/// Whole lines, as many as fit into each piece. A line that fits into none was written by no person, and is left out.
fn pieces(text: &str) -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    for line in text.split_inclusive('\n') {
        match pieces.last_mut() {
            _ if line.len() > MAX_PIECE => {}
            Some(piece) if piece.len() + line.len() <= MAX_PIECE => piece.push_str(line),
            _ => pieces.push(line.to_owned()),
        }
    }
    pieces.retain(|piece| !piece.trim().is_empty());
    pieces
}

/// Source files below a folder; not hidden ones, nor those that were built.
fn find_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if !name.starts_with('.') && name != "target" {
                find_files(&path, found);
            }
        } else if path
            .extension()
            .is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known))
        {
            found.push(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_lines_and_short_enough_for_the_trainer() {
        let long = "x".repeat(MAX_PIECE);
        let text = format!("fn a() {{\n}}\n{long}\n{}", "    let b = 1;\n".repeat(600));
        let pieces = pieces(&text);
        assert!(pieces.len() > 2, "{}", pieces.len());
        assert!(
            pieces
                .iter()
                .all(|piece| piece.len() <= MAX_PIECE && piece.ends_with('\n'))
        );
        assert_eq!(pieces.concat(), text.replace(&format!("{long}\n"), ""));
    }

    #[test]
    fn a_file_is_held_out_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        for folder in ["a", ".git", "target"] {
            std::fs::create_dir_all(from.join(folder)).unwrap();
        }
        for index in 0..25 {
            let text = format!("let file = {index};\n").repeat(1000);
            std::fs::write(from.join(format!("a/{index:02}.rs")), text).unwrap();
        }
        for left_out in [".git/hidden.rs", "target/built.rs", "a/notes.txt"] {
            std::fs::write(from.join(left_out), "let other = 1;\n").unwrap();
        }
        let folder = dir.path().join("code");
        let amount = |least| Amount {
            least,
            enough: 10_000_000,
        };
        let error = write(&from, &folder, &amount(1_000_000)).unwrap_err();
        let said = crate::run::one_line(&error);
        assert!(
            said.contains("have 0.4 MB, and 1.0 MB are needed"),
            "{said}"
        );
        assert!(!folder.exists());

        // What a start left that was ended before this one is not taken along.
        let unfinished = dir.path().join("code.unfinished");
        std::fs::create_dir(&unfinished).unwrap();
        std::fs::write(unfinished.join("train-009.jsonl"), "{}").unwrap();
        write(&from, &folder, &amount(100_000)).unwrap();
        assert!(!folder.join("train-009.jsonl").exists());
        let numbers = |name: &str| {
            let text = std::fs::read_to_string(folder.join(name)).unwrap();
            let mut numbers = Vec::new();
            for line in text.lines() {
                let document: serde_json::Value = serde_json::from_str(line).unwrap();
                let first = document["text"].as_str().unwrap().lines().next().unwrap();
                numbers.push(first.to_owned());
            }
            numbers.dedup();
            numbers
        };
        assert_eq!(numbers("valid.jsonl"), ["let file = 1;", "let file = 21;"]);
        assert_eq!(numbers("train-000.jsonl").len(), 23);
        assert!(!unfinished.exists());

        // What is there stays, whatever has become of its source.
        std::fs::remove_dir_all(&from).unwrap();
        write(&from, &folder, &amount(100_000)).unwrap();
    }
}
