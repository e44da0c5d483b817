//! Writes and reads packages.

use super::signature::{SecretKey, Signature};
use super::{Build, Contents, Entry, FORMAT};
use crate::plugins::inspect::{self, hex};
use crate::whole_file;
use moeut_plugin_api::PluginError;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const CONTENTS: &str = "package.json";
const SIGNATURE: &str = "package.json.sig";
/// Larger lists are no packages of ours.
const MAX_CONTENTS: u64 = 1 << 20;
/// A file of a package; the largest plugin so far has 5 MB.
const MAX_FILE: u64 = 1 << 30;

/// A package whose every byte agrees with its list.
#[derive(Debug)]
pub struct Package {
    /// What it has.
    pub contents: Contents,
    /// Who says so; its bytes and key agree.
    pub signature: Option<Signature>,
    /// Path and bytes of what was wanted.
    pub taken: Vec<(String, Vec<u8>)>,
}

/// Writes a package of plugin files, all of the same plugin and version, to `path`, beside an older one, which it then
/// replaces.
///
/// # Errors
/// If a file is refused, they do not belong together, or the disk refuses.
pub fn pack(
    files: &[&Path],
    texts: &[&Path],
    key: Option<&SecretKey>,
    path: impl FnOnce(&Contents) -> PathBuf,
) -> Result<(PathBuf, Contents), PluginError> {
    let (contents, bytes) = collect(files, texts)?;
    let path = path(&contents);
    let write = |file: &mut std::fs::File| -> std::io::Result<()> {
        let mut archive = tar::Builder::new(zstd::Encoder::new(file, 19)?);
        let list = serde_json::to_vec_pretty(&contents)?;
        append(&mut archive, CONTENTS, &list)?;
        if let Some(key) = key {
            append(
                &mut archive,
                SIGNATURE,
                key.sign(&list).to_string().as_bytes(),
            )?;
        }
        for (entry, bytes) in entries(&contents).zip(&bytes) {
            append(&mut archive, &entry.path, bytes)?;
        }
        archive.into_inner()?.finish().map(drop)
    };
    whole_file::fill(&path, |error| error, write).map_err(|error| {
        PluginError::new(format!("`{}` cannot be written", path.display()))
            .why(error.to_string())
            .fix("check the folder and the free space, or name another place with `--out`")
    })?;
    Ok((path, contents))
}

/// Everything listed, in the order of the archive: texts, then builds.
fn entries(contents: &Contents) -> impl Iterator<Item = &Entry> {
    let builds = contents.builds.iter().map(|build| &build.entry);
    contents.texts.iter().chain(builds)
}

fn collect(files: &[&Path], texts: &[&Path]) -> Result<(Contents, Vec<Vec<u8>>), PluginError> {
    let mut all_bytes = Vec::new();
    let mut contents: Option<Contents> = None;
    for path in texts {
        let bytes = std::fs::read(path).map_err(|error| {
            PluginError::new(format!("`{}` cannot be read", path.display()))
                .why(error.to_string())
                .fix("correct the path behind `--license`")
        })?;
        all_bytes.push(bytes);
    }
    let listed = |path: &Path, bytes: &Vec<u8>| Entry {
        path: path.file_name().unwrap_or_default().display().to_string(),
        n_bytes: bytes.len() as u64,
        sha256: hex(&Sha256::digest(bytes)),
    };
    let texts: Vec<Entry> = texts
        .iter()
        .zip(&all_bytes)
        .map(|(path, bytes)| listed(path, bytes))
        .collect();
    for path in files {
        let read = inspect::read(path).map_err(|refusal| refusal.into_error(path))?;
        let (plugin, components) = inspect::read_records_of_any_machine(&read.bytes)
            .map_err(|refusal| refusal.into_error(path))?;
        let all = contents.get_or_insert_with(|| Contents {
            format: FORMAT,
            name: plugin.name.clone(),
            version: plugin.version.clone(),
            license: plugin.license.clone(),
            authors: plugin.authors.clone(),
            builds: Vec::new(),
            texts: texts.clone(),
        });
        let heading = format!("{} {}", plugin.name, plugin.version);
        if !all.is_of(&plugin) {
            return Err(PluginError::new("these files are not builds of one plugin")
                .why(format!(
                    "`{}` is {heading}, the first is {}",
                    path.display(),
                    all.heading()
                ))
                .fix("make a package for each"));
        }
        let build = Build::of(path, &read, &plugin, &components);
        if let Some(same) = all
            .builds
            .iter()
            .find(|other| other.entry.path == build.entry.path)
        {
            return Err(
                PluginError::new("two files are for the same machine and libtorch")
                    .why(format!(
                        "`{}` is another build for {}",
                        path.display(),
                        same.describe()
                    ))
                    .fix("leave one of them out"),
            );
        }
        all.builds.push(build);
        all_bytes.push(read.bytes);
    }
    let contents = contents.ok_or_else(|| {
        PluginError::new("a package needs a plugin file")
            .why("none was named")
            .fix("type `moeut-host plugins pack target/release/lib<name>.so`")
    })?;
    Ok((contents, all_bytes))
}

/// Times and owners are left out, so that the same files make the same package.
fn append(archive: &mut tar::Builder<impl Write>, path: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, path, bytes)
}

/// Reads a whole package, checks it, and keeps the files that `wants` picks from its list.
///
/// # Errors
/// If it cannot be read, is damaged, or does not agree with its list or its signature.
pub fn read(
    file: impl Read,
    origin: &str,
    wants: impl FnOnce(&Contents) -> Vec<String>,
) -> Result<Package, PluginError> {
    let damaged = |why: String| {
        PluginError::new(format!("package `{origin}` cannot be used"))
            .why(why)
            .fix(
                "get it anew from where it came from; if it is damaged there, too, ask its authors",
            )
    };
    read_checked(file, wants).map_err(damaged)
}

fn read_checked(
    file: impl Read,
    wants: impl FnOnce(&Contents) -> Vec<String>,
) -> Result<Package, String> {
    let text = |error: std::io::Error| format!("it is damaged, or no package: {error}");
    let mut archive = tar::Archive::new(zstd::Decoder::new(file).map_err(text)?);
    let mut files = archive.entries().map_err(text)?;

    let mut next = |limit: u64| -> Result<Option<(String, Vec<u8>)>, String> {
        let Some(entry) = files.next() else {
            return Ok(None);
        };
        let entry = entry.map_err(text)?;
        let path = entry.path().map_err(text)?.display().to_string();
        if !entry.header().entry_type().is_file() {
            return Err(format!("`{path}` in it is no plain file"));
        }
        if entry.size() > limit {
            return Err(format!(
                "`{path}` in it has {} bytes, at most {limit} are expected",
                entry.size()
            ));
        }
        let mut bytes = Vec::new();
        entry.take(limit).read_to_end(&mut bytes).map_err(text)?;
        Ok(Some((path, bytes)))
    };

    let (path, list) = next(MAX_CONTENTS)?.ok_or("it is empty")?;
    if path != CONTENTS {
        return Err(format!(
            "it begins with `{path}`, a package with `{CONTENTS}`"
        ));
    }
    let contents: Contents = serde_json::from_slice(&list)
        .map_err(|error| format!("its `{CONTENTS}` cannot be read: {error}"))?;
    if contents.format != FORMAT {
        return Err(format!(
            "its format is {}, and this host knows {FORMAT}",
            contents.format
        ));
    }

    let wanted: BTreeSet<String> = wants(&contents).into_iter().collect();
    let mut expected = entries(&contents);
    let (mut signature, mut taken) = (None, Vec::new());
    while let Some((path, bytes)) = next(MAX_FILE)? {
        if path == SIGNATURE && signature.is_none() {
            signature = Some(Signature::read(&bytes, &list)?);
            continue;
        }
        let entry = expected.next().filter(|entry| entry.path == path);
        let entry = entry.ok_or_else(|| format!("`{path}` in it is not where its list says"))?;
        let sha256 = hex(&Sha256::digest(&bytes));
        if entry.n_bytes != bytes.len() as u64 || entry.sha256 != sha256 {
            return Err(format!(
                "`{path}` in it has {} bytes with SHA-256 {sha256}; its list says {} and {}",
                bytes.len(),
                entry.n_bytes,
                entry.sha256
            ));
        }
        if wanted.contains(&path) {
            taken.push((path, bytes));
        }
    }
    let missing = expected.next().map(|entry| entry.path.clone());
    drop(expected);
    if let Some(missing) = missing {
        return Err(format!("`{missing}` of its list is missing"));
    }
    Ok(Package {
        contents,
        signature,
        taken,
    })
}
