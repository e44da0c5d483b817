//! A file on a web server, such as a Hugging Face hub, as a plain reader that survives broken connections.
//! Nothing is stored here, and nothing is known about what the bytes mean; [`crate::download`] stores files.

use std::{
    collections::hash_map::RandomState,
    env,
    hash::BuildHasher,
    io::{self, Read},
    path::PathBuf,
    thread,
    time::Duration,
};

use ureq::{Agent, Body, http::Response};

use crate::error::TextError;

/// Where files of the hub are, unless `$HF_ENDPOINT` names a mirror.
pub const PUBLIC_ENDPOINT: &str = "https://huggingface.co";

/// The longest pause that a server may ask for.
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// The longest pause that we make by ourselves.
const LONGEST_OWN_PAUSE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 10;

/// How to reach a hub, and any other server with the same manners.
///
/// Proxies are those of `$HTTPS_PROXY`, `$HTTP_PROXY`, `$ALL_PROXY` and `$NO_PROXY`.
#[derive(Debug, Clone)]
pub struct Hub {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// Sent as a bearer token to the endpoint, and never to another host, also if the endpoint redirects to it.
    pub token: Option<String>,
    /// Whether `$HF_HUB_OFFLINE` forbids any connection.
    pub is_offline: bool,
    /// Attempts without one new byte before giving up.
    pub max_attempts: u32,
    /// Pause before the second attempt; doubles for each further one, up to 30 s, less up to a half by chance, so
    /// that many processes do not come back at the same moment.
    pub first_pause: Duration,
}

impl Hub {
    /// `$HF_ENDPOINT`, or huggingface.co; `$HF_TOKEN`, or the file that `hf auth login` wrote; `$HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let set = |name| {
            let value = env::var(name).ok()?.trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        Self {
            endpoint: set("HF_ENDPOINT")
                .unwrap_or_else(|| PUBLIC_ENDPOINT.to_owned())
                .trim_end_matches('/')
                .to_owned(),
            token: set("HF_TOKEN").or_else(stored_token),
            is_offline: set("HF_HUB_OFFLINE").is_some_and(|value| {
                ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
            }),
            max_attempts: 6,
            first_pause: Duration::from_secs(1),
        }
    }

    /// The address of a file, given as a path on the hub or as an address; one on the public hub is moved to the
    /// endpoint.
    pub fn url(&self, file: &str) -> String {
        match file.strip_prefix(PUBLIC_ENDPOINT) {
            Some(path) if path.starts_with('/') => format!("{}{path}", self.endpoint),
            _ if file.contains("://") => file.to_owned(),
            _ => format!("{}/{file}", self.endpoint),
        }
    }

    /// Opens a file, given as for [`Self::url`], at its beginning.
    ///
    /// # Errors
    /// The server refuses, cannot be reached in [`Self::max_attempts`] attempts, or the hub is to be left alone.
    pub fn open(&self, file: &str) -> Result<HubFile, TextError> {
        self.open_at(file, 0, None)
    }

    /// Opens a file at byte `position`, if `validator` shows that it is still the file that the bytes before came
    /// from; else at its beginning. [`HubFile::position`] tells which.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_at(
        &self,
        file: &str,
        position: u64,
        validator: Option<String>,
    ) -> Result<HubFile, TextError> {
        let url = self.url(file);
        if self.is_offline {
            return Err(TextError::Offline { url });
        }
        let agent = Agent::new_with_config(
            Agent::config_builder()
                .http_status_as_error(false)
                // Redirects are followed here, where it is known who may see the token.
                .max_redirects(0)
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
            url,
            agent,
            body: None,
            position: if validator.is_some() { position } else { 0 },
            is_fresh: true,
            length: None,
            validator,
            sha256: None,
            failures: 0,
        };
        opened.connect()?;
        opened.is_fresh = false;
        Ok(opened)
    }
}

fn stored_token() -> Option<String> {
    let home = env::var_os("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache/huggingface")))?;
    let token = std::fs::read_to_string(home.join("token")).ok()?;
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

/// A file of a server, read to its end.
///
/// A cut connection is resumed with a range request; a mirror that ignores ranges is read again up to the place.
/// The end is only believed if the announced length was reached.
pub struct HubFile {
    hub: Hub,
    url: String,
    agent: Agent,
    body: Option<Box<dyn Read + Send>>,
    position: u64,
    /// Nothing has been handed out, so that a file that is another one now may be taken from its beginning.
    is_fresh: bool,
    length: Option<u64>,
    /// What tells one content of the address from another: a strong `ETag`, or else `Last-Modified`.
    validator: Option<String>,
    sha256: Option<String>,
    failures: u32,
}

/// What became of one good answer.
enum Accepted {
    Body,
    /// The file is another one than that of the bytes before.
    Changed,
}

impl HubFile {
    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Bytes before the next one to be read.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of the whole file, if the server says.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// What [`Hub::open_at`] needs to go on with this content later; none if the server does not tell contents apart.
    pub fn validator(&self) -> Option<&str> {
        self.validator.as_deref()
    }

    /// SHA-256 of the whole file in hexadecimal, if the server says: the hub does for large files.
    pub fn sha256(&self) -> Option<&str> {
        self.sha256.as_deref()
    }

    /// Connects until an answer with a body is there that continues at `position`.
    fn connect(&mut self) -> Result<(), TextError> {
        loop {
            match self.request() {
                Ok(response) => match response.status().as_u16() {
                    200 | 206 => match self.accept(response) {
                        Ok(Accepted::Body) => return Ok(()),
                        Ok(Accepted::Changed) if self.is_fresh => self.forget(),
                        Ok(Accepted::Changed) => {
                            return Err(TextError::FileChanged {
                                url: self.url.clone(),
                                position: self.position,
                            });
                        }
                        Err(reason) => self.pause_or_give_up(reason, None)?,
                    },
                    // What was kept is longer than the file is.
                    416 if self.is_fresh && self.position > 0 => self.forget(),
                    status @ (408 | 429 | 500..=599) => {
                        let pause = retry_after(&response);
                        self.pause_or_give_up(format!("the server answered {status}"), pause)?;
                    }
                    status => {
                        return Err(TextError::HttpStatus {
                            url: self.url.clone(),
                            status,
                            has_token: self.hub.token.is_some(),
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

    /// One request, through all redirects.
    fn request(&mut self) -> Result<Response<Body>, ureq::Error> {
        let mut url = self.url.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(token) = &self.hub.token
                && origin(&url) == origin(&self.hub.endpoint)
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if self.position > 0 {
                request = request.header("Range", format!("bytes={}-", self.position));
                // Without one, the length still tells many a changed file.
                if let Some(validator) = &self.validator {
                    request = request.header("If-Range", validator);
                }
            }
            let response = request.call()?;
            if origin(&url) == origin(&self.hub.endpoint) {
                self.sha256 = sha256_of(&response);
            }
            match header(&response, "location") {
                Some(location) if response.status().is_redirection() => {
                    url = redirected(&url, location);
                }
                _ => return Ok(response),
            }
        }
        Err(ureq::Error::TooManyRedirects)
    }

    /// Takes the body of a good answer, positioned where the reader stands.
    fn accept(&mut self, response: Response<Body>) -> Result<Accepted, String> {
        let is_partial = response.status().as_u16() == 206;
        let announced = header(&response, "content-length").and_then(|text| text.parse().ok());
        let (start, length) = if is_partial {
            let range = header(&response, "content-range").and_then(parse_content_range);
            let (start, total) = range.ok_or("a partial answer without a `Content-Range`")?;
            (
                start,
                total.or(announced.and_then(|rest: u64| rest.checked_add(start))),
            )
        } else {
            (0, announced)
        };
        if start > self.position {
            return Err(format!(
                "asked for byte {} and got byte {start}",
                self.position
            ));
        }
        let validator = validator_of(&response);
        // Not every answer of a mirror has both; what is known must agree. A range was asked for on condition that
        // the file is the same, so that a whole answer means another one, or a server that knows no ranges.
        if differ(self.length, length) || differ(self.validator.as_deref(), validator.as_deref()) {
            return Ok(Accepted::Changed);
        }
        if self.is_fresh && self.position > 0 && validator.is_none() {
            return Ok(Accepted::Changed);
        }
        self.length = self.length.or(length);
        self.validator = self.validator.take().or(validator);
        let mut body = response.into_body().into_reader();
        let already_read = self.position - start;
        let skipped = io::copy(&mut body.by_ref().take(already_read), &mut io::sink());
        match skipped {
            Ok(n) if n == already_read => {
                self.body = Some(Box::new(body));
                Ok(Accepted::Body)
            }
            Ok(n) => Err(format!("the connection ended at byte {}", start + n)),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Starts over at the beginning of whatever the server has.
    fn forget(&mut self) {
        self.position = 0;
        self.length = None;
        self.validator = None;
        self.sha256 = None;
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
            .saturating_mul(1 << (self.failures - 1).min(10))
            .min(LONGEST_OWN_PAUSE);
        // A hasher with keys of chance is the chance that the standard library has.
        let chance = RandomState::new().hash_one(self.failures) as f64 / u64::MAX as f64;
        let own = doubled.mul_f64(1.0 - chance / 2.0);
        thread::sleep(asked.map_or(own, |asked| asked.min(LONGEST_PAUSE)));
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
                    "the connection ended at byte {} of {}",
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

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// A weak `ETag` must not be used for ranges.
fn validator_of(response: &Response<Body>) -> Option<String> {
    header(response, "etag")
        .filter(|etag| !etag.starts_with("W/"))
        .or_else(|| header(response, "last-modified"))
        .map(str::to_owned)
}

/// The hub names the checksum of a large file in its redirect, or as the `ETag` itself. The `ETag` of the server that
/// it redirects to looks alike and may be another hash.
fn sha256_of(response: &Response<Body>) -> Option<String> {
    ["x-linked-etag", "etag"].into_iter().find_map(|name| {
        let text = header(response, name)?.trim_matches('"');
        let is_sha256 = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_sha256.then(|| text.to_ascii_lowercase())
    })
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{host}").to_lowercase()
}

/// The address that a `Location` means.
fn redirected(from: &str, location: &str) -> String {
    let origin = &from[..origin(from).len()];
    if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        let scheme = origin
            .split_once("://")
            .map_or("https", |(scheme, _)| scheme);
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else {
        let path = from.split(['?', '#']).next().unwrap_or(from);
        let folder = path[origin.len()..].rfind('/').unwrap_or(0);
        format!("{}/{location}", &path[..origin.len() + folder])
    }
}

/// `bytes 100-199/200` → start 100, total 200 (or none for `*`).
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split_once('-')?.0.parse().ok()?;
    Some((start, total.parse().ok()))
}

/// The seconds of a `Retry-After`; its other form, a date, is left to our own pauses.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let seconds = header(response, "retry-after")?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use super::*;
    use crate::testing::{self, Answer, Server};

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
            is_offline: false,
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

    #[test]
    fn a_server_may_ask_for_a_longer_pause() {
        let server = Server::start(|_, n_before| match n_before {
            0 => Answer::status(429).with("Retry-After", "1"),
            _ => Answer::whole(b"x"),
        });
        let start = Instant::now();
        assert_eq!(read_all(&server.hub()).unwrap(), b"x");
        assert!(start.elapsed() >= Duration::from_secs(1));
    }

    #[test]
    fn redirects_lead_to_where_browsers_go() {
        let from = "https://a.org/x/y?z=1/2";
        for (location, to) in [
            ("https://b.org/c", "https://b.org/c"),
            ("//b.org/c", "https://b.org/c"),
            ("/c", "https://a.org/c"),
            ("c?d", "https://a.org/x/c?d"),
        ] {
            assert_eq!(redirected(from, location), to);
        }
        assert_eq!(redirected("https://a.org", "c"), "https://a.org/c");
        let server =
            Server::start(|request, _| Answer::status(302).with("Location", request.path.clone()));
        let error = server.hub().open("round").err().unwrap();
        assert!(error.to_string().contains("too many redirects"), "{error}");
    }

    #[test]
    fn the_environment_says_where_the_hub_is_and_who_we_are() {
        let name = "hub::tests::the_environment_says_where_the_hub_is_and_who_we_are";
        if testing::is_child() {
            let hub = Hub::from_env();
            assert_eq!(hub.endpoint, "https://mirror.example/hf");
            assert_eq!(hub.token.as_deref(), Some("from the file"));
            assert!(hub.is_offline);
            return;
        }
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from the file\n").unwrap();
        let output = testing::child_of(name)
            .env("HF_ENDPOINT", " https://mirror.example/hf/ ")
            .env("HF_HOME", home.path())
            .env("HF_TOKEN", "")
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }

    #[test]
    fn the_environments_proxy_is_asked_unless_it_is_forbidden() {
        let name = "hub::tests::the_environments_proxy_is_asked_unless_it_is_forbidden";
        if testing::is_child() {
            let hub = Hub {
                endpoint: "http://hub.invalid".to_owned(),
                token: None,
                is_offline: false,
                max_attempts: 1,
                first_pause: Duration::ZERO,
            };
            assert!(hub.open("x").is_err(), "nobody is there");
            return;
        }
        for (variable, forbidden, n_asked) in [
            ("HTTP_PROXY", "", 1),
            ("ALL_PROXY", "", 1),
            ("HTTP_PROXY", "hub.invalid", 0),
        ] {
            let proxy = Server::start(|_, _| Answer::status(403));
            let mut child = testing::child_of(name);
            for other in ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"] {
                child.env_remove(other).env_remove(other.to_lowercase());
            }
            child.env(variable, proxy.url()).env("NO_PROXY", forbidden);
            assert!(child.output().unwrap().status.success());
            let asked = proxy.paths();
            assert_eq!(asked.len(), n_asked, "{variable} {forbidden}: {asked:?}");
            assert!(
                asked.iter().all(|it| it.contains("hub.invalid")),
                "{asked:?}"
            );
        }
    }
}
