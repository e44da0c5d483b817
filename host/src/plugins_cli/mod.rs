//! `moeut-host plugins …`: reads the words of its commands and writes what they found. The work is in [`crate::plugins`].

mod new;
mod share;
mod show;

use crate::cli::{open_registry, plugin_folders, print};
use crate::doctor::plugin_table;
use crate::error::HostError;
use crate::plugins::folders::libraries;
use crate::plugins::inspect::inspect;
use crate::plugins::known::Known;
use crate::plugins::listing::Listing;
use crate::plugins::lock;
use crate::plugins::needs::{Here, counted};
use crate::plugins::verify::{Check, verify};
use crate::plugins::{Gate, Lock};
use crate::words::{Grammar, Words};
use moeut_plugin_api::PluginError;
use std::fmt::Write;
use std::path::{Path, PathBuf};

const USAGE: &str = "\
usage: moeut-host plugins list                                 every component, and where it is from
       moeut-host plugins show <name or file> [--symbols]      manifest, what it needs of the system, arguments
       moeut-host plugins verify [<file> …]                    every check before loading; exit code 1 if a file is refused
       moeut-host plugins lock [--update]                      write `plugins.lock`, which `-plugin_verify` goes by
       moeut-host plugins new task|dataset|model|kernel <name> [--api <checkout>]
                                                               a crate that builds, passes its tests and trains
       moeut-host plugins pack <file> … [--out <package>] [--license <text>] [--key <file>]
                                                               one file to give to others: builds, checksums, signature
       moeut-host plugins install <package, file, folder or URL> [--into <folder>] [--keep] [--sha256 <hex>]
                                                               check and put into your folder of plugins
       moeut-host plugins remove <plugin>[@<version>] [--from <folder>]
       moeut-host plugins key <file>                           a pair of keys, to sign packages

Each takes `-plugin_dir` and `-plugin_verify strict|warn|off`, as training does.
";

/// What is allowed everywhere is for [`crate::cli`], which reads it for itself.
const GRAMMAR: Grammar = Grammar {
    everywhere: &["plugin_dir", "plugin_verify"],
    with_value: &["api", "from", "into", "key", "license", "out", "sha256"],
    switches: &["keep", "symbols", "update"],
    misuse,
};

/// Exit code of `verify` if a file is refused.
const EXIT_REFUSED: u8 = 1;

/// Runs a command line without its first word; returns the exit code.
///
/// # Errors
/// For words that are no such command, and whatever the command says.
pub fn command(argv: &[String]) -> Result<u8, HostError> {
    let words = Words::of(argv, GRAMMAR)?;
    let mut code = 0;
    let text = match words.places[..] {
        _ if words.has("help") => USAGE.to_owned(),
        [] => USAGE.to_owned(),
        ["list"] => {
            words.allow(&[])?;
            let gate = Gate::from_args(argv)?;
            let listing = Listing::new(&plugin_folders(argv)?, gate, Known::of_user());
            plugin_table(&listing)
        }
        ["show", wanted] => {
            words.allow(&["symbols"])?;
            show::show(wanted, &open_registry(argv)?, words.has("symbols"))?
        }
        ["verify", ref files @ ..] => {
            words.allow(&[])?;
            let (text, n_refused) = verify_files(argv, files)?;
            if n_refused > 0 {
                code = EXIT_REFUSED;
            }
            text
        }
        ["lock"] => {
            words.allow(&["update"])?;
            lock_plugins(argv, Path::new(lock::FILE), words.has("update"))?
        }
        ["new", kind, name] => {
            words.allow(&["api"])?;
            new::new(kind, name, words.value("api").map(Path::new))?
        }
        ["pack", ref files @ ..] => {
            words.allow(&["key", "license", "out"])?;
            share::pack_files(files, &words)?
        }
        ["install", source] => {
            words.allow(&["into", "keep", "sha256"])?;
            share::install_from(source, &words, argv)?
        }
        ["remove", wanted] => {
            words.allow(&["from"])?;
            share::remove_from(wanted, &words)?
        }
        ["key", path] => {
            words.allow(&[])?;
            share::make_key(Path::new(path))?
        }
        _ => {
            let why = format!("`plugins {}` is no such command", words.places.join(" "));
            return Err(misuse(why));
        }
    };
    print(&text);
    Ok(code)
}

fn misuse(why: String) -> HostError {
    HostError::new(
        "the plugins command cannot be read",
        why,
        "type `moeut-host plugins --help`",
    )
}

/// Every library on the search path.
fn all_files(argv: &[String]) -> Result<Vec<PathBuf>, HostError> {
    let mut files = Vec::new();
    for folder in plugin_folders(argv)? {
        let found = libraries(&folder.path).map_err(|error| {
            HostError::new(
                format!("plugin folder `{}` cannot be read", folder.path.display()),
                error.to_string(),
                "correct the path or its permissions",
            )
        })?;
        files.extend(found);
    }
    Ok(files)
}

/// The checks of the files, or of all on the search path; and how many files are refused.
fn verify_files(argv: &[String], files: &[&str]) -> Result<(String, usize), HostError> {
    let gate = Gate::from_args(argv)?;
    let here = Here::now();
    let files = if files.is_empty() {
        all_files(argv)?
    } else {
        files.iter().map(PathBuf::from).collect()
    };
    let (mut text, mut n_refused) = (String::new(), 0);
    for file in &files {
        let checks = verify(file, &gate, &here);
        n_refused += usize::from(checks.iter().any(|check| check.result.is_err()));
        let _ = writeln!(text, "{}", file.display());
        for check in &checks {
            text.push_str(&line(file, check));
        }
    }
    let _ = writeln!(
        text,
        "{} of {} may be opened",
        files.len() - n_refused,
        counted(files.len(), "file")
    );
    Ok((text, n_refused))
}

fn line(file: &Path, check: &Check) -> String {
    let subject = check.subject;
    match &check.result {
        Ok(found) => format!("  ok       {subject:8}  {found}\n"),
        Err(refusal) => {
            let fix = refusal.fix(file);
            format!("  REFUSED  {subject:8}  {refusal}\n                     fix: {fix}\n")
        }
    }
}

/// Locks every file of the search path that passes inspection; one that differs replaces a lock only if asked to.
fn lock_plugins(argv: &[String], path: &Path, is_update: bool) -> Result<String, HostError> {
    let mut text = String::new();
    let files = all_files(argv)?.into_iter();
    let found = Lock::new(files.filter_map(|file| match inspect(&file) {
        Ok(manifest) => Some(manifest),
        Err(refusal) => {
            let _ = writeln!(text, "note: `{}` is left out: {refusal}", file.display());
            None
        }
    }));
    if found.is_empty() {
        return Err(HostError::new(
            "there is nothing to lock",
            format!("no plugin file on the search path passes inspection\n{text}"),
            "`moeut-host doctor` shows the folders, `-plugin_dir` adds one",
        ));
    }
    let n_files = counted(found.len(), "file");
    let change = match Lock::read(path)? {
        Some(locked) if locked == found => {
            let _ = writeln!(text, "`{}` is up to date: {n_files}", path.display());
            return Ok(text);
        }
        Some(locked) => locked.differences(&found).join("\n") + "\n",
        None => String::new(),
    };
    if !change.is_empty() && !is_update {
        return Err(HostError::new(
            format!("`{}` says otherwise", path.display()),
            change.trim_end(),
            "if these changes are meant, type `moeut-host plugins lock --update`",
        ));
    }
    found.write(path).map_err(|error| {
        HostError::from(
            PluginError::new(format!("`{}` cannot be written", path.display()))
                .why(error.to_string())
                .fix("check the folder's permissions and the free space"),
        )
    })?;
    text.push_str(&change);
    let _ = writeln!(
        text,
        "wrote `{}`: {n_files}; `-plugin_verify strict` loads no others",
        path.display()
    );
    Ok(text)
}
