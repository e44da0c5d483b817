//! Progress for a person: a bar on a terminal, a line every few seconds in a log file.
//!
//! Everything goes to stderr; stdout belongs to the results of a command. There is no color in the bar; messages have
//! it unless `NO_COLOR` is set or stderr is not a terminal.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::unhurried::Unhurried;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Between two lines of the same kind where there is no bar.
const LINE_PERIOD: Duration = Duration::from_secs(5);

/// The bar is narrow, and the message cut at the edge, so that 80 columns show what matters.
const TRAIN_TEMPLATE: &str = "{bar:10} {wide_msg}";
const WORK_TEMPLATE: &str = "{prefix} {wide_bar} {human_pos}/{human_len}, {eta} left";
const ENDLESS_TEMPLATE: &str = "{prefix} {spinner} {human_pos}";

/// How much to show, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TerminalMode {
    /// A bar if stderr is a terminal that can move its cursor, else lines.
    #[default]
    Auto,
    /// Lines, also on a terminal.
    Lines,
    /// Warnings and errors only: for ranks other than the first, and for tests.
    Quiet,
}

/// How serious a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Good to know.
    Info,
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
    /// Part of the time spent waiting for data, in 0..=1; shown from one percent on.
    pub wait_fraction: f64,
}

/// The one place that writes to stderr while a run goes on. Usable from several threads.
pub struct Terminal {
    colored: bool,
    quiet: bool,
    inner: Mutex<Inner>,
}

enum Inner {
    Bars(Bars),
    Lines(Lines),
}

impl Terminal {
    /// A terminal on stderr.
    pub fn new(mode: TerminalMode) -> Self {
        let stderr = std::io::stderr();
        let is_terminal = stderr.is_terminal();
        let has_cursor = is_terminal && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        // https://no-color.org: present and not empty.
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let inner = if mode == TerminalMode::Auto && has_cursor {
            Inner::Bars(Bars::default())
        } else {
            Inner::Lines(Lines::new(Box::new(Unhurried::new(stderr))))
        };
        Self {
            colored: has_cursor && !no_color,
            quiet: mode == TerminalMode::Quiet,
            inner: Mutex::new(inner),
        }
    }

    /// Shows where training is.
    pub fn train(&self, line: &StepLine) {
        if self.quiet {
            return;
        }
        match &mut *self.lock() {
            Inner::Bars(bars) => bars.train(line),
            Inner::Lines(lines) => lines.train(line, Instant::now()),
        }
    }

    /// Shows how far a long piece of work is, such as tokenizing: `done` of `total`, which is 0 if nobody knows.
    /// The work is over when `done` reaches `total`, or with [`Self::finish`]. Several may go on at once, told apart
    /// by `label`.
    pub fn work(&self, label: &str, done: u64, total: u64) {
        if self.quiet {
            return;
        }
        match &mut *self.lock() {
            Inner::Bars(bars) => bars.work(label, done, total),
            Inner::Lines(lines) => lines.work(label, done, total, Instant::now()),
        }
    }

    /// Prints a message, above the bar if there is one.
    pub fn message(&self, level: Level, text: &str) {
        if self.quiet && level == Level::Info {
            return;
        }
        let (color, word) = match level {
            Level::Info => ("", ""),
            Level::Warning => ("\u{1b}[33m", "warning: "),
            Level::Error => ("\u{1b}[31m", "error: "),
        };
        let text = if self.colored && !color.is_empty() {
            format!("{color}{word}\u{1b}[0m{text}")
        } else {
            format!("{word}{text}")
        };
        match &mut *self.lock() {
            Inner::Bars(bars) => bars
                .multi
                .suspend(|| write_line(&mut std::io::stderr(), &text)),
            Inner::Lines(lines) => write_line(&mut lines.out, &text),
        }
    }

    /// Takes the bars away, leaving the last state of training as a line. A later call shows a new bar.
    pub fn finish(&self) {
        match &mut *self.lock() {
            Inner::Bars(bars) => bars.finish(),
            Inner::Lines(lines) => lines.finish(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A closed stderr is no reason to stop training.
fn write_line(out: &mut dyn Write, text: &str) {
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// Estimates the time left from this process's own steps, so that a restart does not count the steps before it.
#[derive(Debug, Default)]
struct Pace {
    first: Option<(u64, Instant)>,
}

impl Pace {
    fn left(&mut self, line: &StepLine, now: Instant) -> Option<Duration> {
        let (first_step, since) = *self.first.get_or_insert((line.step, now));
        let n_done = line.step.checked_sub(first_step).filter(|&n| n > 0)?;
        let n_left = line.n_steps.saturating_sub(line.step);
        let seconds = now.duration_since(since).as_secs_f64() * n_left as f64 / n_done as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }
}

fn describe(line: &StepLine, left: Option<Duration>) -> String {
    let text = format!(
        "{}/{}, loss {:.4}, lr {:.2e}, {} tokens/s",
        line.step,
        line.n_steps,
        line.loss,
        line.lr,
        short_count(line.tokens_per_s)
    );
    let waiting = (line.wait_fraction >= 0.01)
        .then(|| format!("{:.0} % waiting for data", line.wait_fraction * 100.0));
    let left = left.map(|left| format!("{} left", short_duration(left)));
    [Some(text), left, waiting]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn short_count(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2}M", v / 1e6),
        v if v >= 1e4 => format!("{:.1}k", v / 1e3),
        v => format!("{v:.0}"),
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

#[derive(Default)]
struct Bars {
    multi: MultiProgress,
    train: Option<ProgressBar>,
    work: BTreeMap<String, ProgressBar>,
    pace: Pace,
}

impl Bars {
    fn train(&mut self, line: &StepLine) {
        let text = describe(line, self.pace.left(line, Instant::now()));
        let bar = self.train.get_or_insert_with(|| {
            self.multi
                .add(ProgressBar::new(line.n_steps).with_style(style(TRAIN_TEMPLATE)))
        });
        bar.set_length(line.n_steps);
        bar.set_message(text);
        bar.set_position(line.step);
    }

    fn work(&mut self, label: &str, done: u64, total: u64) {
        let template = if total == 0 {
            ENDLESS_TEMPLATE
        } else {
            WORK_TEMPLATE
        };
        let bar = self.work.entry(label.to_owned()).or_insert_with(|| {
            let bar = ProgressBar::new(total).with_style(style(template));
            // Below the other work, above the bar of training.
            self.multi.insert(0, bar.with_prefix(label.to_owned()))
        });
        bar.set_length(total);
        bar.set_position(done);
        if total > 0 && done >= total {
            bar.finish_and_clear();
            self.multi.remove(bar);
            self.work.remove(label);
        }
    }

    fn finish(&mut self) {
        for bar in std::mem::take(&mut self.work).into_values() {
            bar.finish_and_clear();
        }
        if let Some(bar) = self.train.take() {
            let last = bar.message();
            bar.finish_and_clear();
            write_line(&mut std::io::stderr(), &format!("step {last}"));
        }
        self.pace = Pace::default();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

struct Lines {
    out: Box<dyn Write + Send>,
    pace: Pace,
    /// When each kind was shown last; training is the empty label.
    shown: BTreeMap<String, Instant>,
    /// The last state of training, if it was not shown.
    pending: Option<String>,
}

impl Lines {
    fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            pace: Pace::default(),
            shown: BTreeMap::new(),
            pending: None,
        }
    }

    fn train(&mut self, line: &StepLine, now: Instant) {
        let text = format!("step {}", describe(line, self.pace.left(line, now)));
        if self.is_due("", now) {
            write_line(&mut self.out, &text);
            self.pending = None;
        } else {
            self.pending = Some(text);
        }
    }

    fn work(&mut self, label: &str, done: u64, total: u64, now: Instant) {
        let is_over = total > 0 && done >= total;
        if self.is_due(label, now) || is_over {
            let text = if total == 0 {
                format!("{label}: {done}")
            } else {
                let percent = done as f64 / total as f64 * 100.0;
                format!("{label}: {done}/{total} ({percent:.0} %)")
            };
            write_line(&mut self.out, &text);
        }
        if is_over {
            self.shown.remove(label);
        }
    }

    fn is_due(&mut self, label: &str, now: Instant) -> bool {
        let is_due = self
            .shown
            .get(label)
            .is_none_or(|&last| now.duration_since(last) >= LINE_PERIOD);
        if is_due {
            self.shown.insert(label.to_owned(), now);
        }
        is_due
    }

    fn finish(&mut self) {
        if let Some(text) = self.pending.take() {
            write_line(&mut self.out, &text);
        }
        self.shown.clear();
        self.pace = Pace::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(data)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn terminal(&self, quiet: bool) -> Terminal {
            Terminal {
                colored: false,
                quiet,
                inner: Mutex::new(Inner::Lines(Lines::new(Box::new(self.clone())))),
            }
        }
    }

    fn line(step: u64) -> StepLine {
        StepLine {
            step,
            n_steps: 1000,
            loss: 3.25,
            lr: 2.5e-4,
            tokens_per_s: 123_456.0,
            wait_fraction: 0.0,
        }
    }

    #[test]
    fn a_step_is_described_with_the_time_left_at_this_process_pace() {
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.left(&line(500), start), None);
        let left = pace.left(&line(600), start + Duration::from_secs(100));
        assert_eq!(
            describe(&line(600), left),
            "600/1000, loss 3.2500, lr 2.50e-4, 123.5k tokens/s, 6 min 40 s left"
        );
        let waiting = StepLine {
            wait_fraction: 0.25,
            tokens_per_s: 2.5e6,
            ..line(1)
        };
        assert_eq!(
            describe(&waiting, Some(Duration::from_secs(200_000))),
            "1/1000, loss 3.2500, lr 2.50e-4, 2.50M tokens/s, 2 d 07 h left, 25 % waiting for data"
        );
    }

    #[test]
    fn without_a_terminal_there_is_a_line_every_few_seconds() {
        let captured = Captured::default();
        let mut lines = Lines::new(Box::new(captured.clone()));
        let start = Instant::now();
        for second in 0..12 {
            lines.train(&line(second), start + Duration::from_secs(second));
        }
        lines.finish();
        let text = captured.text();
        let steps: Vec<&str> = text.lines().filter_map(|l| l.split(',').next()).collect();
        assert_eq!(
            steps,
            ["step 0/1000", "step 5/1000", "step 10/1000", "step 11/1000"]
        );
    }

    #[test]
    fn work_shows_its_first_and_its_last_state() {
        let captured = Captured::default();
        let terminal = captured.terminal(false);
        for done in 0..=4 {
            terminal.work("tokenizing c4", done, 4);
        }
        terminal.work("counting", 7, 0);
        assert_eq!(
            captured.text(),
            "tokenizing c4: 0/4 (0 %)\ntokenizing c4: 4/4 (100 %)\ncounting: 7\n"
        );
    }

    #[test]
    fn quiet_shows_warnings_and_errors_only() {
        let captured = Captured::default();
        let terminal = captured.terminal(true);
        terminal.train(&line(1));
        terminal.work("x", 1, 1);
        terminal.message(Level::Info, "hello");
        terminal.message(Level::Warning, "disk is full");
        terminal.message(Level::Error, "gone");
        assert_eq!(captured.text(), "warning: disk is full\nerror: gone\n");
    }

    #[test]
    fn threads_share_a_terminal() {
        let captured = Captured::default();
        let terminal = captured.terminal(false);
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
    fn the_bar_takes_every_call() {
        let mut bars = Bars {
            multi: MultiProgress::with_draw_target(indicatif::ProgressDrawTarget::hidden()),
            ..Bars::default()
        };
        bars.train(&line(1));
        bars.work("a", 1, 0);
        bars.work("a", 1, 2);
        bars.work("a", 2, 2);
        assert!(bars.work.is_empty());
        bars.train(&line(2));
        assert_eq!(bars.train.as_ref().unwrap().position(), 2);
    }
}
