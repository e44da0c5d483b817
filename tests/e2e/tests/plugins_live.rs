//! Plugin files that change, come and go: what a run that has them open feels, and what is listed.

use insta::assert_snapshot;
use moeut_e2e::{
    DATASET, Sandbox, TASK, patch, read, staged_plugins, steps_seen, tiny, wait_until,
};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;

fn staged(name: &str) -> Vec<u8> {
    read(&staged_plugins().join(name))
}

/// The task as version 0.2.0.
fn newer() -> Vec<u8> {
    patch(
        &staged_plugins().join(TASK),
        r#""version":"0.1.0","libtorch":"""#,
        r#""version":"0.2.0","libtorch":"""#,
    )
}

fn list(sandbox: &Sandbox) -> String {
    sandbox.run(&["plugins", "list"]).ok().stdout
}

/// `cp` over a library writes into the file that a run has mapped, which would end the run.
#[test]
fn a_run_goes_on_while_its_files_are_overwritten_and_removed() {
    let sandbox = Sandbox::new();
    let args = tiny("live", &["-stop_after", "100000"]);
    let running = sandbox.start(&args.as_strs(), &[]);
    let folder = sandbox.run_folder("live");
    wait_until("the first steps", || steps_seen(&folder) >= 3);
    for entry in fs::read_dir(sandbox.installed()).unwrap().flatten() {
        let inode = || fs::metadata(entry.path()).unwrap().ino();
        let before = inode();
        fs::write(entry.path(), "overwritten in place").unwrap();
        assert_eq!(inode(), before);
    }
    let seen = steps_seen(&folder);
    wait_until("steps with files that are overwritten", || {
        steps_seen(&folder) >= seen + 20
    });
    fs::remove_dir_all(sandbox.installed()).unwrap();
    let seen = steps_seen(&folder);
    wait_until("steps without files", || steps_seen(&folder) >= seen + 20);
    running.signal("INT");
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(130), "{outcome}");
    assert!(outcome.stderr.contains("stopped by SIGINT"), "{outcome}");
}

#[test]
fn a_list_shows_at_once_what_came_changed_and_went() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &staged(TASK));
    assert!(list(&sandbox).contains(" 0.1.0 "));
    // In place, then by renaming, as an installation does.
    sandbox.drop_in("plugins", "x.so", &newer());
    let shown = list(&sandbox);
    assert!(
        shown.contains(" 0.2.0 ") && !shown.contains(" 0.1.0 "),
        "{shown}"
    );
    let beside = sandbox.drop_in("plugins", "beside", &staged(TASK));
    fs::rename(beside, sandbox.work().join("plugins/x.so")).unwrap();
    assert!(list(&sandbox).contains(" 0.1.0 "));
    sandbox.drop_in("plugins", "d.so", &staged(DATASET));
    assert!(list(&sandbox).contains("dataset  c4"));
    fs::remove_file(sandbox.work().join("plugins/x.so")).unwrap();
    assert!(!list(&sandbox).contains("moeut_c4"));
}

/// What is remembered of files only speeds up the list: here it lies, and nothing but the list believes it.
#[test]
fn what_is_remembered_of_files_is_for_listing_only() {
    let sandbox = Sandbox::bare();
    sandbox.drop_in("plugins", "x.so", &staged(TASK));
    let first = list(&sandbox);
    let store = sandbox.work().join("../home/.cache/moeut/plugins.json");
    // Files that have just changed are not remembered.
    wait_until("the file to be old enough", || {
        assert_eq!(list(&sandbox), first);
        store.is_file()
    });
    let kept = fs::read_to_string(&store).unwrap();
    assert!(kept.contains("c4_transformer"), "{kept}");
    let write = |text: &str| fs::write(&store, text).unwrap();

    write(&kept.replace("c4_transformer", "from_the_store"));
    assert!(list(&sandbox).contains("moeut_c4 (from_the_store)"));
    let unknown = sandbox.run(&["-task", "from_the_store", "-name", "a"]);
    assert!(
        unknown.stderr.contains("unknown task `from_the_store`"),
        "{unknown}"
    );
    let known = sandbox.run(&["plugins", "show", "c4_transformer"]).ok();
    assert!(known.stdout.contains("also c4_transformer"), "{known}");

    // The lock is of what files hold, whatever is remembered; and a remembered file must pass the lock, too.
    sandbox.run(&["plugins", "lock"]).ok();
    write(&kept);
    let strict = ["plugins", "list", "-plugin_verify", "strict"];
    assert!(sandbox.run(&strict).ok().stdout.contains("moeut_c4"));
    write(&kept.replace("\"sha256\":\"", "\"sha256\":\"0"));
    let refused = sandbox.run(&strict).ok().stdout;
    assert!(refused.contains("no plugins\nproblem: "), "{refused}");

    // Damaged, another's, open to others, or a folder: as none.
    let without = |what: &str| assert_eq!(list(&sandbox), first, "{what}");
    write(&kept[..kept.len() / 2]);
    without("cut off");
    write(&kept.replace("c4_transformer", "from_the_store"));
    fs::set_permissions(&store, fs::Permissions::from_mode(0o666)).unwrap();
    without("open to others");
    fs::set_permissions(&store, fs::Permissions::from_mode(0o600)).unwrap();
    if chown(&store, Some(12345), None).is_ok() {
        without("another's");
    }
    fs::remove_file(&store).unwrap();
    fs::create_dir(&store).unwrap();
    without("a folder");

    // Permissions of the file and its folder are looked at each time.
    let folder = sandbox.work().join("plugins");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let open = list(&sandbox);
    assert!(open.contains("may be written by everybody"), "{open}");
}

/// Only root can make a file another user's; without that the same check is seen where everybody may write.
#[test]
fn a_file_of_another_user() {
    let sandbox = Sandbox::bare();
    let path = sandbox.drop_in("plugins", "x.so", &staged(TASK));
    if chown(&path, Some(12345), None).is_err() {
        println!("skipped: only root can give files away");
        return;
    }
    assert_snapshot!(list(&sandbox), @r"
    no plugins
    problem: plugin file `plugins/x.so` is refused
        why: `plugins/x.so` belongs to user 12345, who is neither you nor root, and loading a plugin runs it
        fix: if you trust it, copy it to a folder of your own, or type `chown $USER plugins/x.so`
    ");
}

/// Neither waits for ever, nor reads for ever.
#[test]
fn what_is_no_plain_file_is_not_read() {
    let sandbox = Sandbox::bare();
    let folder = sandbox.work().join("plugins");
    let pipe = Command::new("mkfifo").arg(folder.join("pipe.so")).status();
    assert!(pipe.unwrap().success());
    symlink("nowhere", folder.join("broken.so")).unwrap();
    symlink("loop.so", folder.join("loop.so")).unwrap();
    fs::create_dir(folder.join("folder.so")).unwrap();
    symlink("/dev/zero", folder.join("zero.so")).unwrap();
    assert_snapshot!(list(&sandbox), @r"
    no plugins
    problem: plugin file `plugins/broken.so` is refused
        why: it cannot be read: No such file or directory (os error 2)
        fix: check the permissions of `plugins/broken.so`
    problem: plugin file `plugins/loop.so` is refused
        why: it cannot be read: Too many levels of symbolic links (os error 40)
        fix: check the permissions of `plugins/loop.so`
    ");
    for place in ["plugins/pipe.so", "/dev/zero", "plugins/folder.so"] {
        let outcome = sandbox.run(&["plugins", "show", place]);
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert!(outcome.stderr.contains("it is no plain file"), "{outcome}");
        let outcome = sandbox.run(&["plugins", "verify", place]);
        assert_eq!(outcome.code, Some(1), "{outcome}");
    }
}

/// Each start takes the file that the link leads to then; the owner's and the folder's rights are looked at behind it.
#[test]
fn a_link_is_followed_anew_each_time() {
    let sandbox = Sandbox::bare();
    let first = sandbox.drop_in("versions", "1.so", &staged(TASK));
    let second = sandbox.drop_in("versions", "2.so", &newer());
    let link = sandbox.work().join("plugins/x.so");
    for (version, target) in [("0.1.0", &first), ("0.2.0", &second), ("0.1.0", &first)] {
        let _ = fs::remove_file(&link);
        symlink(target, &link).unwrap();
        assert!(list(&sandbox).contains(&format!(" {version} ")));
    }
}
