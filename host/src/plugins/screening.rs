//! Which files of the search path count, and what is said of the others; the same whether they are opened or listed.

use super::folders::{Folder, libraries};
use super::inspect::{self, Refusal};
use super::library::{self, Library};
use super::lock::{Gate, Pass};
use moeut_plugin_api::abi::manifest::ComponentRecord;
use moeut_plugin_api::{ComponentKind, PluginError};
use std::path::{Path, PathBuf};

/// A file that was skipped; fatal only to whoever needs it.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The file or folder.
    pub path: PathBuf,
    /// What, why and fix.
    pub error: PluginError,
    /// The components that the file would have had, as far as it says.
    pub would_provide: Vec<(ComponentKind, String)>,
}

/// What a file is judged by before it is opened.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// SHA-256 of its bytes, in hex.
    pub sha256: &'a str,
    /// The name of the plugin in it.
    pub plugin: &'a str,
    /// Whether others of the file's group may write it, which deserves a warning.
    pub is_group_writable: bool,
}

/// Goes through the files of a search path, one after the other.
#[derive(Debug)]
pub struct Screening {
    gate: Gate,
    problems: Vec<Problem>,
    notes: Vec<String>,
    /// Hash and path of the files that count.
    taken: Vec<(String, PathBuf)>,
}

impl Screening {
    /// With nothing seen so far.
    pub fn new(gate: Gate) -> Self {
        Self {
            gate,
            problems: Vec::new(),
            notes: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Files that were skipped.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// What a user may want to know about the files that were taken.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What lets files through.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The libraries directly in a folder; none, and a problem, if it cannot be read.
    pub fn files(&mut self, folder: &Folder) -> Vec<PathBuf> {
        libraries(&folder.path).unwrap_or_else(|error| {
            let what = format!(
                "plugin folder `{}` ({}) cannot be read",
                folder.path.display(),
                folder.origin
            );
            self.problems.push(Problem {
                path: folder.path.clone(),
                error: PluginError::new(what)
                    .why(error.to_string())
                    .fix("correct the path or its permissions"),
                would_provide: Vec::new(),
            });
            Vec::new()
        })
    }

    /// Opens a file, if it counts.
    pub fn open(&mut self, path: &Path) -> Option<Library> {
        let manifest = match inspect::inspect(path) {
            Ok(manifest) => manifest,
            Err(refusal) => {
                self.refuse(path, refusal, inspect::claims(path));
                return None;
            }
        };
        let would_provide = names(&manifest.components);
        let opened = match self.admit(manifest.candidate()) {
            Ok(true) => library::open(manifest),
            Ok(false) => return None,
            Err(refusal) => Err(refusal),
        };
        match opened {
            Ok(library) => {
                self.take(path, &library.manifest.sha256);
                Some(library)
            }
            Err(refusal) => {
                self.refuse(path, refusal, would_provide);
                None
            }
        }
    }

    /// Whether a file counts that was opened before and is only listed.
    pub fn list(&mut self, candidate: Candidate<'_>) -> bool {
        match self.admit(candidate) {
            Ok(true) => {
                self.take(candidate.path, candidate.sha256);
                true
            }
            Ok(false) => false,
            Err(refusal) => {
                self.refuse(candidate.path, refusal, Vec::new());
                false
            }
        }
    }

    /// Whether the gate lets a file through that is not identical to an earlier one.
    fn admit(&mut self, candidate: Candidate<'_>) -> Result<bool, Refusal> {
        let path = candidate.path.display();
        let mut taken = self.taken.iter();
        if let Some((_, same)) = taken.find(|(sha256, _)| sha256 == candidate.sha256) {
            self.notes.push(format!(
                "`{path}` is identical to `{}` and counts once",
                same.display()
            ));
            return Ok(false);
        }
        if candidate.is_group_writable {
            self.notes.push(format!(
                "`{path}` may be written by its group, and loading a plugin runs it"
            ));
        }
        if let Pass::Changed(warning) = self.gate.check(candidate.plugin, candidate.sha256)? {
            self.notes.push(format!("`{path}`: {warning}"));
        }
        Ok(true)
    }

    fn take(&mut self, path: &Path, sha256: &str) {
        self.taken.push((sha256.to_owned(), path.to_owned()));
    }

    fn refuse(
        &mut self,
        path: &Path,
        refusal: Refusal,
        would_provide: Vec<(ComponentKind, String)>,
    ) {
        self.problems.push(Problem {
            path: path.to_owned(),
            error: refusal.into_error(path),
            would_provide,
        });
    }
}

fn names(components: &[ComponentRecord]) -> Vec<(ComponentKind, String)> {
    let name = |component: &ComponentRecord| (component.kind, component.name.clone());
    components.iter().map(name).collect()
}
