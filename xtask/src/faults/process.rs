//! One run of the host that something happens to: started, watched, ended, and its folder.
//!
//! Knows no fault and judges nothing.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// Longer than any run takes on a machine that does something else besides.
const DEADLINE: Duration = Duration::from_mins(2);
/// Between two looks at a process or its files; a step takes several times as long.
const TICK: Duration = Duration::from_millis(1);

/// Starts of one run that get a log of their own.
const MAX_STARTS: u32 = 1000;

/// Steps of a run.
pub(super) const N_STEPS: u64 = 60;
/// Steps between validations.
pub(super) const VALIDATION: u64 = 10;

/// A model of 10,000 parameters on the embedded text. Validation takes as long as several steps, so that it can be hit.
#[rustfmt::skip] // one argument a line
const ARGS: &[&str] = &[
    "-task", "moeut_c4",
    "-seed", "1",
    "-gpu", "none",
    "-threads", "1",
    "-data.source", "embedded",
    "-data.cache_dir", "cache",
    "-sentencepiece.n_pieces", "300",
    "-lmds.valid_ratio", "1e-5",
    "-lm.eval.enabled", "0",
    "-lm.unroll", "16",
    "-batch_size", "4",
    "-state_size", "16",
    "-transformer.encoder_n_layers", "2",
    "-transformer.n_heads", "2",
    "-moe.n_experts", "4",
    "-moe.expert_size", "8",
    "-pkm.n_heads", "2",
    "-dropout", "0.1",
    "-log", "none",
    "-log_interval", "1",
    "-n_samples", "0",
    "-stop_after", "60",
    "-save_interval", "4",
    "-test_interval", "10",
    "-keep_last", "3",
];

/// Where all runs are: `save/<name>`, `logs/<name>`, and `cache`, which stays.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) host: PathBuf,
    pub(super) folder: PathBuf,
}

impl Site {
    /// The folder of a run.
    pub(super) fn run(&self, name: &str) -> PathBuf {
        self.folder.join("save").join(name)
    }

    /// Starts a run; a later argument wins over an earlier one.
    pub(super) fn start(&self, name: &str, more: &[&str]) -> Result<Process, String> {
        // Writing beyond a limit on file sizes is an error then, as on a full disk, and not the end of the process.
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
            .arg(&self.host)
            .args(ARGS)
            .args(["-name", name])
            .args(more)
            .current_dir(&self.folder)
            .env("NO_COLOR", "1")
            .env_remove("RUST_BACKTRACE");
        let logs = self.folder.join("logs");
        let stderr = (0..MAX_STARTS)
            .map(|n| logs.join(format!("{name}.{n}")))
            .find(|path| !path.exists())
            .unwrap_or_default();
        let child = fs::create_dir_all(&logs)
            .and_then(|()| File::create(&stderr))
            .and_then(|file| {
                command
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(file)
                    .spawn()
            })
            .map_err(|error| format!("the host cannot be started: {error}"))?;
        Ok(Process {
            child,
            stderr,
            folder: self.run(name),
        })
    }

    /// Runs to the end.
    pub(super) fn finish(&self, name: &str, more: &[&str]) -> Result<Ending, String> {
        self.start(name, more)?.wait()
    }
}

/// A process of the host; killed when dropped, so that a campaign leaves none behind.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stderr: PathBuf,
    folder: PathBuf,
}

impl Process {
    /// Waits until `condition` holds for the run's folder, the time is over, or the process has ended; whether it
    /// still runs.
    pub(super) fn watch(&mut self, condition: impl Fn(&Path) -> bool) -> Result<bool, String> {
        let start = Instant::now();
        while self.is_running()? {
            if condition(&self.folder) {
                return Ok(true);
            }
            if start.elapsed() > DEADLINE {
                return Err(self.hung());
            }
            sleep(TICK);
        }
        Ok(false)
    }

    /// Lets some time pass; whether it still runs.
    pub(super) fn sleep(&mut self, time: Duration) -> Result<bool, String> {
        let start = Instant::now();
        self.watch(|_| start.elapsed() >= time)
    }

    fn is_running(&mut self) -> Result<bool, String> {
        let ended = self.child.try_wait().map_err(|error| error.to_string())?;
        Ok(ended.is_none())
    }

    fn hung(&mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        format!(
            "no end within {} s; see `{}`",
            DEADLINE.as_secs(),
            self.stderr.display()
        )
    }

    /// SIGKILL, and how it ended: perhaps by itself, a moment before.
    pub(super) fn kill(mut self) -> Result<Ending, String> {
        self.child.kill().map_err(|error| error.to_string())?;
        self.wait()
    }

    /// Sends a signal, by its name without `SIG`. By the shell, which has `kill` where no package brings it.
    pub(super) fn signal(&self, name: &str) -> Result<(), String> {
        let pid = self.child.id();
        call("sh", &["-c", &format!("kill -{name} {pid}")])
    }

    /// Limits the size of files that it writes; nothing lifts the limit.
    pub(super) fn limit_files(&self, bytes: Option<u64>) -> Result<(), String> {
        let limit = bytes.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
        let pid = self.child.id().to_string();
        call("prlimit", &["--pid", &pid, &format!("--fsize={limit}:")])
    }

    /// Waits for the end.
    pub(super) fn wait(mut self) -> Result<Ending, String> {
        self.watch(|_| false)?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        let stderr = fs::read(&self.stderr).unwrap_or_default();
        Ok(Ending {
            code: status.code(),
            signal: status.signal(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended, usually.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program of the system.
pub(super) fn call(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|error| format!("`{program}` cannot be started: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{program} {}`: {}", args.join(" "), why.trim()))
}

/// How a process ended.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    pub(super) stderr: String,
}

impl Ending {
    /// Whether it reached its end, and otherwise the last it said.
    pub(super) fn succeeded(&self) -> Result<(), String> {
        match self.code {
            Some(0) => Ok(()),
            _ => Err(self.describe()),
        }
    }

    /// Whether it refused with exit code 2 and all three parts, `text` among them.
    pub(super) fn refused(&self, text: &str) -> Result<(), String> {
        // Lines are wrapped for the terminal.
        let words: Vec<&str> = self
            .stderr
            .split([' ', '\n', '│'])
            .filter(|word| !word.is_empty())
            .collect();
        let said = words.join(" ");
        if self.code == Some(2)
            && said.contains(text)
            && ["×", "╰─▶", "help:"].iter().all(|part| said.contains(part))
        {
            return Ok(());
        }
        Err(format!(
            "expected an error with `{text}`; {}",
            self.describe()
        ))
    }

    /// Whether it went on from this checkpoint, if it came to say so: a run that begins anew ends alike, only later.
    pub(super) fn went_on(&self, from: Option<u64>) -> Result<(), String> {
        match from {
            Some(step) if self.stderr.contains("ready: ") => {
                let said = format!("going on from step {step}\n");
                let went_on = self.stderr.contains(&said);
                went_on
                    .then_some(())
                    .ok_or_else(|| format!("it did not go on from step {step}"))
            }
            _ => Ok(()),
        }
    }

    fn describe(&self) -> String {
        let mut text = match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => format!("ended by signal {}", signal.unwrap_or_default()),
        };
        for line in self
            .stderr
            .lines()
            .rev()
            .take(6)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
        {
            let _ = write!(text, "\n    {line}");
        }
        text
    }
}

/// Steps that have a checkpoint, the newest first.
pub(super) fn checkpoints(run: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> = names(&run.join("checkpoint"))
        .iter()
        .filter_map(|name| name.strip_prefix("model-")?.parse().ok())
        .collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    steps
}

/// Whether a save is under way, or was when the process was killed.
pub(super) fn is_saving(run: &Path) -> bool {
    let dir = run.join("checkpoint");
    names(&dir).iter().any(|name| name.starts_with(".tmp-"))
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Copies a folder.
pub(super) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
