//! A server on this machine that has a folder, as a hub has its files, and misbehaves as told.
//!
//! It speaks as much HTTP/1.1 as a client needs that reads files: GET and HEAD, ranges, entity tags, one request a
//! connection.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// What is done to requests for a file instead of answering them well.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status, with `Retry-After: 0`.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// The whole file from its beginning, whatever range was asked for.
    NoRanges,
    /// So many bytes of the body, and then nothing for so long.
    Stall(usize, Duration),
}

/// One request, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Path without the leading slash.
    pub path: String,
    /// First byte of the wanted range, if there is one.
    pub start: Option<usize>,
    /// Value of `Authorization`.
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Log {
    requests: Vec<Request>,
    /// End of a path, fault, how often it is still to happen.
    faults: Vec<(String, Fault, usize)>,
}

/// A running server; it ends with the test's process.
pub struct Web {
    address: String,
    log: Arc<Mutex<Log>>,
}

impl Web {
    /// Serves what is in a folder.
    pub fn serve(folder: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("a listener has an address");
        let log = Arc::new(Mutex::new(Log::default()));
        let (folder, shared) = (folder.to_owned(), Arc::clone(&log));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (folder, log) = (folder.clone(), Arc::clone(&shared));
                // A client that goes away in the middle is what many tests are about.
                thread::spawn(move || drop(answer(stream, &folder, &log)));
            }
        });
        Self {
            address: format!("http://{address}"),
            log,
        }
    }

    /// `http://127.0.0.1:<port>`
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The next `times` requests for paths that end so meet a fault.
    pub fn fault(&self, path_end: &str, fault: Fault, times: usize) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.faults.push((path_end.to_owned(), fault, times));
    }

    /// No further faults.
    pub fn forgive(&self) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.faults.clear();
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.requests.clone()
    }
}

fn answer(mut stream: TcpStream, folder: &Path, log: &Mutex<Log>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split(' ');
    let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let mut request = Request {
        path: path.trim_start_matches('/').replace("%2B", "+"),
        start: None,
        authorization: None,
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let range = value
                    .strip_prefix("bytes=")
                    .and_then(|range| range.split_once('-'));
                request.start = range.and_then(|(start, _)| start.parse().ok());
            }
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let fault = note(log, &request);
    let is_ranged = !matches!(fault, Some(Fault::NoRanges));
    if let Some(Fault::Status(status)) = fault {
        return head(&mut stream, &status.to_string(), 0, "Retry-After: 0\r\n");
    }
    let file: PathBuf = folder.join(&request.path);
    let Ok(bytes) = fs::read(&file) else {
        return head(&mut stream, "404 Not Found", 0, "");
    };
    let start = request
        .start
        .filter(|_| is_ranged)
        .unwrap_or(0)
        .min(bytes.len());
    let body = &bytes[start..];
    let tag = format!("ETag: \"{}\"\r\n", bytes.len());
    if start == 0 {
        head(&mut stream, "200 OK", body.len(), &tag)?;
    } else {
        let (last, total) = (bytes.len() - 1, bytes.len());
        let range = format!("Content-Range: bytes {start}-{last}/{total}\r\n");
        head(
            &mut stream,
            "206 Partial Content",
            body.len(),
            &(tag + &range),
        )?;
    }
    if method == "HEAD" {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut(n_bytes)) => stream.write_all(&body[..n_bytes.min(body.len())]),
        Some(Fault::Stall(n_bytes, time)) => {
            stream.write_all(&body[..n_bytes.min(body.len())])?;
            thread::sleep(time);
            Ok(())
        }
        _ => stream.write_all(body),
    }
}

/// Keeps the request and finds its fault.
fn note(log: &Mutex<Log>, request: &Request) -> Option<Fault> {
    let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
    log.requests.push(request.clone());
    let (_, fault, times) = log
        .faults
        .iter_mut()
        .find(|(end, _, times)| *times > 0 && request.path.ends_with(end.as_str()))?;
    *times -= 1;
    Some(fault.clone())
}

fn head(stream: &mut TcpStream, status: &str, length: usize, more: &str) -> std::io::Result<()> {
    let text =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(text.as_bytes())
}
