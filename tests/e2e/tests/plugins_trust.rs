//! `plugins show`, `verify` and `lock`: what a file says of itself, why it is refused, and files that a team has agreed on.

use insta::assert_snapshot;
use moeut_e2e::{MODEL, Outcome, Sandbox, TASK, patch, read, staged_plugins};
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;

fn staged(name: &str) -> PathBuf {
    staged_plugins().join(name)
}

/// The task under another version, so with another hash.
fn changed() -> Vec<u8> {
    patch(
        &staged(TASK),
        r#""version":"0.1.0","libtorch":"""#,
        r#""version":"0.1.1","libtorch":"""#,
    )
}

/// A sandbox whose only plugin, `plugins/x.so`, has these bytes.
fn with(bytes: &[u8]) -> Sandbox {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", bytes);
    sandbox
}

/// Lines of the output that say why something is refused, and the exit code.
fn refused(outcome: &Outcome) -> String {
    let lines = outcome.stdout.lines();
    let refusals = lines.skip_while(|line| !line.contains("REFUSED"));
    let text: Vec<&str> = refusals.take(2).map(str::trim).collect();
    format!("exit: {:?}\n{}", outcome.code, text.join("\n"))
}

#[test]
fn show_says_what_a_task_is_and_needs() {
    let outcome = with(&read(&staged(TASK))).run(&["plugins", "show", "c4_transformer"]);
    let text = outcome.ok().stdout;
    let is_volatile = |line: &&str| {
        ["sha256", "commit", "C++ runtime", "C library"]
            .iter()
            .any(|name| line.trim_start().starts_with(name))
    };
    let lines: Vec<&str> = text
        .lines()
        .take_while(|line| !line.contains("-lm.eval.enabled"))
        .filter(|line| !is_volatile(line))
        .collect();
    assert_snapshot!(lines.join("\n"), @r"
    moeut-task-moeut-c4 0.1.0
      file         plugins/x.so
      licence      MIT OR Apache-2.0
      authors      the moeut-host authors
      abi          1.4 (of this host: 1.4)
      libtorch     not used
      target       x86_64-unknown-linux-gnu
      profile      release
      needs        libgcc_s.so.1, libc.so.6, ld-linux-x86-64.so.2

    task `moeut_c4`, also c4_transformer: Language modelling with MoEUT on C4
      -transformer.variant <text>         The model: `[preln_]moe[_universal]`, `[preln_]rope[_universal]`,
                                          `preln_{moe,rope}_parallel`, `[preln_][act]sut_universal`, or the name
                                          of any other model plugin [default preln_moe_universal]
      -lm.unroll <int>                    Context length [tokens; default 100]
      -lmds.valid_ratio <float>           Share of the canonical validation set to evaluate
                                          [fraction; default 1.0]
    ");
    assert!(
        text.contains(" symbols of libc.so.6, up to GLIBC_2."),
        "{text}"
    );
    assert!(text.contains("-profile demo"), "{text}");
}

#[test]
fn show_lists_the_symbols_that_a_file_needs_of_libtorch() {
    let sandbox = with(&read(&staged(MODEL)));
    for wanted in ["moeut", "moeut-model-moeut", "plugins/x.so"] {
        let text = sandbox
            .run(&["plugins", "show", wanted, "--symbols"])
            .ok()
            .stdout;
        assert!(text.contains("\n  libtorch    "), "{text}");
        assert!(text.contains(" symbols of libtorch_cpu.so\n"), "{text}");
        assert!(text.contains("\n    _ZN2at4_ops"), "{text}");
        assert!(text.contains("\nmodel `moeut`"), "{text}");
        assert!(!text.contains("not found"), "{text}");
    }
}

#[test]
fn show_of_what_is_not_there() {
    let sandbox = with(&read(&staged(TASK)));
    assert_snapshot!(sandbox.run(&["plugins", "show", "moeut_c5"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × unknown plugin `moeut_c5`
      ╰─▶ it is neither a file, nor the name of a plugin or component that is found
      help: did you mean `moeut_c4`?
    ");
    assert_snapshot!(sandbox.run(&["plugins", "show", "plugins/y.so"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × plugin file `plugins/y.so` is refused
      ╰─▶ it cannot be read: No such file or directory (os error 2)
      help: check the permissions of `plugins/y.so`
    ");
}

#[test]
fn verify_names_each_check_of_a_good_file() {
    let outcome = with(&read(&staged(MODEL))).run(&["plugins", "verify"]);
    let text = outcome.ok().stdout;
    let subjects: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("ok"))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(
        subjects,
        [
            "file", "owner", "manifest", "abi", "target", "libtorch", "symbols", "lock"
        ]
    );
    assert!(text.ends_with("\n1 of 1 file may be opened\n"), "{text}");
}

/// Each kind of bad file: what `plugins verify` says of it. None of them is opened for that.
#[test]
fn verify_says_why_a_file_is_refused_and_exits_with_1() {
    let task = || read(&staged(TASK));
    let mut for_arm = task();
    for_arm[18] = 183; // `e_machine`: AArch64
    let cases = [
        ("garbage", b"\x7fELF and then nothing".to_vec()),
        ("for another machine", for_arm),
        ("cut off", task()[..100_000].to_vec()),
        (
            "a newer ABI",
            patch(&staged(TASK), r#""abi":"1.4""#, r#""abi":"1.9""#),
        ),
        (
            "another libtorch",
            patch(&staged(MODEL), r#""libtorch":"2.11"#, r#""libtorch":"2.10"#),
        ),
        (
            "a symbol that libtorch does not have",
            patch(
                &staged(MODEL),
                "_ZN2at4_ops9embedding4call",
                "_ZN2at4_ops9embeddinx4call",
            ),
        ),
        (
            "a newer C library",
            patch(&staged(TASK), "GLIBC_2.34", "GLIBC_2.94"),
        ),
    ];
    let mut text = String::new();
    for (name, bytes) in cases {
        let outcome = with(&bytes).run(&["plugins", "verify", "plugins/x.so"]);
        assert_eq!(outcome.code, Some(1), "{name}: {outcome}");
        let _ = writeln!(text, "# {name}\n{}", refused(&outcome));
    }
    // Of the C library the newest version is this machine's.
    let text: Vec<String> = text
        .lines()
        .map(|line| match line.split_once("whose newest here is") {
            Some((start, _)) => format!("{start}whose newest here is …"),
            None => line.to_owned(),
        })
        .collect();
    assert_snapshot!(text.join("\n"), @r"
    # garbage
    exit: Some(1)
    REFUSED  manifest  it is not a complete ELF library: Unknown file magic
    fix: copy or build `plugins/x.so` anew
    # for another machine
    exit: Some(1)
    REFUSED  manifest  it was built for a machine of kind Aarch64, and this is x86_64-unknown-linux-gnu
    fix: rebuild it for x86_64-unknown-linux-gnu
    # cut off
    exit: Some(1)
    REFUSED  manifest  it is not a complete ELF library: Invalid ELF section header offset/size/alignment
    fix: copy or build `plugins/x.so` anew
    # a newer ABI
    exit: Some(1)
    REFUSED  abi       it was built for plugin ABI 1.9, and this host speaks 1.4
    fix: rebuild it against moeut-plugin-api 1.4
    # another libtorch
    exit: Some(1)
    REFUSED  libtorch  it was built against libtorch 2.10.0, and this host has 2.11.0
    fix: rebuild it against libtorch 2.11.0
    # a symbol that libtorch does not have
    exit: Some(1)
    REFUSED  symbols   it needs 1 symbol that neither libtorch 2.11.0 nor another library here exports: `_ZN2at4_ops9embeddinx4callERKNS_6TensorES4_N3c106SymIntEbb`
    fix: rebuild it on this machine, against libtorch 2.11.0
    # a newer C library
    exit: Some(1)
    REFUSED  symbols   it needs `GLIBC_2.94` of `libc.so.6`, whose newest here is …
    fix: rebuild it on this machine, against libtorch 2.11.0
    ");
}

/// The loader names one symbol and no library.
#[test]
fn a_library_with_missing_symbols_is_explained_when_it_is_needed() {
    let sandbox = Sandbox::new();
    let bytes = patch(
        &staged(MODEL),
        "_ZN2at4_ops9embedding4call",
        "_ZN2at4_ops9embeddinx4call",
    );
    fs::remove_file(sandbox.installed().join(MODEL)).unwrap();
    sandbox.drop_in("plugins", "x.so", &bytes);
    let outcome = sandbox.run(&["plugins", "list"]).ok();
    assert!(
        outcome.stdout.contains(
            "why: it needs 1 symbol that neither libtorch 2.11.0 nor another library here exports: `_ZN2at4_ops9embeddinx4call"
        ),
        "{outcome}"
    );
}

#[test]
fn a_link_into_a_folder_that_everybody_may_write() {
    let sandbox = Sandbox::bare();
    let real = sandbox.drop_in("open", "real.so", &read(&staged(TASK)));
    symlink(&real, sandbox.work().join("plugins/x.so")).unwrap();
    assert_eq!(sandbox.run(&["plugins", "verify"]).code, Some(0));
    fs::set_permissions(real.parent().unwrap(), fs::Permissions::from_mode(0o1777)).unwrap();
    let outcome = sandbox.run(&["plugins", "verify"]);
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let text = refused(&outcome);
    assert!(
        text.contains("here/open` may be written by everybody, and loading a plugin runs it"),
        "{text}"
    );
}

#[test]
fn a_locked_file_that_changed_is_a_warning() {
    let sandbox = with(&read(&staged(TASK)));
    sandbox.run(&["plugins", "lock"]).ok();
    assert_eq!(
        sandbox
            .run(&["plugins", "list"])
            .ok()
            .stdout
            .matches("note:")
            .count(),
        0
    );
    sandbox.drop_in("plugins", "x.so", &changed());
    let list = |policy| {
        sandbox
            .run(&["plugins", "list", "-plugin_verify", policy])
            .ok()
            .stdout
    };
    let warned = list("warn");
    assert!(
        warned.contains("note: `plugins/x.so`: its SHA-256 is "),
        "{warned}"
    );
    assert!(warned.contains("task  moeut_c4"), "{warned}");
    assert!(!list("off").contains("note:"));
}

#[test]
fn strict_opens_only_what_is_locked() {
    let sandbox = with(&read(&staged(TASK)));
    let strict = ["plugins", "list", "-plugin_verify", "strict"];
    assert_snapshot!(sandbox.run(&strict), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × there is no `plugins.lock`
      ╰─▶ `-plugin_verify strict` loads only what it names
      help: type `moeut-host plugins lock`, or leave out `-plugin_verify`
    ");
    sandbox.run(&["plugins", "lock"]).ok();
    sandbox.drop_in("plugins", "y.so", &read(&staged(MODEL)));
    assert_snapshot!(sandbox.run(&strict), @r"
    exit: 0
    --- stdout
    KIND  NAME                       VERSION  ABI  LIBTORCH  FILE
    task  moeut_c4 (c4_transformer)  0.1.0    1.4  -         plugins/x.so
    problem: plugin file `plugins/y.so` is refused
        why: `plugins.lock` does not name it, and `-plugin_verify strict` loads only what it names
        fix: if you trust the file, type `moeut-host plugins lock --update`
    --- stderr
    ");
    // The file that is there under a locked name is another one.
    sandbox.drop_in("plugins", "x.so", &changed());
    let outcome = sandbox.run(&["-task", "moeut_c4", "-name", "a", "-plugin_v=strict"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(
        outcome.stderr.contains("unknown task `moeut_c4`"),
        "{outcome}"
    );
    assert!(
        outcome.stderr.contains("and `plugins.lock` says"),
        "{outcome}"
    );
    assert!(
        outcome.stderr.contains("moeut-host plugins lock --update"),
        "{outcome}"
    );
}

#[test]
fn a_lock_is_replaced_only_when_that_is_meant() {
    let sandbox = with(&read(&staged(TASK)));
    let lock = || fs::read_to_string(sandbox.work().join("plugins.lock")).unwrap();
    sandbox.run(&["plugins", "lock"]).ok();
    let first = lock();
    let again = sandbox.run(&["plugins", "lock"]).ok().stdout;
    assert_eq!(again, "`plugins.lock` is up to date: 1 file\n");

    sandbox.drop_in("plugins", "x.so", &changed());
    let outcome = sandbox.run(&["plugins", "lock"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
    assert!(
        outcome.stderr.contains("- moeut-task-moeut-c4 0.1.0"),
        "{outcome}"
    );
    assert!(
        outcome.stderr.contains("+ moeut-task-moeut-c4 0.1.1"),
        "{outcome}"
    );
    assert_eq!(lock(), first);

    sandbox.run(&["plugins", "lock", "--update"]).ok();
    assert!(lock().contains("0.1.1"), "{}", lock());
    sandbox
        .run(&["plugins", "list", "-plugin_verify", "strict"])
        .ok();
}

#[test]
fn a_lock_that_cannot_be_read_is_no_lock_to_ignore() {
    let sandbox = with(&read(&staged(TASK)));
    fs::write(
        sandbox.work().join("plugins.lock"),
        "{\"format\": 2, \"plugins\": []}",
    )
    .unwrap();
    assert_snapshot!(sandbox.run(&["plugins", "list"]), @r"
    exit: 2
    --- stdout
    --- stderr
    Error:   × `plugins.lock` cannot be used
      ╰─▶ its format is 2, and this host knows 1
      help: correct it, or remove it and type `moeut-host plugins lock`
    ");
}
