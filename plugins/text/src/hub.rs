//! A file on a Hugging Face hub as a plain reader that survives broken connections.
//! It streams: nothing is stored, and nothing is known about what the bytes mean.

use std::{
    env,
    io::{self, Read},
    path::PathBuf,
    thread,
    time::Duration,
};

use ureq::{Agent, Body, http::Response};

use crate::error::TextError;

/// How to reach a hub.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// Sent as a bearer token to the endpoint, and never to a host that it redirects to.
    pub token: Option<String>,
    /// Attempts without one new byte before giving up.
    pub max_attempts: u32,
    /// Pause before the second attempt; doubles for each further one, up to 30 s.
    pub first_pause: Duration,
}

impl Hub {
    /// `$HF_ENDPOINT`, or huggingface.co; `$HF_TOKEN`, or the file that `huggingface-cli login` wrote.
    pub fn from_env() -> Self {
        let endpoint = env::var("HF_ENDPOINT")
            .ok()
            .filter(|value| !value.trim().is_empty());
        Self {
            endpoint: endpoint
                .unwrap_or_else(|| "https://huggingface.co".to_owned())
                .trim()
                .trim_end_matches('/')
                .to_owned(),
            token: env::var("HF_TOKEN")
                .ok()
                .or_else(stored_token)
                .map(|token| token.trim().to_owned())
                .filter(|token| !token.is_empty()),
            max_attempts: 6,
            first_pause: Duration::from_secs(1),
        }
    }

    /// Opens `<endpoint>/<file>`.
    ///
    /// # Errors
    /// The server refuses, or cannot be reached in [`Self::max_attempts`] attempts.
    pub fn open(&self, file: &str) -> Result<HubFile, TextError> {
        let agent = Agent::new_with_config(
            Agent::config_builder()
                .http_status_as_error(false)
                // A compressed transfer would make lengths and ranges those of other bytes.
                .accept_encoding("identity")
                .user_agent(concat!("moeut-host/", env!("CARGO_PKG_VERSION")))
                .timeout_connect(Some(Duration::from_secs(30)))
                // A server that falls silent is a broken connection.
                .timeout_per_read(Some(Duration::from_mins(1)))
                .build(),
        );
        let mut opened = HubFile {
            hub: self.clone(),
            url: format!("{}/{file}", self.endpoint),
            agent,
            body: None,
            position: 0,
            length: None,
            etag: None,
            failures: 0,
        };
        opened.connect()?;
        Ok(opened)
    }
}

fn stored_token() -> Option<String> {
    let home = env::var_os("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache/huggingface")))?;
    std::fs::read_to_string(home.join("token")).ok()
}

/// A file of a hub, read from its beginning to its end.
///
/// A cut connection is resumed with a range request; a mirror that ignores ranges is read again up to the place.
/// The end is only believed if the announced length was reached.
pub struct HubFile {
    hub: Hub,
    url: String,
    agent: Agent,
    body: Option<Box<dyn Read + Send>>,
    position: u64,
    length: Option<u64>,
    etag: Option<String>,
    failures: u32,
}

impl HubFile {
    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Connects until an answer with a body is there that continues at `position`.
    fn connect(&mut self) -> Result<(), TextError> {
        loop {
            match self.request() {
                Ok(response) => match response.status().as_u16() {
                    200 | 206 => match self.accept(response) {
                        Ok(()) => return Ok(()),
                        Err(reason) => self.pause_or_give_up(reason, None)?,
                    },
                    status @ (408 | 429 | 500..=599) => {
                        let pause = retry_after(&response);
                        self.pause_or_give_up(format!("the server answered {status}"), pause)?;
                    }
                    status => {
                        return Err(TextError::HttpStatus {
                            url: self.url.clone(),
                            status,
                        });
                    }
                },
                Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_))) => {
                    return Err(self.network_error(error.to_string()));
                }
                Err(error) => self.pause_or_give_up(error.to_string(), None)?,
            }
        }
    }

    fn request(&self) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.get(&self.url);
        if let Some(token) = &self.hub.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if self.position > 0 {
            request = request.header("Range", format!("bytes={}-", self.position));
            // A weak tag is not allowed here; without the header, the length still tells a changed file.
            if let Some(etag) = self.etag.as_deref().filter(|etag| !etag.starts_with("W/")) {
                request = request.header("If-Range", etag);
            }
        }
        request.call()
    }

    /// Takes the body of a good answer, positioned where the reader stands.
    fn accept(&mut self, response: Response<Body>) -> Result<(), String> {
        let header = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let is_partial = response.status().as_u16() == 206;
        let announced = header("content-length").and_then(|text| text.parse::<u64>().ok());
        let start = if is_partial {
            let range = header("content-range").and_then(parse_content_range);
            range.ok_or("a partial answer without a `Content-Range`")?.0
        } else {
            0
        };
        if start > self.position {
            return Err(format!(
                "asked for byte {} and got byte {start}",
                self.position
            ));
        }
        let length = match header("content-range")
            .filter(|_| is_partial)
            .and_then(parse_content_range)
        {
            Some((_, Some(total))) => Some(total),
            _ => announced.and_then(|rest| rest.checked_add(start)),
        };
        let etag = header("etag").map(str::to_owned);
        // Not every answer of a mirror has both; what is known must agree.
        if differ(self.length, length) || differ(self.etag.as_deref(), etag.as_deref()) {
            return Err("the file changed on the server meanwhile".to_owned());
        }
        self.length = self.length.or(length);
        self.etag = self.etag.take().or(etag);
        let mut body = response.into_body().into_reader();
        let already_read = self.position - start;
        let skipped = io::copy(&mut body.by_ref().take(already_read), &mut io::sink());
        match skipped {
            Ok(n) if n == already_read => {
                self.body = Some(Box::new(body));
                Ok(())
            }
            Ok(n) => Err(format!("the connection ended at byte {}", start + n)),
            Err(error) => Err(error.to_string()),
        }
    }

    fn pause_or_give_up(
        &mut self,
        reason: String,
        asked: Option<Duration>,
    ) -> Result<(), TextError> {
        self.failures += 1;
        if self.failures >= self.hub.max_attempts {
            return Err(self.network_error(reason));
        }
        let doubled = self
            .hub
            .first_pause
            .saturating_mul(1 << (self.failures - 1).min(10));
        thread::sleep(asked.unwrap_or(doubled).min(Duration::from_secs(30)));
        Ok(())
    }

    fn network_error(&self, reason: String) -> TextError {
        TextError::Network {
            url: self.url.clone(),
            attempts: self.failures.max(1),
            position: self.position,
            reason,
        }
    }
}

impl Read for HubFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if self.body.is_none() {
                self.connect().map_err(io::Error::other)?;
            }
            let Some(body) = self.body.as_mut() else {
                continue;
            };
            let reason = match body.read(buffer) {
                Ok(0) if self.length.is_none_or(|length| self.position == length) => return Ok(0),
                Ok(0) => format!(
                    "the connection ended at byte {} of {:?}",
                    self.position,
                    self.length.unwrap_or(0)
                ),
                Ok(n) => {
                    self.position += n as u64;
                    self.failures = 0;
                    return Ok(n);
                }
                Err(error) => error.to_string(),
            };
            self.body = None;
            self.pause_or_give_up(reason, None)
                .map_err(io::Error::other)?;
        }
    }
}

fn differ<T: PartialEq>(first: Option<T>, second: Option<T>) -> bool {
    first
        .zip(second)
        .is_some_and(|(first, second)| first != second)
}

/// `bytes 100-199/200` → start 100, total 200 (or none for `*`).
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split_once('-')?.0.parse().ok()?;
    Some((start, total.parse().ok()))
}

/// The seconds of a `Retry-After`; its other form, a date, is left to our own pauses.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let seconds = response
        .headers()
        .get("retry-after")?
        .to_str()
        .ok()?
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// A server on this machine that answers the n-th connection with the n-th function, then is gone.
    fn serve(answers: Vec<fn(&str, &mut TcpStream)>) -> (Hub, thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let request: Vec<String> = BufReader::new(stream.try_clone().unwrap())
                    .lines()
                    .map(Result::unwrap)
                    .take_while(|line| !line.is_empty())
                    .collect();
                answer(&request.join("\n").to_lowercase(), &mut stream);
            }
        });
        let hub = Hub {
            endpoint,
            token: Some("t0ken".to_owned()),
            max_attempts: 3,
            first_pause: Duration::from_millis(1),
        };
        (hub, server)
    }

    fn content() -> Vec<u8> {
        (0..100_000u32).flat_map(u32::to_le_bytes).collect()
    }

    fn cut_after_100_000(_: &str, stream: &mut TcpStream) {
        let head =
            "HTTP/1.1 200 OK\r\nContent-Length: 400000\r\nETag: \"a\"\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&content()[..100_000]).unwrap();
    }

    fn rest(request: &str, stream: &mut TcpStream) {
        let range = request
            .lines()
            .find_map(|line| line.strip_prefix("range: bytes="))
            .unwrap();
        assert!(request.contains("if-range: \"a\""), "{request}");
        assert!(request.contains("authorization: bearer t0ken"), "{request}");
        let start: usize = range.trim_end_matches('-').parse().unwrap();
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-399999/400000\r\nETag: \"a\"\r\nConnection: close\r\n\r\n",
            400_000 - start
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&content()[start..]).unwrap();
    }

    fn all_from_the_start(_: &str, stream: &mut TcpStream) {
        let head =
            "HTTP/1.1 200 OK\r\nContent-Length: 400000\r\nETag: \"a\"\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&content()).unwrap();
    }

    fn busy(_: &str, stream: &mut TcpStream) {
        stream
            .write_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
    }

    fn not_found(_: &str, stream: &mut TcpStream) {
        stream
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
    }

    fn read_all(hub: &Hub) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        hub.open("a/b.gz")
            .map_err(io::Error::other)?
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn a_cut_connection_is_resumed_where_it_broke() {
        let (hub, server) = serve(vec![busy, cut_after_100_000, busy, rest]);
        assert!(read_all(&hub).unwrap() == content());
        server.join().unwrap();
    }

    #[test]
    fn a_mirror_that_ignores_ranges_is_read_up_to_the_place() {
        let (hub, server) = serve(vec![cut_after_100_000, all_from_the_start]);
        assert!(read_all(&hub).unwrap() == content());
        server.join().unwrap();
    }

    #[test]
    fn a_short_file_is_an_error_and_not_an_end() {
        let (hub, server) = serve(vec![cut_after_100_000, busy, busy]);
        let error = read_all(&hub).unwrap_err().to_string();
        assert!(
            error.contains("failed 3 times in a row at byte 100000"),
            "{error}"
        );
        server.join().unwrap();
    }

    #[test]
    fn a_missing_file_names_its_address_and_what_to_do() {
        let (hub, server) = serve(vec![not_found]);
        let Err(error) = hub.open("a/b.gz") else {
            panic!("a 404 was taken for a file")
        };
        assert_eq!(
            error.to_string(),
            format!("`{}/a/b.gz` answered 404", hub.endpoint)
        );
        assert!(error.help().contains("HF_ENDPOINT"), "{}", error.help());
        server.join().unwrap();
    }
}
