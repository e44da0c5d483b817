//! `plugins new`: writes a crate outside this repository that builds, passes its own tests and trains.
//!
//! What it writes are the files of `host/templates`, with names filled in.

use crate::error::HostError;
use crate::plugins::needs::Here;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The checkout that this program was built from; on another machine it need not be there.
const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The longest name of a component.
const MAX_NAME: usize = 40;

/// The file by which a process that has libtorch shows where it is.
const LIBTORCH: &str = "libtorch_cpu.so";

/// What differs between the kinds.
struct Kind {
    name: &'static str,
    source: &'static str,
    dependencies: &'static str,
    /// Links libtorch.
    has_torch: bool,
    /// What to type to train with it, between the program and the name of the run.
    use_it: &'static str,
}

const LM: &str = "moeut-lm = { path = \"__CHECKOUT__/plugins/lm\" }\n";
const LM_SERDE: &str = "moeut-lm = { path = \"__CHECKOUT__/plugins/lm\" }
serde = { version = \"1\", features = [\"derive\"] }\n";
const TORCH: &str = "moeut-torch = { path = \"__CHECKOUT__/plugin-api/torch\" }
tch = { version = \"=0.24.0\", default-features = false }\n";
const TORCH_SERDE: &str = "moeut-torch = { path = \"__CHECKOUT__/plugin-api/torch\" }
serde = { version = \"1\", features = [\"derive\"] }
tch = { version = \"=0.24.0\", default-features = false }\n";

/// The generated half of tch is minutes of compilation at full optimization, for no gain.
const TORCH_PROFILE: &str = "\n[profile.release.package.torch-sys]\nopt-level = 1\n";

const KINDS: [Kind; 4] = [
    Kind {
        name: "task",
        source: include_str!("../../templates/task.rs.txt"),
        dependencies: LM,
        has_torch: false,
        use_it: "-task __NAME__ -profile demo",
    },
    Kind {
        name: "dataset",
        source: include_str!("../../templates/dataset.rs.txt"),
        dependencies: LM_SERDE,
        has_torch: false,
        use_it: "-task __NAME__ -profile small",
    },
    Kind {
        name: "model",
        source: include_str!("../../templates/model.rs.txt"),
        dependencies: TORCH_SERDE,
        has_torch: true,
        use_it: "-task moeut_c4 -profile demo -transformer.variant __NAME__",
    },
    Kind {
        name: "kernel",
        source: include_str!("../../templates/kernel.rs.txt"),
        dependencies: TORCH,
        has_torch: true,
        use_it: "-task moeut_c4 -profile demo -moe.kernel __NAME__",
    },
];

/// Writes the crate below the working folder, and says what to type next.
///
/// # Errors
/// For an unknown kind, a name that is none, a checkout that is none, and a folder that is there already.
pub(super) fn new(kind: &str, name: &str, checkout: Option<&Path>) -> Result<String, HostError> {
    let Some(kind) = KINDS.iter().find(|known| known.name == kind) else {
        return Err(HostError::new(
            format!("unknown kind of plugin `{kind}`"),
            "kinds are `task`, `dataset`, `model` and `kernel`",
            format!("type `moeut-host plugins new task {name}`"),
        ));
    };
    check_name(kind.name, name)?;
    let checkout = find_checkout(checkout.unwrap_or(Path::new(CHECKOUT)))?;
    let libtorch = if kind.has_torch {
        find_libtorch()?
    } else {
        String::new()
    };
    let package = format!("moeut-{}-{}", kind.name, name.replace('_', "-"));
    let profile = if kind.has_torch { TORCH_PROFILE } else { "" };
    let fill = |text: &str| {
        // The first two hold others.
        text.replace("__DEPENDENCIES__", kind.dependencies)
            .replace("__PROFILE__\n", profile)
            .replace("__PACKAGE__", &package)
            .replace("__KIND__", kind.name)
            .replace("__NAME__", name)
            .replace("__TYPE__", &type_name(name))
            .replace("__CHECKOUT__", &checkout)
            .replace("__LIBTORCH__", &libtorch)
    };
    let mut files = vec![
        (
            "Cargo.toml",
            fill(include_str!("../../templates/Cargo.toml.txt")),
        ),
        (".gitignore", "/target\n".to_owned()),
        ("src/lib.rs", fill(kind.source)),
    ];
    if kind.has_torch {
        let config = include_str!("../../templates/cargo-config.toml.txt");
        files.push((".cargo/config.toml", fill(config)));
        files.push((
            "build.rs",
            include_str!("../../templates/build.rs.txt").to_owned(),
        ));
    }
    if kind.name == "dataset" {
        files.push((
            "src/text.txt",
            include_str!("../../templates/text.txt").to_owned(),
        ));
    }
    write(Path::new(&package), &files)?;
    let library = format!("lib{}.so", package.replace('-', "_"));
    Ok(format!(
        "wrote `{package}`: {}\n\n\
         build, test and use it:\n\
         \x20 cd {package}\n\
         \x20 cargo test && cargo build --release\n\
         \x20 install -D -m 755 target/release/{library} ~/.local/share/moeut/plugins/{library}\n\
         \x20 moeut-host {} -name first\n",
        files
            .iter()
            .map(|(path, _)| *path)
            .collect::<Vec<_>>()
            .join(", "),
        fill(kind.use_it)
    ))
}

/// Names are typed on the command line, and become names of a type and of a package.
fn check_name(kind: &str, name: &str) -> Result<(), HostError> {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let why = if name.is_empty() {
        "it is empty".to_owned()
    } else if name.len() > MAX_NAME {
        format!(
            "it has {} characters, and {MAX_NAME} are the most",
            name.len()
        )
    } else if let Some(other) = name.chars().find(|&c| !is_word(c)) {
        format!("`{other}` is none of `a` to `z`, `0` to `9` and `_`")
    } else if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        "it does not begin with a letter".to_owned()
    } else if name.ends_with('_') || name.contains("__") {
        "its words are separated by one `_` each".to_owned()
    } else {
        return Ok(());
    };
    let better: Vec<String> = name
        .to_lowercase()
        .split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit())
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    let better = better.join("_");
    let better = better.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    let better = if better.is_empty() { "poetry" } else { better };
    Err(HostError::new(
        format!("`{name}` is no name for a {kind}"),
        why,
        format!(
            "type for instance `moeut-host plugins new {kind} {}`",
            better.chars().take(MAX_NAME).collect::<String>()
        ),
    ))
}

/// `two_words` is `TwoWords`.
fn type_name(name: &str) -> String {
    let capital = |word: &str| {
        let (first, rest) = word.split_at(1);
        first.to_uppercase() + rest
    };
    name.split('_').map(capital).collect()
}

/// The folder that the crate's dependencies lie in, absolute.
fn find_checkout(path: &Path) -> Result<String, HostError> {
    let no_checkout = |why: String| {
        HostError::new(
            format!("`{}` is no checkout of moeut-host", path.display()),
            why,
            "add `--api <folder>` with the folder that holds `plugin-api` and `plugins`",
        )
    };
    for part in ["plugin-api", "plugins/lm"] {
        if !path.join(part).join("Cargo.toml").is_file() {
            return Err(no_checkout(format!("it holds no `{part}/Cargo.toml`")));
        }
    }
    let path = path
        .canonicalize()
        .map_err(|error| no_checkout(error.to_string()))?;
    for_toml(&path)
}

/// The libtorch of this very process: a model must be built against no other.
fn find_libtorch() -> Result<String, HostError> {
    let library = Here::now().path(LIBTORCH).map(Path::to_owned);
    let root = library
        .as_deref()
        .and_then(|library| library.ancestors().nth(2));
    let Some(root) = root.filter(|root| root.join("include").is_dir()) else {
        return Err(HostError::new(
            "there is no libtorch to build against",
            format!("the headers belong beside the folder of `{LIBTORCH}`, and are not there"),
            "type `cargo xtask setup` in a checkout of moeut-host, and use the program that is built there",
        ));
    };
    for_toml(root)
}

/// A path as it stands between quotes in a TOML file.
fn for_toml(path: &Path) -> Result<String, HostError> {
    let text = path
        .to_str()
        .filter(|text| !text.contains(['"', '\\', '\n']));
    text.map(str::to_owned).ok_or_else(|| {
        HostError::new(
            format!("`{}` cannot be written into `Cargo.toml`", path.display()),
            "it holds quotes, backslashes or what is not UTF-8",
            "move the checkout to a plainer path",
        )
    })
}

/// Writes everything beside `folder` and moves it there: nobody sees half a crate.
fn write(folder: &Path, files: &[(&str, String)]) -> Result<(), HostError> {
    if folder.symlink_metadata().is_ok() {
        return Err(HostError::new(
            format!("`{}` is there already", folder.display()),
            "what is in it is not touched",
            "choose another name, or another folder to start from",
        ));
    }
    let write_all = || -> io::Result<()> {
        let prefix = folder.file_name().unwrap_or(OsStr::new("plugin"));
        let beside = tempfile::Builder::new().prefix(prefix).tempdir_in(".")?;
        for (path, text) in files {
            let path: PathBuf = beside.path().join(path);
            fs::create_dir_all(path.parent().unwrap_or(beside.path()))?;
            fs::write(path, text)?;
        }
        // A temporary folder is for its owner alone.
        fs::set_permissions(beside.path(), fs::Permissions::from_mode(0o755))?;
        fs::rename(beside.path(), folder)
    };
    write_all().map_err(|error| {
        HostError::new(
            format!("`{}` cannot be written", folder.display()),
            error.to_string(),
            "check the permissions of this folder and the free space",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_types() {
        assert_eq!(type_name("two_words_2"), "TwoWords2");
    }

    #[test]
    fn names_that_are_none_get_a_better_one() {
        for (name, why, better) in [
            ("Two-Words", "`T` is none of", "two_words"),
            ("2nd", "does not begin with a letter", "nd"),
            ("", "it is empty", "poetry"),
            ("a__b", "one `_` each", "a_b"),
            ("../x", "`.` is none of", "x"),
            (&"x".repeat(50), "it has 50 characters", &"x".repeat(40)),
        ] {
            let error = check_name("task", name).unwrap_err().render(false);
            let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(error.contains(why), "{error}");
            assert!(error.contains(&format!("new task {better}`")), "{error}");
        }
        check_name("task", "two_words_2").unwrap();
    }
}
