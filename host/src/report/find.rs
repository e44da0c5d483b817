//! Which runs are meant: a run's folder, a sweep's folder, or any folder with runs below it.

use crate::error::HostError;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Files of which every run has at least one.
const SIGNS: [&str; 3] = ["metrics.jsonl", "args.json", "startup_log.txt"];

/// How deep below a folder runs are looked for: `save/<sweep>/<run>`.
const MAX_DEPTH: usize = 3;

/// A run and what to call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// Its folder.
    pub(super) folder: PathBuf,
    /// The folder's name; with those above it where several runs have the same.
    pub(super) name: String,
}

/// The runs of all folders, each once, in the given order; those below one folder by name. Also remarks.
///
/// # Errors
/// For a folder that is not there, and one without runs.
pub(super) fn find(folders: &[&str]) -> Result<(Vec<Place>, Vec<String>), HostError> {
    let mut remarks = Vec::new();
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for folder in folders {
        let folder = Path::new(folder);
        let runs = runs_of(folder)?;
        for run in runs {
            let real = run.canonicalize().unwrap_or_else(|_| run.clone());
            if seen.insert(real) {
                found.push(run);
            } else {
                remarks.push(format!("`{}` is named twice and shown once", run.display()));
            }
        }
    }
    let names = names(&found);
    let places = found.into_iter().zip(names);
    let places = places.map(|(folder, name)| Place { folder, name });
    Ok((places.collect(), remarks))
}

fn is_run(folder: &Path) -> bool {
    SIGNS.iter().any(|sign| folder.join(sign).is_file())
}

fn runs_of(folder: &Path) -> Result<Vec<PathBuf>, HostError> {
    if let Err(error) = std::fs::read_dir(folder) {
        return Err(HostError::new(
            format!("`{}` cannot be reported on", folder.display()),
            error.to_string(),
            "name the folder of a run, `save/<name>`, or one with runs below it",
        ));
    }
    if is_run(folder) {
        return Ok(vec![folder.to_owned()]);
    }
    let mut runs = Vec::new();
    if let Some(sweep) = sweep_of(folder) {
        collect(&sweep.0, 1, &mut runs);
        runs.retain(|run| is_of_sweep(run, &sweep.1));
    } else {
        collect(folder, MAX_DEPTH, &mut runs);
    }
    if runs.is_empty() {
        return Err(HostError::new(
            format!("`{}` is no run", folder.display()),
            format!(
                "it has none of `{}`, and there is no run below it",
                SIGNS.join("`, `")
            ),
            "name the folder of a run, `save/<name>`, or one with runs below it",
        ));
    }
    runs.sort_by(|a, b| natural(&a.to_string_lossy(), &b.to_string_lossy()));
    Ok(runs)
}

/// `save/s.sweep` is about the runs `save/s-1`, `save/s-2`, …: the folder that they are in, and `s`.
fn sweep_of(folder: &Path) -> Option<(PathBuf, String)> {
    let folder = folder.canonicalize().ok()?;
    let sweep = folder.file_name()?.to_str()?.strip_suffix(".sweep")?;
    Some((folder.parent()?.to_owned(), sweep.to_owned()))
}

fn is_of_sweep(run: &Path, sweep: &str) -> bool {
    let name = run.file_name().and_then(|name| name.to_str());
    let number = name
        .and_then(|name| name.strip_prefix(sweep))
        .and_then(|rest| rest.strip_prefix('-'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Adds the runs below a folder, not those inside of runs. What cannot be read has none.
fn collect(folder: &Path, depth: usize, runs: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
    {
        if is_run(&path) {
            runs.push(path);
        } else if depth > 1 {
            collect(&path, depth - 1, runs);
        }
    }
}

/// The last part of each path, and as many before it as it takes to tell the runs apart.
fn names(folders: &[PathBuf]) -> Vec<String> {
    let whole = |folder: &PathBuf| folder.canonicalize().unwrap_or_else(|_| folder.clone());
    let paths: Vec<PathBuf> = folders.iter().map(whole).collect();
    let tail = |path: &Path, n_parts: usize| {
        let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
        parts[parts.len().saturating_sub(n_parts)..].join("/")
    };
    let name = |path: &PathBuf| {
        let n_max = path.iter().count().max(1);
        let is_alone = |n_parts: &usize| {
            let same = |other: &&PathBuf| tail(other, *n_parts) == tail(path, *n_parts);
            paths.iter().filter(same).count() == 1
        };
        tail(path, (1..n_max).find(is_alone).unwrap_or(n_max))
    };
    paths.iter().map(name).collect()
}

/// `a-2` comes before `a-10`.
fn natural(a: &str, b: &str) -> Ordering {
    fn pieces(text: &str) -> Vec<(bool, &str)> {
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        text.as_bytes()
            .chunk_by(|x, y| is_digit(x) == is_digit(y))
            .scan(0, |start, chunk| {
                let range = *start..*start + chunk.len();
                *start = range.end;
                // A change between digits and others is at a character's border.
                Some((is_digit(&chunk[0]), &text[range]))
            })
            .collect()
    }
    let (a_pieces, b_pieces) = (pieces(a), pieces(b));
    for ((a_is_number, a), (b_is_number, b)) in a_pieces.iter().zip(&b_pieces) {
        let order = if *a_is_number && *b_is_number {
            let digits = |text: &str| text.trim_start_matches('0').len();
            digits(a).cmp(&digits(b)).then(a.cmp(b))
        } else {
            a.cmp(b)
        };
        if order.is_ne() {
            return order;
        }
    }
    a_pieces.len().cmp(&b_pieces.len()).then(a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(runs: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for run in runs {
            let folder = dir.path().join(run);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("args.json"), "{}").unwrap();
        }
        dir
    }

    fn found(dir: &tempfile::TempDir, folders: &[&str]) -> (Vec<String>, usize) {
        let paths: Vec<String> = folders
            .iter()
            .map(|folder| dir.path().join(folder).display().to_string())
            .collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let (places, remarks) = find(&paths).unwrap();
        (
            places.into_iter().map(|place| place.name).collect(),
            remarks.len(),
        )
    }

    #[test]
    fn runs_are_found_below_a_folder_in_natural_order_and_once() {
        let dir = tree(&[
            "save/s-10",
            "save/s-2",
            "save/b",
            "save/b/export",
            "other/b",
            "save/t-1",
        ]);
        assert_eq!(found(&dir, &["save/b"]), (vec!["b".to_owned()], 0));
        let (names, n_remarks) = found(&dir, &["save", "save/b"]);
        assert_eq!(
            (names.join(" "), n_remarks),
            ("b s-2 s-10 t-1".to_owned(), 1)
        );
        let (names, _) = found(&dir, &["other/b", "save/b"]);
        assert_eq!(names, ["other/b", "save/b"]);
    }

    #[test]
    fn a_sweeps_folder_stands_for_its_runs() {
        let dir = tree(&["save/s-10", "save/s-2", "save/s-x", "save/s", "save/ss-1"]);
        std::fs::create_dir(dir.path().join("save/s.sweep")).unwrap();
        assert_eq!(found(&dir, &["save/s.sweep"]).0, ["s-2", "s-10"]);
    }

    #[test]
    fn names_that_share_a_beginning_are_in_order() {
        let mut names = ["a-10", "a-9", "a-009", "b", "a", "ä-1", "10"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["10", "a", "a-009", "a-9", "a-10", "b", "ä-1"]);
    }
}
