//! `plugins pack`, `install`, `remove` and `key`: plugins on their way between people.

use insta::assert_snapshot;
use moeut_e2e::{Fault, MODEL, Sandbox, TASK, Web, patch, read, staged_plugins};
use std::fs;
use std::path::PathBuf;

const PACKAGE: &str = "moeut-task-moeut-c4-0.1.0.moeut.tar.zst";

/// The task under another version.
fn newer() -> Vec<u8> {
    patch(
        &staged_plugins().join(TASK),
        r#""version":"0.1.0","libtorch":"""#,
        r#""version":"0.2.0","libtorch":"""#,
    )
}

/// A sandbox with the task's file as its authors have it, which no search path has.
fn authors() -> Sandbox {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("built", TASK, &read(&staged_plugins().join(TASK)));
    sandbox.drop_in(".", "LICENSE-MIT", b"do as you like\n");
    sandbox
}

/// Hashes and sizes differ from build to build.
fn without_hashes(text: &str) -> String {
    let is_hash =
        |word: &&str| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_size = |word: &&str| word.len() > 4 && word.bytes().all(|byte| byte.is_ascii_digit());
    let words = || text.split(|c: char| !c.is_ascii_alphanumeric());
    let stable = words()
        .filter(is_hash)
        .fold(text.to_owned(), |text, hash| text.replace(hash, "<sha256>"));
    words()
        .filter(is_size)
        .fold(stable, |text, size| text.replace(size, "<size>"))
}

/// Where `install` puts things, without being told.
fn users_folder(sandbox: &Sandbox) -> PathBuf {
    sandbox.work().join("../home/data/moeut/plugins")
}

/// What the failing command says, on one line: where it breaks depends on the length of paths.
fn says(sandbox: &Sandbox, args: &[&str]) -> String {
    let outcome = sandbox.run(args);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    let text = outcome.stderr.replace("│", " ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_plugin_goes_from_one_to_another_and_away_again() {
    let sandbox = authors();
    let file = format!("built/{TASK}");
    let args = ["plugins", "pack", &file, "--license", "LICENSE-MIT"];
    let packed = sandbox.run(&args).ok();
    let first = read(&sandbox.work().join(PACKAGE));
    sandbox.run(&args).ok();
    assert!(
        first == read(&sandbox.work().join(PACKAGE)),
        "packing twice gives two packages"
    );
    let installed = sandbox.run(&["plugins", "install", PACKAGE]).ok();
    let again = sandbox.run(&["plugins", "install", PACKAGE]).ok();
    let list = sandbox.run(&["plugins", "list"]).ok();
    assert!(
        list.stdout
            .contains("home/data/moeut/plugins/libmoeut_task_moeut_c4-0.1.0.so"),
        "{list}"
    );
    let removed = sandbox
        .run(&["plugins", "remove", "moeut-task-moeut-c4"])
        .ok();
    let left = fs::read_dir(users_folder(&sandbox)).unwrap().count();
    assert_eq!(left, 0);
    assert_snapshot!(
        [packed, installed, again, removed]
            .map(|outcome| without_hashes(&outcome.to_string()))
            .join("\n")
    );
}

#[test]
fn a_new_version_replaces_the_old_or_lies_beside_it() {
    let sandbox = Sandbox::new();
    fs::remove_file(sandbox.installed().join(TASK)).unwrap();
    sandbox.drop_in("old", TASK, &read(&staged_plugins().join(TASK)));
    sandbox.drop_in("new", TASK, &newer());
    sandbox.run(&["plugins", "install", "old"]).ok();
    sandbox.run(&["plugins", "install", "new", "--keep"]).ok();
    assert_eq!(fs::read_dir(users_folder(&sandbox)).unwrap().count(), 2);

    let task = |name: &str| sandbox.run(&["config", "show", "-task", name]);
    let both = says(&sandbox, &["config", "show", "-task", "moeut_c4"]);
    assert!(
        both.ends_with(
            "help: remove one of the files, or say which: `moeut_c4@moeut-task-moeut-c4:0.1.0`"
        ),
        "{both}"
    );
    for version in ["0.1.0", "0.2.0"] {
        task(&format!("moeut_c4@moeut-task-moeut-c4:{version}")).ok();
    }
    assert_eq!(task("moeut_c4@moeut-task-moeut-c4:0.3.0").code, Some(2));

    let installed = sandbox.run(&["plugins", "install", "new"]).ok();
    assert!(
        installed.stdout.contains(
            "removed `[sandbox]/home/data/moeut/plugins/libmoeut_task_moeut_c4-0.1.0.so`"
        ),
        "{installed}"
    );
    task("moeut_c4").ok();
}

#[test]
fn only_trusted_keys_install_under_strict() {
    let sandbox = authors();
    let key = sandbox.run(&["plugins", "key", "ada"]).ok();
    assert!(says(&sandbox, &["plugins", "key", "ada"]).contains("File exists"));
    let file = format!("built/{TASK}");
    let strict = ["plugins", "install", PACKAGE, "-plugin_verify", "strict"];

    sandbox.run(&["plugins", "pack", &file]).ok();
    let unsigned = says(&sandbox, &strict);
    let public = says(&sandbox, &["plugins", "pack", &file, "--key", "ada.pub"]);
    sandbox
        .run(&["plugins", "pack", &file, "--key", "ada"])
        .ok();
    let unknown = says(&sandbox, &strict);
    // Where a line breaks in the path of the sandbox differs.
    let unknown = unknown.split(" >> ").next().unwrap().to_owned();
    let line = fs::read_to_string(sandbox.work().join("ada.pub")).unwrap();
    let config = sandbox.work().join("../home/.config/moeut");
    fs::create_dir_all(&config).unwrap();
    fs::write(config.join("trusted_keys"), &line).unwrap();
    let trusted = sandbox.run(&strict).ok();
    fs::write(config.join("trusted_keys"), "ssh-ed25519 AAAA ada\n").unwrap();
    let malformed = says(&sandbox, &strict);

    let public_key = line.split(' ').nth(1).unwrap();
    let text = [
        key.to_string(),
        unsigned,
        public,
        unknown,
        trusted.to_string(),
        malformed,
    ]
    .join("\n");
    assert_snapshot!(without_hashes(&text.replace(public_key, "<key>")));
}

#[test]
fn what_is_damaged_or_meant_for_others_is_not_installed() {
    let sandbox = authors();
    sandbox.run(&["plugins", "key", "ada"]).ok();
    let file = format!("built/{TASK}");
    sandbox
        .run(&[
            "plugins",
            "pack",
            &file,
            "--key",
            "ada",
            "--out",
            "good.moeut.tar.zst",
        ])
        .ok();
    let good = read(&sandbox.work().join("good.moeut.tar.zst"));
    let mut cases = Vec::new();
    let mut case = |what: &str, bytes: &[u8]| {
        sandbox.drop_in(".", "case.moeut.tar.zst", bytes);
        let said = says(&sandbox, &["plugins", "install", "case.moeut.tar.zst"]);
        cases.push(format!("# {what}\n{said}"));
    };
    case("cut off", &good[..good.len() / 2]);
    case("no package", b"hello");
    case("empty", b"");
    // The entries of the archive, changed one by one, under their old signature.
    let plain = zstd::decode_all(&good[..]).unwrap();
    let edited = |from: &[u8], to: &[u8]| {
        assert_eq!(from.len(), to.len());
        let mut bytes = plain.clone();
        let at = bytes
            .windows(from.len())
            .position(|window| window == from)
            .unwrap();
        bytes[at..at + from.len()].copy_from_slice(to);
        zstd::encode_all(&bytes[..], 1).unwrap()
    };
    case(
        "another byte in the library",
        &edited(b"\x7fELF\x02\x01\x01", b"\x7fELF\x02\x01\x02"),
    );
    case(
        "another licence under the old signature",
        &edited(b"MIT OR Apache-2.0", b"MIT OR Apache-2.1"),
    );
    case(
        "another format",
        &edited(b"\"format\": 1", b"\"format\": 9"),
    );

    sandbox.drop_in(
        "foreign",
        "x.so",
        &patch(
            &staged_plugins().join(MODEL),
            r#""libtorch":"2.11.0""#,
            r#""libtorch":"2.10.0""#,
        ),
    );
    sandbox
        .run(&[
            "plugins",
            "pack",
            "foreign/x.so",
            "--out",
            "foreign.moeut.tar.zst",
        ])
        .ok();
    case(
        "for another libtorch",
        &read(&sandbox.work().join("foreign.moeut.tar.zst")),
    );
    assert_eq!(
        fs::read_dir(users_folder(&sandbox)).unwrap().count(),
        0,
        "something is left"
    );

    assert_snapshot!(without_hashes(&cases.join("\n")));
}

#[test]
fn mistakes_change_nothing() {
    let sandbox = authors();
    let file = format!("built/{TASK}");
    let foreign = patch(
        &staged_plugins().join(MODEL),
        r#""libtorch":"2.11.0""#,
        r#""libtorch":"2.10.0""#,
    );
    sandbox.drop_in("foreign", "x.so", &foreign);
    sandbox
        .run(&["plugins", "pack", &file, "--out", "good.moeut.tar.zst"])
        .ok();
    let mut cases = Vec::new();
    let mut more =
        |what: &str, args: &[&str]| cases.push(format!("# {what}\n{}", says(&sandbox, args)));
    more(
        "a library of no plugin",
        &["plugins", "install", "foreign/x.so"],
    );
    more(
        "not what was asked for",
        &["plugins", "install", "good.moeut.tar.zst", "--sha256", "00"],
    );
    more(
        "a folder without plugins",
        &["plugins", "install", "plugins"],
    );
    more("no such file", &["plugins", "install", "nowhere.so"]);
    more("nothing to pack", &["plugins", "pack"]);
    more(
        "two plugins in one package",
        &["plugins", "pack", &file, "foreign/x.so"],
    );
    more("the same build twice", &["plugins", "pack", &file, &file]);
    more(
        "a plugin that is not there",
        &["plugins", "remove", "nobody"],
    );
    sandbox
        .run(&["plugins", "install", "good.moeut.tar.zst"])
        .ok();
    more(
        "another version",
        &["plugins", "remove", "moeut-task-moeut-c4@9.9.9"],
    );
    more("another plugin", &["plugins", "remove", "nobody"]);

    // A file of the same name that belongs to another plugin stays.
    let taken = users_folder(&sandbox).join("libmoeut_task_moeut_c4-0.1.0.so");
    let other = read(&staged_plugins().join(MODEL));
    fs::write(&taken, &other).unwrap();
    more(
        "a file of another plugin",
        &["plugins", "install", "good.moeut.tar.zst"],
    );
    assert!(read(&taken) == other);

    assert_snapshot!(without_hashes(&cases.join("\n")));
}

#[test]
fn a_package_is_installed_from_an_address() {
    let sandbox = authors();
    fs::create_dir(sandbox.work().join("served")).unwrap();
    sandbox
        .run(&[
            "plugins",
            "pack",
            &format!("built/{TASK}"),
            "--out",
            "served/x.moeut.tar.zst",
        ])
        .ok();
    let web = Web::serve(&sandbox.work().join("served"));
    let address = format!("{}/x.moeut.tar.zst", web.address());
    web.fault("x.moeut.tar.zst", Fault::Cut(1000), 1);
    let cut = says(&sandbox, &["plugins", "install", &address]);
    assert!(cut.contains("cannot be downloaded"), "{cut}");
    web.fault("x.moeut.tar.zst", Fault::Status(404), 1);
    let missing = says(&sandbox, &["plugins", "install", &address]);
    assert!(missing.contains("404"), "{missing}");
    assert_eq!(fs::read_dir(users_folder(&sandbox)).unwrap().count(), 0);
    sandbox.run(&["plugins", "install", &address]).ok();
    let list = sandbox.run(&["plugins", "list"]).ok();
    assert!(
        list.stdout.contains("libmoeut_task_moeut_c4-0.1.0.so"),
        "{list}"
    );
}
