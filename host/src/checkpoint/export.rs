//! From any checkpoint to a folder for use from Python: `model.safetensors`, `config.json`, the tokenizer.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::reference::is_trained;
use super::source::{self, Source};
use super::{CheckpointError, clean, write_tensors};
use crate::whole_file;

/// SentencePiece's files in the reference's token cache; the doubled ending is its own.
const TOKENIZER: &str = "tokenizer.model.model";
const VOCABULARY: &str = "tokenizer.model.vocab";
/// `<cache>/[embedded/]C4/C4-en-8000/tokenizer.model.model`, and one more for other sources.
const CACHE_DEPTH: usize = 4;

/// Whose parameter names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Those of the training code, which are ours.
    Training,
    /// Those of the clean `MoEUT` package.
    Clean,
}

/// What [`export`] wrote.
#[derive(Debug)]
pub struct Exported {
    /// The checkpoint it is from.
    pub from: PathBuf,
    /// Names of the files.
    pub files: Vec<String>,
    /// For the user.
    pub notes: Vec<String>,
}

/// Writes the model of `checkpoint` (anything that [`super::read_model_tensors`] takes) into `folder`.
///
/// `config.json` holds `layout`, `step`, `vocab_size` and `n_params`; with [`Layout::Training`] also `args`, the raw
/// arguments of the run, with [`Layout::Clean`] `model`, the arguments of `MoEUTLM(**model)`.
///
/// The tokenizer is the file `tokenizer`, or else the one for this vocabulary size in the run's cache folder.
///
/// # Errors
/// If `checkpoint` cannot be read, `layout` cannot express it, there are several tokenizers to choose from, or
/// `folder` cannot be written.
pub fn export(
    checkpoint: &Path,
    folder: &Path,
    layout: Layout,
    tokenizer: Option<&Path>,
) -> Result<Exported, CheckpointError> {
    let source = source::read(checkpoint)?;
    if folder.join("MANIFEST.json").exists() {
        return Err(CheckpointError::foreign(
            folder,
            "it is a checkpoint, which an export would damage",
            "give a new folder",
        ));
    }
    let Source {
        path: from,
        step,
        args,
        model,
        warnings: mut notes,
    } = source;
    let vocab_size = model
        .iter()
        .find(|(name, _)| name == "embedding.weight")
        .and_then(|(_, tensor)| tensor.size().first().copied());
    let n_params: usize = model
        .iter()
        .filter(|(name, tensor)| is_trained(name, tensor))
        .map(|(_, tensor)| tensor.numel())
        .sum();
    let inexpressible = |why: String| {
        CheckpointError::foreign(
            &from,
            why,
            "export it with `--layout training`, which takes every model",
        )
    };
    let (model, key, config) = match layout {
        Layout::Training => (model, "args", json!(args)),
        Layout::Clean => {
            let constructor = clean::constructor(&args, &model).map_err(inexpressible)?;
            let model = clean::to_clean(model).map_err(inexpressible)?;
            (model, "model", constructor)
        }
    };
    let name = match layout {
        Layout::Training => "training",
        Layout::Clean => "clean",
    };
    let tokenizer = match (tokenizer, vocab_size) {
        (Some(file), _) => Some(file.to_owned()),
        (None, Some(vocab_size)) => {
            let cache = args.get("data.cache_dir").map_or("cache", String::as_str);
            find_tokenizer(Path::new(cache), vocab_size)?
        }
        (None, None) => None,
    };
    let config = json!({
        "format": "moeut",
        "layout": name,
        "step": step,
        "vocab_size": vocab_size,
        "n_params": n_params,
        key: config,
        "tokenizer": tokenizer.as_ref().map(|_| TOKENIZER),
    });

    std::fs::create_dir_all(folder).map_err(CheckpointError::io("create", folder))?;
    let mut files = vec!["model.safetensors".to_owned(), "config.json".to_owned()];
    write(&folder.join(&files[0]), |out, path| {
        write_tensors(out, path, &model)
    })?;
    write_text(&folder.join(&files[1]), &config)?;
    match tokenizer {
        Some(file) => {
            copy(&file, &folder.join(TOKENIZER))?;
            files.push(TOKENIZER.to_owned());
            let vocabulary = file.with_extension("vocab");
            if vocabulary.is_file() {
                copy(&vocabulary, &folder.join(VOCABULARY))?;
                files.push(VOCABULARY.to_owned());
            }
            notes.push(format!("the tokenizer is `{}`", file.display()));
        }
        None => notes.push(format!(
            "no tokenizer was found; add `--tokenizer <folder>/{TOKENIZER}`"
        )),
    }
    Ok(Exported { from, files, notes })
}

/// The tokenizers below `cache` whose folder says that they have `vocab_size` pieces: one, or none.
fn find_tokenizer(cache: &Path, vocab_size: i64) -> Result<Option<PathBuf>, CheckpointError> {
    let ending = format!("-{vocab_size}");
    let mut found = Vec::new();
    let mut open = vec![(cache.to_owned(), 0)];
    while let Some((folder, depth)) = open.pop() {
        let of_this_size = folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().ends_with(&ending));
        if of_this_size && folder.join(TOKENIZER).is_file() {
            found.push(folder.join(TOKENIZER));
        }
        if depth < CACHE_DEPTH {
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            let folders = entries
                .map(|entry| entry.path())
                .filter(|path| path.is_dir());
            open.extend(folders.map(|path| (path, depth + 1)));
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [first, second, ..] => Err(CheckpointError::foreign(
            cache,
            format!(
                "it has several tokenizers of {vocab_size} pieces: `{}`, `{}`",
                first.display(),
                second.display()
            ),
            format!("choose one: `--tokenizer {}`", first.display()),
        )),
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    let bytes = std::fs::read(from).map_err(CheckpointError::io("read", from))?;
    write(to, |out, path| {
        out.write_all(&bytes)
            .map_err(CheckpointError::io("write", path))
    })
}

fn write_text(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    write(path, |out, path| {
        writeln!(out, "{value:#}").map_err(CheckpointError::io("write", path))
    })
}

/// A file appears under its name only when it is whole.
pub(crate) fn write(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write, &Path) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let io = || CheckpointError::io("write", path);
    whole_file::fill(
        path,
        |error| io()(error),
        |file| {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            contents(&mut out, path)?;
            out.flush().map_err(io())
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_of_the_vocabulary_is_found_and_a_choice_is_left_to_the_user() {
        let cache = tempfile::tempdir().unwrap();
        let add = |name: &str| {
            let folder = cache.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(TOKENIZER), "x").unwrap();
            folder.join(TOKENIZER)
        };
        assert_eq!(find_tokenizer(cache.path(), 8000).unwrap(), None);
        let wanted = add("C4/C4-en-8000");
        add("C4/C4-en-500");
        assert_eq!(find_tokenizer(cache.path(), 8000).unwrap(), Some(wanted));
        add("embedded/C4/C4-en-8000");
        let error = find_tokenizer(cache.path(), 8000).unwrap_err();
        assert!(error.help().starts_with("choose one: `--tokenizer "));
    }
}
