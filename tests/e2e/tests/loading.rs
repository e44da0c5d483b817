//! Plugin files that cannot or must not be opened, and which of several files wins.

use insta::assert_snapshot;
use moeut_e2e::{DATASET, MODEL, Sandbox, TASK, build_crate, patch, read, staged_plugins};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

fn staged(name: &str) -> PathBuf {
    staged_plugins().join(name)
}

/// What a user sees who asks for the main task when the only file in `./plugins` has these bytes.
fn refusal(bytes: &[u8]) -> String {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", bytes);
    sandbox
        .run(&["-task", "moeut_c4", "-name", "a"])
        .to_string()
}

#[test]
fn a_library_that_is_no_plugin() {
    let libtorch = std::env::var_os("LIBTORCH").expect("cargo's configuration sets it");
    let folder = fs::read_dir(PathBuf::from(libtorch).join("lib"))
        .unwrap()
        .flatten();
    let smallest = folder
        .filter(|entry| entry.file_name().to_string_lossy().contains(".so"))
        .min_by_key(|entry| entry.metadata().unwrap().len())
        .unwrap();
    assert_snapshot!(refusal(&read(&smallest.path())), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it is a library, but holds no moeut manifest (section `.moeut.plugin`)
    Error:   × unknown task `moeut_c4`
      ╰─▶ found no tasks at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn a_truncated_plugin() {
    let bytes = read(&staged(TASK));
    assert_snapshot!(refusal(&bytes[..bytes.len() / 2]), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it is not a complete ELF library: Invalid ELF section header offset/size/alignment
    Error:   × unknown task `moeut_c4`
      ╰─▶ found no tasks at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn garbage() {
    assert_snapshot!(refusal(b"not a library at all"), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it is not a complete ELF library: Unknown file magic
    Error:   × unknown task `moeut_c4`
      ╰─▶ found no tasks at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn an_empty_file() {
    assert_snapshot!(refusal(b""), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it is not a complete ELF library: Could not read file magic
    Error:   × unknown task `moeut_c4`
      ╰─▶ found no tasks at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn another_abi_major() {
    assert_snapshot!(refusal(&patch(&staged(TASK), r#""abi":"1.4""#, r#""abi":"2.0""#)), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it was built for plugin ABI 2.0, and this host speaks 1.4
    Error:   × unknown task `moeut_c4`
      ╰─▶ plugin file `plugins/x.so` is refused: it was built for plugin ABI 2.0, and this host speaks
          1.4
      help: rebuild it against moeut-plugin-api 1.4
    ");
}

#[test]
fn another_target() {
    let bytes = patch(&staged(TASK), r#""target":"x86_64"#, r#""target":"sparc9"#);
    assert_snapshot!(refusal(&bytes), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: it was built for sparc9-unknown-linux-gnu, and this is x86_64-unknown-linux-gnu
    Error:   × unknown task `moeut_c4`
      ╰─▶ plugin file `plugins/x.so` is refused: it was built for sparc9-unknown-linux-gnu, and this
          is x86_64-unknown-linux-gnu
      help: rebuild it for x86_64-unknown-linux-gnu
    ");
}

#[test]
fn another_libtorch() {
    let sandbox = Sandbox::new();
    fs::remove_file(sandbox.installed().join(MODEL)).unwrap();
    sandbox.drop_in(
        "plugins",
        "x.so",
        &patch(&staged(MODEL), r#""libtorch":"2.11"#, r#""libtorch":"2.12"#),
    );
    let outcome = sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none"]);
    assert_snapshot!(outcome.stderr, @r"
    warning: plugin file `plugins/x.so` is refused: it was built against libtorch 2.12.0, and this host has 2.11.0
    Error:   × unknown model `moeut`
      ╰─▶ plugin file `plugins/x.so` is refused: it was built against libtorch 2.12.0, and this host
          has 2.11.0
      help: rebuild it against libtorch 2.11.0
    ");
}

#[test]
fn a_manifest_that_is_no_json() {
    let bytes = patch(
        &staged(TASK),
        r#"{"record":"plugin""#,
        r#"{"record";"plugin""#,
    );
    assert_snapshot!(refusal(&bytes), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: its manifest is malformed: expected `:` at line 1 column 10
    Error:   × unknown task `moeut_c4`
      ╰─▶ found no tasks at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

/// A plugin whose file says that its task is `moeut_c5`, while its code says `moeut_c4`.
fn lying() -> Vec<u8> {
    patch(
        &staged(TASK),
        r#""kind":"task","name":"moeut_c4""#,
        r#""kind":"task","name":"moeut_c5""#,
    )
}

#[test]
fn a_lying_manifest() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &lying());
    assert_snapshot!(sandbox.run(&["-task", "moeut_c5", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: its manifest says that it holds task `moeut_c5`, but it registers task `moeut_c4`
    Error:   × unknown task `moeut_c5`
      ╰─▶ plugin file `plugins/x.so` is refused: its manifest says that it holds task `moeut_c5`, but
          it registers task `moeut_c4`
      help: rebuild the plugin from clean sources
    ");
}

#[test]
fn another_layout_of_the_root_module() {
    let library = build_crate(
        "other-layout",
        "tests/e2e/fixtures/other-layout",
        str::to_owned,
    );
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &read(&library));
    assert_snapshot!(sandbox.run(&["-task", "other_layout", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: its plugin module is laid out otherwise than this host's
    Error:   × unknown task `other_layout`
      ╰─▶ plugin file `plugins/x.so` is refused: its plugin module is laid out otherwise than this
          host's
      help: rebuild the plugin against this host
    ");
}

#[test]
fn a_file_that_everybody_may_write() {
    let sandbox = Sandbox::bare();
    let path = sandbox.drop_in("plugins", "x.so", &read(&staged(TASK)));
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    assert_snapshot!(sandbox.run(&["-task", "moeut_c4", "-name", "a"]), @r"
    exit: 2
    --- stdout
    --- stderr
    warning: plugin file `plugins/x.so` is refused: `plugins/x.so` may be written by everybody, and loading a plugin runs it
    Error:   × unknown task `moeut_c4`
      ╰─▶ plugin file `plugins/x.so` is refused: `plugins/x.so` may be written by everybody, and
          loading a plugin runs it
      help: type `chmod o-w plugins/x.so`
    ");
}

#[test]
fn a_folder_that_everybody_may_write() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &read(&staged(TASK)));
    fs::set_permissions(
        sandbox.work().join("plugins"),
        fs::Permissions::from_mode(0o1777),
    )
    .unwrap();
    assert_snapshot!(sandbox.run(&["plugins", "list"]), @r"
    exit: 0
    --- stdout
    no plugins
    problem: plugin file `plugins/x.so` is refused
        why: `plugins` may be written by everybody, and loading a plugin runs it
        fix: type `chmod o-w plugins`
    --- stderr
    ");
}

/// Each bad file comes before the good ones, so that whatever it leaves behind could do harm.
#[test]
fn bad_files_never_hide_good_ones() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "a.so", b"garbage");
    sandbox.drop_in("plugins", "b.so", &lying());
    let layout = build_crate(
        "other-layout",
        "tests/e2e/fixtures/other-layout",
        str::to_owned,
    );
    sandbox.drop_in("plugins", "c.so", &read(&layout));
    sandbox.drop_in("plugins", "d.so", &read(&staged(DATASET)));
    sandbox.drop_in("plugins", "e.so", &read(&staged(TASK)));
    let table = sandbox.run(&["plugins", "list"]).ok().stdout;
    let good: Vec<&str> = table
        .lines()
        .take_while(|line| !line.starts_with("problem"))
        .collect();
    assert_snapshot!(good.join("\n"), @r"
    KIND     NAME                       VERSION  ABI  LIBTORCH  FILE
    dataset  c4                         0.1.0    1.4  -         plugins/d.so
    task     moeut_c4 (c4_transformer)  0.1.0    1.4  -         plugins/e.so
    ");
    assert_eq!(table.matches("problem: ").count(), 3, "{table}");
}

/// A second plugin with the same task, which differs from the first by its name.
fn namesake() -> Vec<u8> {
    patch(
        &staged(TASK),
        r#""name":"moeut-task-moeut-c4""#,
        r#""name":"moeut-task-moeut-c9""#,
    )
}

#[test]
fn two_files_of_one_folder_with_one_task() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "a.so", &read(&staged(TASK)));
    sandbox.drop_in("plugins", "b.so", &namesake());
    assert_snapshot!(sandbox.run(&["-task", "moeut_c4", "-name", "a", "-gpu", "none"]).stderr, @r"
    Error:   × two plugins of one folder have the task `moeut_c4`
      ╰─▶ `plugins/a.so` and `plugins/b.so`
      help: remove one of the files, or say which: `moeut_c4@moeut-task-moeut-c4`
    ");
    // Once one is chosen, what is missing is the model.
    let chosen = sandbox.run(&[
        "-task",
        "moeut_c4@moeut-task-moeut-c9",
        "-name",
        "b",
        "-gpu",
        "none",
    ]);
    assert_snapshot!(chosen.stderr, @r"
    Error:   × unknown dataset `c4`
      ╰─▶ found no datasets at all
      help: `moeut-host plugins list` shows what there is, `moeut-host doctor` what is wrong
    ");
}

#[test]
fn an_earlier_folder_shadows_a_later_one() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("mine", "a.so", &namesake());
    sandbox.drop_in("plugins", "a.so", &read(&staged(TASK)));
    assert_snapshot!(sandbox.run(&["plugins", "list", "-plugin_dir", "mine"]), @r"
    exit: 0
    --- stdout
    KIND  NAME                       VERSION  ABI  LIBTORCH  FILE
    task  moeut_c4 (c4_transformer)  0.1.0    1.4  -         mine/a.so
    task  moeut_c4 (c4_transformer)  0.1.0    1.4  -         plugins/a.so (shadowed)
    --- stderr
    ");
}

#[test]
fn an_identical_file_counts_once() {
    let sandbox = Sandbox::bare();
    for name in ["a.so", "b.so"] {
        sandbox.drop_in("plugins", name, &read(&staged(TASK)));
    }
    assert_snapshot!(sandbox.run(&["plugins", "list"]), @r"
    exit: 0
    --- stdout
    KIND  NAME                       VERSION  ABI  LIBTORCH  FILE
    task  moeut_c4 (c4_transformer)  0.1.0    1.4  -         plugins/a.so
    note: `plugins/b.so` is identical to `plugins/a.so` and counts once
    --- stderr
    ");
}

#[test]
fn a_misspelled_task_suggests_the_real_one() {
    let sandbox = Sandbox::new();
    assert_snapshot!(sandbox.run(&["-task", "moeut_c5", "-name", "a", "-gpu", "none"]).stderr, @r"
    Error:   × unknown task `moeut_c5`
      ╰─▶ found `moeut_c4`
      help: did you mean `moeut_c4`?
    ");
}

/// What was built against API 1.0 is opened before the plugins of today or after them, and trains, saves and goes on.
#[test]
fn a_plugin_of_api_1_0_is_loaded_beside_those_of_today() {
    let packed = include_bytes!("../fixtures/frozen/libmoeut_frozen.so.zst");
    let bytes = zstd::decode_all(&packed[..]).unwrap();
    for folder in ["first", "plugins"] {
        let sandbox = Sandbox::full();
        sandbox.drop_in(folder, "frozen.so", &bytes);
        let shown = sandbox
            .run(&["plugins", "list", "-plugin_dir", folder])
            .ok();
        assert!(!shown.stdout.contains("problem"), "{folder}: {shown}");
        assert!(!shown.stdout.contains("note"), "{folder}: {shown}");
        for (kind, name) in [
            ("task", "frozen (frozen_alias)"),
            ("dataset", "frozen_bytes"),
            ("model", "frozen_model"),
            ("kernel", "frozen_kernel"),
        ] {
            let is_it = |line: &str| {
                line.starts_with(kind) && line.contains(name) && line.contains(" 1.0  ")
            };
            assert!(shown.stdout.lines().any(is_it), "{kind} {name}: {shown}");
        }

        let train = |stop_after: &str| {
            sandbox
                .run(&[
                    "-plugin_dir",
                    folder,
                    "-task",
                    "frozen_alias",
                    "-name",
                    "old",
                    "-frozen.d_model",
                    "12",
                    "-batch_size",
                    "8",
                    "-lr",
                    "0.05",
                    "-log_interval",
                    "10",
                    "-test_interval",
                    "20",
                    "-stop_after",
                    stop_after,
                ])
                .ok()
        };
        let said = train("20");
        assert!(
            said.to_string().contains("the frozen task speaks"),
            "{said}"
        );
        let said = train("40");
        assert!(said.to_string().contains("going on from step 20"), "{said}");
        let metrics = fs::read_to_string(sandbox.run_folder("old").join("metrics.jsonl")).unwrap();
        let last: serde_json::Value =
            serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        let loss = last["validation/val/loss"].as_f64().unwrap();
        // A text that repeats, seen byte by byte: from ln 256 = 5.5 down to what the byte before tells.
        assert!(loss < 1.5, "{last}");
        assert!(metrics.contains("\"frozen/norm\":"), "{metrics}");
    }
}
