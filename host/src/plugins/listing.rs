//! What `plugins list` shows: every component that a run would find. A file that was opened before is not run for it.

use super::folders::Folder;
use super::inspect::check_place;
use super::known::{Entry, Known, Name, Stamp};
use super::library::Library;
use super::lock::Gate;
use super::screening::{Candidate, Screening};
use moeut_plugin_api::abi::manifest::PluginRecord;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// One component.
#[derive(Debug)]
pub struct Listed {
    /// Its kind and names.
    pub name: Name,
    /// The plugin it is in.
    pub plugin: PluginRecord,
    /// The file that the plugin is in.
    pub path: PathBuf,
}

/// Every component of a search path, in search order, and what is to be said of files.
#[derive(Debug)]
pub struct Listing {
    /// The components, shadowed ones too.
    pub components: Vec<Listed>,
    /// What became of the files.
    pub screening: Screening,
}

impl Listing {
    /// Lists a search path. Files that are not known are opened, and known afterwards.
    pub fn new(folders: &[Folder], gate: Gate, mut known: Known) -> Self {
        let mut screening = Screening::new(gate);
        let mut components = Vec::new();
        // Libraries stay until the end: the loader knows each by the number of its handle.
        let mut opened: Vec<Library> = Vec::new();
        for folder in folders {
            for path in screening.files(folder) {
                let entry = match find(&known, &path) {
                    Some((entry, is_group_writable)) => {
                        let candidate = Candidate {
                            path: &path,
                            sha256: &entry.sha256,
                            plugin: &entry.plugin.name,
                            is_group_writable,
                        };
                        if !screening.list(candidate) {
                            continue;
                        }
                        entry.clone()
                    }
                    None => match screening.open(&path) {
                        Some(library) => {
                            let entry = entry_of(&library);
                            known.insert(&path, entry.clone());
                            opened.push(library);
                            entry
                        }
                        None => continue,
                    },
                };
                components.extend(entry.components.into_iter().map(|name| Listed {
                    name,
                    plugin: entry.plugin.clone(),
                    path: path.clone(),
                }));
            }
        }
        known.save();
        Self {
            components,
            screening,
        }
    }
}

/// What is known of a file that others may not change, and whether its group may. Anything else is opened, or refused.
fn find<'a>(known: &'a Known, path: &Path) -> Option<(&'a Entry, bool)> {
    let metadata = std::fs::metadata(path).ok()?;
    let entry = known.get(path, &metadata)?;
    check_place(path, &metadata).ok()?;
    Some((entry, metadata.mode() & 0o020 != 0))
}

fn entry_of(library: &Library) -> Entry {
    let manifest = &library.manifest;
    let names = library.components.iter().map(|component| Name {
        kind: component.kind,
        name: component.name.clone(),
        aliases: component.aliases.clone(),
    });
    let stamp = Stamp::of(&manifest.metadata);
    Entry::new(stamp, &manifest.sha256, &manifest.plugin, names.collect())
}
