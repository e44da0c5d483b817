//! Trains the runs of a sweep: each is a child process of this program, on a GPU of its own or some at a time on the CPU.
//!
//! Run, log and results of a sweep `s`:
//!
//! ```text
//! save/s-1, save/s-2, …                the runs' folders; `save/s` if there is one run only
//! save/s.sweep/s-1.log, …              what each process says
//! save/s.sweep/results.{json,csv}      the table, anew with each change
//! ```
//! A run that is done is not started again, one that was interrupted goes on from its own checkpoints, and one that failed
//! is tried again when the sweep is; the others do not wait for it. SIGINT and SIGTERM are handed on once for each time
//! they come: the children save and end, and the sweep with them. They are in process groups of their own, so that Ctrl-C
//! in a terminal does not reach them a second time.

use super::record::{Record, check_arguments, folder};
use super::runs::{Sweep, SweepRun};
use super::table::{self, Row, State};
use crate::args::GpuChoice;
use crate::error::HostError;
use crate::gpu;
use crate::log::{Level, Terminal};
use crate::run_folder::RunFolder;
use crate::signals::Relay;
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// How often processes and signals are looked at.
const TICK: Duration = Duration::from_millis(50);

/// Exit code of a sweep of which a run failed.
const EXIT_FAILED: u8 = 1;

/// Where a run is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Wherever the run's own arguments say.
    Given,
    /// On the CPU, beside others, with so many threads.
    Threads(usize),
    /// On this GPU.
    Gpu(u32),
}

/// Trains what is left to train and returns the exit code: 0, 1 if a run failed, or that of the signal.
///
/// # Errors
/// If the sweep cannot be trained at all: another process trains it, a run has no end, was started with other arguments,
/// or no GPU is free.
pub fn run(
    sweep: &Sweep,
    n_jobs: Option<usize>,
    terminal: &Terminal,
) -> Result<(u8, String), HostError> {
    for run in &sweep.runs {
        check_end(run)?;
        check_arguments(run)?;
    }
    let Some(first) = sweep.runs.first() else {
        return Ok((0, String::new()));
    };
    let home = RunFolder::lock(&first.config.save_dir.join(format!("{}.sweep", sweep.name)))?;
    let rows = sweep.runs.iter().map(|run| row(run, home.path())).collect();
    let slots = slots(first.config.gpu, n_jobs)?;
    let mut queue = Queue {
        sweep,
        rows,
        home: home.path(),
        free: slots,
        active: Vec::new(),
        terminal,
    };
    queue.write()?;
    let ending = queue.drain(&Relay::listen()?)?;
    let exit_code = match ending {
        Some(Signal::INT) => 130,
        Some(_) => 0,
        None if queue.rows.iter().all(|row| row.state == State::Done) => 0,
        None => EXIT_FAILED,
    };
    Ok((exit_code, table::render(sweep, &queue.rows)))
}

/// The table as it is, without training anything.
pub fn results(sweep: &Sweep) -> String {
    let rows: Vec<Row<'_>> = sweep
        .runs
        .iter()
        .map(|run| {
            let row = row(run, Path::new(""));
            let is_running = is_held(&folder(run));
            Row {
                state: if is_running {
                    State::Running
                } else {
                    row.state
                },
                ..row
            }
        })
        .collect();
    table::render(sweep, &rows)
}

/// A run that never ends would keep its place for ever.
fn check_end(run: &SweepRun) -> Result<(), HostError> {
    if run.config.n_steps.is_some_and(|n_steps| n_steps > 0) {
        return Ok(());
    }
    Err(HostError::new(
        format!("the run `{}` has no end", run.name),
        "neither the sweep file nor the command line has `stop_after`",
        "add `-stop_after <steps>`",
    ))
}

fn row<'a>(run: &'a SweepRun, home: &Path) -> Row<'a> {
    let record = Record::read(&folder(run));
    let is_done = record.is_done(run) && !run.config.reset;
    let state = if is_done { State::Done } else { State::Waiting };
    Row {
        run,
        state,
        record,
        log: home.join(format!("{}.log", run.name)),
    }
}

/// The places that there are, in the order in which they are taken.
fn slots(gpu: GpuChoice, n_jobs: Option<usize>) -> Result<Vec<Slot>, HostError> {
    let n_gpus = u32::try_from(tch::Cuda::device_count()).unwrap_or(0);
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    if gpu != GpuChoice::Auto || n_gpus == 0 {
        return Ok(shared(gpu, n_jobs.unwrap_or(1), n_threads));
    }
    let free = gpu::free(n_gpus);
    if free.is_empty() {
        return Err(HostError::new(
            "no GPU is free",
            format!("each of the {n_gpus} has a process"),
            "wait for one, share one with `-gpu <index>`, or take the CPU with `-gpu none`",
        ));
    }
    Ok(free
        .into_iter()
        .map(Slot::Gpu)
        .take(n_jobs.unwrap_or(usize::MAX))
        .collect())
}

/// Places on one device. On the CPU they share its cores; the split is by `n_jobs` alone, since another number of threads
/// is another order of sums.
fn shared(gpu: GpuChoice, n_jobs: usize, n_threads: usize) -> Vec<Slot> {
    let slot = match gpu {
        GpuChoice::Cpu | GpuChoice::Auto if n_jobs > 1 => {
            Slot::Threads((n_threads / n_jobs).max(1))
        }
        GpuChoice::Cpu | GpuChoice::Auto | GpuChoice::Index(_) => Slot::Given,
    };
    vec![slot; n_jobs.max(1)]
}

struct Queue<'a> {
    sweep: &'a Sweep,
    rows: Vec<Row<'a>>,
    home: &'a Path,
    free: Vec<Slot>,
    active: Vec<Active>,
    terminal: &'a Terminal,
}

/// A child that trains.
struct Active {
    row: usize,
    slot: Slot,
    child: Child,
}

impl Queue<'_> {
    /// Trains until nothing is left, or a signal comes; returns that signal.
    fn drain(&mut self, relay: &Relay) -> Result<Option<Signal>, HostError> {
        let mut ending = None;
        loop {
            if let Some(signal) = relay.take() {
                self.hand_on(signal);
                if signal != Signal::USR1 {
                    ending = Some(signal);
                }
            }
            self.reap(ending.is_some())?;
            if ending.is_none() {
                self.start_some()?;
            }
            let is_waiting = self.rows.iter().any(|row| row.state == State::Waiting);
            if self.active.is_empty() && (ending.is_some() || !is_waiting) {
                return Ok(ending);
            }
            std::thread::sleep(TICK);
        }
    }

    fn hand_on(&self, signal: Signal) {
        for active in &self.active {
            // Who has ended meanwhile is reaped in this turn.
            let _ = kill_process(Pid::from_child(&active.child), signal);
        }
        if signal != Signal::USR1 {
            let text = format!(
                "the sweep ends: {} runs are told to save and end",
                self.active.len()
            );
            self.terminal.message(Level::Info, &text);
        }
    }

    /// Takes in the runs that have ended.
    fn reap(&mut self, is_ending: bool) -> Result<(), HostError> {
        let mut ended = Vec::new();
        for (index, active) in self.active.iter_mut().enumerate() {
            match active.child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => ended.push((index, Ok(status))),
                Err(error) => ended.push((index, Err(error))),
            }
        }
        for (index, status) in ended.into_iter().rev() {
            let active = self.active.remove(index);
            self.free.push(active.slot);
            let row = &mut self.rows[active.row];
            row.record = Record::read(&folder(row.run));
            row.state = outcome(&status, &row.record, row.run, is_ending);
            self.report(active.row);
            self.write()?;
        }
        Ok(())
    }

    fn report(&self, index: usize) {
        let row = &self.rows[index];
        let (name, log) = (&row.run.name, row.log.display());
        match &row.state {
            State::Failed(how) => {
                let last = last_error(&row.log)
                    .map(|line| format!(": {line}"))
                    .unwrap_or_default();
                let text = format!("{name} failed ({how}){last}; see `{log}`");
                self.terminal.message(Level::Error, &text);
            }
            State::Done => {
                let loss = row.record.score(row.run, "loss");
                let loss = loss
                    .map(|loss| format!(": val loss {loss:.4}"))
                    .unwrap_or_default();
                self.terminal
                    .message(Level::Info, &format!("{name} is done{loss}"));
            }
            State::Waiting | State::Running | State::Stopped => {
                let step = row.record.saved.unwrap_or(0);
                self.terminal.message(
                    Level::Info,
                    &format!("{name} stopped; step {step} is saved"),
                );
            }
        }
    }

    /// Starts runs while there are places.
    fn start_some(&mut self) -> Result<(), HostError> {
        for index in 0..self.rows.len() {
            if self.free.is_empty() {
                return Ok(());
            }
            if self.rows[index].state != State::Waiting {
                continue;
            }
            let run = self.rows[index].run;
            // A process that outlived an earlier start of this sweep still trains it; then its turn comes later.
            if is_held(&folder(run)) {
                continue;
            }
            let record = Record::read(&folder(run));
            if record.is_done(run) && !run.config.reset {
                self.rows[index] = row(run, self.home);
            } else {
                self.start(index);
            }
            self.write()?;
        }
        Ok(())
    }

    fn start(&mut self, index: usize) {
        let slot = self.free.remove(0);
        let row = &mut self.rows[index];
        match spawn(row.run, slot, &row.log) {
            Ok(child) => {
                row.state = State::Running;
                let text = format!(
                    "{} of {}: {} starts",
                    index + 1,
                    self.rows.len(),
                    self.rows[index].run.name
                );
                self.active.push(Active {
                    row: index,
                    slot,
                    child,
                });
                self.terminal.message(Level::Info, &text);
            }
            Err(error) => {
                row.state = State::Failed(error.to_string());
                self.free.insert(0, slot);
                self.report(index);
            }
        }
    }

    fn write(&self) -> Result<(), HostError> {
        table::write(self.home, self.sweep, &self.rows)
    }
}

impl Drop for Queue<'_> {
    /// If the sweep cannot go on, a full disk say, its runs save and end; nobody would wait for them.
    fn drop(&mut self) {
        for active in &mut self.active {
            let _ = kill_process(Pid::from_child(&active.child), Signal::TERM);
            let _ = active.child.wait();
        }
    }
}

fn outcome(
    status: &std::io::Result<ExitStatus>,
    record: &Record,
    run: &SweepRun,
    is_ending: bool,
) -> State {
    match status {
        Ok(status) if status.success() && record.is_done(run) => State::Done,
        Ok(status) if status.success() || (is_ending && ended_by_signal(*status)) => State::Stopped,
        Ok(status) => State::Failed(match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        }),
        Err(error) => State::Failed(error.to_string()),
    }
}

/// Whether a signal ended a process, before or after it could react.
fn ended_by_signal(status: ExitStatus) -> bool {
    let codes = [128 + SIGINT, 128 + SIGTERM];
    status.signal().is_some() || status.code().is_some_and(|code| codes.contains(&code))
}

fn spawn(run: &SweepRun, slot: Slot, log: &Path) -> std::io::Result<Child> {
    let log = File::options().append(true).create(true).open(log)?;
    let mut command = Command::new(program()?);
    command.args(run.arguments());
    command.args(match slot {
        Slot::Gpu(index) => Some(format!("-gpu={index}")),
        Slot::Threads(n_threads) if run.config.threads.is_none() => {
            Some(format!("-threads={n_threads}"))
        }
        Slot::Threads(_) | Slot::Given => None,
    });
    command
        // The record of a SLURM job leads to the checkpoints of one run, and this job has many.
        .env_remove("SLURM_JOB_ID")
        // An id of W&B is that of one run, too.
        .env_remove("WANDB_RUN_ID")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
}

/// This program, for its children.
///
/// # Errors
/// If the system does not say.
pub fn program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// Whether a process trains the run of this folder.
fn is_held(folder: &Path) -> bool {
    let file = File::open(folder.join("lock"));
    file.is_ok_and(|file| matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock)))
}

/// The last error of a log: what a user looks for first.
fn last_error(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| line.starts_with("Error:"))?;
    Some(
        line.trim_start_matches("Error:")
            .trim_matches([' ', '×'])
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_share_the_cores_and_one_place_has_them_all() {
        use GpuChoice::{Auto, Cpu, Index};
        for (gpu, n_jobs, slots) in [
            (Cpu, 1, vec![Slot::Given]),
            (Auto, 3, vec![Slot::Threads(2); 3]),
            (Cpu, 16, vec![Slot::Threads(1); 16]),
            (Index(1), 2, vec![Slot::Given; 2]),
        ] {
            assert_eq!(shared(gpu, n_jobs, 8), slots, "{gpu:?} {n_jobs}");
        }
    }

    #[test]
    fn the_last_error_of_a_log_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a.log");
        assert_eq!(last_error(&log), None);
        std::fs::write(
            &log,
            "Error:   × first\nstep 1\nError:   × no space\n  help: make some\n",
        )
        .unwrap();
        assert_eq!(last_error(&log).as_deref(), Some("no space"));
    }

    #[test]
    fn a_folder_is_held_while_somebody_trains_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert!(!is_held(&path));
        let holder = RunFolder::lock(&path).unwrap();
        assert!(is_held(&path));
        drop(holder);
        assert!(!is_held(&path));
    }
}
