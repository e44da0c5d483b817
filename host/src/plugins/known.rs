//! Plugin files that this program has opened before, so that to list them none is read, hashed or opened again.
//!
//! What stands here saves time and decides nothing: whatever is opened is read and hashed through its own handle. A file
//! is known while device, inode, size and both times of change are those it had; the later of these times is the
//! kernel's, and no program can set it. The store is one file of the user, `$XDG_CACHE_HOME/moeut/plugins.json`. One
//! that is damaged, of another build of the host, or that another user owns or may write, is as none.

use super::inspect::current_user;
use crate::whole_file;
use moeut_plugin_api::ComponentKind;
use moeut_plugin_api::abi::manifest::PluginRecord;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The version of the format that is written and read.
const FORMAT: u32 = 1;

/// A larger store is none of ours: a plugin takes half a kilobyte of it.
const MAX_BYTES: u64 = 1 << 26;

/// How long a file must have been as it is. One that is younger could change once more within the same tick of its file
/// system's clock, of which the coarsest count in steps of two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// What tells a file from any other, and from itself after a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of an open file, or one at a path.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn is_before(&self, time: SystemTime) -> bool {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since_epoch.as_secs()).is_ok_and(|seconds| self.changed.0 < seconds)
    }
}

/// A component, as far as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// What it is.
    pub kind: ComponentKind,
    /// What it is called.
    pub name: String,
    /// What else it is called.
    pub aliases: Vec<String>,
}

/// A file that was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    stamp: Stamp,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// What it says of itself.
    pub plugin: PluginRecord,
    /// What it registered.
    pub components: Vec<Name>,
}

/// The store as it lies on the disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    /// The program that opened the files: another build may refuse them.
    host: Stamp,
    files: BTreeMap<String, Entry>,
}

/// The files that were opened before, by absolute path.
#[derive(Debug)]
pub struct Known {
    store: Option<PathBuf>,
    host: Option<Stamp>,
    files: BTreeMap<String, Entry>,
    has_news: bool,
    /// Files that changed later than this are not remembered.
    settled: SystemTime,
}

impl Known {
    /// Reads the store of this user.
    pub fn of_user() -> Self {
        let folder = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        Self::read(folder.map(|folder| folder.join("moeut/plugins.json")))
    }

    /// Reads a store; without one nothing is known, and nothing kept.
    fn read(store: Option<PathBuf>) -> Self {
        let host = std::fs::metadata("/proc/self/exe");
        // Links to the program come and go, and with them its second time.
        let host = host.ok().map(|metadata| Stamp {
            changed: (0, 0),
            ..Stamp::of(&metadata)
        });
        let stored = store.as_deref().and_then(read_trusted);
        let files = stored
            .filter(|stored| stored.format == FORMAT && Some(&stored.host) == host.as_ref())
            .map_or_else(BTreeMap::new, |stored| stored.files);
        Self {
            store,
            host,
            files,
            has_news: false,
            settled: SystemTime::now() - SETTLED,
        }
    }

    /// What is known of a file that is there.
    pub fn get(&self, path: &Path, metadata: &Metadata) -> Option<&Entry> {
        let entry = self.files.get(&key(path)?)?;
        (entry.stamp == Stamp::of(metadata)).then_some(entry)
    }

    /// Remembers a file that was opened, unless it is too young. The stamp is of before it was read.
    pub fn insert(&mut self, path: &Path, entry: Entry) {
        if entry.stamp.is_before(self.settled)
            && let Some(key) = key(path)
        {
            self.files.insert(key, entry);
            self.has_news = true;
        }
    }

    /// Stores what is new, without files that are gone. A disk that refuses costs the next list time, and nothing else.
    pub fn save(mut self) {
        let (Some(store), Some(host), true) = (self.store, self.host, self.has_news) else {
            return;
        };
        self.files.retain(|path, _| Path::new(path).exists());
        let stored = Stored {
            format: FORMAT,
            host,
            files: self.files,
        };
        let _ = write(&store, &stored);
    }
}

impl Entry {
    /// What is to be remembered of a file.
    pub fn new(stamp: Stamp, sha256: &str, plugin: &PluginRecord, components: Vec<Name>) -> Self {
        Self {
            stamp,
            sha256: sha256.to_owned(),
            plugin: plugin.clone(),
            components,
        }
    }
}

/// Paths that are no text are not remembered.
fn key(path: &Path) -> Option<String> {
    let absolute = std::path::absolute(path).ok()?;
    absolute.to_str().map(str::to_owned)
}

/// A store of this user that nobody else may write; none if it is anything else, a pipe that nobody fills among it.
fn read_trusted(path: &Path) -> Option<Stored> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .ok()?;
    let metadata = file.metadata().ok()?;
    let is_own = metadata.is_file()
        && Some(metadata.uid()) == current_user()
        && metadata.mode() & 0o022 == 0;
    if !is_own {
        return None;
    }
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn write(path: &Path, stored: &Stored) -> std::io::Result<()> {
    let text = serde_json::to_vec(stored)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(whole_file::folder_of(path))?;
    let error = |error| error;
    whole_file::fill(path, error, |file: &mut File| {
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(&text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::inspect::tests::PLUGIN;
    use crate::plugins::inspect::{hex, parse_records};
    use std::fs;

    fn entry(path: &Path) -> Entry {
        let (plugin, _) = parse_records(PLUGIN.as_bytes()).unwrap();
        let name = Name {
            kind: ComponentKind::Task,
            name: "x".into(),
            aliases: vec!["y".into()],
        };
        let stamp = Stamp::of(&fs::metadata(path).unwrap());
        Entry::new(stamp, &hex(&[7; 32]), &plugin, vec![name])
    }

    /// As if the files in it were old.
    fn known(store: &Path) -> Known {
        let mut known = Known::read(Some(store.to_owned()));
        known.settled = SystemTime::now() + SETTLED;
        known
    }

    /// A plugin, and a store that knows it.
    fn stored() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (plugin, store) = (dir.path().join("a.so"), dir.path().join("c/plugins.json"));
        fs::write(&plugin, "one").unwrap();
        let mut first = known(&store);
        first.insert(&plugin, entry(&plugin));
        first.save();
        (dir, plugin, store)
    }

    fn knows(store: &Path, plugin: &Path) -> bool {
        let known = known(store);
        known
            .get(plugin, &fs::metadata(plugin).unwrap())
            .is_some_and(|found| *found == entry(plugin))
    }

    #[test]
    fn a_file_is_known_until_it_changes() {
        let (dir, plugin, store) = stored();
        assert!(knows(&store, &plugin));
        let time = fs::metadata(&plugin).unwrap().modified().unwrap();

        // Of the same size and, for who asks, of the same age.
        fs::write(&plugin, "two").unwrap();
        let file = OpenOptions::new().append(true).open(&plugin).unwrap();
        file.set_modified(time).unwrap();
        assert_eq!(fs::metadata(&plugin).unwrap().modified().unwrap(), time);
        assert!(!knows(&store, &plugin));

        // Another file of the same contents, through a link.
        let (_other, real, store) = stored();
        let link = dir.path().join("link.so");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mut through = known(&store);
        through.insert(&link, entry(&link));
        through.save();
        assert!(knows(&store, &link));
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&plugin, &link).unwrap();
        assert!(!knows(&store, &link));
    }

    #[test]
    fn a_file_that_may_change_within_one_tick_of_the_clock_is_not_remembered() {
        let (_dir, plugin, store) = stored();
        let mut young = Known::read(Some(store));
        young.files.clear();
        young.insert(&plugin, entry(&plugin));
        assert!(young.files.is_empty() && !young.has_news);
    }

    #[test]
    fn files_that_are_gone_are_forgotten() {
        let (dir, plugin, store) = stored();
        let other = dir.path().join("b.so");
        fs::write(&other, "two").unwrap();
        fs::remove_file(&plugin).unwrap();
        let mut second = known(&store);
        second.insert(&other, entry(&other));
        second.save();
        let names: Vec<String> = known(&store).files.into_keys().collect();
        assert_eq!(names, [key(&other).unwrap()]);
    }

    #[test]
    fn a_store_that_is_not_the_users_own_whole_one_is_as_none() {
        let (_dir, plugin, store) = stored();
        let whole = fs::read_to_string(&store).unwrap();
        let mode = |mode| fs::set_permissions(&store, Permissions::from_mode(mode)).unwrap();
        assert_eq!(fs::metadata(&store).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(store.parent().unwrap()).unwrap().mode() & 0o777,
            0o700
        );
        for open in [0o620, 0o602, 0o666] {
            mode(open);
            assert!(!knows(&store, &plugin), "{open:o}");
        }
        mode(0o600);
        assert!(knows(&store, &plugin));
        for damaged in [
            whole[..whole.len() / 2].to_owned(),
            whole.replace("\"format\":1", "\"format\":2"),
            whole.replacen("\"inode\":", "\"inode\":1", 1), // of the host
            "[".repeat(1_000_000),
            String::new(),
        ] {
            fs::write(&store, &damaged).unwrap();
            assert!(!knows(&store, &plugin), "{damaged:.100}");
        }
        // A later list repairs it.
        let mut repaired = known(&store);
        repaired.insert(&plugin, entry(&plugin));
        repaired.save();
        assert!(knows(&store, &plugin));

        // Nobody writes into this pipe, and reading it would wait for that.
        fs::remove_file(&store).unwrap();
        let pipe = std::process::Command::new("mkfifo").arg(&store).status();
        assert!(pipe.unwrap().success());
        assert!(!knows(&store, &plugin));
    }
}
