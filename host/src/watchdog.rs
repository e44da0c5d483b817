//! Names a call into a plugin that does not return. Nothing can end such a call from outside, but a user who knows which
//! plugin it is need not guess why a run stands still.
//!
//! Whoever calls a plugin holds a [`Watched`] meanwhile; a thread looks at those that are held.

use crate::log::{Level, Terminal};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Calls that have not returned, by number.
static CALLS: Mutex<BTreeMap<u64, Call>> = Mutex::new(BTreeMap::new());

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

/// Starts the thread; it tells the user of each call that lasts longer than `patience`.
///
/// # Errors
/// If the system starts no thread.
pub fn start(terminal: &Arc<Terminal>, patience: Duration) -> std::io::Result<()> {
    let terminal = Arc::clone(terminal);
    let look = move || {
        loop {
            std::thread::sleep(patience / 4);
            for text in overdue(patience) {
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
