//! `cargo xtask setup`: libtorch, its libraries and cmake below `.libtorch`, each wheel once.
//!
//! Which wheels there are is `wheels.rs`; how one is fetched is `fetch.py`. This file decides what is missing, keeps
//! the stamps, and turns whatever goes wrong into advice. It does not look at an installation without stamps: a
//! half-copied one cannot be told from a complete one.

use std::{
    collections::HashSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    failure::Failure,
    wheels::{CPU, CUDA, TORCH, Wheel},
};

const FETCH: &str = include_str!("fetch.py");

/// What to install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Set {
    /// Enough to build everything and to run on a CPU: about 0.6 GB to download, 1.1 GB on disk.
    Cpu,
    /// In addition NVIDIA's run time: about 2 GB more to download.
    Cuda,
}

/// The installation folder.
pub(crate) fn libtorch_root(repo: &Path) -> PathBuf {
    repo.join(".libtorch")
}

/// A libtorch of the user's own, if `LIBTORCH` names one. (Cargo itself sets it to ours otherwise.) Several checkouts
/// may share ours through a link.
pub(crate) fn foreign_libtorch(repo: &Path) -> Option<PathBuf> {
    let path = PathBuf::from(env::var_os("LIBTORCH")?);
    let ours = libtorch_root(repo).join("torch");
    let resolved = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    (resolved(&path) != resolved(&ours)).then_some(path)
}

/// Installs what `set` lacks below `repo`; a second call finds nothing to do.
pub(crate) fn setup(repo: &Path, set: Set) -> Result<(), Failure> {
    let mut wheels = CPU.to_vec();
    match foreign_libtorch(repo) {
        Some(path) => check_foreign(&path)?,
        None => wheels.push(TORCH),
    }
    if set == Set::Cuda {
        wheels.extend(CUDA);
    }

    let root = libtorch_root(repo);
    if missing(&root, &wheels).is_empty() {
        return Ok(());
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err(Failure::new(
            "libtorch cannot be installed on this platform",
            format!(
                "the pinned wheels are for x86_64 Linux, this is {} {}",
                env::consts::ARCH,
                env::consts::OS
            ),
            "install libtorch 2.11.0 yourself and name its folder: `export LIBTORCH=/path/to/torch`",
        ));
    }
    check_python()?;
    fs::create_dir_all(&root).map_err(|error| Failure::io("create", &root, &error))?;
    let lock_path = root.join(".lock");
    let lock =
        fs::File::create(&lock_path).map_err(|error| Failure::io("create", &lock_path, &error))?;
    lock.lock()
        .map_err(|error| Failure::io("lock", &lock_path, &error))?;

    // Looked up again: another `setup` may have held the lock and done the work.
    let todo = missing(&root, &wheels);
    for (index, wheel) in todo.iter().enumerate() {
        eprintln!("[{}/{}] {}", index + 1, todo.len(), wheel.file);
        install(&root, wheel, "")?;
    }
    if !todo.is_empty() {
        eprintln!("libtorch 2.11.0 is complete in `{}`", root.display());
    }
    Ok(())
}

fn check_foreign(libtorch: &Path) -> Result<(), Failure> {
    let library = libtorch.join("lib/libtorch_cpu.so");
    if library.exists() {
        return Ok(());
    }
    Err(Failure::new(
        "`LIBTORCH` does not name a libtorch",
        format!("`{}` does not exist", library.display()),
        "`unset LIBTORCH` to use the one that `cargo xtask setup` installs",
    ))
}

/// Refuses a machine whose Python cannot install anything.
pub(crate) fn check_python() -> Result<(), Failure> {
    let install = "`sudo apt-get install python3 python3-pip`, or the like of your distribution";
    let python = Command::new("python3")
        .args(["-c", "import sys; sys.exit(sys.version_info < (3, 9))"])
        .stdin(Stdio::null())
        .status()
        .map_err(|error| {
            Failure::new(
                "`python3` cannot be started, which installs packages",
                error,
                install,
            )
        })?;
    if !python.success() {
        return Err(Failure::new(
            "`python3` is too old",
            "Python 3.9 or later is needed",
            install,
        ));
    }
    let pip = Command::new("python3")
        .args(["-m", "pip", "--version"])
        .output()
        .map_err(|error| Failure::start("python3", &error))?;
    if pip.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&pip.stderr);
    Err(Failure::new(
        "`python3 -m pip` does not work, which finds packages",
        why.trim(),
        install,
    ))
}

/// The wheels that are not completely there, in the given order.
fn missing(root: &Path, wheels: &[Wheel]) -> Vec<Wheel> {
    wheels
        .iter()
        .copied()
        .filter(|wheel| !is_complete(root, wheel))
        .collect()
}

/// Whether the stamp is for this very file and everything that it lists still exists.
fn is_complete(root: &Path, wheel: &Wheel) -> bool {
    read_stamp(root, wheel).is_some_and(|stamp| {
        stamp.sha256 == wheel.sha256 && stamp.files.iter().all(|file| root.join(file).exists())
    })
}

/// Written last, so that its presence says that everything before it succeeded.
struct Stamp {
    sha256: String,
    /// Unpacked files, relative to the installation folder.
    files: Vec<String>,
}

fn stamp_path(root: &Path, wheel: &Wheel) -> PathBuf {
    root.join(".stamps").join(wheel.name)
}

fn read_stamp(root: &Path, wheel: &Wheel) -> Option<Stamp> {
    let text = fs::read_to_string(stamp_path(root, wheel)).ok()?;
    let mut lines = text.lines().map(str::to_owned);
    Some(Stamp {
        sha256: lines.next()?,
        files: lines.collect(),
    })
}

fn write_stamp(root: &Path, wheel: &Wheel, files: &str) -> Result<(), Failure> {
    let path = stamp_path(root, wheel);
    let beside = path.with_extension("new");
    fs::create_dir_all(root.join(".stamps"))
        .and_then(|()| fs::write(&beside, format!("{}\n{files}", wheel.sha256)))
        .and_then(|()| fs::rename(&beside, &path))
        .map_err(|error| Failure::io("write", &path, &error))
}

/// Fetches and unpacks one wheel, removes what an earlier version of it left behind, and stamps it.
///
/// `url` is empty but in tests: pip's configuration says where the file is.
fn install(root: &Path, wheel: &Wheel, url: &str) -> Result<(), Failure> {
    let output = Command::new("python3")
        .args(["-c", FETCH, wheel.name, wheel.file, wheel.sha256])
        .arg(root)
        .arg(url)
        .args(wheel.keep)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::start("python3", &error))?;
    let files = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(explain(root, wheel, &files));
    }

    let kept: HashSet<&str> = files.lines().collect();
    for old in read_stamp(root, wheel).map_or_else(Vec::new, |stamp| stamp.files) {
        if !kept.contains(old.as_str()) {
            // Gone already is as good; anything else that keeps it does no harm.
            let _ = fs::remove_file(root.join(old));
        }
    }
    write_stamp(root, wheel, &files)?;
    let archive = root.join(".wheels").join(wheel.file);
    fs::remove_file(&archive).map_err(|error| Failure::io("remove", &archive, &error))
}

/// The advice for what `fetch.py` reported as `kind<TAB>reason`.
fn explain(root: &Path, wheel: &Wheel, report: &str) -> Failure {
    let (kind, why) = report
        .trim()
        .split_once('\t')
        .unwrap_or(("crash", "see the messages above"));
    let again = "run `cargo xtask setup` again";
    let fix = match kind {
        "network" => format!(
            "check the network, `https_proxy`, and the index of `python3 -m pip config list`; then {again}: it \
             continues where it stopped"
        ),
        "absent" => "use an index that has it: `python3 -m pip config set global.index-url <url>`"
            .to_owned(),
        "checksum" => format!(
            "{again}: the refused file is deleted; if it happens twice, the index or a proxy alters files: do not \
             trust it"
        ),
        "disk" => format!(
            "free 2 GB (with `--cuda` 6 GB), or make `{}` a link to a larger disk; then {again}: it continues where \
             it stopped",
            root.display()
        ),
        "files" => format!(
            "check the permissions with `ls -ld {}`; then {again}",
            root.display()
        ),
        _ => again.to_owned(),
    };
    Failure::new(
        format!("cannot install `{}` below `{}`", wheel.name, root.display()),
        why,
        fix,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};
    use std::{
        fmt::Write as _,
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        sync::{Arc, Mutex},
        thread,
    };
    use tempfile::TempDir;

    const FILE: &str = "demo-1.0-py3-none-any.whl";

    /// A wheel of 3 MB that does not compress: larger than what the sockets buffer.
    fn demo_wheel(folder: &Path) -> Vec<u8> {
        let script = "import os, random, sys, zipfile\n\
                      with zipfile.ZipFile(sys.argv[1], 'w') as z:\n\
                      \x20   z.writestr('demo/lib/a.so', random.Random(1).randbytes(3_000_000))\n\
                      \x20   z.writestr('demo/docs/b.txt', 'text')\n";
        let path = folder.join("demo.zip");
        assert!(
            Command::new("python3")
                .args(["-c", script])
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        fs::read(path).unwrap()
    }

    fn hex_sha256(bytes: &[u8]) -> &'static str {
        let hex = Sha256::digest(bytes)
            .iter()
            .fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").unwrap();
                hex
            });
        hex.leak()
    }

    fn demo(sha256: &'static str) -> Wheel {
        Wheel {
            name: "demo",
            file: FILE,
            sha256,
            keep: &["demo/lib/"],
        }
    }

    /// Serves `body` with Range support; the first `cuts` answers end after a million bytes. Returns the address and
    /// the first byte that each request asked for.
    fn serve(body: Vec<u8>, cuts: usize) -> (String, Arc<Mutex<Vec<usize>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/{FILE}", listener.local_addr().unwrap());
        let starts = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&starts);
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &body, cuts, &seen);
            }
        });
        (url, starts)
    }

    fn answer(mut stream: TcpStream, body: &[u8], cuts: usize, starts: &Mutex<Vec<usize>>) {
        let head = BufReader::new(stream.try_clone().unwrap())
            .lines()
            .map_while(Result::ok);
        let mut start = 0;
        for line in head.take_while(|line| !line.is_empty()) {
            if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                start = range.trim_end_matches('-').parse().unwrap();
            }
        }
        let index = {
            let mut starts = starts.lock().unwrap();
            starts.push(start);
            starts.len()
        };
        let rest = &body[start..];
        let (status, range) = match start {
            0 => ("200 OK", String::new()),
            _ => (
                "206 Partial Content",
                format!("Content-Range: bytes {start}-/{}\r\n", body.len()),
            ),
        };
        let sent = if index <= cuts {
            &rest[..rest.len().min(1_000_000)]
        } else {
            rest
        };
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{range}Connection: close\r\n\r\n",
            rest.len()
        )
        .unwrap();
        stream.write_all(sent).unwrap();
    }

    #[test]
    fn cut_download_continues_where_it_stopped() {
        let root = TempDir::new().unwrap();
        let body = demo_wheel(root.path());
        let wheel = demo(hex_sha256(&body));
        let (url, starts) = serve(body, 2);

        install(root.path(), &wheel, &url).unwrap();

        let starts = starts.lock().unwrap();
        assert_eq!(starts.len(), 3, "{starts:?}");
        assert!(
            starts[0] == 0 && starts[1] > 0 && starts[2] > starts[1],
            "{starts:?}"
        );
        assert_eq!(
            fs::read(root.path().join("demo/lib/a.so")).unwrap().len(),
            3_000_000
        );
        assert!(
            !root.path().join("demo/docs").exists(),
            "only the wanted members are unpacked"
        );
        assert!(!root.path().join(".wheels").join(FILE).exists());
        assert!(is_complete(root.path(), &wheel));
    }

    #[test]
    fn interrupted_setup_continues_with_the_part_file() {
        let root = TempDir::new().unwrap();
        let body = demo_wheel(root.path());
        let wheel = demo(hex_sha256(&body));
        fs::create_dir(root.path().join(".wheels")).unwrap();
        fs::write(
            root.path().join(".wheels").join(format!("{FILE}.part")),
            &body[..1234],
        )
        .unwrap();
        let (url, starts) = serve(body, 0);

        install(root.path(), &wheel, &url).unwrap();

        assert_eq!(*starts.lock().unwrap(), [1234]);
    }

    #[test]
    fn wrong_checksum_is_refused_and_nothing_is_installed() {
        let root = TempDir::new().unwrap();
        let body = demo_wheel(root.path());
        let wheel = demo("0000000000000000000000000000000000000000000000000000000000000000");
        let (url, _) = serve(body, 0);

        let message = install(root.path(), &wheel, &url).unwrap_err().to_string();

        assert!(
            message.contains("has SHA-256") && message.contains("expected 0000"),
            "{message}"
        );
        assert!(
            message.contains("help: run `cargo xtask setup` again"),
            "{message}"
        );
        assert!(!root.path().join("demo").exists());
        assert_eq!(
            fs::read_dir(root.path().join(".wheels")).unwrap().count(),
            0
        );
        assert!(!is_complete(root.path(), &wheel));
    }

    #[test]
    fn each_reported_kind_has_its_own_advice() {
        let advice =
            |report: &str| explain(Path::new("/r/.libtorch"), &demo(""), report).to_string();

        let network = advice("network\tno answer from 127.0.0.1:1\n");
        assert!(
            network.starts_with("Error:   × cannot install `demo` below `/r/.libtorch`"),
            "{network}"
        );
        assert!(
            network.contains("no answer from 127.0.0.1:1") && network.contains("https_proxy"),
            "{network}"
        );
        assert!(advice("disk\tNo space left on device").contains("free 2 GB"));
        assert!(advice("files\tPermission denied").contains("ls -ld /r/.libtorch"));
        assert!(advice("absent\tno such file").contains("pip config set"));
        assert!(advice("").contains("see the messages above"));
    }

    #[test]
    fn stamp_counts_only_for_its_own_checksum_and_existing_files() {
        let root = TempDir::new().unwrap();
        let wheel = demo("aa");
        assert!(!is_complete(root.path(), &wheel), "no stamp");
        write_stamp(root.path(), &wheel, "x.so\n").unwrap();
        assert!(
            !is_complete(root.path(), &wheel),
            "a listed file is missing"
        );
        fs::write(root.path().join("x.so"), "").unwrap();
        assert!(is_complete(root.path(), &wheel));
        assert!(!is_complete(root.path(), &demo("bb")), "another version");
    }

    #[test]
    fn new_version_removes_what_only_the_old_one_had() {
        let root = TempDir::new().unwrap();
        fs::write(root.path().join("old.so"), "").unwrap();
        write_stamp(root.path(), &demo("aa"), "old.so\n").unwrap();
        let body = demo_wheel(root.path());
        let wheel = demo(hex_sha256(&body));
        let (url, _) = serve(body, 0);

        install(root.path(), &wheel, &url).unwrap();

        assert!(!root.path().join("old.so").exists());
        assert!(is_complete(root.path(), &wheel));
    }

    #[test]
    fn every_wheel_has_a_name_of_its_own_and_a_checksum() {
        let all: Vec<Wheel> = CPU.into_iter().chain(CUDA).chain([TORCH]).collect();
        let names: HashSet<&str> = all.iter().map(|wheel| wheel.name).collect();
        assert_eq!(names.len(), all.len());
        for wheel in all {
            assert!(
                wheel.sha256.len() == 64
                    && wheel.sha256.bytes().all(|digit| digit.is_ascii_hexdigit())
            );
            assert!(
                wheel.file.starts_with(&wheel.name.replace('-', "_")),
                "{wheel:?}"
            );
        }
    }
}
