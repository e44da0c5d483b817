//! The records of a `.wandb` file. Field numbers are those of W&B's `wandb_internal.proto`, version 0.31.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::super::protobuf::Value as Field;
use super::super::protobuf::{Message, bytes_of, fields, integer_of};
use super::WandbRun;
use super::artifact::Artifact;

/// The version whose records these are, and the oldest that reads them.
const PRODUCER: &str = "0.31.0";
const MIN_CONSUMER: &str = "0.70.0";

/// A record before it gets its number.
#[derive(Debug, Clone)]
pub(super) struct Record {
    kind: u32,
    content: Message,
}

const HISTORY: u32 = 2;
const SUMMARY: u32 = 3;
const FILES: u32 = 6;
const ARTIFACT: u32 = 8;
const METRIC: u32 = 12;
const RUN: u32 = 17;
const EXIT: u32 = 18;
const HEADER: u32 = 21;
const PREEMPTING: u32 = 23;
const ENVIRONMENT: u32 = 26;

impl Record {
    /// The record's bytes; the first record of a file has the number 1.
    pub(super) fn encode(&self, number: u64) -> Vec<u8> {
        let record = Message::default().integer(1, number);
        record.bytes(self.kind, &self.content.0).0
    }
}

/// Says which program wrote the file.
pub(super) fn header() -> Record {
    let version = Message::default()
        .bytes(1, PRODUCER.as_bytes())
        .bytes(2, MIN_CONSUMER.as_bytes());
    Record {
        kind: HEADER,
        content: Message::default().bytes(1, &version.0),
    }
}

/// What a run is.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct RunInfo {
    pub(super) id: String,
    pub(super) entity: String,
    pub(super) project: String,
    pub(super) display_name: String,
    pub(super) group: String,
    pub(super) job_type: String,
    pub(super) notes: String,
    pub(super) tags: Vec<String>,
    pub(super) sweep_id: String,
    pub(super) host: String,
    pub(super) commit: String,
    pub(super) config: Vec<(String, Value)>,
    /// The server has rows of it already, which these come behind.
    pub(super) is_resumed: bool,
}

pub(super) fn run(run: &RunInfo, start: SystemTime) -> Record {
    let mut config = Message::default();
    for (key, value) in &run.config {
        let item = Message::default()
            .bytes(1, key.as_bytes())
            .bytes(16, value.to_string().as_bytes());
        config = config.bytes(1, &item.0);
    }
    let mut content = Message::default()
        .bytes(1, run.id.as_bytes())
        .bytes(4, &config.0)
        .bytes(17, &timestamp(start).0);
    for (number, text) in [
        (2, &run.entity),
        (3, &run.project),
        (6, &run.group),
        (7, &run.job_type),
        (8, &run.display_name),
        (9, &run.notes),
        (12, &run.sweep_id),
        (13, &run.host),
    ] {
        content = with_text(content, number, text);
    }
    for tag in &run.tags {
        content = content.bytes(10, tag.as_bytes());
    }
    if !run.commit.is_empty() {
        let git = Message::default().bytes(2, run.commit.as_bytes());
        content = content.bytes(21, &git.0);
    }
    if run.is_resumed {
        content = content.integer(24, 1);
    }
    Record { kind: RUN, content }
}

/// Where and how a run was started.
#[derive(Debug, Clone, Default)]
pub(super) struct Environment {
    pub(super) args: Vec<String>,
    pub(super) program: String,
    pub(super) host: String,
    pub(super) folder: String,
    pub(super) n_cpus: u64,
}

pub(super) fn environment(environment: &Environment, start: SystemTime) -> Record {
    let mut content = Message::default()
        .bytes(1, std::env::consts::OS.as_bytes())
        .bytes(3, &timestamp(start).0)
        .bytes(6, environment.program.as_bytes())
        .bytes(11, environment.folder.as_bytes())
        .bytes(12, environment.host.as_bytes())
        .bytes(14, environment.program.as_bytes())
        .integer(16, environment.n_cpus)
        .integer(17, environment.n_cpus)
        .bytes(199, b"moeut-host");
    for arg in &environment.args {
        content = content.bytes(5, arg.as_bytes());
    }
    Record {
        kind: ENVIRONMENT,
        content,
    }
}

/// Numbers drawn over another number than W&B's own count of rows.
pub(super) fn metric(name: &str, step_metric: &str) -> Record {
    // `step_sync`: a row without the step metric takes its last value. `defined`: somebody asked for it.
    let options = Message::default().integer(1, 1).integer(3, 1);
    Record {
        kind: METRIC,
        content: Message::default()
            .bytes(1, name.as_bytes())
            .bytes(4, step_metric.as_bytes())
            .bytes(6, &options.0),
    }
}

/// A row of history; `values` are names and JSON.
pub(super) fn history(row: u64, values: &[(String, String)]) -> Record {
    let mut content = Message::default();
    for value in values {
        content = content.bytes(1, &item(value).0);
    }
    let step = Message::default().integer(1, row);
    Record {
        kind: HISTORY,
        content: content.bytes(2, &step.0),
    }
}

/// Values that stand for the whole run.
pub(super) fn summary<'a>(values: impl IntoIterator<Item = (&'a String, &'a String)>) -> Record {
    let mut content = Message::default();
    for (name, json) in values {
        content = content.bytes(1, &item(&(name.clone(), json.clone())).0);
    }
    Record {
        kind: SUMMARY,
        content,
    }
}

/// Nested, since a name is taken as it is there, dots and all.
fn item((name, json): &(String, String)) -> Message {
    Message::default()
        .bytes(2, name.as_bytes())
        .bytes(16, json.as_bytes())
}

/// Media files, below the folder `files`, that can be uploaded.
pub(super) fn files<'a>(paths: impl IntoIterator<Item = &'a String>) -> Record {
    const MEDIA: u64 = 2;
    let mut content = Message::default();
    for path in paths {
        let file = Message::default()
            .bytes(1, path.as_bytes())
            .integer(3, MEDIA);
        content = content.bytes(1, &file.0);
    }
    Record {
        kind: FILES,
        content,
    }
}

/// A table that is uploaded as an artifact; `place` is its file.
pub(super) fn artifact(artifact: &Artifact, run: &WandbRun, place: &str) -> Record {
    let layout = Message::default()
        .bytes(1, b"storageLayout")
        .bytes(2, b"\"V2\"");
    let entry = Message::default()
        .bytes(1, artifact.entry.as_bytes())
        .bytes(2, artifact.md5.as_bytes())
        .integer(4, artifact.size)
        .bytes(6, place.as_bytes())
        // W&B need not keep a copy of what the run keeps.
        .integer(8, 1);
    let manifest = Message::default()
        .integer(1, 1)
        .bytes(2, b"wandb-storage-policy-v1")
        .bytes(3, &layout.0)
        .bytes(4, &entry.0);
    let content = Message::default()
        .bytes(1, run.id.as_bytes())
        .bytes(2, run.project.as_bytes());
    let content = with_text(content, 3, &run.entity)
        .bytes(4, b"run_table")
        .bytes(5, artifact.name.as_bytes())
        .bytes(6, artifact.digest().as_bytes())
        .bytes(11, b"latest")
        .bytes(12, &manifest.0)
        .integer(14, 1)
        .bytes(15, artifact.client_id.as_bytes())
        .bytes(16, artifact.sequence_id.as_bytes())
        .bytes(20, b"MANIFEST_MD5");
    Record {
        kind: ARTIFACT,
        content,
    }
}

/// The run is stopped from outside and may go on later.
pub(super) fn preempting() -> Record {
    Record {
        kind: PREEMPTING,
        content: Message::default(),
    }
}

/// The end of the file.
pub(super) fn exit(code: u8, seconds: u64) -> Record {
    Record {
        kind: EXIT,
        content: Message::default()
            .integer(1, code.into())
            .integer(2, seconds),
    }
}

/// The row's number, if the record is a row of history.
pub(super) fn row_of(record: &[u8]) -> Option<u64> {
    let history = bytes_of(record, HISTORY.into())?;
    let step = bytes_of(history, 2)?;
    Some(integer_of(step, 1).unwrap_or(0))
}

/// The messages `number` of a message.
pub(super) fn repeated(message: &[u8], number: u64) -> impl Iterator<Item = &[u8]> {
    fields(message).filter_map(move |field| match field {
        (found, Field::Bytes(bytes)) if found == number => Some(bytes),
        _ => None,
    })
}

fn with_text(message: Message, number: u32, text: &str) -> Message {
    if text.is_empty() {
        message
    } else {
        message.bytes(number, text.as_bytes())
    }
}

fn timestamp(time: SystemTime) -> Message {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Message::default()
        .integer(1, since.as_secs())
        .integer(2, since.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_told_from_other_records() {
        let values = [("loss".to_owned(), "1.5".to_owned())];
        assert_eq!(row_of(&history(7, &values).encode(3)), Some(7));
        assert_eq!(row_of(&history(0, &values).encode(3)), Some(0));
        assert_eq!(row_of(&exit(0, 1).encode(4)), None);
    }

    #[test]
    fn a_run_has_what_is_known_about_it_and_no_more() {
        let info = RunInfo {
            id: "abc".to_owned(),
            tags: vec!["a".to_owned(), "b".to_owned()],
            config: vec![("lr".to_owned(), 0.5.into())],
            is_resumed: true,
            ..RunInfo::default()
        };
        let record = run(&info, UNIX_EPOCH).encode(2);
        let content = bytes_of(&record, 17).unwrap();
        assert_eq!(bytes_of(content, 1), Some(&b"abc"[..]));
        assert_eq!(bytes_of(content, 2), None, "no entity is not an empty one");
        assert_eq!(repeated(content, 10).count(), 2);
        assert_eq!(integer_of(content, 24), Some(1));
        let item = bytes_of(bytes_of(content, 4).unwrap(), 1).unwrap();
        assert_eq!(bytes_of(item, 16), Some(&b"0.5"[..]));
    }
}
