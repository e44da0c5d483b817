//! A folder of its own for a test: the host, its plugins, a home and a working folder, and nothing of the machine's.

use crate::build::{host, scratch, staged_plugins};
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that a test waits for anything; a machine has to be fifty times too slow to get there.
pub const DEADLINE: Duration = Duration::from_secs(100);

/// An installed host.
pub struct Sandbox {
    root: TempDir,
}

impl Sandbox {
    /// A host with the plugins of the main job beside it, and no others: a new plugin is no edit here.
    pub fn new() -> Self {
        let sandbox = Self::bare();
        for name in crate::PLUGINS {
            fs::copy(staged_plugins().join(name), sandbox.installed().join(name))
                .expect("a plugin can be copied");
        }
        sandbox
    }

    /// A host with every plugin of the workspace.
    pub fn full() -> Self {
        let sandbox = Self::bare();
        let plugins = fs::read_dir(staged_plugins()).expect("plugins are staged");
        for plugin in plugins.flatten() {
            fs::copy(plugin.path(), sandbox.installed().join(plugin.file_name()))
                .expect("a plugin can be copied");
        }
        sandbox
    }

    /// A host without plugins.
    pub fn bare() -> Self {
        let root = tempfile::tempdir_in(scratch()).expect("a temporary folder can be made");
        let sandbox = Self { root };
        for folder in ["bin/plugins", "home", "here/plugins"] {
            let path = sandbox.root.path().join(folder);
            fs::create_dir_all(&path).expect("the sandbox can be written");
            set_mode(&path, 0o755);
        }
        fs::hard_link(host(), sandbox.program()).expect("the host can be linked");
        sandbox
    }

    /// The host.
    pub fn program(&self) -> PathBuf {
        self.root.path().join("bin/moeut-host")
    }

    /// The folder of plugins beside the executable.
    pub fn installed(&self) -> PathBuf {
        self.root.path().join("bin/plugins")
    }

    /// The working folder.
    pub fn work(&self) -> PathBuf {
        self.root.path().join("here")
    }

    /// A copy of the cached data, for tests that add to it; relative to the working folder it is `cache`.
    pub fn copy_cache(&self) -> PathBuf {
        let cache = self.work().join("cache");
        let copied = Command::new("cp")
            .arg("-r")
            .args([&crate::cached_data(), &cache])
            .status();
        assert!(copied.is_ok_and(|status| status.success()), "`cp` works");
        cache
    }

    /// The folder of a run.
    pub fn run_folder(&self, name: &str) -> PathBuf {
        self.work().join("save").join(name)
    }

    /// Writes a file into a folder of plugins below the working folder, whose names in messages are short and the same
    /// on every machine; `plugins` is on the search path without being asked for.
    pub fn drop_in(&self, folder: &str, name: &str, bytes: &[u8]) -> PathBuf {
        let folder = self.work().join(folder);
        fs::create_dir_all(&folder).expect("the sandbox can be written");
        set_mode(&folder, 0o755);
        let path = folder.join(name);
        fs::write(&path, bytes).expect("the sandbox can be written");
        set_mode(&path, 0o755);
        path
    }

    /// Runs the host to its end.
    pub fn run(&self, args: &[&str]) -> Outcome {
        let output = self.command(args).output().expect("the host starts");
        let text = |bytes: &[u8]| self.normalize(&String::from_utf8_lossy(bytes));
        Outcome {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Runs the host to its end with at most so many bytes of address space.
    pub fn run_within(&self, bytes: u64, args: &[&str]) -> Outcome {
        let host = self.command(args);
        let mut limited = Command::new("prlimit");
        limited
            .arg(format!("--as={bytes}"))
            .arg(host.get_program())
            .args(host.get_args())
            .env_clear()
            .envs(
                host.get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .current_dir(self.work())
            .stdin(Stdio::null());
        let output = limited.output().expect("`prlimit` starts");
        let text = |bytes: &[u8]| self.normalize(&String::from_utf8_lossy(bytes));
        Outcome {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Starts the host and does not wait. Whoever calls this kills it or waits for it.
    pub fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.command(args);
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the host starts")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.foreign(&self.program());
        command.args(args);
        command
    }

    /// Another program in the same surroundings.
    pub fn foreign(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("HOME", self.root.path().join("home"))
            .env("XDG_DATA_HOME", self.root.path().join("home/data"))
            .env("NO_COLOR", "1")
            // The host would set it and start once more, which costs a moment each time; one test is about that.
            .env("GOMP_SPINCOUNT", "10000")
            .env("LD_LIBRARY_PATH", libtorch())
            .current_dir(self.work())
            .stdin(Stdio::null());
        command
    }

    /// Paths and times are not the same everywhere.
    pub(crate) fn normalize(&self, text: &str) -> String {
        let text = text.replace(&self.root.path().display().to_string(), "[sandbox]");
        let is_timing =
            |line: &&str| line.starts_with("plugins ") && line.trim_end().ends_with(" s");
        text.split_inclusive('\n')
            .filter(|line| !is_timing(line))
            .collect()
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

/// The rpath leads from `target/release` only; cargo tells tests where libtorch is.
fn libtorch() -> OsString {
    let root = std::env::var_os("LIBTORCH").map_or_else(
        || crate::build::repo().join(".libtorch/torch"),
        PathBuf::from,
    );
    root.join("lib").into_os_string()
}

/// Sets permissions.
pub(crate) fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions can be set");
}

/// How a run of the host ended; shown as one text, for snapshots.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; none after a signal.
    pub code: Option<i32>,
    /// With paths replaced and without the line about start-up times.
    pub stdout: String,
    /// As above.
    pub stderr: String,
}

impl Outcome {
    /// Itself, if the host succeeded.
    #[expect(
        clippy::return_self_not_must_use,
        reason = "most tests want to know no more than that"
    )]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self
            .code
            .map_or_else(|| "killed".to_owned(), |code| code.to_string());
        let (stdout, stderr) = (&self.stdout, &self.stderr);
        write!(f, "exit: {code}\n--- stdout\n{stdout}--- stderr\n{stderr}")
    }
}

/// The bytes of a file.
pub fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Replaces text in a library by other text of the same length.
pub fn patch(library: &Path, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(
        from.len(),
        to.len(),
        "a patch cannot move what is behind it"
    );
    let mut bytes = read(library);
    let places: Vec<usize> = (0..=bytes.len() - from.len())
        .filter(|&at| bytes[at..].starts_with(from.as_bytes()))
        .collect();
    assert_eq!(
        places.len(),
        1,
        "`{from}` should occur once in `{}`",
        library.display()
    );
    bytes[places[0]..][..to.len()].copy_from_slice(to.as_bytes());
    bytes
}

/// Polls until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < DEADLINE,
            "waited {DEADLINE:?} for: {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
