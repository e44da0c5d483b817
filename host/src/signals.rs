//! Signals that reach the program while it trains.
//!
//! ```text
//! SIGTERM, SIGINT   finish the step, save, exit: 0 after SIGTERM (a scheduler asked), 130 after SIGINT (a user did)
//!                   a second one exits at once, with 128 + its number
//! SIGUSR1           finish the step and save; in a SLURM job then end and have the job queued again, else go on
//! SIGHUP            nothing: a terminal that is closed, or a connection that breaks, does not end a training
//! ```
//!
//! A handler only sets a flag. Who reads it decides what follows: the loop between two steps, validation between two
//! batches, and plugins that prepare data through `HostServices::is_cancelled`.

use crate::error::HostError;
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Exit code of a program that SIGINT ended, as shells have it: 128 + the signal's number.
const EXIT_INTERRUPTED: u8 = 130;

/// How often a run that is kept alive looks whether it may end.
const WAIT: Duration = Duration::from_millis(100);

/// What signals have asked for so far.
#[derive(Debug, Default)]
pub struct Signals {
    /// The last of SIGTERM and SIGINT; 0 if there was none.
    stop: Arc<AtomicUsize>,
    save: Arc<AtomicBool>,
    /// Whether SIGUSR1 ends the run: it does where it can be queued again.
    save_ends: bool,
    /// What all processes of the run have agreed on; none if this one is alone and need not ask.
    agreed: Option<Agreed>,
}

/// What counts for all processes.
#[derive(Debug, Default)]
struct Agreed {
    stop: AtomicUsize,
    save: AtomicBool,
}

/// What a process has been asked for, as numbers that can be summed over all processes.
pub const N_WISHES: usize = 4;

/// Why a run ends before its last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// SIGTERM.
    Terminated,
    /// SIGINT: Ctrl-C.
    Interrupted,
    /// SIGUSR1 in a SLURM job.
    Requeue,
}

impl Ending {
    /// The signal, as the user knows it.
    pub fn signal(self) -> &'static str {
        match self {
            Self::Terminated => "SIGTERM",
            Self::Interrupted => "SIGINT",
            Self::Requeue => "SIGUSR1",
        }
    }

    /// The signal's number.
    pub fn number(self) -> u8 {
        let number = match self {
            Self::Terminated => SIGTERM,
            Self::Interrupted => SIGINT,
            Self::Requeue => SIGUSR1,
        };
        u8::try_from(number).unwrap_or_default()
    }

    /// The program's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupted => EXIT_INTERRUPTED,
            Self::Terminated | Self::Requeue => 0,
        }
    }
}

impl Signals {
    /// Listens from now on; without this call nothing is ever asked for. `is_slurm_job`: SIGUSR1 ends the run.
    ///
    /// # Errors
    /// If the system refuses a handler.
    pub fn listen(is_slurm_job: bool) -> Result<Self, HostError> {
        let signals = Self {
            save_ends: is_slurm_job,
            ..Self::default()
        };
        signals.register().map_err(|error| refused(&error))?;
        Ok(signals)
    }

    fn register(&self) -> std::io::Result<()> {
        let is_stopping = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal finds the flag unset and sets it, the second one finds it set.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&is_stopping))?;
            flag::register(signal, Arc::clone(&is_stopping))?;
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, Arc::clone(&self.stop), number)?;
        }
        flag::register(SIGUSR1, Arc::clone(&self.save))?;
        flag::register(SIGHUP, Arc::default())?; // A handler, so that the system does not end the program.
        Ok(())
    }

    /// From now on this process is one of several, and does nothing on a signal before all have agreed.
    #[must_use]
    pub fn with_others(self) -> Self {
        Self {
            agreed: Some(Agreed::default()),
            ..self
        }
    }

    /// Why the run is to end now, if it is.
    pub fn ending(&self) -> Option<Ending> {
        match &self.agreed {
            None => self.asked(),
            Some(agreed) => match i32::try_from(agreed.stop.load(Ordering::SeqCst)) {
                Ok(SIGTERM) => Some(Ending::Terminated),
                Ok(SIGINT) => Some(Ending::Interrupted),
                Ok(SIGUSR1) => Some(Ending::Requeue),
                _ => None,
            },
        }
    }

    /// Whether the run is to end now.
    pub fn is_ending(&self) -> bool {
        self.ending().is_some()
    }

    /// Why this process is asked to end, whatever the others are asked.
    pub fn asked(&self) -> Option<Ending> {
        match i32::try_from(self.stop.load(Ordering::SeqCst)) {
            Ok(SIGTERM) => Some(Ending::Terminated),
            Ok(SIGINT) => Some(Ending::Interrupted),
            _ => {
                let is_requeued = self.save_ends && self.save.load(Ordering::SeqCst);
                is_requeued.then_some(Ending::Requeue)
            }
        }
    }

    /// Whether a save was asked for since the last call.
    pub fn take_save_request(&self) -> bool {
        let save = self
            .agreed
            .as_ref()
            .map_or(&*self.save, |agreed| &agreed.save);
        !self.save_ends && save.swap(false, Ordering::SeqCst)
    }

    /// What this process is asked for, to be summed over all; nothing if it is alone.
    pub fn wishes(&self) -> Option<[f64; N_WISHES]> {
        self.agreed.as_ref()?;
        let asked = self.asked();
        let is = |ending| f64::from(u8::from(asked == Some(ending)));
        let saves = !self.save_ends && self.save.swap(false, Ordering::SeqCst);
        Some([
            is(Ending::Terminated),
            is(Ending::Interrupted),
            is(Ending::Requeue),
            f64::from(u8::from(saves)),
        ])
    }

    /// The sums of all processes' [`Signals::wishes`]: what one is asked for, all do.
    pub fn agree(&self, wishes: &[f64]) {
        let Some(agreed) = &self.agreed else {
            return;
        };
        let is_asked = |index: usize| wishes.get(index).is_some_and(|&n| n > 0.0);
        let endings = [SIGTERM, SIGINT, SIGUSR1];
        if let Some(index) = (0..endings.len()).find(|&index| is_asked(index)) {
            let number = usize::try_from(endings[index]).unwrap_or_default();
            agreed.stop.store(number, Ordering::SeqCst);
        }
        if is_asked(endings.len()) {
            agreed.save.store(true, Ordering::SeqCst);
        }
    }

    /// Returns when the run is to end.
    pub fn wait_for_ending(&self) {
        while !self.is_ending() {
            std::thread::sleep(WAIT);
        }
    }
}

/// For a program that trains in other processes: the signals that came and were not handed on to them yet.
#[derive(Debug)]
pub struct Relay {
    last: Arc<AtomicUsize>,
}

impl Relay {
    /// Listens from now on.
    ///
    /// # Errors
    /// If the system refuses a handler.
    pub fn listen() -> Result<Self, HostError> {
        let last = Arc::new(AtomicUsize::new(0));
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, Arc::clone(&last), number)
                .map_err(|error| refused(&error))?;
        }
        Ok(Self { last })
    }

    /// The last one.
    pub fn take(&self) -> Option<Signal> {
        match i32::try_from(self.last.swap(0, Ordering::SeqCst)) {
            Ok(SIGINT) => Some(Signal::INT),
            Ok(SIGTERM) => Some(Signal::TERM),
            Ok(SIGUSR1) => Some(Signal::USR1),
            _ => None,
        }
    }
}

fn refused(error: &std::io::Error) -> HostError {
    HostError::new(
        "signals cannot be handled",
        error.to_string(),
        "allow `sigaction` in the container that this runs in",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags as handlers would have set them; signals themselves are sent by the end-to-end tests.
    fn asked(stop: i32, save: bool, save_ends: bool) -> Signals {
        Signals {
            stop: Arc::new(AtomicUsize::new(usize::try_from(stop).unwrap())),
            save: Arc::new(AtomicBool::new(save)),
            save_ends,
            agreed: None,
        }
    }

    #[test]
    fn each_signal_has_its_ending() {
        assert_eq!(Signals::default().ending(), None);
        for (signals, ending, exit_code) in [
            (asked(SIGTERM, false, false), Ending::Terminated, 0),
            (asked(SIGINT, true, true), Ending::Interrupted, 130),
            (asked(0, true, true), Ending::Requeue, 0),
        ] {
            assert_eq!(signals.ending(), Some(ending));
            assert_eq!(ending.exit_code(), exit_code);
        }
    }

    #[test]
    fn several_processes_do_what_one_is_asked_for() {
        let all = [
            asked(0, false, false).with_others(),
            asked(SIGTERM, true, false).with_others(),
        ];
        assert!(all.iter().all(|signals| !signals.is_ending()));
        let wishes: Vec<_> = all
            .iter()
            .map(|signals| signals.wishes().unwrap())
            .collect();
        let sums: Vec<f64> = (0..N_WISHES).map(|i| wishes[0][i] + wishes[1][i]).collect();
        for signals in &all {
            signals.agree(&sums);
            assert_eq!(signals.ending(), Some(Ending::Terminated));
            assert!(signals.take_save_request() && !signals.take_save_request());
        }
        assert_eq!(asked(SIGTERM, true, false).wishes(), None, "nobody to ask");
    }

    #[test]
    fn outside_slurm_a_save_is_asked_for_once_and_ends_nothing() {
        let signals = asked(0, true, false);
        assert_eq!(signals.ending(), None);
        assert!(signals.take_save_request());
        assert!(!signals.take_save_request());
        assert!(!asked(0, true, true).take_save_request());
    }
}
