//! The command line: a command, then names and flags in any order; a flag has a value.

use moeut_host::error::HostError;
use std::path::PathBuf;

/// A command line taken apart.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// What is no flag.
    pub(crate) names: Vec<String>,
    flags: Vec<(String, String)>,
}

impl Words {
    /// Takes words apart. `-a b`, `--a b`, `-a=b` and `--a=b` are the same.
    ///
    /// # Errors
    /// For a flag that is none of `known`, or lacks its value.
    pub(crate) fn read(argv: &[String], known: &[&str]) -> Result<Self, HostError> {
        let mut words = Self::default();
        let mut argv = argv.iter();
        while let Some(word) = argv.next() {
            let Some(flag) = word.strip_prefix('-') else {
                words.names.push(word.clone());
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if !known.contains(&name) {
                return Err(misuse(format!("`{word}` is unknown here")));
            }
            let value = value.or_else(|| argv.next().cloned());
            let value = value.ok_or_else(|| misuse(format!("`{word}` has no value")))?;
            words.flags.push((name.to_owned(), value));
        }
        Ok(words)
    }

    /// The value of a flag; the last one counts.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.flags.iter().rfind(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    }

    /// A value with commas between its parts.
    pub(crate) fn list(&self, name: &str, default: &str) -> Vec<String> {
        let value = self.get(name).unwrap_or(default);
        let parts = value.split(',').filter(|part| !part.is_empty());
        parts.map(str::to_owned).collect()
    }

    /// A whole number above 0, if one is given.
    ///
    /// # Errors
    /// If it is another value.
    pub(crate) fn positive(&self, name: &str) -> Result<Option<u64>, HostError> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        let number = text.parse().ok().filter(|&number| number > 0);
        let why = || misuse(format!("`-{name} {text}` is no whole number above 0"));
        number.ok_or_else(why).map(Some)
    }

    /// A path.
    pub(crate) fn path(&self, name: &str, default: &str) -> PathBuf {
        self.get(name).unwrap_or(default).into()
    }
}

/// A command that cannot be understood.
pub(crate) fn misuse(why: impl Into<String>) -> HostError {
    HostError::new(
        "the command cannot be read",
        why,
        "type `moeut-paper --help`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Words, HostError> {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Words::read(&argv, &["out", "save_dir"])
    }

    #[test]
    fn flags_have_values_and_stand_anywhere() {
        let words = read("-out a all --save_dir=b,c -out=d").unwrap();
        assert_eq!(words.names, ["all"]);
        assert_eq!(words.get("out"), Some("d"));
        assert_eq!(words.list("save_dir", "save"), ["b", "c"]);
        for line in ["-outt a", "all -out"] {
            assert!(read(line).is_err(), "{line}");
        }
    }

    #[test]
    fn counts_are_whole_numbers_above_zero() {
        assert_eq!(read("-out 12").unwrap().positive("out").unwrap(), Some(12));
        assert_eq!(read("-out 12").unwrap().positive("save_dir").unwrap(), None);
        for line in ["-out 0", "-out -3", "-out 1.5"] {
            assert!(read(line).unwrap().positive("out").is_err(), "{line}");
        }
    }
}
