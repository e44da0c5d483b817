//! Looks after the other processes while this one trains: who has failed, and who is silent.
//!
//! ```text
//! beat/<rank>   {n, step, n_calls}, written by each process every half second
//! report        {rank, error}: why the run ends; the first one written counts
//! ```
//! One thread writes and reads, and may get stuck when a network breaks; another one only judges. The first process reads
//! all beats, the others read the first one's, and everyone reads all while an error is looked into. Who finds a report,
//! a process that has been silent for too long, or no store any more, aborts the engine, so that whatever waits in it
//! returns with an error; [`Lookout::explain`] then says whose fault it is. A process that does not return in spite of
//! that, because it is busy elsewhere, is ended.

use crate::error::{EXIT_USER_ERROR, HostError};
use crate::log::{Terminal, is_colored};
use moeut_c10d::{Error, Group as Engine, Store};
use moeut_plugin_api::PluginError;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Between two beats.
const PERIOD: Duration = Duration::from_millis(500);
/// The longest silence that is taken for life while nothing else is wrong.
const MAX_SILENCE: Duration = Duration::from_mins(1);
/// Silence that explains an error which has occurred.
const SUSPICIOUS: Duration = Duration::from_secs(4);
/// How long to look for the cause of an error.
const SEARCH: Duration = Duration::from_secs(10);
/// How long a report may take to be written.
const POSTING: Duration = Duration::from_secs(3);
/// How long a process may take to end by itself once the run has failed.
const GRACE: Duration = Duration::from_secs(15);
/// How long an operation of the lookout's connection may take.
pub(super) const STORE_TIMEOUT: Duration = Duration::from_secs(10);

/// Key of the first report.
const REPORT: &str = "report";
/// Counts the reports, so that one is the first.
const N_REPORTS: &str = "n_reports";

/// How to go on after whatever ended a run.
const START_AGAIN: &str = "the last checkpoint is intact: start again to go on from it";

/// One of the processes, for messages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Member {
    pub(super) host: String,
    pub(super) process: u32,
}

/// Why the run ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    /// Whose fault it is.
    rank: usize,
    error: PluginError,
}

/// What a process tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Beat {
    n: u64,
    step: u64,
    n_calls: u64,
}

/// The lookout of a process.
pub(super) struct Lookout(Arc<Shared>);

/// What the threads and their process share.
struct Shared {
    rank: usize,
    members: Vec<Member>,
    /// A connection of its own: whoever waits for a key holds the other one.
    store: Store,
    /// The process that keeps the store; none if the launcher does.
    keeper: Option<usize>,
    silence: Duration,
    step: AtomicU64,
    n_calls: AtomicU64,
    /// What is to be reported.
    wanted: Mutex<Option<Report>>,
    /// Why the run ends: what everyone is told, or what this process alone can know.
    verdict: OnceLock<Report>,
    engine: OnceLock<Arc<Engine>>,
    is_over: AtomicBool,
    /// Whether an operation of the engine has ended with an error, whose cause is looked for.
    is_searching: AtomicBool,
    seen: Mutex<Seen>,
}

/// What was read last.
struct Seen {
    /// The beats of all, and since when they are what they are.
    beats: Vec<(Beat, Instant)>,
    /// When the store answered last.
    at: Instant,
    /// What it said instead.
    error: String,
}

impl Lookout {
    /// Starts the threads. Operations of the engine take `timeout` at most.
    pub(super) fn start(
        rank: usize,
        members: Vec<Member>,
        store: Store,
        keeper: Option<usize>,
        timeout: Duration,
        terminal: &Arc<Terminal>,
    ) -> Result<Self, PluginError> {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            rank,
            seen: Mutex::new(Seen {
                beats: vec![(Beat::default(), now); members.len()],
                at: now,
                error: "it does not answer".to_owned(),
            }),
            members,
            store,
            keeper,
            silence: timeout.min(MAX_SILENCE),
            step: AtomicU64::new(0),
            n_calls: AtomicU64::new(0),
            wanted: Mutex::new(None),
            verdict: OnceLock::new(),
            engine: OnceLock::new(),
            is_over: AtomicBool::new(false),
            is_searching: AtomicBool::new(false),
        });
        let reader = Arc::clone(&shared);
        start_thread("beats", move || reader.read())?;
        let (judge, terminal) = (Arc::clone(&shared), Arc::clone(terminal));
        start_thread("lookout", move || judge.judge(&terminal))?;
        Ok(Self(shared))
    }

    /// What to abort if the run fails.
    pub(super) fn guard(&self, engine: &Arc<Engine>) {
        let _ = self.0.engine.set(Arc::clone(engine));
        if self.0.verdict.get().is_some() {
            engine.abort();
        }
    }

    /// The step that this process is in.
    pub(super) fn note_step(&self, step: u64) {
        self.0.step.store(step, Ordering::Relaxed);
    }

    /// This process begins one more operation of the engine.
    pub(super) fn note_call(&self) {
        self.0.n_calls.fetch_add(1, Ordering::Relaxed);
    }

    /// Why the run ends, if it does.
    pub(super) fn verdict(&self) -> Option<PluginError> {
        self.0.verdict.get().map(|report| self.0.words(report))
    }

    /// Whether this process is the one to tell the user: it is to blame itself, or it is the first of its host that is
    /// not.
    pub(super) fn tells(&self) -> bool {
        let Shared { rank, members, .. } = &*self.0;
        let culprit = self.0.verdict.get().map_or(*rank, |report| report.rank);
        let others = members
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != culprit);
        let mut neighbours = others.filter(|(_, member)| member.host == members[*rank].host);
        culprit == *rank || neighbours.next().is_some_and(|(first, _)| first == *rank)
    }

    /// Tells all others that the run ends because of this process; an earlier report stays.
    pub(super) fn report(&self, error: &PluginError) {
        let report = Report {
            rank: self.0.rank,
            error: error.clone(),
        };
        self.0.want(report.clone());
        self.wait_for_verdict(POSTING);
        let _ = self.0.verdict.set(report);
    }

    /// What an error of the engine comes from: another process, most often.
    pub(super) fn explain(&self, error: &Error) -> PluginError {
        self.0.is_searching.store(true, Ordering::Relaxed);
        // Whoever is silent is found by the judge meanwhile; who is only late shows when it still is.
        self.wait_for_verdict(3 * PERIOD);
        if error.is_timeout()
            && let Some(report) = self.0.laggard()
        {
            self.0.want(report);
        }
        self.wait_for_verdict(SEARCH);
        let plain = PluginError::new("the processes cannot work together")
            .why(error.to_string())
            .fix(format!(
                "check the network between the hosts; {START_AGAIN}"
            ));
        if self.0.verdict.get().is_none() {
            self.report(&plain);
        }
        self.verdict().unwrap_or(plain)
    }

    fn wait_for_verdict(&self, patience: Duration) {
        let begin = Instant::now();
        while self.0.verdict.get().is_none() && begin.elapsed() < patience {
            std::thread::sleep(PERIOD / 10);
        }
    }

    /// Ends the threads.
    pub(super) fn end(&self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.end();
    }
}

fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), PluginError> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(work).map(drop);
    started.map_err(|error| PluginError::new("no thread can be started").why(error.to_string()))
}

impl Shared {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    fn is_searching(&self) -> bool {
        self.is_searching.load(Ordering::Relaxed)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first report that is wanted is the one that is written.
    fn want(&self, report: Report) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.get_or_insert(report);
    }

    /// The thread that writes and reads.
    fn read(&self) {
        let mut n = 0;
        while !self.is_over() {
            n += 1;
            let looked = self.look(n);
            let mut seen = self.seen();
            match looked {
                Ok(()) => seen.at = Instant::now(),
                Err(error) => seen.error = error.to_string(),
            }
            drop(seen);
            let is_urgent =
                self.is_searching() || self.wanted.lock().is_ok_and(|wanted| wanted.is_some());
            std::thread::sleep(if is_urgent { PERIOD / 10 } else { PERIOD });
        }
    }

    /// One beat, and a look at the others.
    fn look(&self, n: u64) -> Result<(), Error> {
        let beat = Beat {
            n,
            step: self.step.load(Ordering::Relaxed),
            n_calls: self.n_calls.load(Ordering::Relaxed),
        };
        let text = serde_json::to_vec(&beat).unwrap_or_default();
        self.store.set(&format!("beat/{}", self.rank), &text)?;
        if self.verdict.get().is_none() && self.store.check(&[REPORT])? {
            let text = self.store.get(REPORT, STORE_TIMEOUT)?;
            if let Ok(report) = serde_json::from_slice(&text) {
                let _ = self.verdict.set(report);
            }
        }
        // Else each of n processes would read n beats.
        let reads_all = self.rank == 0 || self.is_searching();
        self.read_beats(0..if reads_all { self.members.len() } else { 1 })?;
        self.post()
    }

    fn read_beats(&self, ranks: Range<usize>) -> Result<(), Error> {
        for rank in ranks {
            let key = format!("beat/{rank}");
            if !self.store.check(&[&key])? {
                continue;
            }
            let text = self.store.get(&key, STORE_TIMEOUT)?;
            let beat: Beat = serde_json::from_slice(&text).unwrap_or_default();
            let known = &mut self.seen().beats[rank];
            if known.0 != beat {
                *known = (beat, Instant::now());
            }
        }
        Ok(())
    }

    /// Tells everyone why the run ends, unless somebody has done so: then that report arrives in a moment.
    fn post(&self) -> Result<(), Error> {
        let wanted = self
            .wanted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let (Some(report), None) = (wanted, self.verdict.get())
            && self.store.add(N_REPORTS, 1)? == 1
        {
            let text = serde_json::to_vec(&report).unwrap_or_default();
            self.store.set(REPORT, &text)?;
            let _ = self.verdict.set(report);
        }
        Ok(())
    }

    /// The thread that judges.
    fn judge(&self, terminal: &Terminal) {
        while !self.is_over() {
            if self.verdict.get().is_some() {
                return self.give_up(terminal);
            }
            let patience = if self.is_searching() {
                SUSPICIOUS
            } else {
                self.silence
            };
            if let Some(rank) = self.silent(patience) {
                self.want(Report {
                    rank,
                    error: gone(patience),
                });
            }
            // A little longer, so that who is silent is told from a store that is.
            if self.seen().at.elapsed() > patience + SUSPICIOUS / 2 {
                let _ = self.verdict.set(self.cut_off());
            }
            std::thread::sleep(PERIOD / 10);
        }
    }

    /// A process that was seen alive, and has not been for so long.
    fn silent(&self, patience: Duration) -> Option<usize> {
        let seen = self.seen();
        let is_silent = |rank: &usize| {
            let (beat, since) = &seen.beats[*rank];
            // Who has not been read for as long is not known to be silent.
            *rank != self.rank && beat.n > 0 && seen.at.saturating_duration_since(*since) > patience
        };
        let is_read = |rank: &usize| self.rank == 0 || self.is_searching() || *rank == 0;
        (0..seen.beats.len()).filter(is_read).find(is_silent)
    }

    /// The process that is the furthest behind, and so the one that the others waited for in vain.
    fn laggard(&self) -> Option<Report> {
        let own = self.n_calls.load(Ordering::Relaxed);
        let seen = self.seen();
        let others = seen.beats.iter().enumerate();
        let others = others.filter(|(rank, (beat, _))| *rank != self.rank && beat.n > 0);
        let (rank, (beat, _)) = others.min_by_key(|(_, (beat, _))| beat.n_calls)?;
        (beat.n_calls < own).then(|| {
            let why = format!(
                "it is in step {}, has taken part in {} exchanges, and is waited for in number {own}",
                beat.step + 1,
                beat.n_calls
            );
            let fix = format!(
                "look at what that process does; `-distributed_timeout` says how long the others wait; {START_AGAIN}"
            );
            let error = PluginError::new("does not come").why(why).fix(fix);
            Report { rank, error }
        })
    }

    /// A report as this process tells it.
    fn words(&self, report: &Report) -> PluginError {
        let Report { rank, error } = report;
        if *rank == self.rank {
            return error.clone();
        }
        let Member { host, process } = &self.members[*rank];
        PluginError::new(format!("rank {rank} ended the run"))
            .why(format!(
                "rank {rank}, process {process} on `{host}`: {error}"
            ))
            .fix(error.fix.clone())
    }

    /// The store does not answer any more.
    fn cut_off(&self) -> Report {
        let fix = format!(
            "check the network between the hosts, and what ended that process; {START_AGAIN}"
        );
        let (rank, what) = match self.keeper {
            Some(rank) if rank != self.rank => (rank, "cannot be reached any more"),
            _ => (self.rank, "the launcher cannot be reached any more"),
        };
        let error = PluginError::new(what)
            .why(self.seen().error.clone())
            .fix(fix);
        Report { rank, error }
    }

    /// The run has failed: wakes whatever waits in the engine, and ends a process that does not end by itself.
    fn give_up(&self, terminal: &Terminal) {
        if let Some(engine) = self.engine.get() {
            engine.abort();
        }
        let begin = Instant::now();
        while begin.elapsed() < GRACE {
            if self.is_over() {
                return;
            }
            std::thread::sleep(PERIOD / 10);
        }
        if let Some(report) = self.verdict.get() {
            let error = HostError::from(self.words(report));
            terminal.finish();
            terminal.report(
                &error
                    .at(&format!("rank {}: ", self.rank))
                    .render(is_colored()),
            );
            terminal.finish();
        }
        // Not `exit`: what that waits for is what hangs.
        signal_hook::low_level::exit(EXIT_USER_ERROR.into());
    }
}

/// Of a process that has been silent for so long.
fn gone(silence: Duration) -> PluginError {
    PluginError::new(format!("has been silent for {} s", silence.as_secs()))
        .why("it was killed, or its host or the network is gone")
        .fix(format!(
            "look for the reason on that host (`dmesg` tells of a lack of memory); {START_AGAIN}"
        ))
}
