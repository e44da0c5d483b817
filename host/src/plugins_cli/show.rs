//! `plugins show`: everything that a plugin file says of itself, what it needs of the system, and its arguments.

use crate::args::{Owner, Role, help_text, nearest};
use crate::error::HostError;
use crate::plugins::inspect::{self, inspect};
use crate::plugins::library::{self, Library};
use crate::plugins::needs::{Here, Needs, Resolution, Symbol, counted, numbered};
use crate::plugins::{Manifest, Problem, Registry};
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::{ABI_MAJOR, ABI_MINOR};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

/// Columns of the argument help.
const WIDTH: usize = 110;

/// Describes the plugins that `wanted` means: a file, or the name of a plugin or of one of its components.
///
/// # Errors
/// If there is none.
pub(super) fn show(
    wanted: &str,
    registry: &Registry,
    with_symbols: bool,
) -> Result<String, HostError> {
    let path = Path::new(wanted);
    if wanted.contains('/') || path.is_file() {
        return show_file(path, registry, with_symbols);
    }
    let found: Vec<&Library> = registry
        .libraries()
        .iter()
        .filter(|library| means(library, wanted))
        .collect();
    if found.is_empty() {
        return Err(unknown(wanted, registry));
    }
    let texts: Result<Vec<String>, HostError> = found
        .iter()
        .map(|library| describe(library, with_symbols))
        .collect();
    Ok(texts?.join("\n"))
}

/// A file of the search path is open already; another one is opened if it passes the same checks.
fn show_file(path: &Path, registry: &Registry, with_symbols: bool) -> Result<String, HostError> {
    let manifest = inspect(path).map_err(|refusal| refusal.into_error(path))?;
    let same = |library: &&Library| library.manifest.sha256 == manifest.sha256;
    if let Some(library) = registry.libraries().iter().find(same) {
        return describe(library, with_symbols);
    }
    registry
        .gate()
        .check(&manifest.plugin.name, &manifest.sha256)
        .map_err(|refusal| refusal.into_error(path))?;
    let library = library::open(manifest).map_err(|refusal| refusal.into_error(path))?;
    describe(&library, with_symbols)
}

fn means(library: &Library, wanted: &str) -> bool {
    library.manifest.plugin.name == wanted
        || library.components.iter().any(|component| {
            component.name == wanted || component.aliases.iter().any(|alias| alias == wanted)
        })
}

fn unknown(wanted: &str, registry: &Registry) -> HostError {
    let would_provide = |problem: &&Problem| {
        let mut names = problem.would_provide.iter();
        names.any(|(_, name)| name == wanted)
    };
    if let Some(problem) = registry.problems().iter().find(would_provide) {
        return problem.error.clone().into();
    }
    let names: BTreeSet<&str> = registry
        .components()
        .flat_map(|component| {
            [
                component.info.name.as_str(),
                component.library.manifest.plugin.name.as_str(),
            ]
        })
        .collect();
    let near: Vec<String> = nearest(wanted, names.into_iter())
        .iter()
        .map(|name| format!("`{name}`"))
        .collect();
    HostError::new(
        format!("unknown plugin `{wanted}`"),
        "it is neither a file, nor the name of a plugin or component that is found",
        if near.is_empty() {
            "`moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong"
                .into()
        } else {
            format!("did you mean {}?", near.join(" or "))
        },
    )
}

fn describe(library: &Library, with_symbols: bool) -> Result<String, HostError> {
    let mut text = facts(&library.manifest);
    text.push_str(&needs(&library.manifest, with_symbols)?);
    let plugin = &library.manifest.plugin;
    let heading = format!("{} {}", plugin.name, plugin.version);
    for component in &library.components {
        let _ = write!(text, "\n{} `{}`", component.kind, component.name);
        if !component.aliases.is_empty() {
            let _ = write!(text, ", also {}", component.aliases.join(", "));
        }
        let _ = writeln!(text, ": {}", component.summary);
        if let Some(capabilities) = &component.capabilities {
            let _ = writeln!(text, "  {capabilities:?}");
        }
        let owner = Owner::component(component, &heading, Role::Active);
        let help = help_text(&[owner], WIDTH);
        // Its heading was said with the summary.
        text.extend(help.split_inclusive('\n').skip(1));
    }
    Ok(text)
}

fn facts(manifest: &Manifest) -> String {
    let plugin = &manifest.plugin;
    let or = |text: &str, otherwise: &str| {
        if text.is_empty() {
            otherwise.to_owned()
        } else {
            text.to_owned()
        }
    };
    let rows = [
        ("file", manifest.path.display().to_string()),
        ("sha256", manifest.sha256.clone()),
        ("licence", or(&plugin.license, "not said")),
        ("authors", or(&plugin.authors, "not said")),
        ("commit", or(&plugin.git, "unknown")),
        (
            "abi",
            format!("{} (of this host: {ABI_MAJOR}.{ABI_MINOR})", plugin.abi),
        ),
        ("libtorch", or(&plugin.libtorch, "not used")),
        ("target", plugin.target.clone()),
        ("profile", plugin.profile.clone()),
    ];
    let mut text = format!("{} {}\n", plugin.name, plugin.version);
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:11}  {value}");
    }
    text
}

/// What the file needs, read from the file and not asked of the loader.
fn needs(manifest: &Manifest, with_symbols: bool) -> Result<String, HostError> {
    let path = &manifest.path;
    let contents = inspect::read(path).map_err(|refusal| refusal.into_error(path))?;
    let unreadable = |error: &dyn std::fmt::Display| {
        PluginError::new(format!("what `{}` needs cannot be read", path.display()))
            .why(error.to_string())
            .fix("build it anew")
    };
    let needs = Needs::read(&contents.bytes).map_err(|error| unreadable(&error))?;
    let resolution = Here::now()
        .resolve(&needs)
        .map_err(|error| unreadable(&error))?;
    Ok(listed(&needs, &resolution, with_symbols))
}

fn listed(needs: &Needs, resolution: &Resolution, with_symbols: bool) -> String {
    let mut text = format!("  needs        {}\n", needs.libraries.join(", "));
    for group in ["libtorch", "C++ runtime", "C library", "others"] {
        let of_group = resolution
            .found
            .iter()
            .filter(|(library, _)| group_of(library) == group);
        for (library, symbols) in of_group {
            let _ = writeln!(text, "  {group:11}  {}", summary(library, symbols));
            if with_symbols {
                text.extend(
                    symbols
                        .iter()
                        .map(|symbol| format!("    {}\n", symbol.name)),
                );
            }
        }
    }
    if !resolution.missing.is_empty() {
        let _ = writeln!(text, "  not found    {}", resolution.missing.join(", "));
    }
    text
}

/// Whose library it is.
fn group_of(library: &str) -> &'static str {
    let is = |prefixes: &[&str]| prefixes.iter().any(|prefix| library.starts_with(prefix));
    if is(&["libtorch", "libc10"]) {
        "libtorch"
    } else if is(&["libstdc++", "libgcc_s", "libgomp"]) {
        "C++ runtime"
    } else if is(&["libc.", "libm.", "ld-linux", "libpthread", "libdl"]) {
        "C library"
    } else {
        "others"
    }
}

/// `12 symbols of libc.so.6, up to GLIBC_2.34`.
fn summary(library: &str, symbols: &[Symbol]) -> String {
    let versions = symbols.iter().filter_map(|symbol| {
        let name = &symbol.version.as_ref()?.name;
        Some((numbered(name)?, name))
    });
    let newest = versions.max().map(|(_, name)| format!(", up to {name}"));
    format!(
        "{} of {library}{}",
        counted(symbols.len(), "symbol"),
        newest.unwrap_or_default()
    )
}
