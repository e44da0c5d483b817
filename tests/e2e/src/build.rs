//! Builds what the tests run, once per test program: the host, its plugins, and crates that only tests have.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The root of the workspace.
pub(crate) fn repo() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .expect("this crate is two folders below the root")
        .to_owned()
}

/// Cargo's output folder: this program is `<target>/<profile>/deps/<test>`.
fn target() -> PathBuf {
    let program = std::env::current_exe().expect("a program knows its path");
    program
        .ancestors()
        .nth(3)
        .expect("cargo put it three folders deep")
        .to_owned()
}

/// Where tests keep what they build and cache, out of sight of git.
pub(crate) fn scratch() -> PathBuf {
    let folder = target().join("e2e");
    fs::create_dir_all(&folder).expect("the target folder can be written");
    folder
}

/// The released host, built and its plugins staged as `cargo xtask run` does it.
pub(crate) fn host() -> &'static Path {
    // A failure is remembered too, or every test would build in vain.
    static HOST: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = HOST.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(["run", "--quiet", "--package", "xtask", "--", "build"])
            .current_dir(repo());
        run(&mut cargo).map(|()| target().join("release/moeut-host"))
    });
    match built {
        Ok(host) => host,
        Err(error) => panic!("{error}"),
    }
}

/// The folder with every plugin of the workspace.
pub fn staged_plugins() -> PathBuf {
    host().with_file_name("plugins")
}

/// Builds the crate in `folder`, relative to the root, as if it were the task folder `plugins/tasks/<name>` of this
/// workspace, after `edit` has changed its files; returns the library, built in debug.
///
/// The workspace is not touched: another one is made of links to its folders and the same root files, in which
/// `plugins/tasks` has one entry more.
pub fn build_crate(name: &str, folder: &str, edit: impl Fn(&str) -> String) -> PathBuf {
    build_as(Flavor::Debug, name, folder, edit)
}

/// How a crate is built; none is how the workspace builds its plugins.
#[derive(Clone, Copy)]
pub enum Flavor {
    /// Cargo's `dev` profile.
    Debug,
    /// Optimised over all crates at once, unused sections dropped, symbols stripped: whatever is not needed is gone.
    FatLto,
}

impl Flavor {
    fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Debug => &[],
            Self::FatLto => &[
                ("CARGO_PROFILE_DEV_LTO", "fat"),
                ("CARGO_PROFILE_DEV_OPT_LEVEL", "2"),
                ("CARGO_PROFILE_DEV_CODEGEN_UNITS", "1"),
                ("CARGO_PROFILE_DEV_STRIP", "symbols"),
            ],
        }
    }

    /// Its own output folder: cargo keeps one build of a profile.
    fn target(self) -> PathBuf {
        match self {
            Self::Debug => scratch(),
            Self::FatLto => scratch().join("lto"),
        }
    }
}

/// As [`build_crate`], in another flavor.
pub fn build_as(
    flavor: Flavor,
    name: &str,
    folder: &str,
    edit: impl Fn(&str) -> String,
) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let workspace = scratch().join("workspace");
    mirror_workspace(&workspace);
    let crate_folder = workspace.join("plugins/tasks").join(name);
    copy_tree(&repo().join(folder), &crate_folder, &edit);

    let package = name_in(&crate_folder.join("Cargo.toml"));
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .args(["build", "--quiet", "--package", &package])
        .env("CARGO_TARGET_DIR", flavor.target())
        .envs(flavor.settings().iter().copied())
        .current_dir(&workspace);
    if let Err(error) = run(&mut cargo) {
        panic!("{error}");
    }
    let file = format!("debug/lib{}.so", package.replace('-', "_"));
    flavor.target().join(file)
}

/// Tests and builds a crate outside the workspace, as its author would; returns the library.
///
/// It is built where the workspace is, with the same versions and settings, so that what both need is built once.
pub fn build_new(folder: &Path) -> PathBuf {
    fs::copy(repo().join("Cargo.lock"), folder.join("Cargo.lock")).expect("the crate is there");
    for command in ["test", "build"] {
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args([command, "--quiet", "--release", "--offline"])
            .env("CARGO_TARGET_DIR", target())
            .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
            .current_dir(folder);
        if let Err(error) = run(&mut cargo) {
            panic!("{error}");
        }
    }
    let package = name_in(&folder.join("Cargo.toml"));
    target().join(format!("release/lib{}.so", package.replace('-', "_")))
}

/// A workspace of the same root files and members. Folders are links, so what is in them is never out of date.
fn mirror_workspace(workspace: &Path) {
    fs::create_dir_all(workspace.join("plugins/tasks")).expect("the mirror can be made");
    // The lock file too, every time: versions are those of the workspace, and nothing is looked up.
    for file in ["Cargo.toml", "Cargo.lock"] {
        write_if_changed(&workspace.join(file), &read(&repo().join(file)));
    }
    for member in ["xtask", "plugin-api", "host", "paper", "tests"] {
        link(&repo().join(member), &workspace.join(member));
    }
    for below in ["plugins", "plugins/tasks"] {
        remove_dangling_links(&workspace.join(below));
        for entry in fs::read_dir(repo().join(below))
            .expect("the plugins are there")
            .flatten()
        {
            if entry.path() != repo().join("plugins/tasks") {
                link(
                    &entry.path(),
                    &workspace.join(below).join(entry.file_name()),
                );
            }
        }
    }
}

/// Links to plugins that are no more: cargo would miss their manifests.
fn remove_dangling_links(folder: &Path) {
    for entry in fs::read_dir(folder)
        .expect("the mirror can be read")
        .flatten()
    {
        if !entry.path().exists() {
            fs::remove_file(entry.path()).expect("a link can be removed");
        }
    }
}

fn link(target: &Path, at: &Path) {
    if fs::read_link(at).ok().as_deref() != Some(target) {
        let _ = fs::remove_file(at); // of a checkout that was moved; usually there is none
        symlink(target, at).expect("a link can be made");
    }
}

/// Copies a crate, leaving files alone that are as they should be: cargo goes by their times.
fn copy_tree(from: &Path, to: &Path, edit: &impl Fn(&str) -> String) {
    fs::create_dir_all(to).expect("the mirror can be written");
    for entry in fs::read_dir(from).expect("the crate is there").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target, edit);
        } else {
            write_if_changed(&target, &edit(&read(&entry.path())));
        }
    }
}

fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).expect("the mirror can be written");
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The package name in a manifest.
fn name_in(manifest: &Path) -> String {
    let text = read(manifest);
    let name = text.lines().find_map(|line| line.strip_prefix("name = \""));
    name.and_then(|rest| rest.split('"').next())
        .expect("the manifest has a name")
        .to_owned()
}

fn run(command: &mut Command) -> Result<(), String> {
    // What the outer cargo tells a test about itself would only make the inner one build things anew.
    for variable in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME", "LD_LIBRARY_PATH"] {
        command.env_remove(variable);
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// A folder for tokenizers and tokens, shared by all tests, and another one whenever the dataset's code changes.
pub fn cached_data() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    fs::read(staged_plugins().join(crate::DATASET))
        .expect("the dataset is staged")
        .hash(&mut hasher);
    scratch().join(format!("cache/{:016x}", hasher.finish()))
}

/// A file or folder of the test data beside the repository, or of `$MOEUT_SHARED`.
///
/// A machine without the data skips such tests, but never the one that decides whether a change is good.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let shared =
        std::env::var_os("MOEUT_SHARED").map_or_else(|| repo().join("../shared"), PathBuf::from);
    let found = shared.join(path);
    if found.exists() {
        return Some(found);
    }
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(
        !is_ci,
        "`{}` is missing; set MOEUT_SHARED to the folder with the test data",
        found.display()
    );
    None
}
