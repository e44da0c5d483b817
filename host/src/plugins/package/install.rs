//! Puts plugins into a folder, and takes them out again.
//!
//! A file is written beside its place, inspected there, and renamed; a host that runs keeps the one that it opened.

use super::signature::{Signature, TrustedKeys};
use super::{Contents, EXTENSION, read};
use crate::plugins::inspect::{self, hex, inspect};
use crate::plugins::{Policy, folders};
use moeut_plugin_api::PluginError;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a server may take to answer, and then between two pieces of the file.
const PATIENCE: Duration = Duration::from_mins(1);

/// What is asked of an installation.
pub struct Request<'a> {
    /// Folder of the plugin.
    pub into: &'a Path,
    /// SHA-256 that the file at the source must have.
    pub sha256: Option<&'a str>,
    /// Leave other versions of the plugin where they are.
    pub keeps_others: bool,
    /// What is done about missing signatures.
    pub policy: Policy,
    /// Whose signatures count.
    pub trusted: &'a TrustedKeys,
}

/// A plugin file that was put into place.
pub struct Installed {
    /// `moeut-task-mine 0.2.0`.
    pub heading: String,
    /// Where it is.
    pub path: PathBuf,
    /// In hex.
    pub sha256: String,
    /// Whose word it is, in words.
    pub trust: String,
    /// Files of other versions that were removed.
    pub removed: Vec<PathBuf>,
    /// The very file was there already.
    pub was_there: bool,
}

/// A plugin file in memory.
struct Candidate {
    file_name: String,
    bytes: Vec<u8>,
    /// From a package: what it says, and whose word that is.
    package: Option<(Contents, Option<Signature>)>,
}

/// Installs from a package or plugin file, a folder of these, or an address.
///
/// # Errors
/// If something is refused, or the disk refuses. What was installed before that stays.
pub fn install(source: &str, request: &Request<'_>) -> Result<Vec<Installed>, PluginError> {
    make_folder(request.into)?;
    let is_address = source.starts_with("http://") || source.starts_with("https://");
    let files = if is_address {
        let file = download(source)?;
        vec![(source.to_owned(), file)]
    } else {
        local_files(Path::new(source))?
    };
    if request.sha256.is_some() && files.len() != 1 {
        return Err(PluginError::new("`--sha256` is of one file")
            .why(format!(
                "`{source}` has {} plugin files and packages",
                files.len()
            ))
            .fix("name the file"));
    }
    let mut installed = Vec::new();
    for (origin, file) in files {
        let candidate = candidate(&origin, file, request)?;
        installed.push(place(&origin, &candidate, request)?);
    }
    Ok(installed)
}

fn make_folder(folder: &Path) -> Result<(), PluginError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .map_err(|error| {
            PluginError::new(format!(
                "the plugin folder `{}` cannot be made",
                folder.display()
            ))
            .why(error.to_string())
            .fix("name another one with `--into`")
        })
}

fn local_files(source: &Path) -> Result<Vec<(String, File)>, PluginError> {
    let error = |why: String, fix: &str| {
        Err(PluginError::new(format!(
            "nothing can be installed from `{}`",
            source.display()
        ))
        .why(why)
        .fix(fix))
    };
    let unreadable = |problem: std::io::Error| error(problem.to_string(), "correct the path");
    let mut paths = vec![source.to_owned()];
    if source.is_dir() {
        let entries =
            match fs::read_dir(source).and_then(Iterator::collect::<std::io::Result<Vec<_>>>) {
                Ok(entries) => entries,
                Err(problem) => return unreadable(problem),
            };
        let is_wanted = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            path.is_file() && (name.ends_with(".so") || name.ends_with(EXTENSION))
        };
        paths = entries
            .iter()
            .map(fs::DirEntry::path)
            .filter(is_wanted)
            .collect();
        paths.sort();
        if paths.is_empty() {
            let why = format!("the folder has neither `*.so` nor `*{EXTENSION}`");
            return error(why, "name a plugin file, a package, or a folder with some");
        }
    }
    let mut files = Vec::new();
    for path in paths {
        match File::open(&path) {
            Ok(file) => files.push((path.display().to_string(), file)),
            Err(problem) => return unreadable(problem),
        }
    }
    Ok(files)
}

fn download(address: &str) -> Result<File, PluginError> {
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_recv_body(Some(PATIENCE * 10))
        .build();
    let fetch = || -> Result<File, Box<dyn std::error::Error>> {
        let mut response = ureq::Agent::new_with_config(config).get(address).call()?;
        let expected = response
            .headers()
            .get("content-length")
            .and_then(|text| text.to_str().ok()?.parse().ok());
        let mut file = tempfile::tempfile()?;
        let mut body = response.body_mut().as_reader().take(inspect::MAX_BYTES + 1);
        let n_bytes = std::io::copy(&mut body, &mut file)?;
        if n_bytes > inspect::MAX_BYTES {
            return Err(format!("it has more than {} bytes", inspect::MAX_BYTES).into());
        }
        if expected.is_some_and(|expected: u64| expected != n_bytes) {
            return Err(format!("it broke off after {n_bytes} bytes").into());
        }
        file.rewind()?;
        Ok(file)
    };
    fetch().map_err(|error| {
        PluginError::new(format!("`{address}` cannot be downloaded"))
            .why(error.to_string())
            .fix("check the address in a browser, then type the command again")
    })
}

/// Reads a file and finds out what it is by how it begins.
fn candidate(
    origin: &str,
    mut file: File,
    request: &Request<'_>,
) -> Result<Candidate, PluginError> {
    let mut bytes = Vec::new();
    let read_all = Read::by_ref(&mut file)
        .take(inspect::MAX_BYTES)
        .read_to_end(&mut bytes);
    read_all.map_err(|error| {
        PluginError::new(format!("`{origin}` cannot be read"))
            .why(error.to_string())
            .fix("correct the path")
    })?;
    let found = hex(&Sha256::digest(&bytes));
    if let Some(wanted) = request.sha256
        && !wanted.eq_ignore_ascii_case(&found)
    {
        return Err(
            PluginError::new(format!("`{origin}` is not the file that you want"))
                .why(format!(
                    "its SHA-256 is {found}, and `--sha256` says {wanted}"
                ))
                .fix("compare with what its authors published; install it only if they agree"),
        );
    }
    if bytes.starts_with(b"\x7fELF") {
        let last = origin.rsplit('/').next().unwrap_or(origin);
        return Ok(Candidate {
            file_name: last.to_owned(),
            bytes,
            package: None,
        });
    }
    let here = |contents: &Contents| -> Vec<String> {
        contents
            .builds
            .iter()
            .find(|build| build.is_for_here())
            .map(|build| build.entry.path.clone())
            .into_iter()
            .collect()
    };
    let package = read(&bytes[..], origin, here)?;
    let Some((path, bytes)) = package.taken.into_iter().next() else {
        let builds: Vec<String> = package
            .contents
            .builds
            .iter()
            .map(super::Build::describe)
            .collect();
        return Err(
            PluginError::new(format!("`{origin}` has no build for this machine"))
                .why(format!(
                    "this is {}, libtorch {}; it has {}",
                    moeut_plugin_api::abi::manifest::TARGET,
                    moeut_torch::LIBTORCH_VERSION,
                    builds.join("; ")
                ))
                .fix("ask its authors for one, or build it here from its sources"),
        );
    };
    let last = path.rsplit('/').next().unwrap_or(&path);
    Ok(Candidate {
        file_name: last.to_owned(),
        bytes,
        package: Some((package.contents, package.signature)),
    })
}

fn place(
    origin: &str,
    candidate: &Candidate,
    request: &Request<'_>,
) -> Result<Installed, PluginError> {
    let signature = candidate
        .package
        .as_ref()
        .and_then(|(_, signature)| *signature);
    let trust = request.trusted.judge(origin, signature, request.policy)?;
    let io = |path: &Path, error: &std::io::Error| {
        PluginError::new(format!("`{}` cannot be written", path.display()))
            .why(error.to_string())
            .fix("check the folder's permissions and the free space, or name another one with `--into`")
    };
    // Its name must not end with `.so`: a host that starts now does not see it yet.
    let mut beside = tempfile::Builder::new()
        .prefix(".installing-")
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(request.into)
        .map_err(|error| io(request.into, &error))?;
    let written = beside
        .write_all(&candidate.bytes)
        .and_then(|()| beside.as_file().sync_all());
    written.map_err(|error| io(beside.path(), &error))?;
    let manifest = inspect(beside.path()).map_err(|refusal| {
        let fix = refusal.fix(Path::new(origin));
        PluginError::new(format!("`{origin}` is not installed"))
            .why(refusal.to_string())
            .fix(fix)
    })?;
    let plugin = &manifest.plugin;
    if let Some((contents, _)) = &candidate.package
        && !contents.is_of(plugin)
    {
        return Err(PluginError::new(format!("`{origin}` is not installed"))
            .why(format!(
                "it says that it is {}, but has {} {}",
                contents.heading(),
                plugin.name,
                plugin.version
            ))
            .fix("ask its authors for a package that `moeut-host plugins pack` made"));
    }

    let path = request
        .into
        .join(versioned(&candidate.file_name, &plugin.version));
    let was_there = match inspect::records(&path) {
        Some((other, _)) if other.name != plugin.name => {
            return Err(PluginError::new(format!("`{origin}` is not installed"))
                .why(format!(
                    "`{}` is there and belongs to {} {}",
                    path.display(),
                    other.name,
                    other.version
                ))
                .fix("move that file away, or name another folder with `--into`"));
        }
        Some(_) => fs::read(&path).is_ok_and(|bytes| bytes == candidate.bytes),
        None => false,
    };
    if !was_there {
        beside
            .persist(&path)
            .map_err(|error| io(&path, &error.error))?;
        sync(request.into).map_err(|error| io(request.into, &error))?;
    }
    let mut removed = Vec::new();
    if !request.keeps_others {
        let others = files_of(request.into, &plugin.name)?;
        for (other, _) in others.into_iter().filter(|(other, _)| *other != path) {
            fs::remove_file(&other).map_err(|error| io(&other, &error))?;
            removed.push(other);
        }
    }
    Ok(Installed {
        heading: format!("{} {}", plugin.name, plugin.version),
        path,
        sha256: manifest.sha256.clone(),
        trust,
        removed,
        was_there,
    })
}

/// `libmine.so` of version 0.2.0 becomes `libmine-0.2.0.so`, so that versions can lie side by side.
fn versioned(file_name: &str, version: &str) -> String {
    let stem = file_name.strip_suffix(".so").unwrap_or(file_name);
    let ending = format!("-{version}");
    let stem = stem.strip_suffix(&ending).unwrap_or(stem);
    format!("{stem}{ending}.so")
}

fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The plugin files of this name in a folder, with their versions; also such as would be refused.
fn files_of(folder: &Path, name: &str) -> Result<Vec<(PathBuf, String)>, PluginError> {
    let files = folders::libraries(folder).map_err(|error| {
        PluginError::new(format!(
            "plugin folder `{}` cannot be read",
            folder.display()
        ))
        .why(error.to_string())
        .fix("correct the path or its permissions")
    })?;
    let of_name = |path: PathBuf| {
        let (plugin, _) = inspect::records(&path)?;
        (plugin.name == name).then_some((path, plugin.version))
    };
    Ok(files.into_iter().filter_map(of_name).collect())
}

/// Removes the files of a plugin, or of one version of it (`name@0.2.0`), from a folder; returns them.
///
/// # Errors
/// If there are none, or the disk refuses.
pub fn remove(wanted: &str, folder: &Path) -> Result<Vec<PathBuf>, PluginError> {
    let (name, version) = match wanted.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (wanted, None),
    };
    let found = files_of(folder, name)?;
    let chosen: Vec<&PathBuf> = found
        .iter()
        .filter(|(_, have)| version.is_none_or(|version| version == have))
        .map(|(path, _)| path)
        .collect();
    if chosen.is_empty() {
        let have = if found.is_empty() {
            let all = folders::libraries(folder).unwrap_or_default();
            let names = all
                .iter()
                .filter_map(|path| Some(format!("`{}`", inspect::records(path)?.0.name)));
            let mut names: Vec<String> = names.collect();
            names.dedup();
            if names.is_empty() {
                "no plugins".to_owned()
            } else {
                names.join(", ")
            }
        } else {
            let versions: Vec<&str> = found.iter().map(|(_, version)| version.as_str()).collect();
            format!("version {}", versions.join(", "))
        };
        return Err(PluginError::new(format!("there is no plugin `{wanted}` to remove"))
            .why(format!("`{}` has {have}", folder.display()))
            .fix("`moeut-host plugins list` shows plugins and folders; `--from` names another folder"));
    }
    for path in &chosen {
        fs::remove_file(path).map_err(|error| {
            PluginError::new(format!("`{}` cannot be removed", path.display()))
                .why(error.to_string())
                .fix("check the folder's permissions")
        })?;
    }
    Ok(chosen.into_iter().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_lie_side_by_side() {
        assert_eq!(versioned("libmine.so", "0.2.0"), "libmine-0.2.0.so");
        assert_eq!(versioned("libmine-0.2.0.so", "0.2.0"), "libmine-0.2.0.so");
    }
}
