//! `cargo xtask dist`: one archive that runs on a machine without Rust.
//!
//! ```text
//! moeut-host-<version>-x86_64-linux/
//!   moeut-host, moeut-paper        launchers: find libtorch
//!   lib/bin/moeut-host             the program, and its plugins beside it
//!   lib/bin/moeut-paper            tables and figures; it starts the program beside it
//!   lib/bin/plugins/*.so
//!   .libtorch/                     libtorch, with `--libtorch`; the program finds it there as it does in the checkout
//!   licenses/ LICENSE-* README.md sweeps/
//! ```

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    cargo::{self, Profile},
    failure::Failure,
    setup::libtorch_root,
    wheels,
};

const LAUNCHER: &str = include_str!("launcher.sh");
const PROGRAMS: [&str; 2] = ["moeut-host", "moeut-paper"];
/// Libraries of the wheels that no program of ours opens: they are for Python.
const UNUSED: [&str; 3] = ["libtorch_python", "libshm", "libtorch_nvshmem"];

/// Builds everything and makes `target/dist/<name>.tar.gz`, beside the folder that it holds.
pub(crate) fn dist(repo: &Path, args: &[String]) -> Result<(), Failure> {
    let has_libtorch = match args {
        [] => false,
        [flag] if flag == "--libtorch" => true,
        _ => {
            return Err(Failure::new(
                "invalid arguments of `dist`",
                format!("got {args:?}, the only one is `--libtorch`"),
                "`cargo xtask dist` or `cargo xtask dist --libtorch`",
            ));
        }
    };
    let host = cargo::build(repo, Profile::Release, &[])?;
    let metadata = cargo::metadata(repo, &["--filter-platform=x86_64-unknown-linux-gnu"])?;
    let version = version(&metadata, "moeut-host");
    let name = format!("moeut-host-{version}-{}-linux", std::env::consts::ARCH);
    let target = host.ancestors().nth(2).unwrap_or(repo).join("dist");
    let folder = target.join(&name);
    fs::create_dir_all(&target).map_err(|error| Failure::io("create", &target, &error))?;
    let lock_path = target.join(".lock");
    let lock =
        fs::File::create(&lock_path).map_err(|error| Failure::io("create", &lock_path, &error))?;
    lock.lock()
        .map_err(|error| Failure::io("lock", &lock_path, &error))?;
    let filled = fill(repo, &folder, &host, &metadata, has_libtorch);
    filled.map_err(|(path, error)| Failure::io("write", &path, &error))?;
    pack(&target, &name)
}

/// Packs a folder; the same files make the same archive.
fn pack(target: &Path, name: &str) -> Result<(), Failure> {
    let archive = target.join(format!("{name}.tar.gz"));
    let beside = target.join(format!("{name}.tar.gz.new"));
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--gzip",
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
    ]);
    tar.arg("--file")
        .arg(&beside)
        .arg("--directory")
        .arg(target)
        .arg(name);
    let status = tar
        .status()
        .map_err(|error| Failure::start("tar", &error))?;
    if !status.success() {
        let why = format!("`tar` ended with {status}");
        return Err(Failure::new(
            "the archive cannot be made",
            why,
            "check the free space with `df -h`",
        ));
    }
    fs::rename(&beside, &archive).map_err(|error| Failure::io("write", &archive, &error))?;
    let n_bytes = fs::metadata(&archive).map_or(0, |metadata| metadata.len());
    eprintln!(
        "wrote `{}`, {:.1} MB",
        archive.display(),
        n_bytes as f64 / 1e6
    );
    Ok(())
}

/// An error of the system, and where.
type At = (PathBuf, io::Error);

fn fill(
    repo: &Path,
    folder: &Path,
    host: &Path,
    metadata: &Value,
    has_libtorch: bool,
) -> Result<(), At> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err((folder.to_owned(), error));
        }
        _ => {}
    }
    let launcher = LAUNCHER.replace("@LIBTORCH@", wheels::LIBTORCH);
    for program in PROGRAMS {
        let built = host.with_file_name(program);
        copy(&built, &folder.join("lib/bin").join(program), 0o755)?;
        write(&folder.join(program), launcher.as_bytes(), 0o755)?;
    }
    copy_all(
        &host.with_file_name("plugins"),
        &folder.join("lib/bin/plugins"),
        |name| name.contains(".so"),
    )?;
    for name in ["README.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        copy(&repo.join(name), &folder.join(name), 0o644)?;
    }
    copy_all(&repo.join("sweeps"), &folder.join("sweeps"), |_| true)?;
    copy_all(
        &repo.join("sweeps/small"),
        &folder.join("sweeps/small"),
        |_| true,
    )?;
    let licenses = licenses(metadata);
    write(
        &folder.join("licenses/THIRD-PARTY.txt"),
        licenses.as_bytes(),
        0o644,
    )?;
    if has_libtorch {
        copy_libtorch(&libtorch_root(repo), &folder.join(".libtorch"))?;
    }
    Ok(())
}

/// The libraries of the wheels, where they find each other. Those for a GPU only if all of NVIDIA's are there.
fn copy_libtorch(from: &Path, to: &Path) -> Result<(), At> {
    let has_cuda = from.join("nvidia/cudnn").is_dir();
    let is_wanted = |name: &str| {
        let is_unused = UNUSED.iter().any(|prefix| name.starts_with(prefix));
        name.contains(".so") && !is_unused && (has_cuda || !name.contains("cuda"))
    };
    copy_all(&from.join("torch/lib"), &to.join("torch/lib"), is_wanted)?;
    copy(
        &from.join("torch/version.py"),
        &to.join("torch/version.py"),
        0o644,
    )?;
    let nvidia = from.join("nvidia");
    for entry in fs::read_dir(&nvidia)
        .map_err(|error| (nvidia.clone(), error))?
        .flatten()
    {
        let lib = entry.path().join("lib");
        if lib.is_dir() {
            let place = to.join("nvidia").join(entry.file_name()).join("lib");
            copy_all(&lib, &place, |name| name.contains(".so"))?;
        }
    }
    for entry in fs::read_dir(from)
        .map_err(|error| (from.to_owned(), error))?
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let licenses = entry.path().join("licenses");
        if name.ends_with(".dist-info") && licenses.is_dir() {
            copy_all(&licenses, &to.join("licenses").join(name), |_| true)?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), At> {
    let at = |error| (path.to_owned(), error);
    fs::create_dir_all(path.parent().unwrap_or(path)).map_err(at)?;
    fs::write(path, bytes).map_err(at)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(at)
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<(), At> {
    fs::create_dir_all(to.parent().unwrap_or(to)).map_err(|error| (to.to_owned(), error))?;
    fs::copy(from, to).map_err(|error| (from.to_owned(), error))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))
        .map_err(|error| (to.to_owned(), error))
}

/// The plain files directly in a folder whose names are wanted.
fn copy_all(from: &Path, to: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<(), At> {
    for entry in fs::read_dir(from)
        .map_err(|error| (from.to_owned(), error))?
        .flatten()
    {
        let name = entry.file_name();
        if entry.path().is_file() && is_wanted(&name.to_string_lossy()) {
            let is_library = name.to_string_lossy().contains(".so");
            copy(
                &entry.path(),
                &to.join(&name),
                if is_library { 0o755 } else { 0o644 },
            )?;
        }
    }
    Ok(())
}

fn version<'a>(metadata: &'a Value, package: &str) -> &'a str {
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let mut found = packages.filter(|found| found["name"] == package);
    found
        .next()
        .and_then(|found| found["version"].as_str())
        .unwrap_or("0")
}

/// What the crates that are built in ask to be passed on: name, licence, and each text once.
fn licenses(metadata: &Value) -> String {
    let mut list = String::from(
        "The programs and plugins in this folder contain these crates, or were built and tested with them:\n\n",
    );
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        if text("source").is_empty() {
            continue;
        }
        let heading = format!("{} {}", text("name"), text("version"));
        let license = if text("license").is_empty() {
            "see below"
        } else {
            text("license")
        };
        let _ = writeln!(list, "{heading}: {license}  {}", text("repository"));
        let folder = Path::new(text("manifest_path"))
            .parent()
            .unwrap_or(Path::new(""));
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().to_uppercase();
            let is_license = ["LICENSE", "LICENCE", "COPYING", "NOTICE"]
                .iter()
                .any(|word| name.starts_with(word));
            if is_license && let Ok(body) = fs::read_to_string(entry.path()) {
                texts.entry(body).or_default().push(heading.clone());
            }
        }
    }
    for (body, of) in texts {
        let _ = write!(
            list,
            "\n{}\n{}\n\n{}\n",
            "-".repeat(100),
            of.join(", "),
            body.trim_end()
        );
    }
    list
}
