//! What several tests need: the shared fixtures, and small shards made on the spot.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use parquet::{
    basic::{Compression as Codec, ZstdLevel},
    data_type::{ByteArray, ByteArrayType, Int64Type},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};

use crate::{
    error::TextError,
    hub::Hub,
    sentencepiece::{SentencePiece, train_bpe},
    token_cache::SEPARATOR,
};

/// The folder with fixtures and real text, or `None` where it is absent.
///
/// It is `$MOEUT_SHARED`, or `shared` beside the repository. On CI (`CI=true`) a missing folder fails the test.
pub(crate) fn shared() -> Option<PathBuf> {
    let folder = env::var_os("MOEUT_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if folder.is_dir() {
        return Some(folder);
    }
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "no shared folder at `{}`",
        folder.display()
    );
    eprintln!(
        "skipped: no shared folder at `{}` (set MOEUT_SHARED)",
        folder.display()
    );
    None
}

/// A file of `fixtures/tokenizer_json`, which Python's `tokenizers` made; see `make.py` there.
pub(crate) fn tokenizer_json(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokenizer_json");
    folder.join(name).with_extension("json")
}

/// A gzip member of JSON lines, one document each.
pub(crate) fn shard_of(documents: &[&str]) -> Vec<u8> {
    let mut lines = String::new();
    for text in documents {
        lines += &serde_json::json!({ "text": text, "url": "x" }).to_string();
        lines += "\n";
    }
    gzip(lines.as_bytes())
}

/// One gzip member.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Document `index`; all have the same number of tokens under [`tiny_tokenizer`].
pub(crate) fn sentence(index: usize) -> String {
    format!(
        "the cat {:04} sat on the mat and ate the rat",
        index % 10_000
    )
}

/// 64 pieces, learned from [`sentence`]s.
pub(crate) fn tiny_tokenizer() -> SentencePiece {
    let documents = (0..500).map(|i| Ok::<_, TextError>(sentence(i * 7) + SEPARATOR));
    SentencePiece::from_bytes(&train_bpe(documents, 64).unwrap()).unwrap()
}

/// A web server on this machine, gone when dropped.
pub(crate) struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// In lower case.
    headers: Vec<String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The first byte of a range request, else 0.
    pub(crate) fn start(&self) -> usize {
        let range = self.header("range");
        range.map_or(0, |range| {
            let first = range.strip_prefix("bytes=").unwrap();
            first.trim_end_matches('-').parse().unwrap()
        })
    }
}

/// What the server answers.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub(crate) cut: Option<usize>,
}

impl Answer {
    pub(crate) fn status(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            cut: None,
        }
    }

    pub(crate) fn whole(body: &[u8]) -> Self {
        Self {
            body: body.to_owned(),
            ..Self::status(200)
        }
    }

    /// The part of a file that was asked for, if it still has this tag; else all of it.
    pub(crate) fn file(request: &Request, body: &[u8], tag: &str) -> Self {
        let is_same = request.header("if-range").is_none_or(|given| given == tag);
        let start = if is_same { request.start() } else { 0 };
        let answer = match start {
            0 => Self::whole(body),
            start if start >= body.len() => Self::status(416),
            start => Self {
                body: body[start..].to_owned(),
                ..Self::status(206)
            }
            .with(
                "Content-Range",
                format!("bytes {start}-{}/{}", body.len() - 1, body.len()),
            ),
        };
        answer.with("ETag", tag)
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }
}

impl Server {
    /// Answers each request by `answer`, which is also told how many there were before.
    pub(crate) fn start(answer: impl Fn(&Request, usize) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (requests, is_over) = (Arc::clone(&requests), Arc::clone(&is_over));
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if is_over.load(Ordering::SeqCst) {
                        return;
                    }
                    // A client that goes away in the middle is its own business.
                    let _ = serve_one(stream, &requests, &answer);
                }
            }
        });
        Self {
            address,
            requests,
            is_over,
            thread: Some(thread),
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A hub at this address that loses no time.
    pub(crate) fn hub(&self) -> Hub {
        Hub {
            endpoint: self.url(),
            token: None,
            is_offline: false,
            max_attempts: 3,
            first_pause: Duration::from_millis(1),
        }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// What was asked for, in order.
    pub(crate) fn paths(&self) -> Vec<String> {
        self.requests().into_iter().map(|it| it.path).collect()
    }
}

fn serve_one(
    mut stream: TcpStream,
    requests: &Mutex<Vec<Request>>,
    answer: &impl Fn(&Request, usize) -> Answer,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        headers.push(line.to_lowercase());
    }
    let request = Request { path, headers };
    let n_before = {
        let mut all = requests.lock().unwrap();
        all.push(request.clone());
        all.len() - 1
    };
    let answer = answer(&request, n_before);
    let mut head = format!(
        "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n",
        answer.status,
        answer.body.len()
    );
    for (name, value) in &answer.headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    stream.write_all(head.as_bytes())?;
    stream.write_all(b"\r\n")?;
    stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())])
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        // Wakes it up, so that it sees that it is over.
        drop(TcpStream::connect(&self.address));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the server of the test failed");
        }
    }
}

/// Orders of shards and windows as NumPy makes them; `fixtures/known_answers.json` says with which version.
pub(crate) fn known_answers() -> serde_json::Value {
    serde_json::from_str(include_str!("../fixtures/known_answers.json")).unwrap()
}

/// A Parquet file of groups of 100 rows, with a column of numbers before the one of texts.
pub(crate) fn parquet_of(column: &str, rows: &[Option<&[u8]>], is_snappy: bool) -> Vec<u8> {
    let schema = format!("message m {{ optional int64 size; optional binary {column} (UTF8); }}");
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let codec = if is_snappy {
        Codec::SNAPPY
    } else {
        Codec::ZSTD(ZstdLevel::default())
    };
    let properties = WriterProperties::builder().set_compression(codec).build();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties)).unwrap();
    for rows in rows.chunks(100) {
        let mut group = writer.next_row_group().unwrap();
        let sizes: Vec<i64> = (0..).take(rows.len()).collect();
        let mut sizes_column = group.next_column().unwrap().unwrap();
        let levels = vec![1; rows.len()];
        let typed = sizes_column.typed::<Int64Type>();
        typed.write_batch(&sizes, Some(&levels), None).unwrap();
        sizes_column.close().unwrap();
        let present = rows
            .iter()
            .flatten()
            .map(|text| ByteArray::from(text.to_vec()));
        let levels: Vec<i16> = rows.iter().map(|row| i16::from(row.is_some())).collect();
        let mut texts_column = group.next_column().unwrap().unwrap();
        let typed = texts_column.typed::<ByteArrayType>();
        typed
            .write_batch(&present.collect::<Vec<_>>(), Some(&levels), None)
            .unwrap();
        texts_column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// A test that is also what its child processes run, told apart by [`is_child`].
pub(crate) fn child_of(test: &str) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env("MOEUT_TEXT_CHILD", "1");
    command
}

/// Whether this process was started by [`child_of`].
pub(crate) fn is_child() -> bool {
    env::var_os("MOEUT_TEXT_CHILD").is_some()
}
