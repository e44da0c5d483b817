//! Where plugins are looked for, in order; an earlier folder shadows a later one.

use std::path::{Path, PathBuf};

/// One folder of the search path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// The folder; it need not exist.
    pub path: PathBuf,
    /// Who put it on the search path, in words.
    pub origin: &'static str,
}

/// The search path: `-plugin_dir`, `$MOEUT_PLUGIN_PATH`, beside the executable, the user's data folder, `./plugins`.
pub fn search_path(plugin_dirs: &[String]) -> Vec<Folder> {
    let folder = |path: PathBuf, origin| Folder { path, origin };
    let mut all: Vec<Folder> = plugin_dirs
        .iter()
        .map(|dir| folder(dir.into(), "-plugin_dir"))
        .collect();
    if let Some(paths) = std::env::var_os("MOEUT_PLUGIN_PATH") {
        // An empty entry would mean the current folder to a shell; here it means that nothing was set.
        let paths = std::env::split_paths(&paths).filter(|path| !path.as_os_str().is_empty());
        all.extend(paths.map(|path| folder(path, "$MOEUT_PLUGIN_PATH")));
    }
    if let Ok(executable) = std::env::current_exe()
        && let Some(parent) = executable.parent()
    {
        all.push(folder(parent.join("plugins"), "beside the executable"));
    }
    if let Some(own) = users_folder() {
        all.push(folder(own, "your data folder"));
    }
    all.push(folder("plugins".into(), "the current folder"));
    without_repeats(all)
}

/// Where a user's own plugins are installed: `$XDG_DATA_HOME/moeut/plugins`, by default below `~/.local/share`.
pub fn users_folder() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/share")));
    Some(data?.join("moeut/plugins"))
}

fn without_repeats(all: Vec<Folder>) -> Vec<Folder> {
    let mut unique: Vec<(PathBuf, Folder)> = Vec::new();
    for folder in all {
        let real = folder
            .path
            .canonicalize()
            .unwrap_or_else(|_| folder.path.clone());
        if !unique.iter().any(|(known, _)| *known == real) {
            unique.push((real, folder));
        }
    }
    unique.into_iter().map(|(_, folder)| folder).collect()
}

/// The `*.so` files directly in a folder, sorted by name, and links of such a name that lead nowhere; a folder that does
/// not exist has none.
///
/// # Errors
/// If the folder exists and cannot be read.
pub fn libraries(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let is_named = path.extension().is_some_and(|extension| extension == "so");
        if is_named && (path.is_file() || !path.exists()) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_libraries_directly_in_a_folder_count() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.so", "a.so", "c.so.1", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        std::fs::create_dir(dir.path().join("d.so")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("e.so")).unwrap();
        let names: Vec<_> = libraries(dir.path())
            .unwrap()
            .into_iter()
            .map(|path| path.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["a.so", "b.so", "e.so"]);
    }

    #[test]
    fn the_first_mention_of_a_folder_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let found = search_path(&[path.clone(), format!("{path}/.")]);
        assert_eq!(
            found
                .iter()
                .filter(|folder| folder.origin == "-plugin_dir")
                .count(),
            1
        );
    }
}
