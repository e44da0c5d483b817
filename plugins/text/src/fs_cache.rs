//! Copies on a local disk of chunks that lie on a network file system, where a memory map is slow.
//!
//! A copy is `<mount point>/<user>/fs_cache/<absolute path of the chunk>`, as the reference has it. It counts if it is
//! as long as the chunk and not older. Of the disks whose mount point the pattern matches, a solid-state one with the most
//! free space is taken; if none has the space, the chunk is read from where it is.

use std::{
    env,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use regex_lite::Regex;

use crate::{
    error::TextError,
    files::{FileLock, beside, create_folder, give_name},
    progress::{Progress, Watch},
    token_cache::Chunk,
};

/// `statfs` types of NFS, SMB 1, CIFS and SMB 2.
const NETWORK_FILE_SYSTEMS: &[u32] = &[0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// Space that stays free on a disk: 1 GiB.
const SPARE_BYTES: u64 = 1 << 30;

/// A place for copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    mount: PathBuf,
    is_solid_state: bool,
    n_free: u64,
}

/// Which mount points may be used.
#[derive(Debug)]
pub(crate) enum Pattern {
    Any,
    Matching(Regex),
}

impl Pattern {
    /// `*` is all; anything else a regular expression that is looked for in the mount point.
    pub(crate) fn parse(text: &str) -> Result<Self, TextError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        Regex::new(text)
            .map(Self::Matching)
            .map_err(|error| TextError::BadPattern {
                pattern: text.to_owned(),
                reason: error.to_string(),
            })
    }

    fn takes(&self, mount: &Path) -> bool {
        match self {
            Self::Any => true,
            Self::Matching(regex) => regex.is_match(&mount.to_string_lossy()),
        }
    }
}

/// Replaces chunks on network file systems by local copies, which are made as needed.
///
/// # Errors
/// The host cancelled. A copy that cannot be made is a warning.
pub(crate) fn local_copies(
    chunks: Vec<Chunk>,
    pattern: &Pattern,
    watch: Watch<'_>,
) -> Result<Vec<Chunk>, TextError> {
    if !chunks.iter().any(|chunk| is_on_network(&chunk.path)) {
        return Ok(chunks);
    }
    let local = |chunk: Chunk| {
        if !is_on_network(&chunk.path) {
            return Ok(chunk);
        }
        match local_copy(&chunk.path, &disks(), pattern, watch) {
            Ok(path) => Ok(Chunk { path, ..chunk }),
            Err(TextError::Cancelled) => Err(TextError::Cancelled),
            Err(error) => {
                watch.tell(Progress::Warning(format!(
                    "`{}` is read over the network: {error}",
                    chunk.path.display()
                )));
                Ok(chunk)
            }
        }
    };
    chunks.into_iter().map(local).collect()
}

fn is_on_network(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|info| {
        // A signed number on some machines; the constants are its lower half.
        let kind = info.f_type.cast_unsigned() & 0xffff_ffff;
        u32::try_from(kind).is_ok_and(|kind| NETWORK_FILE_SYSTEMS.contains(&kind))
    })
}

/// The copy of a file, made if there is none that counts.
fn local_copy(
    path: &Path,
    disks: &[Disk],
    pattern: &Pattern,
    watch: Watch<'_>,
) -> Result<PathBuf, TextError> {
    let unreadable = |source| TextError::io("read", path, source);
    // Links resolved, so that one file has one copy.
    let path = path.canonicalize().map_err(unreadable)?;
    let original = path.metadata().map_err(unreadable)?;
    let copy_on = |disk: &Disk| {
        let below = path.strip_prefix("/").unwrap_or(&path);
        cache_folder(disk).join(below)
    };
    let usable = |disk: &&Disk| pattern.takes(&disk.mount);
    let counts = |copy: &Path| {
        copy.metadata().is_ok_and(|copy| {
            copy.len() == original.len()
                && (copy.mtime(), copy.mtime_nsec()) >= (original.mtime(), original.mtime_nsec())
        })
    };
    if let Some(copy) = disks
        .iter()
        .filter(usable)
        .map(copy_on)
        .find(|it| counts(it))
    {
        return Ok(copy);
    }
    let disk = best(disks, pattern, original.len()).ok_or_else(|| {
        let why = "no local disk that `-fs_cache_pattern` matches has the space";
        TextError::io("copy", &path, io::Error::other(why))
    })?;
    let copy = copy_on(disk);
    create_folder(copy.parent().unwrap_or(&disk.mount))?;
    let lock = beside(&cache_folder(disk), ".lock");
    let _held = FileLock::acquire(&lock, watch)?;
    // Another process may have made it while this one waited.
    if !counts(&copy) {
        copy_file(&path, &copy).map_err(|source| TextError::io("write", &copy, source))?;
    }
    Ok(copy)
}

/// `<mount point>/<user>/fs_cache`
fn cache_folder(disk: &Disk) -> PathBuf {
    let user = env::var("USER").ok().filter(|user| !user.contains('/'));
    let user = user.unwrap_or_else(|| "moeut".to_owned());
    disk.mount.join(user).join("fs_cache")
}

/// Whole or absent.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let temporary = beside(to, ".tmp");
    let outcome = fs::copy(from, &temporary)
        .and_then(|_| give_name(&File::open(&temporary)?, &temporary, to));
    if outcome.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    outcome
}

/// The disk to copy to: solid-state before turning, then the one with the most free space.
fn best<'a>(disks: &'a [Disk], pattern: &Pattern, n_bytes: u64) -> Option<&'a Disk> {
    disks
        .iter()
        .filter(|disk| pattern.takes(&disk.mount) && disk.n_free >= n_bytes + SPARE_BYTES)
        .max_by_key(|disk| (disk.is_solid_state, disk.n_free))
}

/// The local disks of this machine that can be written to.
fn disks() -> Vec<Disk> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    local_mounts(&table)
        .into_iter()
        .filter_map(|mount| {
            let writable = rustix::fs::access(&mount, rustix::fs::Access::WRITE_OK);
            writable.ok()?;
            let space = rustix::fs::statvfs(&mount).ok()?;
            Some(Disk {
                n_free: space.f_bavail.saturating_mul(space.f_frsize),
                is_solid_state: is_solid_state(&mount),
                mount,
            })
        })
        .collect()
}

/// Mount points of devices that are mounted for writing.
fn local_mounts(table: &str) -> Vec<PathBuf> {
    let mut mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (device, mount, _, options) = (
                fields.next()?,
                fields.next()?,
                fields.next()?,
                fields.next()?,
            );
            let is_writable = options.split(',').any(|option| option == "rw");
            (device.starts_with("/dev/") && is_writable).then(|| PathBuf::from(unescaped(mount)))
        })
        // A device may be mounted on a file.
        .filter(|mount| !mount.is_file())
        .collect();
    mounts.sort();
    mounts.dedup();
    mounts
}

/// The kernel writes a space as `\040`.
fn unescaped(text: &str) -> String {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    escapes.iter().fold(text.to_owned(), |text, (code, char)| {
        text.replace(code, char)
    })
}

/// What the kernel says about the device, or about the disk of the partition; unknown is no.
fn is_solid_state(mount: &Path) -> bool {
    let Ok(metadata) = mount.metadata() else {
        return false;
    };
    let (major, minor) = (
        rustix::fs::major(metadata.dev()),
        rustix::fs::minor(metadata.dev()),
    );
    ["queue/rotational", "../queue/rotational"]
        .iter()
        .map(|file| format!("/sys/dev/block/{major}:{minor}/{file}"))
        .find_map(|file| fs::read_to_string(file).ok())
        .is_some_and(|text| text.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(mount: &Path, is_solid_state: bool, n_free: u64) -> Disk {
        Disk {
            mount: mount.to_owned(),
            is_solid_state,
            n_free: n_free + SPARE_BYTES,
        }
    }

    #[test]
    fn solid_state_first_then_free_space_among_those_that_match() {
        let disks = [
            disk(Path::new("/"), false, 900),
            disk(Path::new("/scratch"), true, 100),
            disk(Path::new("/fast disk"), true, 200),
        ];
        let chosen = |pattern, n_bytes| {
            let pattern = Pattern::parse(pattern).unwrap();
            best(&disks, &pattern, n_bytes).map(|disk| disk.mount.to_str().unwrap())
        };
        assert_eq!(chosen("*", 50), Some("/fast disk"));
        assert_eq!(chosen("*", 300), Some("/"));
        assert_eq!(chosen("*", 1000), None);
        assert_eq!(chosen("^/scr", 50), Some("/scratch"));
        assert_eq!(chosen("^/scr", 150), None);
        assert_eq!(chosen("^/home", 1), None);
        let error = Pattern::parse("(").unwrap_err();
        assert!(error.help().contains("`^/scratch`"), "{error}");
    }

    #[test]
    fn only_devices_that_are_writable_are_disks() {
        let table = "\
/dev/sda1 / ext4 rw,relatime 0 0
proc /proc proc rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /fast\\040disk xfs rw,noatime 0 0
/dev/sdc1 /cdrom iso9660 ro 0 0
";
        let expected = ["/", "/fast disk"].map(PathBuf::from);
        assert_eq!(local_mounts(table), expected);
    }

    /// A copy is used until the original changes.
    #[test]
    fn a_copy_counts_as_long_as_the_original_is_the_same() {
        let (network, local) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let original = network.path().join("chunk_0.bin");
        let link = network.path().join("link.bin");
        fs::write(&original, b"1234").unwrap();
        std::os::unix::fs::symlink(&original, &link).unwrap();
        let disks = [disk(local.path(), true, 100)];
        let copy = |path: &Path| local_copy(path, &disks, &Pattern::Any, Watch::nobody()).unwrap();
        let first = copy(&original);
        assert!(first.starts_with(local.path()), "{}", first.display());
        assert_eq!(fs::read(&first).unwrap(), b"1234");
        fs::write(&first, b"4321").unwrap();
        assert_eq!(copy(&link), first);
        assert_eq!(fs::read(&first).unwrap(), b"4321", "it was copied again");
        fs::write(&original, b"12345").unwrap();
        assert_eq!(fs::read(copy(&original)).unwrap(), b"12345");
    }

    #[test]
    fn this_machines_disk_is_no_network() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_on_network(folder.path()));
        let chunk = Chunk {
            path: folder.path().join("chunk_0.bin"),
            n_tokens: 1,
            utf8_bytes: None,
        };
        fs::write(&chunk.path, [0, 0]).unwrap();
        let chunks = local_copies(vec![chunk.clone()], &Pattern::Any, Watch::nobody());
        assert_eq!(chunks.unwrap(), [chunk]);
    }
}
