//! `cargo xtask dist`: the archive runs where there is no checkout and no Rust.
#![expect(
    clippy::expect_used,
    reason = "a helper of a test panics where the test would"
)]

use moeut_e2e::Sandbox;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;

fn repo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Where the tests' libtorch is.
fn libtorch() -> PathBuf {
    std::env::var_os("LIBTORCH")
        .map(PathBuf::from)
        .expect("cargo's configuration sets it")
}

/// The archive, made once.
static ARCHIVE: LazyLock<String> = LazyLock::new(|| {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["xtask", "dist"]).current_dir(repo());
    let made = cargo.output().expect("cargo starts");
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(made.status.success(), "{said}");
    let mut lines = said.lines();
    let archive = lines.find_map(|line| line.strip_prefix("wrote `")?.split('`').next());
    archive.unwrap_or_else(|| panic!("{said}")).to_owned()
});

/// Unpacks the archive into a folder of its own.
fn unpacked(sandbox: &Sandbox) -> PathBuf {
    let mut tar = Command::new("tar");
    let status = tar
        .arg("xzf")
        .arg(&*ARCHIVE)
        .current_dir(sandbox.work())
        .status();
    assert!(status.expect("tar starts").success());
    let folders = fs::read_dir(sandbox.work())
        .expect("the sandbox is there")
        .flatten();
    let mut folders = folders.map(|entry| entry.path());
    folders
        .find(|path| path.join("lib/bin").is_dir())
        .expect("the archive holds one folder")
}

fn text(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The libraries of the system that a program needs, as the loader finds them.
fn system_libraries(program: &Path) -> Vec<PathBuf> {
    let mut ldd = Command::new("ldd");
    let output = ldd
        .arg(program)
        .env("LD_LIBRARY_PATH", libtorch().join("lib"))
        .output()
        .expect("ldd starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = said
        .split_whitespace()
        .filter(|word| word.starts_with('/') && !word.contains("/torch/"));
    paths
        .filter(|path| !path.contains("/nvidia/"))
        .map(PathBuf::from)
        .collect()
}

#[test]
fn the_archive_runs_without_rust() {
    let sandbox = Sandbox::bare();
    let root = unpacked(&sandbox);
    for file in [
        "README.md",
        "LICENSE-MIT",
        "licenses/THIRD-PARTY.txt",
        "sweeps/small",
    ] {
        assert!(root.join(file).exists(), "{file}");
    }
    let licenses = fs::read_to_string(root.join("licenses/THIRD-PARTY.txt")).unwrap();
    assert!(
        licenses.contains("\nabi_stable 0.11.3: MIT/Apache-2.0"),
        "{}",
        &licenses[..500]
    );

    // Through a link, from elsewhere, with an empty environment.
    let link = sandbox.work().join("moeut");
    std::os::unix::fs::symlink(root.join("moeut-host"), &link).unwrap();
    let start_program = |program: &Path, args: &[&str], libtorch: Option<PathBuf>| {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", "/nowhere:/usr/bin:/bin");
        command
            .env("HOME", sandbox.work())
            .current_dir(sandbox.work());
        command.envs(libtorch.map(|path| ("LIBTORCH", path)));
        command.output().unwrap()
    };
    let start = |args: &[&str], libtorch| start_program(&link, args, libtorch);
    let list = start(&["plugins", "list"], Some(libtorch()));
    assert!(list.status.success(), "{}", text(&list));
    let n_plugins = text(&list).matches("/lib/bin/plugins/lib").count();
    assert!(n_plugins >= 22, "{}", text(&list));
    let args =
        "-task moeut_c4 -profile demo -name a -stop_after 2 -batch_size 2 -n_samples 0 -log none";
    let args: Vec<&str> = args.split(' ').collect();
    let trained = start(&args, Some(libtorch()));
    assert!(trained.status.success(), "{}", text(&trained));
    assert!(
        sandbox.run_folder("a").join("checkpoint/model-2").is_dir(),
        "{}",
        text(&trained)
    );

    // The other program finds the plugins and the sweeps that came along.
    let sweeps = root.join("sweeps/small");
    let args = ["configurations", sweeps.to_str().unwrap(), "-out", "tables"];
    let made = start_program(&root.join("moeut-paper"), &args, Some(libtorch()));
    assert!(made.status.success(), "{}", text(&made));
    let table = fs::read_to_string(sandbox.work().join("tables/configurations.csv")).unwrap();
    assert!(table.contains("moeut"), "{table}");

    // The wrong libtorch, as none, is not taken.
    let other = sandbox.work().join("other");
    fs::create_dir_all(other.join("lib")).unwrap();
    fs::write(other.join("lib/libtorch_cpu.so"), "").unwrap();
    fs::write(other.join("build-version"), "2.10.0+cpu\n").unwrap();
    let refused = start(&["plugins", "list"], Some(other));
    if refused.status.success() {
        println!("the Python here has libtorch, too; what is said without one is not seen");
    } else {
        assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
        assert!(
            text(&refused).contains("Error: libtorch 2.11.0 is not found"),
            "{}",
            text(&refused)
        );
    }
}

/// A root folder with the archive, libtorch, and the C and C++ libraries; no shell, no `/usr`, no `/etc`.
#[test]
fn the_archive_runs_in_an_empty_root() {
    let sandbox = Sandbox::bare();
    let root = unpacked(&sandbox);
    let program = root.join("lib/bin/moeut-host");
    for library in system_libraries(&program) {
        let place = root.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(&library, &place).unwrap();
    }
    // Where `--libtorch` puts it: large files, so links.
    let parent = libtorch()
        .canonicalize()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    let status = Command::new("cp")
        .args(["-rlL"])
        .arg(&parent)
        .arg(root.join(".libtorch"))
        .status()
        .unwrap();
    assert!(status.success());
    fs::create_dir(root.join("proc")).unwrap();

    let mut unshare = Command::new("unshare");
    unshare.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
    ]);
    unshare
        .arg("--root")
        .arg(&root)
        .args(["/lib/bin/moeut-host", "plugins", "list"])
        .env_clear();
    unshare.env("PATH", "/usr/bin:/bin");
    let list = unshare.output().unwrap();
    if text(&list).contains("unshare failed") || text(&list).contains("unshare: mount") {
        println!(
            "skipped: this machine lets nobody make namespaces: {}",
            text(&list)
        );
        return;
    }
    assert!(list.status.success(), "{}", text(&list));
    assert!(
        text(&list).contains("/lib/bin/plugins/libmoeut_model_moeut.so"),
        "{}",
        text(&list)
    );
}
