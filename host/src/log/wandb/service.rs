//! W&B's own service, `wandb-core`: where it is, how it is started, and the requests that have it upload a run.
//!
//! The service follows a `.wandb` file while it grows, as it does for `wandb beta sync --live`. Its protocol is private to
//! W&B's releases. A message is `W`, its length as u32 (little endian), and `ServerRequest` or `ServerResponse` of
//! `wandb_server.proto`, on a Unix socket whose path the service writes into a file.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::super::protobuf::{Message, bytes_of, integer_of};
use super::records::repeated;
use super::settings::Settings;

/// Releases whose service this was tried with, and how one of them is installed. Older ones never get to the rows.
const TESTED: [&str; 2] = ["0.30.", "0.31."];
pub(super) const INSTALL: &str = "pip install wandb==0.31.0";

/// Names a service directly.
const OVERRIDE: &str = "MOEUT_WANDB_CORE";

/// How long the service may take to start, to answer what it always answers at once, and to end.
const STARTING: Duration = Duration::from_secs(30);
const ENDING: Duration = Duration::from_secs(2);

/// How long a call waits for an answer before it lets the caller look around.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// An installed service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Installed {
    pub(super) path: PathBuf,
    /// As it says itself.
    pub(super) version: String,
}

impl Installed {
    /// Looks for it: `MOEUT_WANDB_CORE`, else the Python package of the `wandb` or the Python on the path.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn find() -> Result<Self, String> {
        let path = match std::env::var_os(OVERRIDE) {
            Some(path) => PathBuf::from(path),
            None => package().ok_or("W&B is not installed")?,
        };
        let help = Command::new(&path)
            .arg("--help")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("cannot start `{}`: {error}", path.display()))?;
        let help = [help.stdout, help.stderr].concat();
        let help = String::from_utf8_lossy(&help);
        let version = help
            .lines()
            .find_map(|line| line.trim().strip_prefix("Version: "));
        let version = version.ok_or_else(|| format!("`{}` is no W&B service", path.display()))?;
        Ok(Self {
            path,
            version: version.to_owned(),
        })
    }

    /// Whether this program was tried with it.
    pub(super) fn is_tested(&self) -> bool {
        TESTED
            .iter()
            .any(|release| self.version.starts_with(release))
    }
}

/// The service in the package that a Python finds.
fn package() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // A `wandb` that is installed apart from everything else has its own Python in its first line.
    let own = std::env::split_paths(&path).find_map(|dir| interpreter(&dir.join("wandb")));
    let others = ["python3", "python"].map(PathBuf::from);
    own.into_iter()
        .chain(others)
        .find_map(|python| ask(&python))
}

fn interpreter(script: &Path) -> Option<PathBuf> {
    let text = std::fs::read(script).ok()?;
    let line = text.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_prefix("#!")?;
    let program = line.split_whitespace().next()?;
    program.contains("python").then(|| PathBuf::from(program))
}

fn ask(python: &Path) -> Option<PathBuf> {
    const QUESTION: &str = "import importlib.util as u; s = u.find_spec('wandb'); print(s.submodule_search_locations[0])";
    let answer = Command::new(python)
        .args(["-c", QUESTION])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let folder = String::from_utf8(answer.stdout).ok()?;
    let service = Path::new(folder.trim()).join("bin/wandb-core");
    (answer.status.success() && service.is_file()).then_some(service)
}

/// A running service.
#[derive(Debug)]
pub(super) struct Service {
    child: Child,
    socket: UnixStream,
    /// Bytes of a message that has not come completely.
    received: Vec<u8>,
}

/// What the service says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A number for the upload that was asked for.
    Ready(String),
    /// Lines for the user.
    News(Vec<Line>),
    /// The upload is over.
    Done(Vec<Line>),
    /// The service does not understand, or cannot do it.
    Refused(String),
    /// Of no interest.
    Other,
}

/// A line for the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) is_error: bool,
    pub(super) text: String,
}

impl Service {
    /// Starts it; `folder` is for its log. It ends with this process, however that ends.
    ///
    /// # Errors
    /// If it does not come up.
    pub(super) fn start(installed: &Installed, folder: &Path) -> Result<Self, String> {
        let cannot = |error: &dyn std::fmt::Display| {
            format!("`{}` does not start: {error}", installed.path.display())
        };
        std::fs::create_dir_all(folder).map_err(|error| cannot(&error))?;
        let log =
            std::fs::File::create(folder.join("service.log")).map_err(|error| cannot(&error))?;
        let place = tempfile::tempdir().map_err(|error| cannot(&error))?;
        let port_file = place.path().join("port");
        let child = Command::new(&installed.path)
            .args(["--no-observability", "--os-pid-shutdown", "--pid"])
            .arg(std::process::id().to_string())
            .arg("--port-filename")
            .arg(&port_file)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|error| cannot(&error))?)
            .stderr(log)
            // Ctrl-C in a terminal is for the training, which tells the service when to end.
            .process_group(0)
            .spawn()
            .map_err(|error| cannot(&error))?;
        let mut starting = Starting(Some(child));
        let socket = starting
            .socket(&port_file)
            .and_then(|path| UnixStream::connect(path).map_err(|error| error.to_string()))
            .map_err(|why| cannot(&why))?;
        socket
            .set_read_timeout(Some(TICK))
            .and_then(|()| socket.set_write_timeout(Some(STARTING)))
            .map_err(|error| cannot(&error))?;
        let child = starting.0.take().ok_or_else(|| cannot(&"it is gone"))?;
        Ok(Self {
            child,
            socket,
            received: Vec::new(),
        })
    }

    /// Asks to upload a file that still grows.
    ///
    /// # Errors
    /// If the service is gone.
    pub(super) fn prepare(&mut self, file: &Path, settings: &Settings) -> Result<(), String> {
        let content = Message::default()
            .bytes(1, file.as_os_str().as_encoded_bytes())
            .bytes(2, &encode(settings).0)
            .integer(6, 1);
        self.send(11, &content)
    }

    /// Begins the upload that [`Answer::Ready`] named.
    ///
    /// # Errors
    /// If the service is gone.
    pub(super) fn upload(&mut self, id: &str) -> Result<(), String> {
        let content = Message::default().bytes(1, id.as_bytes()).integer(2, 1);
        self.send(12, &content)
    }

    /// Asks for news of the upload.
    ///
    /// # Errors
    /// If the service is gone.
    pub(super) fn ask_for_news(&mut self, id: &str) -> Result<(), String> {
        self.send(13, &Message::default().bytes(1, id.as_bytes()))
    }

    /// Tells the service to end, and waits a little.
    pub(super) fn end(mut self) {
        if self.send(7, &Message::default()).is_ok() {
            let deadline = Instant::now() + ENDING;
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                std::thread::sleep(TICK / 10);
            }
        }
    }

    fn send(&mut self, request: u32, content: &Message) -> Result<(), String> {
        // The answer to each request tells by its kind what it answers.
        let message = Message::default()
            .bytes(request, &content.0)
            .bytes(10, b"moeut");
        let length = u32::try_from(message.0.len()).map_err(|error| error.to_string())?;
        let mut frame = vec![b'W'];
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&message.0);
        self.socket
            .write_all(&frame)
            .map_err(|error| format!("the W&B service is gone: {error}"))
    }

    /// The next answer; nothing if none comes for a moment.
    ///
    /// # Errors
    /// If the service is gone, or answers what is no message.
    pub(super) fn receive(&mut self) -> Result<Option<Answer>, String> {
        loop {
            if let Some(answer) = take_message(&mut self.received)? {
                return Ok(Some(understand(&answer)));
            }
            let mut part = [0; 4096];
            match self.socket.read(&mut part) {
                Ok(0) => return Err("the W&B service ended early".to_owned()),
                Ok(n) => self.received.extend_from_slice(&part[..n]),
                Err(error) if is_timeout(&error) => return Ok(None),
                Err(error) => return Err(format!("the W&B service is gone: {error}")),
            }
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // One that has ended has nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// A service that has not said yet where it listens; killed if it never does.
struct Starting(Option<Child>);

impl Starting {
    fn socket(&mut self, port_file: &Path) -> Result<String, String> {
        let deadline = Instant::now() + STARTING;
        while Instant::now() < deadline {
            let text = std::fs::read_to_string(port_file).unwrap_or_default();
            if text.trim_end().ends_with("EOF") {
                let path = text.lines().find_map(|line| line.strip_prefix("unix="));
                return path
                    .map(str::to_owned)
                    .ok_or_else(|| "it offers no Unix socket".to_owned());
            }
            if let Some(child) = &mut self.0
                && let Ok(Some(status)) = child.try_wait()
            {
                return Err(format!("it ended at once: {status}"));
            }
            std::thread::sleep(TICK / 10);
        }
        Err(format!("it says nothing for {} s", STARTING.as_secs()))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `Settings` of `wandb_settings.proto`: every value is a message of its own.
fn encode(settings: &Settings) -> Message {
    let text = |value: &str| Message::default().bytes(1, value.as_bytes()).0;
    // The dashboard, whose address the service shows, is beside the server for W&B's own, and at the same address for others.
    let dashboard = settings.base_url.replace("://api.wandb.ai", "://wandb.ai");
    let mut message = Message::default()
        .bytes(55, &text(&settings.api_key))
        .bytes(57, &text(&settings.base_url))
        .bytes(202, &text(&dashboard));
    if let Some(seconds) = settings.upload_interval {
        let interval = Message::default().double(1, seconds);
        message = message.bytes(175, &interval.0);
    }
    message
}

/// Cuts a whole message off the front of what has come.
fn take_message(received: &mut Vec<u8>) -> Result<Option<Vec<u8>>, String> {
    const HEADER: usize = 5;
    let Some((header, rest)) = received.split_first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let [magic, length @ ..] = *header;
    if magic != b'W' {
        return Err("the W&B service speaks another protocol".to_owned());
    }
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if rest.len() < length {
        return Ok(None);
    }
    let message = rest[..length].to_vec();
    received.drain(..HEADER + length);
    Ok(Some(message))
}

fn understand(response: &[u8]) -> Answer {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if let Some(error) = bytes_of(response, 200) {
        return Answer::Refused(bytes_of(error, 1).map(text).unwrap_or_default());
    }
    if let Some(ready) = bytes_of(response, 11) {
        return Answer::Ready(bytes_of(ready, 1).map(text).unwrap_or_default());
    }
    if let Some(done) = bytes_of(response, 12) {
        return Answer::Done(lines(done, 1));
    }
    match bytes_of(response, 13) {
        Some(news) => Answer::News(lines(news, 2)),
        None => Answer::Other,
    }
}

fn lines(message: &[u8], number: u64) -> Vec<Line> {
    /// Python's number for warnings.
    const WARNING: u64 = 30;
    let line = |line: &[u8]| Line {
        is_error: integer_of(line, 1).unwrap_or(0) >= WARNING,
        text: String::from_utf8_lossy(bytes_of(line, 2).unwrap_or_default()).into_owned(),
    };
    repeated(message, number).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_one_by_one_however_they_come() {
        let stream = b"W\x02\0\0\0abW\x00\0\0\0W\x01\0\0\0c";
        let mut received = Vec::new();
        let mut messages = Vec::new();
        for byte in stream {
            received.push(*byte);
            messages.extend(take_message(&mut received).unwrap());
        }
        assert_eq!(messages, [b"ab".to_vec(), Vec::new(), b"c".to_vec()]);
        assert!(take_message(&mut b"HTTP/1.1".to_vec()).is_err());
    }

    #[test]
    fn answers_are_understood() {
        let line = |severity, text: &str| {
            Message::default()
                .integer(1, severity)
                .bytes(2, text.as_bytes())
        };
        let news = Message::default()
            .bytes(1, b"statistics")
            .bytes(2, &line(20, "View run").0)
            .bytes(2, &line(40, "no").0);
        let response = Message::default().bytes(13, &news.0).bytes(10, b"moeut");
        let expected = [(false, "View run"), (true, "no")].map(|(is_error, text)| Line {
            is_error,
            text: text.to_owned(),
        });
        assert_eq!(understand(&response.0), Answer::News(expected.to_vec()));
        let error = Message::default().bytes(1, b"what?");
        let response = Message::default().bytes(200, &error.0);
        assert_eq!(understand(&response.0), Answer::Refused("what?".to_owned()));
        assert_eq!(understand(b""), Answer::Other);
    }

    #[test]
    fn a_script_names_its_python() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("wandb");
        for (text, expected) in [
            (
                "#!/opt/venv/bin/python3\nimport sys\n",
                Some("/opt/venv/bin/python3"),
            ),
            ("#!/usr/bin/env bash\nexec pyenv\n", None),
            ("", None),
        ] {
            std::fs::write(&script, text).unwrap();
            assert_eq!(interpreter(&script), expected.map(PathBuf::from));
        }
    }
}
