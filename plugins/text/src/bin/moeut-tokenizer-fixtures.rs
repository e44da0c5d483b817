//! `moeut-tokenizer-fixtures <folder>`: every recorded tokenizer of a folder, and of those below it, against this crate.
//!
//! Developers start it with `cargo xtask fixtures`. A recorded tokenizer is a folder with `tokenizer.model.model` and
//! `tokenizer.model.vocab` as the Python package trained them, and `expected.json`: ids of odd strings, the SHA-256 of the
//! ids of named shards, and the shards that it was trained on. Shards are found by their names, in a corpus below
//! `data/lm` of the shared folder or in the one inside the `c4` plugin; of several, it is the one with as many documents.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a command line program: this is its user interface"
)]

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use moeut_text::{
    Tokenizer,
    sentencepiece::{SentencePiece, train_bpe},
    shards::Documents,
    token_cache::SEPARATOR,
    tokenizer::{MODEL_FILE, VOCAB_FILE},
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// What a recorded tokenizer must do.
#[derive(Deserialize)]
struct Expected {
    vocab_size: usize,
    /// Names of shards.
    trained_on: Vec<String>,
    /// Names of the shards that the next four are about.
    encoded: Vec<String>,
    n_docs: usize,
    n_tokens: usize,
    first_ids: Vec<i32>,
    /// Of all ids, as little-endian `int16`.
    sha256_int16_le: String,
    /// In words; names the separator if there is one.
    rule: String,
    odd_strings: Vec<(String, Vec<i32>)>,
}

/// What happened to one check: a note for the good case, or what is wrong.
type Outcome = Result<String, String>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [folder] = &args[..] else {
        eprintln!("usage: moeut-tokenizer-fixtures <folder>");
        return ExitCode::from(2);
    };
    let files = match files_below(Path::new(folder)) {
        Ok(files) => files,
        Err(error) => {
            eprintln!(
                "Error: `{folder}` cannot be read\n  why: {error}\n  fix: name a folder with recorded tokenizers"
            );
            return ExitCode::from(2);
        }
    };
    let (mut n_checks, mut n_failed) = (0, 0);
    for model in files.iter().filter(|path| path.ends_with(MODEL_FILE)) {
        let fixture = model.parent().unwrap_or(Path::new(""));
        for (check, outcome) in check(fixture) {
            n_checks += 1;
            let name = fixture.file_name().unwrap_or_default().display();
            match outcome {
                Ok(note) => println!("{name} {check}: {note}"),
                Err(why) => {
                    n_failed += 1;
                    println!("FAILED {name} {check}: {why}");
                }
            }
        }
    }
    println!(
        "{n_checks} checks of tokenizers: {} agree with the reference, {n_failed} do not",
        n_checks - n_failed
    );
    if n_failed == 0 && n_checks > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// All checks of the recorded tokenizer in a folder.
fn check(fixture: &Path) -> Vec<(&'static str, Outcome)> {
    let loaded = fs::read(fixture.join("expected.json"))
        .map_err(|error| format!("`expected.json` cannot be read: {error}"))
        .and_then(|bytes| {
            serde_json::from_slice::<Expected>(&bytes)
                .map_err(|error| format!("`expected.json` is not understood: {error}"))
        })
        .and_then(|expected| {
            let tokenizer = Tokenizer::from_file(&fixture.join(MODEL_FILE))
                .map_err(|error| error.to_string())?;
            same("pieces", tokenizer.vocab_size(), expected.vocab_size)?;
            Ok((expected, tokenizer))
        });
    let (expected, tokenizer) = match loaded {
        Ok(loaded) => loaded,
        Err(why) => return vec![("files", Err(why))],
    };
    let mut outcomes = vec![("odd strings", odd_strings(&expected, &tokenizer))];
    match expected.corpus() {
        Ok(corpus) => {
            outcomes.push(("shards", encode(&corpus, &expected, &tokenizer)));
            outcomes.push(("training", train(&corpus, &expected, fixture)));
        }
        Err(why) => outcomes.push(("shards", Err(why))),
    }
    outcomes
}

fn odd_strings(expected: &Expected, tokenizer: &Tokenizer) -> Outcome {
    for (text, ids) in &expected.odd_strings {
        let found = tokenizer.encode(text).map_err(|error| error.to_string())?;
        same(&format!("ids of {text:?}"), &found, ids)?;
    }
    Ok(format!(
        "ids of {} strings are the same",
        expected.odd_strings.len()
    ))
}

fn encode(corpus: &Corpus, expected: &Expected, tokenizer: &Tokenizer) -> Outcome {
    let mut encoder = tokenizer.encoder();
    let mut ids = Vec::new();
    for text in documents(&corpus.encoded)? {
        let text = text + expected.separator();
        encoder
            .encode_into(&text, &mut ids)
            .map_err(|error| error.to_string())?;
    }
    same("ids", ids.len(), expected.n_tokens)?;
    let n_first = expected.first_ids.len().min(ids.len());
    same("first ids", &ids[..n_first], &expected.first_ids[..])?;
    let mut hash = Sha256::new();
    for id in &ids {
        let id = i16::try_from(*id).map_err(|_| format!("id {id} is no `int16`"))?;
        hash.update(id.to_le_bytes());
    }
    same(
        "SHA-256 of the ids",
        &format!("{:x}", hash.finalize()),
        &expected.sha256_int16_le,
    )?;
    Ok(format!(
        "{} ids of {} documents are the same",
        ids.len(),
        expected.n_docs
    ))
}

fn train(corpus: &Corpus, expected: &Expected, fixture: &Path) -> Outcome {
    let texts = documents(&corpus.trained_on)?
        .into_iter()
        .map(|text| Ok(text + expected.separator()));
    let trained = train_bpe(texts, expected.vocab_size)
        .and_then(|model| SentencePiece::from_bytes(&model)?.vocab_file())
        .map_err(|error| error.to_string())?;
    let recorded = fs::read_to_string(fixture.join(VOCAB_FILE))
        .map_err(|error| format!("`{VOCAB_FILE}` cannot be read: {error}"))?;
    for (id, (found, expected)) in trained.lines().zip(recorded.lines()).enumerate() {
        same(&format!("piece {id} with its score"), found, expected)?;
    }
    same("pieces", trained.lines().count(), recorded.lines().count())?;
    Ok(format!(
        "{} pieces and scores are the same",
        expected.vocab_size
    ))
}

fn same<T: Copy + PartialEq + std::fmt::Debug>(
    what: &str,
    found: T,
    expected: T,
) -> Result<(), String> {
    if found == expected {
        Ok(())
    } else {
        Err(format!("{what}: found {found:?}, expected {expected:?}"))
    }
}

/// The shards of a fixture.
struct Corpus {
    trained_on: Vec<PathBuf>,
    encoded: Vec<PathBuf>,
}

impl Expected {
    fn separator(&self) -> &'static str {
        if self.rule.contains(SEPARATOR) {
            SEPARATOR
        } else {
            ""
        }
    }

    /// The corpus that has all the shards, and as many documents in those that are encoded.
    fn corpus(&self) -> Result<Corpus, String> {
        let places = corpora();
        for place in &places {
            let files = files_below(place).unwrap_or_default();
            let find = |names: &[String]| -> Option<Vec<PathBuf>> {
                let of_name = |name| files.iter().find(|path| path.ends_with(name)).cloned();
                names.iter().map(of_name).collect()
            };
            if let (Some(trained_on), Some(encoded)) = (find(&self.trained_on), find(&self.encoded))
                && documents(&encoded).is_ok_and(|texts| texts.len() == self.n_docs)
            {
                return Ok(Corpus {
                    trained_on,
                    encoded,
                });
            }
        }
        Err(format!(
            "no corpus has the shards {:?} and {:?} with {} documents in the latter; searched {places:?}, set MOEUT_SHARED",
            self.trained_on, self.encoded, self.n_docs
        ))
    }
}

/// Folders, each of one corpus.
fn corpora() -> Vec<PathBuf> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared =
        env::var_os("MOEUT_SHARED").map_or_else(|| package.join("../../../shared"), PathBuf::from);
    let mut places = vec![package.join("../datasets/c4/corpus")];
    let more = fs::read_dir(shared.join("data/lm")).into_iter().flatten();
    places.extend(more.filter_map(Result::ok).map(|entry| entry.path()));
    places.sort();
    places
}

fn documents(shards: &[PathBuf]) -> Result<Vec<String>, String> {
    let mut texts = Vec::new();
    for path in shards {
        let name = path.display().to_string();
        let file =
            fs::File::open(path).map_err(|error| format!("`{name}` cannot be read: {error}"))?;
        for text in Documents::from_gzip(name, file) {
            texts.push(text.map_err(|error| error.to_string())?);
        }
    }
    Ok(texts)
}

/// Files in a folder and in those below it, sorted.
fn files_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_below(&path)?);
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
