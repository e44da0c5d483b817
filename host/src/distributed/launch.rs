//! `moeut-host launch -n 4 -task …`: as many processes on this machine, without Python.
//!
//! The launcher speaks torchrun's language (variables, a store that it keeps), so that a process cannot tell the two
//! apart. It hands signals on, and ends what is left when a process has failed and the others do not end by themselves.

use super::group::HOW_TO_START;
use crate::error::{EXIT_USER_ERROR, HostError};
use crate::log::{Level, Terminal};
use crate::signals::Relay;
use moeut_c10d::Store;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How often processes and signals are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long the others may take to end by themselves once one has failed; more than they need to find out and to say so.
const PATIENCE: Duration = Duration::from_secs(40);
/// Between SIGTERM and SIGKILL.
const LAST_PATIENCE: Duration = Duration::from_secs(5);
/// For an operation of the store.
const STORE_TIMEOUT: Duration = Duration::from_mins(1);

/// Starts the processes and returns the exit code: that of the first one that failed, or what all returned.
///
/// # Errors
/// If their number is missing, or one cannot be started.
pub fn command(words: &[String], terminal: &Terminal) -> Result<u8, HostError> {
    let (n_ranks, args) = read(words)?;
    let relay = Relay::listen()?;
    let store = Store::tcp("127.0.0.1", 0, true, None, STORE_TIMEOUT).map_err(|error| {
        HostError::new(
            "the launcher cannot listen on 127.0.0.1",
            error.to_string(),
            "allow it in the container that this runs in",
        )
    })?;
    let mut ranks = Ranks {
        children: Vec::new(),
    };
    for rank in 0..n_ranks {
        ranks.start(rank, n_ranks, store.port(), args)?;
    }
    Ok(ranks.wait(&relay, terminal))
}

/// `-n <number> [--] <arguments of moeut-host>`.
fn read(words: &[String]) -> Result<(usize, &[String]), HostError> {
    let wrong = |why: String| {
        HostError::new(
            "the number of processes is missing",
            why,
            "type `moeut-host launch -n <number> -task <task> -name <name> …`",
        )
    };
    let [flag, value, args @ ..] = words else {
        return Err(wrong("`launch` takes `-n <number>` first".to_owned()));
    };
    if !matches!(
        flag.as_str(),
        "-n" | "--nproc-per-node" | "--nproc_per_node"
    ) {
        return Err(wrong(format!(
            "`launch` takes `-n <number>` first, and got `{flag}`"
        )));
    }
    let n_ranks = value.parse().ok().filter(|&n_ranks| n_ranks > 0);
    let n_ranks = n_ranks.ok_or_else(|| wrong(format!("`{value}` is no number of processes")))?;
    let args = args.strip_prefix(&["--".to_owned()]).unwrap_or(args);
    Ok((n_ranks, args))
}

/// The processes, `None` once one has ended.
struct Ranks {
    children: Vec<Option<Child>>,
}

impl Ranks {
    fn start(
        &mut self,
        rank: usize,
        n_ranks: usize,
        port: u16,
        args: &[String],
    ) -> Result<(), HostError> {
        let failed = |error: &std::io::Error| {
            HostError::new(
                format!("rank {rank} cannot be started"),
                error.to_string(),
                HOW_TO_START,
            )
        };
        let program = std::env::current_exe().map_err(|error| failed(&error))?;
        let mut command = Command::new(program);
        for (name, value) in [
            ("RANK", rank),
            ("WORLD_SIZE", n_ranks),
            ("LOCAL_RANK", rank),
            ("LOCAL_WORLD_SIZE", n_ranks),
            ("MASTER_PORT", usize::from(port)),
            ("TORCHELASTIC_RESTART_COUNT", 0),
        ] {
            command.env(name, value.to_string());
        }
        command
            .env("MASTER_ADDR", "127.0.0.1")
            .env("TORCHELASTIC_USE_AGENT_STORE", "True");
        // Together they use the machine once.
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
            command.env("OMP_NUM_THREADS", (n_cores / n_ranks).max(1).to_string());
        }
        // In groups of their own, so that Ctrl-C in a terminal reaches them once, by way of the launcher.
        let child = command.args(args).process_group(0).spawn();
        self.children
            .push(Some(child.map_err(|error| failed(&error))?));
        Ok(())
    }

    fn wait(&mut self, relay: &Relay, terminal: &Terminal) -> u8 {
        let mut code = 0;
        let mut failed_at: Option<Instant> = None;
        let mut last_signal: Option<Signal> = None;
        while self.children.iter().any(Option::is_some) {
            if let Some(signal) = relay.take() {
                self.signal(signal);
            }
            for (rank, status) in self.reap() {
                let ended = exit_code(status);
                if ended == 0 || is_stopped(ended) {
                    code = code.max(ended);
                } else if failed_at.is_none() {
                    (code, failed_at) = (ended, Some(Instant::now()));
                    if let Some(signal) = status.signal() {
                        let text =
                            format!("rank {rank} was killed by signal {signal}; the others end");
                        terminal.message(Level::Warning, &text);
                    }
                }
            }
            let late = failed_at.map_or(Duration::ZERO, |at| at.elapsed());
            let signal = match late {
                late if late > PATIENCE + LAST_PATIENCE => Some(Signal::KILL),
                late if late > PATIENCE => Some(Signal::TERM),
                _ => None,
            };
            if let Some(signal) = signal.filter(|&signal| last_signal != Some(signal)) {
                self.signal(signal);
                last_signal = Some(signal);
            }
            std::thread::sleep(TICK);
        }
        code
    }

    fn signal(&self, signal: Signal) {
        for child in self.children.iter().flatten() {
            // Who has ended meanwhile is reaped in this turn.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Those that have ended since the last call.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)> {
        let mut ended = Vec::new();
        for (rank, child) in self.children.iter_mut().enumerate() {
            let status = child.as_mut().map(Child::try_wait);
            if let Some(Ok(Some(status))) = status {
                ended.push((rank, status));
                *child = None;
            }
        }
        ended
    }
}

impl Drop for Ranks {
    /// If not all processes can be started, none is left behind.
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for child in self.children.iter_mut().flatten() {
            let _ = child.wait();
        }
    }
}

/// As shells have it.
fn exit_code(status: ExitStatus) -> u8 {
    let killed = || status.signal().map(|signal| 128 + signal);
    let code = status.code().or_else(killed);
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(EXIT_USER_ERROR)
}

/// Whether a signal that was handed on ended the process.
fn is_stopped(code: u8) -> bool {
    [SIGINT, SIGTERM]
        .into_iter()
        .any(|signal| i32::from(code) == 128 + signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_number_comes_first_and_the_rest_is_for_the_processes() {
        for (line, n_ranks, rest) in [
            ("-n 2 -task x -name y", 2, "-task x -name y"),
            ("-n 4 -- -n 7", 4, "-n 7"),
            ("--nproc-per-node 1", 1, ""),
        ] {
            let typed = words(line);
            let (n, args) = read(&typed).unwrap();
            assert_eq!((n, args), (n_ranks, &words(rest)[..]));
        }
        for line in ["", "-n", "-n 0", "-n x -task y", "-task y"] {
            assert!(read(&words(line)).is_err(), "{line}");
        }
    }
}
