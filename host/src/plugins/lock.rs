//! `plugins.lock`: the plugin files that a team has agreed on, by SHA-256; and what is done about others.

use super::inspect::{Manifest, Refusal};
use crate::args::peek;
use crate::whole_file;
use moeut_plugin_api::PluginError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Its name; it is looked for where the program is started, beside the folder `save`.
pub const FILE: &str = "plugins.lock";

/// The version of the format that is written and read.
const FORMAT: u32 = 1;

/// The contents of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    format: u32,
    plugins: Vec<Locked>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Locked {
    name: String,
    version: String,
    sha256: String,
    /// The file's name, for people: where a file lies differs between machines, so folders are left out.
    file: String,
}

impl Lock {
    /// Locks these files; identical ones count once.
    pub fn new(manifests: impl IntoIterator<Item = Manifest>) -> Self {
        let locked = |manifest: Manifest| Locked {
            name: manifest.plugin.name,
            version: manifest.plugin.version,
            sha256: manifest.sha256,
            file: manifest
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        };
        let mut plugins: Vec<Locked> = manifests.into_iter().map(locked).collect();
        plugins.sort();
        plugins.dedup_by(|a, b| a.sha256 == b.sha256);
        Self {
            format: FORMAT,
            plugins,
        }
    }

    /// Reads a lock; none if there is no file.
    ///
    /// # Errors
    /// If it cannot be read or is no lock of this format.
    pub fn read(path: &Path) -> Result<Option<Self>, PluginError> {
        let error = |why: String| {
            PluginError::new(format!("`{}` cannot be used", path.display()))
                .why(why)
                .fix("correct it, or remove it and type `moeut-host plugins lock`")
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(other) => return Err(error(other.to_string())),
        };
        let lock: Self = serde_json::from_str(&text).map_err(|bad| error(bad.to_string()))?;
        if lock.format != FORMAT {
            return Err(error(format!(
                "its format is {}, and this host knows {FORMAT}",
                lock.format
            )));
        }
        Ok(Some(lock))
    }

    /// Writes the lock beside an older one, which it then replaces.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        whole_file::write(path, &text)
    }

    /// How many files are locked.
    pub fn len(&self) -> usize {
        self.plugins.len()
    }

    /// Whether nothing is locked.
    pub fn is_empty(&self) -> bool {
        self.plugins.is_empty()
    }

    /// What `newer` has that this lock has not, and the other way round, a line each.
    pub fn differences(&self, newer: &Self) -> Vec<String> {
        let line = |sign: char, one: &Locked| {
            let Locked {
                name,
                version,
                file,
                sha256,
            } = one;
            format!("{sign} {name} {version}  {file}  {sha256}")
        };
        let gone = self
            .plugins
            .iter()
            .filter(|one| !newer.plugins.contains(one));
        let added = newer
            .plugins
            .iter()
            .filter(|one| !self.plugins.contains(one));
        gone.map(|one| line('-', one))
            .chain(added.map(|one| line('+', one)))
            .collect()
    }
}

/// What happens to a file that is not locked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// Only what is locked is opened.
    Strict,
    /// A file whose name is locked with another hash is opened with a warning.
    #[default]
    Warn,
    /// The lock is not looked at.
    Off,
}

impl Policy {
    /// What `-plugin_verify` on a command line says. Abbreviations count, too: nobody who types `-plugin_v strict` means
    /// to be without it.
    ///
    /// # Errors
    /// If it is none of the three words.
    pub fn from_args(argv: &[String]) -> Result<Self, PluginError> {
        const FLAG: &str = "plugin_verify";
        const SHORTEST: usize = "plugin_v".len();
        let given = (SHORTEST..=FLAG.len()).flat_map(|length| peek(argv, &FLAG[..length]));
        given
            .last()
            .map_or(Ok(Self::default()), |word| Self::parse(&word))
    }

    /// What `-plugin_verify` says.
    ///
    /// # Errors
    /// With the word that is none of the three.
    pub fn parse(word: &str) -> Result<Self, PluginError> {
        match word {
            "strict" => Ok(Self::Strict),
            "warn" => Ok(Self::Warn),
            "off" => Ok(Self::Off),
            other => Err(PluginError::new("invalid value for `-plugin_verify`")
                .why(format!("`{other}` is none of `strict`, `warn` and `off`"))
                .fix("set `-plugin_verify strict` to load only what `plugins.lock` names")),
        }
    }
}

/// The lock and what is done about it.
#[derive(Debug, Default)]
pub struct Gate {
    policy: Policy,
    lock: Option<Lock>,
}

/// What a gate says of a file that may pass.
#[derive(Debug, PartialEq, Eq)]
pub enum Pass {
    /// The lock names it.
    Locked,
    /// The lock does not name it, or there is none.
    Unlocked,
    /// The lock names another file under its name: what to warn of.
    Changed(Refusal),
}

impl Gate {
    /// What `-plugin_verify` on a command line asks for, with the lock in the working folder.
    ///
    /// # Errors
    /// If the policy is unknown, or see [`Self::open`].
    pub fn from_args(argv: &[String]) -> Result<Self, PluginError> {
        Self::open(Policy::from_args(argv)?, Path::new(FILE))
    }

    /// Reads the lock at `path` if the policy is to look at it.
    ///
    /// # Errors
    /// If it cannot be read, or everything depends on it and there is none.
    pub fn open(policy: Policy, path: &Path) -> Result<Self, PluginError> {
        let lock = match policy {
            Policy::Off => None,
            Policy::Warn => Lock::read(path)?,
            Policy::Strict => Some(Lock::read(path)?.ok_or_else(|| {
                PluginError::new(format!("there is no `{}`", path.display()))
                    .why("`-plugin_verify strict` loads only what it names")
                    .fix("type `moeut-host plugins lock`, or leave out `-plugin_verify`")
            })?),
        };
        Ok(Self { policy, lock })
    }

    /// Whether a file of this plugin and SHA-256 may be opened. Whoever opens it has hashed what it opens.
    ///
    /// # Errors
    /// If it may not.
    pub fn check(&self, plugin: &str, sha256: &str) -> Result<Pass, Refusal> {
        let Some(lock) = &self.lock else {
            return Ok(Pass::Unlocked);
        };
        let by_hash = |one: &&Locked| one.sha256 == sha256;
        let by_name = |one: &&Locked| one.name == plugin;
        if lock.plugins.iter().any(|one| by_hash(&one)) {
            return Ok(Pass::Locked);
        }
        let changed = lock
            .plugins
            .iter()
            .find(by_name)
            .map(|one| Refusal::Changed {
                name: one.name.clone(),
                locked: one.sha256.clone(),
                found: sha256.to_owned(),
            });
        match (self.policy, changed) {
            (Policy::Strict, changed) => Err(changed.unwrap_or(Refusal::NotLocked)),
            (_, Some(changed)) => Ok(Pass::Changed(changed)),
            (_, None) => Ok(Pass::Unlocked),
        }
    }
}
