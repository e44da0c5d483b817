//! Packages: one file that carries a plugin to other people, with its builds, licence, checksums and signature.
//!
//! A package is a `tar` archive compressed with Zstandard. Its entries, in this order:
//!
//! ```text
//! package.json                                     what follows, with SHA-256 and size of each
//! package.json.sig                                 who says so; may be absent
//! LICENSE-MIT                                      texts for people
//! x86_64-unknown-linux-gnu/libtorch-2.11/lib….so   a build for each target and minor version of libtorch
//! ```
//!
//! `package.json` comes first so that everything after it is checked as it is read. Nothing is unpacked to where an
//! archive says: [`install`] takes the bytes of one build and chooses the place itself.

mod archive;
pub mod install;
pub mod signature;

pub use archive::{Package, pack, read};

use super::inspect;
use moeut_plugin_api::ComponentKind;
use moeut_plugin_api::abi::manifest::{ComponentRecord, PluginRecord};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What packages end with.
pub const EXTENSION: &str = ".moeut.tar.zst";

/// The version of the format that is written and read.
const FORMAT: u32 = 1;

/// The contents of `package.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    format: u32,
    /// The plugin.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SPDX expression, as the plugin says.
    pub license: String,
    /// As the plugin says.
    pub authors: String,
    /// Builds of this version.
    pub builds: Vec<Build>,
    /// Texts for people.
    pub texts: Vec<Entry>,
}

/// A file of a package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name in the archive.
    pub path: String,
    /// Its size.
    pub n_bytes: u64,
    /// In hex.
    pub sha256: String,
}

/// One build of a plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// Its file.
    #[serde(flatten)]
    pub entry: Entry,
    /// The kind of machine it is for.
    pub target: String,
    /// Minor version of libtorch, `2.11`; empty if it needs none.
    pub libtorch: String,
    /// Version of the plugin ABI.
    pub abi: String,
    /// What it has.
    pub components: Vec<(ComponentKind, String)>,
}

impl Build {
    fn of(
        path: &Path,
        contents: &inspect::Contents,
        plugin: &PluginRecord,
        components: &[ComponentRecord],
    ) -> Self {
        let libtorch = inspect::minor(&plugin.libtorch);
        let folder = if libtorch.is_empty() {
            "any-libtorch".to_owned()
        } else {
            format!("libtorch-{libtorch}")
        };
        let file = path.file_name().unwrap_or_default();
        Self {
            entry: Entry {
                path: format!("{}/{folder}/{}", plugin.target, file.display()),
                n_bytes: contents.bytes.len() as u64,
                sha256: contents.sha256.clone(),
            },
            target: plugin.target.clone(),
            libtorch,
            abi: plugin.abi.clone(),
            components: components
                .iter()
                .map(|component| (component.kind, component.name.clone()))
                .collect(),
        }
    }

    /// Whether this program can open it, as far as the package says.
    pub fn is_for_here(&self) -> bool {
        let have = inspect::minor(moeut_torch::LIBTORCH_VERSION);
        self.target == moeut_plugin_api::abi::manifest::TARGET
            && (self.libtorch.is_empty() || self.libtorch == have)
    }

    /// `x86_64-unknown-linux-gnu, libtorch 2.11`.
    pub fn describe(&self) -> String {
        if self.libtorch.is_empty() {
            format!("{}, any libtorch", self.target)
        } else {
            format!("{}, libtorch {}", self.target, self.libtorch)
        }
    }
}

impl Contents {
    fn is_of(&self, plugin: &PluginRecord) -> bool {
        self.name == plugin.name && self.version == plugin.version
    }

    /// `moeut-task-mine 0.2.0`.
    pub fn heading(&self) -> String {
        format!("{} {}", self.name, self.version)
    }
}
