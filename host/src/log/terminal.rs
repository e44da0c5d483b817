//! Progress for a person: bars on a terminal, a line every few seconds in a log file.
//!
//! Everything goes to stderr, by way of a thread (`screen`); stdout belongs to the results of a command. Bars have
//! no color; messages have it unless `NO_COLOR` is set or stderr is no terminal that can move its cursor.

use super::screen::{Bar, Kind, Screen};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of the same kind where there is no bar.
const LINE_PERIOD: Duration = Duration::from_secs(5);

/// The key of the bar of training; keys of other work sort before it, so that it is the lowest.
const TRAINING: &str = "~";

/// How much to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Verbosity {
    /// Errors only: of several processes that train one model, one says the rest.
    Silent,
    /// Errors, warnings, and what it was all for.
    Quiet,
    /// What a user wants to follow, too.
    #[default]
    Normal,
    /// And what helps to find out why something is as it is.
    Verbose,
}

impl Verbosity {
    /// Takes `-q`, `--quiet`, `-v` and `--verbose` out of a command line; the last one counts.
    pub fn take(argv: &mut Vec<String>) -> Self {
        let mut verbosity = Self::default();
        argv.retain(|word| {
            verbosity = match word.as_str() {
                "-q" | "--quiet" => Self::Quiet,
                "-v" | "--verbose" => Self::Verbose,
                _ => return true,
            };
            false
        });
        verbosity
    }
}

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Good to know when something is to be found out.
    Debug,
    /// Good to know.
    Info,
    /// What the command was given for.
    Result,
    /// Something was not done as asked, and training goes on.
    Warning,
    /// Something failed.
    Error,
}

/// The state of training after a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepLine {
    /// Optimizer steps done, including those before a restart.
    pub step: u64,
    /// Optimizer steps in all.
    pub n_steps: u64,
    /// Mean loss in nats per token.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens per second over all ranks.
    pub tokens_per_s: f64,
    /// Optimizer steps per second.
    pub steps_per_s: f64,
    /// Until the last step, if somebody knows.
    pub left: Option<Duration>,
    /// Bytes now and at most so far, if somebody knows.
    pub memory: Option<(u64, u64)>,
    /// Part of the time spent waiting for data, in 0..=1; shown from one percent on.
    pub wait_fraction: f64,
}

impl StepLine {
    /// The most important first: a narrow terminal cuts the rest.
    fn describe(&self) -> String {
        let position = if self.n_steps == u64::MAX {
            self.step.to_string()
        } else {
            format!("{}/{}", self.step, self.n_steps)
        };
        let mut parts = vec![
            position,
            format!("loss {:.4}", self.loss),
            format!("lr {:.2e}", self.lr),
            format!("{} tokens/s", short_count(self.tokens_per_s)),
        ];
        parts.extend(
            self.left
                .map(|left| format!("{} left", short_duration(left))),
        );
        if self.wait_fraction >= 0.01 {
            parts.push(format!(
                "{:.0} % waiting for data",
                self.wait_fraction * 100.0
            ));
        }
        parts.push(short_rate(self.steps_per_s));
        parts.extend(self.memory.map(|(current, peak)| {
            let gibibytes = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            format!(
                "{:.2} GiB (peak {:.2})",
                gibibytes(current),
                gibibytes(peak)
            )
        }));
        parts.join(", ")
    }
}

/// The one place that writes to stderr while a run goes on. Usable from several threads.
pub struct Terminal {
    verbosity: Verbosity,
    has_bars: bool,
    is_colored: bool,
    screen: Screen,
    progress: Mutex<Progress>,
}

/// What is shown of work that is not over.
#[derive(Default)]
struct Progress {
    /// By label.
    work: BTreeMap<String, Work>,
    /// When training was shown last, where there is no bar.
    shown: Option<Instant>,
    /// The last state of training, if it was not shown as a line.
    pending: Option<String>,
}

struct Work {
    since: Instant,
    /// When it was shown as a line.
    shown: Option<Instant>,
}

impl Terminal {
    /// A terminal on stderr.
    pub fn new(verbosity: Verbosity) -> Self {
        let has_cursor = has_cursor();
        Self {
            verbosity,
            has_bars: has_cursor && verbosity > Verbosity::Quiet,
            is_colored: is_colored(),
            screen: Screen::on_stderr(),
            progress: Mutex::default(),
        }
    }

    /// Shows where training is.
    pub fn train(&self, line: &StepLine) {
        self.train_at(line, Instant::now());
    }

    fn train_at(&self, line: &StepLine, now: Instant) {
        if self.verbosity == Verbosity::Silent {
            return;
        }
        let text = line.describe();
        let mut progress = self.lock();
        if self.has_bars {
            let fraction =
                (line.n_steps < u64::MAX).then(|| line.step as f64 / line.n_steps as f64);
            let bar = Bar {
                label: String::new(),
                fraction,
                text: text.clone(),
            };
            self.screen.bar(TRAINING, Some(bar));
        } else if self.verbosity > Verbosity::Quiet && is_due(progress.shown, now) {
            self.screen.line(format!("step {text}"), Kind::Progress);
            (progress.shown, progress.pending) = (Some(now), None);
            return;
        }
        progress.pending = Some(text);
    }

    /// Shows how far a long piece of work is, such as tokenizing: `done` of `total`, which is 0 if nobody knows.
    /// The work is over when `done` reaches `total`, or with [`Self::finish`]. Several may go on at once, told apart
    /// by `label`. Where there are no bars, work of a few seconds is not worth a line.
    pub fn work(&self, label: &str, done: u64, total: u64) {
        self.work_at(label, done, total, Instant::now());
    }

    fn work_at(&self, label: &str, done: u64, total: u64, now: Instant) {
        if self.verbosity <= Verbosity::Quiet {
            return;
        }
        let is_over = total > 0 && done >= total;
        let mut progress = self.lock();
        let work = progress.work.entry(label.to_owned()).or_insert(Work {
            since: now,
            shown: None,
        });
        if self.has_bars {
            let bar = (!is_over).then(|| work_bar(label, done, total, now - work.since));
            self.screen.bar(label, bar);
        } else if is_due(Some(work.shown.unwrap_or(work.since)), now)
            || is_over && work.shown.is_some()
        {
            work.shown = Some(now);
            let text = if total == 0 {
                format!("{label}: {done}")
            } else {
                let percent = done as f64 / total as f64 * 100.0;
                format!("{label}: {done}/{total} ({percent:.0} %)")
            };
            self.screen.line(text, Kind::Progress);
        }
        if is_over {
            progress.work.remove(label);
        }
    }

    /// Prints a message, above the bars if there are any.
    pub fn message(&self, level: Level, text: &str) {
        let is_shown = match level {
            Level::Debug => self.verbosity == Verbosity::Verbose,
            Level::Info => self.verbosity > Verbosity::Quiet,
            Level::Result | Level::Warning => self.verbosity > Verbosity::Silent,
            Level::Error => true,
        };
        if !is_shown {
            return;
        }
        let (color, word) = match level {
            Level::Info | Level::Result => ("", ""),
            Level::Debug => ("2", "debug: "),
            Level::Warning => ("33", "warning: "),
            Level::Error => ("31", "error: "),
        };
        let text = printable(text);
        let text = if self.is_colored && !color.is_empty() {
            format!("\u{1b}[{color}m{word}\u{1b}[0m{text}")
        } else {
            format!("{word}{text}")
        };
        self.screen.line(text, Kind::Message);
    }

    /// Prints a report as it is, with the colors that it may have.
    pub fn report(&self, text: &str) {
        self.screen.line(text.trim_end().to_owned(), Kind::Message);
    }

    /// Takes the bars away, leaving the last state of training as a line, and waits until all that was said is written,
    /// or nobody has read it for some seconds. A later call shows new bars.
    pub fn finish(&self) {
        let Progress { work, pending, .. } = std::mem::take(&mut *self.lock());
        if self.has_bars {
            for label in work.keys().map(String::as_str).chain([TRAINING]) {
                self.screen.bar(label, None);
            }
        }
        if let Some(text) = pending {
            self.screen.line(format!("step {text}"), Kind::Message);
        }
        self.screen.flush();
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Whether stderr is a terminal that can move its cursor.
fn has_cursor() -> bool {
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stderr().is_terminal() && !is_dumb
}

/// Whether stderr takes colors, and nobody minds: <https://no-color.org> wants the variable present and not empty.
pub fn is_colored() -> bool {
    has_cursor() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn is_due(shown: Option<Instant>, now: Instant) -> bool {
    shown.is_none_or(|last| now.duration_since(last) >= LINE_PERIOD)
}

/// Without what would move the cursor or change colors: texts may be a model's or a file's.
fn printable(text: &str) -> String {
    let is_harmless = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars()
        .map(|c| {
            if is_harmless(c) {
                c
            } else {
                char::REPLACEMENT_CHARACTER
            }
        })
        .collect()
}

fn work_bar(label: &str, done: u64, total: u64, spent: Duration) -> Bar {
    if total == 0 {
        return Bar {
            label: label.to_owned(),
            fraction: None,
            text: done.to_string(),
        };
    }
    let fraction = done as f64 / total as f64;
    let left = spent.as_secs_f64() * (1.0 / fraction - 1.0);
    let left = Duration::try_from_secs_f64(left).ok();
    let left = left.map(|left| format!(", {} left", short_duration(left)));
    Bar {
        label: label.to_owned(),
        fraction: Some(fraction),
        text: format!("{done}/{total}{}", left.unwrap_or_default()),
    }
}

fn short_count(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2}M", v / 1e6),
        v if v >= 1e4 => format!("{:.1}k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

/// Slow steps are said in seconds per step.
fn short_rate(steps_per_s: f64) -> String {
    if steps_per_s >= 1.0 || steps_per_s <= 0.0 || !steps_per_s.is_finite() {
        format!("{steps_per_s:.1} steps/s")
    } else {
        format!("{:.2} s/step", 1.0 / steps_per_s)
    }
}

fn short_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {:02} s", seconds % 60),
        3600..86_400 => format!("{hours} h {minutes:02} min"),
        _ => format!("{days} d {hours:02} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::testing::Captured;

    fn terminal(verbosity: Verbosity, has_bars: bool) -> (Terminal, Captured) {
        let captured = Captured::default();
        let terminal = Terminal {
            verbosity,
            has_bars,
            is_colored: false,
            screen: Screen::new(captured.clone(), || 200),
            progress: Mutex::default(),
        };
        (terminal, captured)
    }

    fn line(step: u64) -> StepLine {
        StepLine {
            step,
            n_steps: 1000,
            loss: 3.25,
            lr: 2.5e-4,
            tokens_per_s: 123_456.0,
            steps_per_s: 2.25,
            left: Some(Duration::from_secs(400)),
            ..StepLine::default()
        }
    }

    #[test]
    fn a_step_is_described_with_rates_time_left_and_memory() {
        assert_eq!(
            line(600).describe(),
            "600/1000, loss 3.2500, lr 2.50e-4, 123.5k tokens/s, 6 min 40 s left, 2.2 steps/s"
        );
        let slow = StepLine {
            n_steps: u64::MAX,
            tokens_per_s: 2.5e6,
            steps_per_s: 0.125,
            left: None,
            memory: Some((3 << 29, 1 << 31)),
            wait_fraction: 0.25,
            ..line(1)
        };
        assert_eq!(
            slow.describe(),
            "1, loss 3.2500, lr 2.50e-4, 2.50M tokens/s, 25 % waiting for data, 8.00 s/step, 1.50 GiB (peak 2.00)"
        );
        let days = Duration::from_secs(200_000);
        assert_eq!(short_duration(days), "2 d 07 h");
    }

    #[test]
    fn without_a_cursor_there_is_a_line_every_few_seconds() {
        let (terminal, captured) = terminal(Verbosity::Normal, false);
        let start = Instant::now();
        for second in 0..12 {
            terminal.train_at(&line(second), start + Duration::from_secs(second));
        }
        terminal.finish();
        let text = captured.text();
        let steps: Vec<&str> = text.lines().filter_map(|l| l.split(',').next()).collect();
        assert_eq!(
            steps,
            ["step 0/1000", "step 5/1000", "step 10/1000", "step 11/1000"]
        );
    }

    #[test]
    fn long_work_shows_lines_and_its_end_and_short_work_nothing() {
        let (terminal, captured) = terminal(Verbosity::Normal, false);
        let start = Instant::now();
        for (second, done) in [(0, 0), (2, 1), (6, 2), (8, 3), (9, 4)] {
            terminal.work_at("tokenizing", done, 4, start + Duration::from_secs(second));
        }
        terminal.work_at("counting", 7, 0, start);
        terminal.work_at("counting", 9, 0, start + LINE_PERIOD);
        terminal.work_at("short", 0, 1, start);
        terminal.work_at("short", 1, 1, start + Duration::from_secs(1));
        terminal.finish();
        assert_eq!(
            captured.text(),
            "tokenizing: 2/4 (50 %)\ntokenizing: 4/4 (100 %)\ncounting: 9\n"
        );
    }

    #[test]
    fn verbosity_decides_what_is_shown() {
        let said = |verbosity| {
            let (terminal, captured) = terminal(verbosity, false);
            terminal.work_at("x", 0, 2, Instant::now());
            terminal.work_at("x", 1, 2, Instant::now() + LINE_PERIOD);
            terminal.message(Level::Debug, "why");
            terminal.message(Level::Info, "hello");
            terminal.message(Level::Warning, "disk is full");
            terminal.message(Level::Error, "gone");
            terminal.message(Level::Result, "loss 3");
            terminal.train(&line(1));
            terminal.train(&line(2));
            terminal.finish();
            captured.text()
        };
        let last = format!("step {}\n", line(2).describe());
        let always = "warning: disk is full\nerror: gone\nloss 3\n";
        assert_eq!(said(Verbosity::Quiet), format!("{always}{last}"));
        let first = format!("step {}\n", line(1).describe());
        let normal = format!("x: 1/2 (50 %)\nhello\n{always}{first}{last}");
        assert_eq!(said(Verbosity::Normal), normal);
        assert_eq!(
            said(Verbosity::Verbose),
            normal.replace("hello", "debug: why\nhello")
        );
    }

    #[test]
    fn the_words_for_it_are_taken_out_and_the_last_one_counts() {
        let take = |line: &str| {
            let mut argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
            (Verbosity::take(&mut argv), argv.join(" "))
        };
        assert_eq!(
            take("plugins list"),
            (Verbosity::Normal, "plugins list".into())
        );
        assert_eq!(take("-v -name a -q"), (Verbosity::Quiet, "-name a".into()));
        assert_eq!(take("eval --verbose"), (Verbosity::Verbose, "eval".into()));
        assert_eq!(take("-prompt=-q"), (Verbosity::Normal, "-prompt=-q".into()));
    }

    #[test]
    fn threads_share_a_terminal() {
        let (terminal, captured) = terminal(Verbosity::Normal, false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        terminal.message(Level::Info, "0123456789");
                    }
                });
            }
        });
        let text = captured.text();
        assert_eq!(text.lines().count(), 200);
        assert!(text.lines().all(|line| line == "0123456789"));
    }

    #[test]
    fn bars_are_gone_at_the_end_and_the_last_step_stays() {
        let (terminal, captured) = terminal(Verbosity::Normal, true);
        terminal.train(&line(500));
        terminal.work("a", 1, 0);
        terminal.work("a", 1, 4);
        terminal.message(Level::Info, "hello");
        let text = captured.text();
        let left = "[##--------] 1/4";
        assert!(
            text.contains("hello\na ") && text.contains(left),
            "{text:?}"
        );
        assert!(text.contains("\n[#####-----] 500/1000, loss"), "{text:?}");
        terminal.work("a", 4, 4);
        assert!(terminal.lock().work.is_empty());
        terminal.finish();
        let text = captured.text();
        let last = format!("\u{1b}[Jstep {}\n", line(500).describe());
        assert!(text.ends_with(&last), "{text:?}");
    }

    #[test]
    fn texts_of_others_cannot_move_the_cursor() {
        let (terminal, captured) = terminal(Verbosity::Normal, false);
        terminal.message(Level::Info, "a\tb\r\u{1b}[2J\nc");
        assert_eq!(captured.text(), "a\tb\u{fffd}\u{fffd}[2J\nc\n");
    }
}
