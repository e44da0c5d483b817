//! Reads `metrics.jsonl` row by row, whatever its size.

use super::curve::Curve;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io::BufRead;

/// Places at which time and tokens of a run are kept; the page interpolates between them.
const N_KNOTS: usize = 1024;

/// Bytes between two words about the progress.
const PROGRESS_BYTES: u64 = 1 << 22;

/// Everything that a run logged.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// By name.
    pub(super) curves: BTreeMap<String, Curve>,
    /// The newest text of each name, and its step.
    pub(super) texts: BTreeMap<String, (u64, String)>,
    /// Rows that could be read.
    pub(super) n_rows: u64,
    /// Rows that could not, the last line not among them.
    pub(super) n_unreadable: u64,
    /// The last line has no end: the run is writing it, or was killed.
    pub(super) is_torn: bool,
    /// Seconds since 1970 of the newest row.
    pub(super) last_time: Option<f64>,
    /// Largest step.
    pub(super) last_step: Option<u64>,
    clock: Clock,
}

impl Metrics {
    /// Reads all rows; `progress` hears the bytes read.
    ///
    /// # Errors
    /// If the file cannot be read to its end.
    pub(super) fn read(
        mut source: impl BufRead,
        mut progress: impl FnMut(u64),
    ) -> std::io::Result<Self> {
        let mut metrics = Self::default();
        let mut line = Vec::new();
        let mut n_bytes = 0;
        loop {
            line.clear();
            let n_read = source.read_until(b'\n', &mut line)?;
            if n_read == 0 {
                progress(n_bytes);
                return Ok(metrics);
            }
            let before = n_bytes / PROGRESS_BYTES;
            n_bytes += n_read as u64;
            if n_bytes / PROGRESS_BYTES > before {
                progress(n_bytes);
            }
            let is_whole = line.ends_with(b"\n");
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice(&line) {
                Ok(Row(cells)) if metrics.take(&cells) => {}
                _ if is_whole => metrics.n_unreadable += 1,
                _ => metrics.is_torn = true,
            }
        }
    }

    /// Whether the row has a step.
    fn take(&mut self, cells: &[(String, Cell)]) -> bool {
        let number = |wanted: &str| {
            let cell = cells.iter().find(|(name, _)| name == wanted);
            match cell {
                Some((_, Cell::Number(value))) => Some(*value),
                _ => None,
            }
        };
        let Some(step) = number("step").filter(|step| *step >= 0.0) else {
            return false;
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "steps are whole and were checked"
        )]
        let step = step as u64;
        self.n_rows += 1;
        self.last_step = self.last_step.max(Some(step));
        let time = number("time");
        self.last_time = time.or(self.last_time);
        let tokens_per_step = number("timing/tokens_per_s")
            .zip(number("timing/ms_per_iter"))
            .map(|(per_s, ms)| per_s * ms / 1e3);
        self.clock.tick(step, time, tokens_per_step);
        for (name, cell) in cells {
            if matches!(name.as_str(), "step" | "time") {
                continue;
            }
            match cell {
                Cell::Number(value) => self.push(name, step, *value),
                Cell::Null => self.push(name, step, f64::NAN),
                Cell::Text(text) => {
                    self.texts.insert(name.clone(), (step, text.clone()));
                }
                Cell::Other => {}
            }
        }
        true
    }

    fn push(&mut self, name: &str, step: u64, value: f64) {
        if let Some(curve) = self.curves.get_mut(name) {
            curve.push(step, value);
        } else {
            let curve = self.curves.entry(name.to_owned()).or_default();
            curve.push(step, value);
        }
    }

    /// Time and tokens by step.
    pub(super) fn knots(&self) -> Knots {
        self.clock.knots()
    }
}

/// When a run was at which step, and how many tokens it had seen.
#[derive(Debug, Default)]
struct Clock {
    knots: Vec<Knot>,
    /// Rows since the last knot, and how many make one.
    n_rows: usize,
    stride: usize,
    last: Option<Knot>,
    first_time: Option<f64>,
    /// Step up to which tokens are counted.
    counted: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Knot {
    step: u64,
    seconds: f64,
    tokens: f64,
}

/// As the page has it.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Knots {
    #[serde(rename = "s")]
    steps: Vec<u64>,
    /// Seconds since the first row.
    #[serde(rename = "t")]
    seconds: Vec<f64>,
    /// Absent if the run has not logged what it takes to know them.
    #[serde(rename = "k", skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<f64>>,
}

impl Clock {
    /// Notes a row. Tokens of steps between rows are those of a step of the row.
    fn tick(&mut self, step: u64, time: Option<f64>, tokens_per_step: Option<f64>) {
        let first = *self.first_time.get_or_insert(time.unwrap_or_default());
        let before = self.last.unwrap_or(Knot {
            step: 0,
            seconds: 0.0,
            tokens: 0.0,
        });
        let mut knot = Knot {
            step: step.max(before.step),
            seconds: time.map_or(before.seconds, |time| (time - first).max(before.seconds)),
            ..before
        };
        if let Some(tokens) = tokens_per_step.filter(|tokens| tokens.is_finite()) {
            knot.tokens += tokens * (knot.step - self.counted.unwrap_or_default()) as f64;
            self.counted = Some(knot.step);
        }
        self.last = Some(knot);
        if self.n_rows == 0 {
            if self.knots.len() >= N_KNOTS {
                let mut is_kept = false;
                self.knots.retain(|_| {
                    is_kept = !is_kept;
                    is_kept
                });
                self.stride *= 2;
            }
            self.knots.push(knot);
        }
        self.stride = self.stride.max(1);
        self.n_rows = (self.n_rows + 1) % self.stride;
    }

    fn knots(&self) -> Knots {
        let mut all = self.knots.clone();
        all.extend(self.last);
        all.dedup_by_key(|knot| knot.step);
        let of = |value: fn(&Knot) -> f64| all.iter().map(value).collect();
        Knots {
            steps: all.iter().map(|knot| knot.step).collect(),
            // Milliseconds are exact enough, and short.
            seconds: of(|knot| (knot.seconds * 1e3).round() / 1e3),
            tokens: self.counted.map(|_| of(|knot| knot.tokens.round())),
        }
    }
}

/// A line of the file, as it stands there.
struct Row(Vec<(String, Cell)>);

enum Cell {
    Number(f64),
    Null,
    Text(String),
    Other,
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Cells;
        impl<'de> Visitor<'de> for Cells {
            type Value = Row;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
                let mut cells = Vec::new();
                while let Some(cell) = map.next_entry()? {
                    cells.push(cell);
                }
                Ok(Row(cells))
            }
        }
        source.deserialize_map(Cells)
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Cell;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_f64<E>(self, value: f64) -> Result<Cell, E> {
                Ok(Cell::Number(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Cell, E> {
                Ok(Cell::Number(value as f64))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Cell, E> {
                Ok(Cell::Number(value as f64))
            }

            fn visit_unit<E>(self) -> Result<Cell, E> {
                Ok(Cell::Null)
            }

            fn visit_str<E>(self, value: &str) -> Result<Cell, E> {
                Ok(Cell::Text(value.to_owned()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Cell, E> {
                Ok(Cell::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Cell, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Cell::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cell, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Cell::Other)
            }
        }
        source.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Metrics {
        Metrics::read(text.as_bytes(), |_| ()).unwrap()
    }

    #[test]
    fn rows_become_curves_and_texts() {
        let metrics = read(concat!(
            "{\"step\":0,\"time\":100.5,\"n_params\":7}\n",
            "{\"step\":10,\"time\":101.5,\"train/loss\":3,\"grad\":null,\"s\":\"a \\u00e9\"}\n",
            "{\"step\":20,\"time\":102.5,\"train/loss\":2.5,\"s\":\"b\",\"odd\":[1,{\"x\":true}]}\n",
        ));
        let names: Vec<&str> = metrics.curves.keys().map(String::as_str).collect();
        assert_eq!(names, ["grad", "n_params", "train/loss"]);
        let loss = &metrics.curves["train/loss"];
        assert_eq!(loss.points(9).steps, [10, 20]);
        assert_eq!(metrics.curves["grad"].n_not_finite, 1);
        assert_eq!(metrics.texts["s"], (20, "b".to_owned()));
        assert_eq!((metrics.n_rows, metrics.last_step), (3, Some(20)));
        assert_eq!(metrics.last_time, Some(102.5));
    }

    #[test]
    fn what_cannot_be_read_is_counted() {
        let whole = "{\"step\":1,\"a\":1}\n";
        let metrics = read(&format!(
            "{whole}{{\"step\":2,\"a\"\n\n{{\"a\":1}}\n[]\n\u{0}\u{0}\n{whole}{{\"step\":3"
        ));
        assert_eq!(
            (metrics.n_rows, metrics.n_unreadable, metrics.is_torn),
            (2, 4, true)
        );
        // The last line may just lack its end.
        let metrics = read(whole.trim_end());
        assert_eq!((metrics.n_rows, metrics.is_torn), (1, false));
        assert_eq!(read("").n_rows, 0);
    }

    #[test]
    fn time_and_tokens_follow_the_steps() {
        let row = |step: u64| {
            format!(
                "{{\"step\":{step},\"time\":{},\"timing/tokens_per_s\":500.0,\"timing/ms_per_iter\":2000.0}}\n",
                50 + 2 * step
            )
        };
        let text: String = (1..=5000).map(|n| row(n * 10)).collect();
        let knots = read(&text).knots();
        assert!(knots.steps.len() > N_KNOTS / 2 && knots.steps.len() <= N_KNOTS + 1);
        assert_eq!(knots.steps.last(), Some(&50_000));
        let tokens = knots.tokens.unwrap();
        for (index, step) in knots.steps.iter().enumerate() {
            assert!((tokens[index] - *step as f64 * 1000.0).abs() < 1e-6);
            assert!((knots.seconds[index] - (2 * (step - 10)) as f64).abs() < 1e-6);
        }
        assert_eq!(read("{\"step\":1,\"time\":5}\n").knots().tokens, None);
    }
}
