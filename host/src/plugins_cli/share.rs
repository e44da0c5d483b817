//! `plugins pack`, `install`, `remove` and `key`: plugins on their way between people.

use crate::error::HostError;
use crate::plugins::folders::users_folder;
use crate::plugins::needs::counted;
use crate::plugins::package::install::{Request, install, remove};
use crate::plugins::package::signature::{SecretKey, TrustedKeys};
use crate::plugins::package::{self, EXTENSION, pack};
use crate::plugins::{Policy, lock};
use crate::words::Words;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Makes a package of plugin files.
pub(super) fn pack_files(files: &[&str], words: &Words<'_>) -> Result<String, HostError> {
    let files: Vec<&Path> = files.iter().map(Path::new).collect();
    let texts: Vec<&Path> = words.values("license").map(Path::new).collect();
    let key = words
        .value("key")
        .map(Path::new)
        .map(SecretKey::read)
        .transpose()?;
    let chosen = |contents: &package::Contents| match words.value("out") {
        Some(path) => PathBuf::from(path),
        None => format!("{}-{}{EXTENSION}", contents.name, contents.version).into(),
    };
    let (path, contents) = pack(&files, &texts, key.as_ref(), chosen)?;
    let mut text = format!(
        "wrote `{}`: {}, licence {}\n",
        path.display(),
        contents.heading(),
        contents.license
    );
    for build in &contents.builds {
        let _ = writeln!(text, "  {}  {}", build.entry.sha256, build.describe());
    }
    for entry in &contents.texts {
        let _ = writeln!(text, "  {}  {}", entry.sha256, entry.path);
    }
    if key.is_none() {
        text.push_str("not signed; `--key <file>` signs it with a key that `moeut-host plugins key <file>` makes\n");
    }
    let _ = writeln!(
        text,
        "others type `moeut-host plugins install {}`",
        path.display()
    );
    Ok(text)
}

/// Puts plugins into a folder of plugins.
pub(super) fn install_from(
    source: &str,
    words: &Words<'_>,
    argv: &[String],
) -> Result<String, HostError> {
    let into = folder(words.value("into"))?;
    let request = Request {
        into: &into,
        sha256: words.value("sha256"),
        keeps_others: words.has("keep"),
        policy: Policy::from_args(argv)?,
        trusted: &TrustedKeys::of_user()?,
    };
    let mut text = String::new();
    for one in install(source, &request)? {
        let verb = if one.was_there {
            "is there already:"
        } else {
            "installed"
        };
        let _ = writeln!(text, "{verb} {} ({})", one.heading, one.trust);
        let _ = writeln!(text, "  {}\n  sha256 {}", one.path.display(), one.sha256);
        for gone in &one.removed {
            let _ = writeln!(
                text,
                "  removed `{}`, another version; `--keep` would leave it",
                gone.display()
            );
        }
    }
    if Path::new(lock::FILE).exists() {
        let _ = writeln!(
            text,
            "`{}` is as it was; `moeut-host plugins lock --update` locks what is here",
            lock::FILE
        );
    }
    Ok(text)
}

/// Takes a plugin out of a folder of plugins.
pub(super) fn remove_from(wanted: &str, words: &Words<'_>) -> Result<String, HostError> {
    let removed = remove(wanted, &folder(words.value("from"))?)?;
    let mut text = format!("removed {}\n", counted(removed.len(), "file"));
    for path in removed {
        let _ = writeln!(text, "  {}", path.display());
    }
    Ok(text)
}

/// Makes a pair of keys.
pub(super) fn make_key(path: &Path) -> Result<String, HostError> {
    let (public, public_path) = SecretKey::create(path)?;
    Ok(format!(
        "wrote the secret key `{}`, which signs: keep it to yourself\n\
         wrote the public key `{}`: {public}\n\
         others trust it by `cat {} >> ~/.config/moeut/trusted_keys`\n",
        path.display(),
        public_path.display(),
        public_path.display(),
    ))
}

fn folder(named: Option<&str>) -> Result<PathBuf, HostError> {
    named
        .map(PathBuf::from)
        .or_else(users_folder)
        .ok_or_else(|| {
            HostError::new(
                "there is no folder for plugins",
                "neither `HOME` nor `XDG_DATA_HOME` is set",
                "name a folder with `--into` or `--from`",
            )
        })
}
