//! Staging: the built plugins, and nothing else, in the folder `plugins` beside the executable.
//!
//! Does not build anything and knows nothing of cargo: it is given files.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::failure::Failure;

/// The host refuses world-writable libraries and warns of group-writable ones, whatever the umask was.
const MODE: u32 = 0o755;

/// Puts copies of `libraries` into `folder` and removes libraries that are no longer built.
///
/// A copy is written beside its place and renamed, so that a run that has the old one open keeps it.
pub(crate) fn stage(folder: &Path, libraries: &[PathBuf]) -> Result<(), Failure> {
    fs::create_dir_all(folder)
        .and_then(|()| fs::set_permissions(folder, fs::Permissions::from_mode(MODE)))
        .map_err(|error| Failure::io("create", folder, &error))?;
    let mut staged: Vec<OsString> = Vec::new();
    for library in libraries {
        let name = library.file_name().unwrap_or_default();
        place(library, &folder.join(name))
            .map_err(|error| Failure::io("stage", library, &error))?;
        staged.push(name.to_owned());
    }
    remove_others(folder, &staged).map_err(|error| Failure::io("clean", folder, &error))
}

fn place(library: &Path, target: &Path) -> io::Result<()> {
    let is_current = fs::symlink_metadata(target)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o777 == MODE)
        && fs::read(library)? == fs::read(target)?;
    if is_current {
        return Ok(());
    }
    let beside = target.with_extension("so.new");
    fs::copy(library, &beside)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(MODE))?;
    fs::rename(&beside, target)
}

/// Only files with a library's name are ours; whatever else somebody keeps there stays.
fn remove_others(folder: &Path, staged: &[OsString]) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let text = name.to_string_lossy();
        let is_library =
            text.starts_with("lib") && (text.ends_with(".so") || text.ends_with(".so.new"));
        if is_library && !staged.contains(&name) {
            fs::remove_file(folder.join(&name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use tempfile::TempDir;

    fn library(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        path
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn staging_removes_libraries_that_are_no_longer_built() {
        let target = TempDir::new().unwrap();
        let plugins = target.path().join("plugins");
        let (a, b) = (
            library(target.path(), "liba.so", "a"),
            library(target.path(), "libb.so", "b"),
        );

        stage(&plugins, &[a.clone(), b]).unwrap();
        fs::write(plugins.join("plugins.lock"), "").unwrap();
        fs::write(plugins.join("libc.so.new"), "").unwrap();
        stage(&plugins, &[a]).unwrap();

        assert_eq!(names(&plugins), ["liba.so", "plugins.lock"]);
    }

    #[test]
    fn staged_library_is_writable_by_its_owner_only() {
        let target = TempDir::new().unwrap();
        let plugins = target.path().join("plugins");
        stage(&plugins, &[library(target.path(), "liba.so", "a")]).unwrap();
        for path in [plugins.join("liba.so"), plugins] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o755);
        }
    }

    #[test]
    fn changed_library_is_a_new_file_and_an_equal_one_is_left_alone() {
        let target = TempDir::new().unwrap();
        let plugins = target.path().join("plugins");
        let inode = || fs::metadata(plugins.join("liba.so")).unwrap().ino();

        stage(&plugins, &[library(target.path(), "liba.so", "a")]).unwrap();
        let first = inode();
        // Held open, as a running host would: the number of its inode is not reused.
        let _running = fs::File::open(plugins.join("liba.so")).unwrap();
        stage(&plugins, &[library(target.path(), "liba.so", "a")]).unwrap();
        assert_eq!(inode(), first);
        stage(&plugins, &[library(target.path(), "liba.so", "another")]).unwrap();
        assert_ne!(inode(), first);
        assert_eq!(fs::read(plugins.join("liba.so")).unwrap(), b"another");
    }
}
