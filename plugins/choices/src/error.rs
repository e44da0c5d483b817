//! What can go wrong between a published file and a question, with advice as data.
//!
//! `Display` is the *why*; [`ChoicesError::what`] and [`ChoicesError::help`] are the other two parts of a user error.

use std::{io, path::PathBuf};

use moeut_plugin_api::PluginError;
use moeut_text::TextError;

/// Any failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChoicesError {
    /// The folder that the user names cannot be read.
    #[error("{source}")]
    Folder {
        /// Which.
        dir: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file that was found cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file is neither in the folder nor below it.
    #[error("no file in `{}` or below is named {}", dir.display(), join(names))]
    Missing {
        /// The set.
        set: &'static str,
        /// The folder.
        dir: PathBuf,
        /// The names that were looked for, `*` for any characters.
        names: Vec<&'static str>,
        /// Where the first of them is published.
        url: &'static str,
    },
    /// A file is not in the archive.
    #[error("`{}` has no file named {}", archive.display(), join(names))]
    NotInArchive {
        /// The archive.
        archive: PathBuf,
        /// The names that were looked for, `*` for any characters.
        names: Vec<&'static str>,
        /// Where the archive is published.
        url: &'static str,
    },
    /// Two files that could be the same one of the set.
    #[error("both `{first}` and `{second}` could be `{name}`")]
    Twice {
        /// The set.
        set: &'static str,
        /// The name that was looked for.
        name: &'static str,
        /// The first file.
        first: String,
        /// The second file.
        second: String,
    },
    /// A line is not what the set's files have.
    #[error("`{file}` line {line}: {reason}; the line starts `{excerpt}`")]
    BadLine {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
        /// At most 60 characters of it.
        excerpt: String,
        /// Where the file is published.
        url: &'static str,
    },
    /// A whole file is not what the set has.
    #[error("`{file}` {reason}")]
    BadFile {
        /// The file.
        file: String,
        /// The rest of a sentence that starts with it.
        reason: String,
        /// Where it is published.
        url: &'static str,
    },
    /// Every question was left out.
    #[error("its rules leave out all questions of its files: {n_skipped}")]
    NothingLeft {
        /// The set.
        set: &'static str,
        /// Questions left out.
        n_skipped: u64,
    },
    /// A download failed, or the host asked to stop.
    #[error(transparent)]
    Text(#[from] TextError),
}

fn join(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(" or ")
}

impl ChoicesError {
    /// The error that a reader carries, such as a cancellation, or else what its own failure is.
    pub(crate) fn of_reader(error: io::Error, failure: impl FnOnce(io::Error) -> Self) -> Self {
        match error.downcast::<TextError>() {
            Ok(carried) => Self::Text(carried),
            Err(error) => failure(error),
        }
    }

    /// What failed, in the user's words.
    pub fn what(&self) -> String {
        match self {
            Self::Folder { dir, .. } => format!("`-data.dir {}` cannot be used", dir.display()),
            Self::Io { .. } => "a file of questions cannot be read".to_owned(),
            Self::Missing { set, .. } => format!("the questions of `{set}` are missing"),
            Self::Twice { set, .. } => format!("the questions of `{set}` are there twice"),
            Self::NotInArchive { .. } | Self::BadLine { .. } | Self::BadFile { .. } => {
                "a file of questions is damaged".to_owned()
            }
            Self::NothingLeft { set, .. } => format!("`{set}` has no questions"),
            Self::Text(error) => error.what().to_owned(),
        }
    }

    /// Something to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Folder { .. } => {
                "name a folder that you may read, or leave out `-data.dir` to have files downloaded"
                    .to_owned()
            }
            Self::Io { path, .. } => format!("check it with `ls -l {}`", path.display()),
            Self::Missing { url, .. } => format!(
                "get it from {url} and put it there, or leave out `-data.dir` to have it downloaded"
            ),
            Self::Twice { .. } => {
                "name a folder with one of them only, or move the other one away".to_owned()
            }
            Self::BadLine { file, url, .. } => {
                format!("correct the line, or replace `{file}` by what is published as {url}")
            }
            Self::BadFile { file, url, .. } => {
                format!("replace `{file}` by what is published as {url}")
            }
            Self::NotInArchive { archive, url, .. } => {
                format!(
                    "replace `{}` by what is published as {url}",
                    archive.display()
                )
            }
            Self::NothingLeft { .. } => {
                "check the arguments that leave questions out: `moeut-host --help`".to_owned()
            }
            Self::Text(error) => error.help(),
        }
    }
}

impl From<ChoicesError> for PluginError {
    fn from(error: ChoicesError) -> Self {
        Self::new(error.what())
            .why(error.to_string())
            .fix(error.help())
    }
}
