//! Several processes of the host that train together, each under the test's eyes.

use crate::sandbox::{Outcome, Sandbox, wait_until};
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// One of the processes. It is killed when the test fails.
struct Rank {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// The processes of a run, as torchrun would start them.
pub struct Ranks<'a> {
    sandbox: &'a Sandbox,
    ranks: Vec<Rank>,
}

impl Sandbox {
    /// Starts a process for each command line; they meet on a port of their own.
    pub fn start_ranks(&self, command_lines: &[Vec<&str>]) -> Ranks<'_> {
        let port = free_port().to_string();
        let n_ranks = command_lines.len().to_string();
        let commands = command_lines.iter().enumerate().map(|(rank, args)| {
            let mut command = self.command(args);
            let rank = rank.to_string();
            command.envs([
                ("RANK", rank.as_str()),
                ("LOCAL_RANK", &rank),
                ("WORLD_SIZE", &n_ranks),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", &port),
            ]);
            command
        });
        self.start_commands(commands)
    }

    /// Starts processes whose surroundings the test has arranged.
    pub fn start_commands(&self, commands: impl IntoIterator<Item = Command>) -> Ranks<'_> {
        let start = |(rank, mut command): (usize, Command)| {
            let [stdout, stderr] =
                ["stdout", "stderr"].map(|name| self.work().join(format!("{name}.{rank}")));
            let file = |path: &Path| File::create(path).expect("the sandbox can be written");
            command
                .stdin(Stdio::null())
                .stdout(file(&stdout))
                .stderr(file(&stderr));
            Rank {
                child: command.spawn().expect("a process starts"),
                stdout,
                stderr,
            }
        };
        Ranks {
            sandbox: self,
            ranks: commands.into_iter().enumerate().map(start).collect(),
        }
    }

    /// Starts as many processes with the same arguments and waits for them.
    pub fn run_ranks(&self, n: usize, args: &[&str]) -> Vec<Outcome> {
        self.start_ranks(&vec![args.to_vec(); n]).wait()
    }
}

impl Ranks<'_> {
    /// Sends a signal to one of them, named without `SIG`.
    pub fn signal(&self, rank: usize, name: &str) {
        let command = format!("kill -{name} {}", self.ranks[rank].child.id());
        let status = Command::new("sh").args(["-c", &command]).status();
        assert!(status.expect("a shell starts").success(), "SIG{name}");
    }

    /// Whether one of them has ended.
    pub fn has_ended(&mut self, rank: usize) -> bool {
        let status = self.ranks[rank].child.try_wait();
        status.expect("a child can be asked").is_some()
    }

    /// What one has said so far on stderr.
    pub fn stderr(&self, rank: usize) -> String {
        fs::read_to_string(&self.ranks[rank].stderr).unwrap_or_default()
    }

    /// Waits until all have ended.
    pub fn wait(mut self) -> Vec<Outcome> {
        for rank in 0..self.ranks.len() {
            wait_until("a process to end", || self.has_ended(rank));
        }
        let sandbox = self.sandbox;
        let outcome = |rank: &mut Rank| {
            let status = rank.child.wait().expect("a child can be waited for");
            let read =
                |path: &Path| sandbox.normalize(&fs::read_to_string(path).unwrap_or_default());
            Outcome {
                code: status.code(),
                stdout: read(&rank.stdout),
                stderr: read(&rank.stderr),
            }
        };
        self.ranks.iter_mut().map(outcome).collect()
    }
}

impl Drop for Ranks<'_> {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("127.0.0.1 has a free port");
    listener
        .local_addr()
        .expect("a listener has an address")
        .port()
}
