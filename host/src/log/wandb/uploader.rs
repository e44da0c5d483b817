//! A thread that has W&B's service upload the file of a run while it grows.
//!
//! Nothing depends on it: the file has everything, and whatever goes wrong here ends in a line that says how to upload the
//! file by hand.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::{Level, Notice};
use super::service::{Answer, INSTALL, Installed, Line, Service, TICK};
use super::settings::Settings;

/// How often the service is asked for news.
const NEWS: Duration = Duration::from_secs(1);

/// An upload that goes on in the background.
#[derive(Debug)]
pub(super) struct Uploader {
    shared: Arc<Shared>,
    over: Receiver<()>,
    by_hand: String,
}

#[derive(Debug, Default)]
struct Shared {
    notices: Mutex<Vec<Notice>>,
    is_abandoned: AtomicBool,
}

impl Shared {
    fn say(&self, level: Level, text: String) {
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        notices.push((level, text));
    }
}

/// What is uploaded.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    pub(super) file: PathBuf,
    /// For the service's own log.
    pub(super) logs: PathBuf,
    pub(super) settings: Settings,
    /// How to do it by hand, whenever the run is over.
    pub(super) by_hand: String,
}

impl Uploader {
    /// Begins.
    pub(super) fn start(upload: Upload) -> Self {
        let shared = Arc::new(Shared::default());
        let (done, over) = channel();
        let by_hand = upload.by_hand.clone();
        let started = {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name("wandb".to_owned());
            thread.spawn(move || run(&upload, &shared, &done))
        };
        if let Err(error) = started {
            shared.say(Level::Warning, failure(&error.to_string(), &by_hand));
        }
        Self {
            shared,
            over,
            by_hand,
        }
    }

    /// What the user should know, since the last call.
    pub(super) fn take_notices(&self) -> Vec<Notice> {
        let notices = self.shared.notices.lock();
        std::mem::take(&mut *notices.unwrap_or_else(PoisonError::into_inner))
    }

    /// The file is complete: waits until it is uploaded, at most for so long.
    pub(super) fn finish(&self, patience: Duration) {
        // An upload that failed earlier has said so; its thread is gone, and with it the other end of the channel.
        if self.over.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let why = format!("the upload is not complete after {} s", patience.as_secs());
            let text = format!(
                "W&B: {why}; the run is recorded: upload it with {}",
                self.by_hand
            );
            self.shared.say(Level::Warning, text);
        }
        self.shared.is_abandoned.store(true, Ordering::Relaxed);
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.shared.is_abandoned.store(true, Ordering::Relaxed);
        // The thread sees it within a tick and ends the service; one that is stuck is left behind.
        let _ = self.over.recv_timeout(10 * TICK);
    }
}

fn failure(why: &str, by_hand: &str) -> String {
    format!("W&B: {why}; training goes on, and the run is recorded: upload it with {by_hand}")
}

/// `done` is dropped at the end, which is the message.
fn run(upload: &Upload, shared: &Shared, done: &Sender<()>) {
    if let Err(why) = follow(upload, shared) {
        shared.say(Level::Warning, failure(&why, &upload.by_hand));
    } else {
        let _ = done.send(());
    }
}

/// Uploads until the file is complete, or nobody waits for it any more.
fn follow(upload: &Upload, shared: &Shared) -> Result<(), String> {
    let installed = Installed::find()
        .map_err(|why| format!("{why}; to upload while it trains, type `{INSTALL}`"))?;
    if !installed.is_tested() {
        let text = format!(
            "W&B {} was never tried with this program; if it does not upload, type `{INSTALL}`",
            installed.version
        );
        shared.say(Level::Warning, text);
    }
    let mut service = Service::start(&installed, &upload.logs)?;
    service.prepare(&upload.file, &upload.settings)?;
    let mut id: Option<String> = None;
    let mut asked = Instant::now();
    while !shared.is_abandoned.load(Ordering::Relaxed) {
        if let Some(id) = &id
            && asked.elapsed() >= NEWS
        {
            service.ask_for_news(id)?;
            asked = Instant::now();
        }
        match service.receive()? {
            Some(Answer::Ready(number)) => {
                service.upload(&number)?;
                id = Some(number);
            }
            Some(Answer::News(lines)) => {
                for line in lines {
                    let level = if line.is_error {
                        Level::Warning
                    } else {
                        Level::Info
                    };
                    shared.say(level, format!("W&B: {}", line.text));
                }
            }
            Some(Answer::Done(lines)) => {
                service.end();
                let (errors, news): (Vec<Line>, Vec<Line>) =
                    lines.into_iter().partition(|line| line.is_error);
                for line in news {
                    shared.say(Level::Info, format!("W&B: {}", line.text));
                }
                let errors: Vec<String> = errors.into_iter().map(|line| line.text).collect();
                return if errors.is_empty() {
                    Ok(())
                } else {
                    Err(errors.join("; "))
                };
            }
            Some(Answer::Refused(why)) => {
                return Err(format!(
                    "the service of W&B {} refuses: {why}",
                    installed.version
                ));
            }
            Some(Answer::Other) | None => {}
        }
    }
    Ok(())
}
