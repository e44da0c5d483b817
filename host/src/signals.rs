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
}

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
        signals.register().map_err(|error| {
            HostError::new(
                "signals cannot be handled",
                error.to_string(),
                "allow `sigaction` in the container that this runs in",
            )
        })?;
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

    /// Why the run is to end now, if it is.
    pub fn ending(&self) -> Option<Ending> {
        match i32::try_from(self.stop.load(Ordering::SeqCst)) {
            Ok(SIGTERM) => Some(Ending::Terminated),
            Ok(SIGINT) => Some(Ending::Interrupted),
            _ => {
                let is_requeued = self.save_ends && self.save.load(Ordering::SeqCst);
                is_requeued.then_some(Ending::Requeue)
            }
        }
    }

    /// Whether the run is to end now.
    pub fn is_ending(&self) -> bool {
        self.ending().is_some()
    }

    /// Whether a save was asked for since the last call.
    pub fn take_save_request(&self) -> bool {
        !self.save_ends && self.save.swap(false, Ordering::SeqCst)
    }

    /// Returns when the run is to end.
    pub fn wait_for_ending(&self) {
        while !self.is_ending() {
            std::thread::sleep(WAIT);
        }
    }
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
    fn outside_slurm_a_save_is_asked_for_once_and_ends_nothing() {
        let signals = asked(0, true, false);
        assert_eq!(signals.ending(), None);
        assert!(signals.take_save_request());
        assert!(!signals.take_save_request());
        assert!(!asked(0, true, true).take_save_request());
    }
}
