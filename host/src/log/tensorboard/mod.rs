//! TensorBoard event files.
//!
//! A file is a sequence of frames, each around one protobuf message `Event`:
//!
//! ```text
//! u64 length | u32 masked CRC-32C of the length | message | u32 masked CRC-32C of the message   (little endian)
//! ```
//!
//! Field numbers are those of TensorFlow's `event.proto`, `summary.proto` and `tensor.proto`.

mod charts;
mod server;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::protobuf::Message;
use super::{Record, Sink, SinkError};

pub use server::{Server, ServerSettings, WITH_PARENT, become_child};

/// Writes one event file per process; TensorBoard joins the files of a folder.
#[derive(Debug)]
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    /// Bytes of whole frames; a frame that was torn by a full disk is cut back to this.
    n_bytes: u64,
}

impl TensorBoard {
    /// Starts a file in `dir`. A run that goes on after step `resume_at` tells TensorBoard to forget the later steps
    /// of the folder's earlier files.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn open(dir: &Path, resume_at: Option<u64>) -> Result<Self, SinkError> {
        fs::create_dir_all(dir).map_err(SinkError::io("create", dir))?;
        let now = SystemTime::now();
        let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let name = format!(
            "events.out.tfevents.{seconds}.{}.{}",
            host_name(),
            std::process::id()
        );
        let (path, file) = create_new(dir, &name)?;
        let mut sink = Self {
            path,
            file,
            n_bytes: 0,
        };
        sink.append(&frame(&file_version(now).0))?;
        if let Some(step) = resume_at {
            sink.append(&frame(&session_start(now, step + 1).0))?;
        }
        Ok(sink)
    }

    /// One call to the system per record: what was logged is in the file even if the process is killed.
    fn append(&mut self, frame: &[u8]) -> Result<(), SinkError> {
        if let Err(error) = self.file.write_all(frame) {
            // Readers stop at a torn frame, so a second failure here costs the rest of this file, nothing else.
            let _ = self.file.set_len(self.n_bytes);
            return Err(SinkError::io("write", &self.path)(error));
        }
        self.n_bytes += frame.len() as u64;
        Ok(())
    }
}

impl Sink for TensorBoard {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "tensorboard"
    }

    fn write(&mut self, record: &Record) -> Result<(), SinkError> {
        self.append(&frame(&summary(SystemTime::now(), record).0))
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.file
            .sync_all()
            .map_err(SinkError::io("sync", &self.path))
    }
}

/// The last part of the name counts up, should a process open the same folder twice within a second.
fn create_new(dir: &Path, name: &str) -> Result<(PathBuf, File), SinkError> {
    let mut n_earlier = 0;
    loop {
        let path = dir.join(format!("{name}.{n_earlier}"));
        // Appending: after a cut the next frame must go to the new end.
        match File::options().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => n_earlier += 1,
            Err(error) => return Err(SinkError::io("create", &path)(error)),
        }
    }
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name
        .trim()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .collect();
    if name.is_empty() {
        "localhost".to_owned()
    } else {
        name
    }
}

fn frame(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut frame = Vec::with_capacity(message.len() + 16);
    frame.extend_from_slice(&length);
    frame.extend_from_slice(&masked_crc(&length).to_le_bytes());
    frame.extend_from_slice(message);
    frame.extend_from_slice(&masked_crc(message).to_le_bytes());
    frame
}

/// The mask keeps the checksum of data that contains checksums from being a poor one. Constants: TensorFlow's
/// `core/lib/hash/crc32c.h`.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// `tensorflow.Event` without its content.
fn event(now: SystemTime, step: u64) -> Message {
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64();
    Message::default().double(1, seconds).integer(2, step)
}

fn file_version(now: SystemTime) -> Message {
    event(now, 0).bytes(3, b"brain.Event:2")
}

/// `SessionLog { status: START }`: readers drop what earlier files have from this step on.
fn session_start(now: SystemTime, step: u64) -> Message {
    let session_log = Message::default().integer(1, 1);
    event(now, step).bytes(7, &session_log.0)
}

fn summary(now: SystemTime, record: &Record) -> Message {
    let mut summary = Message::default();
    for (name, value) in &record.scalars {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the format has 32-bit floats"
        )]
        let value = Message::default()
            .bytes(1, name.as_bytes())
            .float(2, *value as f32);
        summary = summary.bytes(1, &value.0);
    }
    for (name, text) in &record.texts {
        summary = summary.bytes(1, &text_value(name, text).0);
    }
    for (name, plot) in &record.plots {
        summary = summary.bytes(1, &charts::value(name, plot).0);
    }
    event(now, record.step).bytes(5, &summary.0)
}

/// A text is a string tensor of shape `[1]`, marked for the text plugin.
fn text_value(name: &str, text: &str) -> Message {
    const DT_STRING: u64 = 7;
    let plugin_data = Message::default().bytes(1, b"text");
    let metadata = Message::default().bytes(1, &plugin_data.0);
    let dim = Message::default().integer(1, 1);
    let shape = Message::default().bytes(2, &dim.0);
    let tensor = Message::default()
        .integer(1, DT_STRING)
        .bytes(2, &shape.0)
        .bytes(8, text.as_bytes());
    Message::default()
        .bytes(1, format!("{name}/text_summary").as_bytes())
        .bytes(8, &tensor.0)
        .bytes(9, &metadata.0)
}

#[cfg(test)]
mod tests {
    use super::super::protobuf;
    use super::*;
    use moeut_plot::{
        Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Plot, Series,
        Table, XyChart,
    };
    use serde_json::{Value, json};
    use std::process::Command;

    /// Checks length and checksums of every frame and returns the messages.
    fn messages(file: &[u8]) -> Vec<&[u8]> {
        let mut rest = file;
        let mut messages = Vec::new();
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        while !rest.is_empty() {
            let length =
                usize::try_from(u64::from_le_bytes(rest[..8].try_into().unwrap())).unwrap();
            assert_eq!(word(&rest[8..12]), masked_crc(&rest[..8]));
            let message = &rest[12..12 + length];
            assert_eq!(word(&rest[12 + length..16 + length]), masked_crc(message));
            messages.push(message);
            rest = &rest[16 + length..];
        }
        messages
    }

    /// The fields of a message: `(number, value)`, integers as eight bytes.
    fn fields(message: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let bytes = |value| match value {
            protobuf::Value::Integer(value) => value.to_le_bytes().to_vec(),
            protobuf::Value::Bytes(bytes) => bytes.to_vec(),
        };
        let fields = protobuf::fields(message);
        fields
            .map(|(number, value)| (number, bytes(value)))
            .collect()
    }

    fn field(message: &[u8], number: u64) -> Vec<u8> {
        let found = fields(message).into_iter().find(|(n, _)| *n == number);
        found.unwrap_or_else(|| panic!("no field {number}")).1
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        // CRC-32C of "123456789" is the check value of the algorithm's catalogue entry.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn scalars_and_texts_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TensorBoard::open(dir.path(), Some(299)).unwrap();
        sink.write(&Record {
            step: 300,
            scalars: vec![("train/loss".to_owned(), 7.25), ("lr".to_owned(), 0.5)],
            texts: vec![("sample".to_owned(), "Once upon".repeat(50))],
            ..Record::default()
        })
        .unwrap();
        sink.flush().unwrap();

        let name = sink.path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        assert_eq!(name.split('.').count(), 7, "{name}");

        let file = fs::read(&sink.path).unwrap();
        let events = messages(&file);
        assert_eq!(events.len(), 3);
        assert_eq!(field(events[0], 3), b"brain.Event:2");
        assert_eq!(field(events[1], 2), 300u64.to_le_bytes());
        assert_eq!(field(&field(events[1], 7), 1), 1u64.to_le_bytes());
        assert_eq!(field(events[2], 2), 300u64.to_le_bytes());

        let values: Vec<Vec<u8>> = fields(&field(events[2], 5))
            .into_iter()
            .map(|(_, v)| v)
            .collect();
        assert_eq!(field(&values[0], 1), b"train/loss");
        assert_eq!(field(&values[0], 2), 7.25f32.to_le_bytes());
        assert_eq!(field(&values[1], 1), b"lr");
        assert_eq!(field(&values[2], 1), b"sample/text_summary");
        assert_eq!(
            field(&field(&values[2], 8), 8),
            "Once upon".repeat(50).as_bytes()
        );
        assert_eq!(field(&field(&field(&values[2], 9), 1), 1), b"text");
    }

    #[test]
    fn two_sinks_in_one_folder_have_files_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = TensorBoard::open(dir.path(), None).unwrap();
        let second = TensorBoard::open(dir.path(), None).unwrap();
        assert_ne!(first.path, second.path);
    }

    /// What TensorBoard's own reader finds in a folder; none without `cargo xtask tools`, which CI has.
    fn read_back(dir: &Path) -> Option<Value> {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/venv/bin/python");
        if !python.exists() {
            let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
            assert!(!is_ci, "`{}` is missing", python.display());
            return None;
        }
        let output = Command::new(python)
            .args(["-c", include_str!("read.py")])
            .arg(dir)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        Some(serde_json::from_slice(&output.stdout).unwrap())
    }

    /// One chart of each kind, by name.
    fn every_kind() -> Vec<(String, Plot)> {
        let matrix = || Matrix::new(2, vec![0.0, 1.0, f32::NAN, 3.0]);
        let series = || vec![Series::new("a", vec![1.0, f64::NAN, 2.0])];
        let image = || Image {
            width: 3,
            height: 2,
            rgb: vec![7; 18],
            caption: String::new(),
        };
        let table = Table {
            header: vec!["prompt".to_owned(), "text".to_owned()],
            rows: vec![vec!["a|b".to_owned(), "Once\nupon".to_owned()]],
        };
        let frames = Frames {
            frames: vec![("0".to_owned(), matrix()), ("1".to_owned(), matrix())],
            ..Frames::default()
        };
        let plots: Vec<(&str, Plot)> = vec![
            ("table", table.into()),
            ("histogram", Histogram::linear([0.0, 1.0, 1.0, 4.0]).into()),
            ("picture", vec![image()].into()),
            ("grid", vec![image(), image()].into()),
            (
                "bars",
                Bars {
                    series: series(),
                    ..Bars::default()
                }
                .into(),
            ),
            (
                "lines",
                XyChart {
                    series: series(),
                    ..XyChart::default()
                }
                .into(),
            ),
            (
                "heatmap",
                Heatmap {
                    matrix: matrix(),
                    ..Heatmap::default()
                }
                .into(),
            ),
            (
                "confusion",
                Confusion {
                    counts: matrix(),
                    names: Vec::new(),
                }
                .into(),
            ),
            (
                "clustermap",
                Clustermap {
                    matrix: matrix(),
                    names: Vec::new(),
                }
                .into(),
            ),
            ("video", frames.into()),
        ];
        plots
            .into_iter()
            .map(|(name, plot)| (name.to_owned(), plot))
            .collect()
    }

    #[test]
    fn tensorboard_reads_every_kind_of_value() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TensorBoard::open(dir.path(), None).unwrap();
        sink.write(&Record {
            step: 7,
            scalars: vec![("train/loss".to_owned(), 1.5), ("bad".to_owned(), f64::NAN)],
            texts: vec![("sample".to_owned(), "a|b\n<c>".to_owned())],
            plots: every_kind(),
        })
        .unwrap();
        sink.flush().unwrap();

        let Some(found) = read_back(dir.path()) else {
            return;
        };
        assert_eq!(found["scalars"]["train/loss"], json!([[7, 1.5]]));
        assert_eq!(found["scalars"]["bad"], json!([[7, "NaN"]]));
        assert_eq!(
            found["texts"]["sample/text_summary"],
            json!([[7, "a|b\n<c>"]])
        );
        assert_eq!(
            found["texts"]["table/text_summary"],
            json!([[
                7,
                "| prompt | text |\n| --- | --- |\n| a\\|b | Once upon |\n"
            ]])
        );
        let histogram = &found["histograms"]["histogram"][0];
        let numbers = histogram.as_array().unwrap();
        assert_eq!(numbers[0], 7);
        assert_eq!(numbers[1..6], [0.0, 4.0, 4.0, 6.0, 18.0].map(Value::from));
        assert_eq!(numbers[6].as_array().unwrap().len(), 64);
        let counts = numbers[7].as_array().unwrap();
        assert_eq!(
            (&counts[0], &counts[16], &counts[63]),
            (&json!(1.0), &json!(2.0), &json!(1.0))
        );
        let images = found["images"].as_object().unwrap();
        assert_eq!(images.len(), 8);
        for (name, image) in images {
            let gif_or_png = if name == "video" {
                "R0lGODlh"
            } else {
                "iVBORw0K"
            };
            assert_eq!(
                (&image[0][0], &image[0][3]),
                (&json!(7), &json!(gif_or_png)),
                "{name}"
            );
        }
        assert_eq!(images["picture"][0], json!([7, 3, 2, "iVBORw0K"]));
        assert!(images["heatmap"][0][1].as_u64() > Some(100));
    }
}
