//! Names a call into a plugin that does not return. Nothing can end such a call from outside, but a user who knows which
//! plugin it is need not guess why a run stands still.
//!
//! Whoever calls a plugin holds a [`Watched`] meanwhile; a thread looks at those that are held.

use crate::error::HostError;
use crate::growth::Growth;
use crate::log::{self, Level, Terminal};
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Calls that have not returned, by number.
static CALLS: Mutex<BTreeMap<u64, Call>> = Mutex::new(BTreeMap::new());

/// How often each call was made.
static COUNTS: Mutex<Counts> = Mutex::new(Counts::new());

/// How often each call was made: kind and name of the component, and the call.
pub type Counts = BTreeMap<(&'static str, Arc<str>, &'static str), u64>;

struct Call {
    kind: &'static str,
    name: Arc<str>,
    what: &'static str,
    since: Instant,
    /// When the user is told next; twice as long each time.
    patience: Option<Duration>,
}

/// A call into a plugin, while it lasts.
#[derive(Debug)]
pub struct Watched(u64);

/// Notes that a component is called: ``watch("model", &name, "forward")``.
pub fn watch(kind: &'static str, name: &Arc<str>, what: &'static str) -> Watched {
    static N_CALLS: AtomicU64 = AtomicU64::new(0);
    let number = N_CALLS.fetch_add(1, Ordering::Relaxed);
    let call = Call {
        kind,
        name: Arc::clone(name),
        what,
        since: Instant::now(),
        patience: None,
    };
    let mut counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    *counts.entry((kind, Arc::clone(name), what)).or_default() += 1;
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    calls.insert(number, call);
    Watched(number)
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
        calls.remove(&self.0);
    }
}

/// How often each call was made so far.
pub fn counts() -> Counts {
    let counts = COUNTS.lock().unwrap_or_else(PoisonError::into_inner);
    counts.clone()
}

/// Names the calls that last while nobody catches a C++ exception, which ends the process.
pub fn name_uncaught() {
    moeut_torch::uncaught::on_uncaught(|why| {
        let calls = CALLS.try_lock().map(|calls| {
            let names = calls.values().map(
                |Call {
                     kind, name, what, ..
                 }| format!("`{what}` of {kind} `{name}`"),
            );
            names.collect::<Vec<_>>().join(" and ")
        });
        let during = match calls {
            Ok(names) if !names.is_empty() => format!(" during {names}"),
            _ => String::new(),
        };
        let error = HostError::new(
            format!("a C++ exception that nobody catches was thrown{during}"),
            why,
            "this is a defect of the plugin: report it to its authors (`moeut-host plugins list` names it); the last \
             checkpoint is intact",
        );
        let _ = writeln!(std::io::stderr(), "{}", error.render(log::is_colored()));
    });
}

/// Starts the thread; it tells the user of each call that lasts longer than `patience`, and of a process that grows.
///
/// # Errors
/// If the system starts no thread.
pub fn start(terminal: &Arc<Terminal>, patience: Duration) -> std::io::Result<()> {
    let terminal = Arc::clone(terminal);
    let look = move || {
        let mut growth = Growth::default();
        loop {
            std::thread::sleep(patience / 4);
            for text in overdue(patience).into_iter().chain(growth.sample()) {
                terminal.message(Level::Warning, &text);
            }
        }
    };
    let thread = std::thread::Builder::new().name("watchdog".to_owned());
    thread.spawn(look).map(drop)
}

/// What to say of the calls that have used up the user's patience.
fn overdue(patience: Duration) -> Vec<String> {
    let mut calls = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    let late = calls.values_mut().filter_map(|call| {
        let patience = call.patience.get_or_insert(patience);
        let lasted = call.since.elapsed();
        if lasted < *patience {
            return None;
        }
        *patience *= 2;
        let Call {
            kind, name, what, ..
        } = call;
        Some(format!(
            "`{what}` of {kind} `{name}` has not returned for {} s; if it hangs, end the run with Ctrl-C, twice: the last \
             checkpoint is intact",
            lasted.as_secs()
        ))
    });
    late.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_named_while_it_lasts_and_less_and_less_often() {
        let patience = Duration::from_millis(20);
        let name = Arc::from("sleepy");
        let call = watch("model", &name, "forward");
        let mine = || {
            let texts = overdue(patience).into_iter();
            texts.filter(|text| text.contains("`sleepy`")).count()
        };
        assert_eq!(mine(), 0);
        std::thread::sleep(patience);
        assert_eq!(mine(), 1);
        assert_eq!(mine(), 0, "not before twice the time");
        std::thread::sleep(patience);
        assert_eq!(mine(), 1);
        drop(call);
        std::thread::sleep(4 * patience);
        assert_eq!(mine(), 0);
    }
}
