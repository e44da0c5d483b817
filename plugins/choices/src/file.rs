//! A published file in memory, and its lines.

use std::io::Read;

use serde::de::DeserializeOwned;

use crate::error::ChoicesError;

/// The largest accepted file: 256 MiB, forty times the largest published one.
const MAX_BYTES: u64 = 256 << 20;
/// Characters of a line that an error shows.
const N_EXCERPT: usize = 60;

/// A file of a set, or a member of an archive.
#[derive(Debug, Clone)]
pub struct SetFile {
    /// Its name, without folders.
    pub name: String,
    /// Where it is, for errors: its path, or `<archive>:<member>`.
    pub place: String,
    /// Where it, or its archive, is published.
    pub url: &'static str,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// A line of a [`SetFile`], without its end.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    file: &'a SetFile,
    /// Counted from 1.
    pub number: usize,
    /// What is in it.
    pub text: &'a str,
}

impl SetFile {
    /// Reads a file whose folders are part of `place` only.
    pub(crate) fn read(
        name: &str,
        place: String,
        url: &'static str,
        bytes: impl Read,
    ) -> Result<Self, ChoicesError> {
        let name = name.rsplit('/').next().unwrap_or(name).to_owned();
        let mut file = Self {
            name,
            place,
            url,
            bytes: Vec::new(),
        };
        let n_read = bytes
            .take(MAX_BYTES + 1)
            .read_to_end(&mut file.bytes)
            .map_err(|error| {
                ChoicesError::of_reader(error, |error| {
                    file.error(format!("cannot be read: {error}"))
                })
            })?;
        if n_read as u64 > MAX_BYTES {
            return Err(file.error(format!("is larger than {MAX_BYTES} bytes")));
        }
        Ok(file)
    }

    /// All lines. A byte order mark, ends of Windows and a missing last end are accepted.
    ///
    /// # Errors
    /// The file is empty, or is not UTF-8.
    pub fn lines(&self) -> Result<impl Iterator<Item = Line<'_>>, ChoicesError> {
        let text = match str::from_utf8(&self.bytes) {
            Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
            Err(error) => {
                let bytes = &self.bytes[error.valid_up_to()..];
                let start = String::from_utf8_lossy(&self.bytes[..error.valid_up_to()]);
                let number = start.matches('\n').count() + 1;
                let line = start.rsplit('\n').next().unwrap_or_default();
                let rest = String::from_utf8_lossy(&bytes[..bytes.len().min(N_EXCERPT)]);
                let reason = "it is not UTF-8".to_owned();
                return Err(self.bad_line(number, &format!("{line}{rest}"), reason));
            }
        };
        if text.trim().is_empty() {
            return Err(self.error("is empty".to_owned()));
        }
        Ok(text.lines().enumerate().map(|(index, text)| Line {
            file: self,
            number: index + 1,
            text,
        }))
    }

    /// The lines that are not blank, each as JSON.
    ///
    /// # Errors
    /// The file is empty, or is not UTF-8; later, a line is not what `T` is.
    pub fn rows<T: DeserializeOwned>(
        &self,
    ) -> Result<impl Iterator<Item = Result<(Line<'_>, T), ChoicesError>>, ChoicesError> {
        let filled = self.lines()?.filter(|line| !line.text.trim().is_empty());
        Ok(filled.map(|line| Ok((line, line.json()?))))
    }

    /// An error about the whole file; `reason` goes on with a sentence that the file's name starts.
    pub fn error(&self, reason: String) -> ChoicesError {
        ChoicesError::BadFile {
            file: self.place.clone(),
            reason,
            url: self.url,
        }
    }

    fn bad_line(&self, line: usize, text: &str, reason: String) -> ChoicesError {
        ChoicesError::BadLine {
            file: self.place.clone(),
            line,
            reason,
            excerpt: text
                .lines()
                .next()
                .unwrap_or("")
                .chars()
                .take(N_EXCERPT)
                .collect(),
            url: self.url,
        }
    }
}

impl Line<'_> {
    /// An error about this line.
    pub fn error(&self, reason: impl Into<String>) -> ChoicesError {
        self.file.bad_line(self.number, self.text, reason.into())
    }

    fn json<T: DeserializeOwned>(&self) -> Result<T, ChoicesError> {
        serde_json::from_str(self.text).map_err(|error| {
            // serde counts lines within ours; only its column means something here.
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default();
            self.error(format!("{reason} at column {}", error.column()))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::testing::set_file;

    #[derive(Debug, Deserialize)]
    struct Row {
        text: String,
    }

    fn rows(bytes: &[u8]) -> Result<Vec<(usize, String)>, String> {
        let file = set_file("a.jsonl", bytes);
        let rows = file.rows::<Row>().map_err(|error| error.to_string())?;
        rows.map(|row| row.map(|(line, row)| (line.number, row.text)))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn marks_of_windows_and_a_missing_last_end_change_nothing() {
        let bytes = b"\xef\xbb\xbf{\"text\":\"a\"}\r\n\r\n{\"text\":\"b\\r\",\"more\":1}";
        assert_eq!(
            rows(bytes).unwrap(),
            [(1, "a".to_owned()), (3, "b\r".to_owned())]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (bytes, why) in [
            (&b""[..], "`a.jsonl` is empty"),
            (b"\n \r\n", "`a.jsonl` is empty"),
            (
                b"{\"text\":\"a\"}\n\n{\"txt\":\"b\"}\n",
                "`a.jsonl` line 3: missing field `text` at column 11; the line starts `{\"txt\":\"b\"}`",
            ),
            (
                b"{\"text\":\"a",
                "`a.jsonl` line 1: EOF while parsing a string at column 10; the line starts `{\"text\":\"a`",
            ),
            (
                b"{\"text\":\"a\"}\n{\"text\":\"b\xff\"}\nc",
                "`a.jsonl` line 2: it is not UTF-8; the line starts `{\"text\":\"b\u{fffd}\"}`",
            ),
        ] {
            assert_eq!(rows(bytes).unwrap_err(), why);
        }
    }

    #[test]
    fn an_endless_file_is_refused() {
        let error = SetFile::read("a", "a".to_owned(), "", std::io::repeat(b'x')).unwrap_err();
        assert_eq!(error.to_string(), "`a` is larger than 268435456 bytes");
    }
}
