//! `metrics.jsonl`: one JSON object a line, for scripts.
//!
//! ```text
//! {"step":20,"time":1700000000.123,"train/loss":7.25,"sample":"Once upon"}
//! ```
//!
//! `time` is in seconds since 1970. JSON has no NaN and no infinity: both are `null`, which data frames read as NaN.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::{Record, Sink, SinkError};
use crate::whole_file;

/// Appends records to a file; each record is in the file when `write` returns.
#[derive(Debug)]
pub struct Jsonl {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines; a line that was torn by a full disk is cut back to this.
    n_bytes: u64,
}

impl Jsonl {
    /// Opens `path`, and its folder, for a new run (`None`; an earlier file is replaced) or for one that goes on after
    /// step `resume_at`: lines of later steps, which will be written again, and a torn last line are cut away.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: impl Into<PathBuf>, resume_at: Option<u64>) -> Result<Self, SinkError> {
        let path = path.into();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(SinkError::io("create", dir))?;
        }
        match resume_at {
            Some(step) if path.exists() => cut(&path, step).map_err(SinkError::io("cut", &path))?,
            Some(_) | None => {
                File::create(&path).map_err(SinkError::io("create", &path))?;
            }
        }
        let io = || SinkError::io("open", &path);
        let file = File::options().append(true).open(&path).map_err(io())?;
        let n_bytes = file.metadata().map_err(io())?.len();
        Ok(Self {
            path,
            file,
            n_bytes,
        })
    }
}

/// Keeps the lines up to `step`. Written beside and renamed, so that being killed here loses nothing.
fn cut(path: &Path, step: u64) -> std::io::Result<()> {
    let mut lines = BufReader::new(File::open(path)?);
    whole_file::fill(
        path,
        |error| error,
        |file| {
            let mut kept = BufWriter::new(file);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line)? > 0 {
                if line.ends_with(b"\n") && step_of(&line).is_some_and(|found| found <= step) {
                    kept.write_all(&line)?;
                }
                line.clear();
            }
            kept.flush()
        },
    )
}

fn step_of(line: &[u8]) -> Option<u64> {
    let object: Value = serde_json::from_slice(line).ok()?;
    object.get("step")?.as_u64()
}

impl Sink for Jsonl {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "jsonl"
    }

    fn write(&mut self, record: &Record) -> Result<(), SinkError> {
        let line = format(record, SystemTime::now());
        if let Err(error) = self.file.write_all(line.as_bytes()) {
            // If this fails as well, the torn line stays; readers and `cut` skip it.
            let _ = self.file.set_len(self.n_bytes);
            return Err(SinkError::io("write", &self.path)(error));
        }
        self.n_bytes += line.len() as u64;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.file
            .sync_all()
            .map_err(SinkError::io("sync", &self.path))
    }
}

fn format(record: &Record, now: SystemTime) -> String {
    let millis = now
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let mut object = Map::new();
    object.insert("step".to_owned(), record.step.into());
    object.insert("time".to_owned(), (millis as f64 / 1000.0).into());
    let scalars = record
        .scalars
        .iter()
        .map(|(name, value)| (name.clone(), Value::from(*value)));
    let texts = record
        .texts
        .iter()
        .map(|(name, text)| (name.clone(), Value::from(text.as_str())));
    for (name, value) in scalars.chain(texts) {
        // The first wins, so that no metric can replace `step`.
        object.entry(name).or_insert(value);
    }
    format!("{}\n", Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn record(step: u64) -> Record {
        Record {
            step,
            scalars: vec![("train/loss".to_owned(), 7.25)],
            ..Record::default()
        }
    }

    fn steps(path: &Path) -> Vec<u64> {
        let text = fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| step_of(line.as_bytes()).unwrap())
            .collect()
    }

    #[test]
    fn a_line_has_step_time_scalars_and_texts() {
        let record = Record {
            step: 20,
            scalars: vec![
                ("train/loss".to_owned(), 7.25),
                ("grad".to_owned(), f64::NAN),
                ("step".to_owned(), 1.0),
            ],
            texts: vec![("sample".to_owned(), "a \"b\"\nc".to_owned())],
            ..Record::default()
        };
        let line = format(
            &record,
            UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        );
        assert_eq!(
            line,
            "{\"step\":20,\"time\":1700000000.123,\"train/loss\":7.25,\"grad\":null,\"sample\":\"a \\\"b\\\"\\nc\"}\n"
        );
    }

    #[test]
    fn resuming_cuts_later_steps_and_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/metrics.jsonl");
        let mut sink = Jsonl::open(&path, None).unwrap();
        for step in [10, 20, 30] {
            sink.write(&record(step)).unwrap();
        }
        sink.file.write_all(b"{\"step\":4").unwrap();
        drop(sink);

        let mut sink = Jsonl::open(&path, Some(20)).unwrap();
        assert_eq!(steps(&path), [10, 20]);
        sink.write(&record(25)).unwrap();
        sink.flush().unwrap();
        assert_eq!(steps(&path), [10, 20, 25]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_new_run_starts_an_empty_file_and_a_resumed_one_may_lack_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        Jsonl::open(&path, Some(7))
            .unwrap()
            .write(&record(8))
            .unwrap();
        assert_eq!(steps(&path), [8]);
        Jsonl::open(&path, None).unwrap();
        assert_eq!(steps(&path), [0; 0]);
    }

    #[test]
    fn a_path_that_refuses_writes_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = Jsonl::open(dir.path().join("file/metrics.jsonl"), None).unwrap_err();
        assert!(error.to_string().starts_with("cannot create `"), "{error}");
    }
}
