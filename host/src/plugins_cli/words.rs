//! The words of a `plugins` command: places and flags in any order.

use super::misuse;
use crate::error::HostError;

/// Flags with a value; the first two are those of training, which [`crate::cli`] reads for itself.
const WITH_VALUE: &[&str] = &["plugin_dir", "plugin_verify", "api"];
/// Flags without one.
const SWITCHES: &[&str] = &["help", "h", "symbols", "update"];

/// A command line taken apart.
#[derive(Debug)]
pub(super) struct Words<'a> {
    /// What is no flag.
    pub(super) places: Vec<&'a str>,
    flags: Vec<(&'a str, &'a str)>,
}

impl<'a> Words<'a> {
    /// Takes a command line apart.
    ///
    /// # Errors
    /// For a flag that no command has, and one whose value is missing.
    pub(super) fn of(argv: &'a [String]) -> Result<Self, HostError> {
        let (mut places, mut flags) = (Vec::new(), Vec::new());
        let mut argv = argv.iter().map(String::as_str);
        while let Some(word) = argv.next() {
            if word.len() < 2 || !word.starts_with('-') {
                places.push(word);
                continue;
            }
            let (name, value) = match word.trim_start_matches('-').split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.trim_start_matches('-'), None),
            };
            if WITH_VALUE.contains(&name) {
                let value = value.or_else(|| argv.next());
                flags.push((
                    name,
                    value.ok_or_else(|| misuse(format!("`{word}` has no value")))?,
                ));
            } else if SWITCHES.contains(&name) && value.is_none() {
                flags.push((if name == "h" { "help" } else { name }, ""));
            } else {
                return Err(misuse(format!("`{word}` is unknown")));
            }
        }
        Ok(Self { places, flags })
    }

    /// Whether a flag is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The last value of a flag.
    pub(super) fn value(&self, name: &str) -> Option<&'a str> {
        let found = self.flags.iter().rfind(|(flag, _)| *flag == name);
        found.map(|&(_, value)| value)
    }

    /// Refuses flags of other commands.
    ///
    /// # Errors
    /// For the first one that is neither in `names` nor one of those of training.
    pub(super) fn allow(&self, names: &[&str]) -> Result<(), HostError> {
        let is_stray = |flag: &&str| !names.contains(flag) && !WITH_VALUE[..2].contains(flag);
        match self
            .flags
            .iter()
            .map(|(flag, _)| *flag)
            .find(|flag| is_stray(flag))
        {
            None => Ok(()),
            Some(flag) => Err(misuse(format!(
                "`--{flag}` does not belong to this command"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, allowed: &[&str]) -> Result<(Vec<String>, Option<String>), String> {
        let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let text = |error: HostError| error.render(false);
        let words = Words::of(&argv).map_err(text)?;
        words.allow(allowed).map_err(text)?;
        let places = words.places.iter().map(|&word| word.to_owned()).collect();
        Ok((places, words.value("api").map(str::to_owned)))
    }

    #[test]
    fn flags_stand_anywhere_and_misuse_is_an_error() {
        let places = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        assert_eq!(
            read("-plugin_dir a show --api=x c4", &["api"]),
            Ok((places(&["show", "c4"]), Some("x".into())))
        );
        for (line, expected) in [
            ("show c4 --fast", "`--fast` is unknown"),
            ("show c4 --symbols=1", "`--symbols=1` is unknown"),
            ("new task a --api", "`--api` has no value"),
            ("lock --symbols", "`--symbols` does not belong"),
        ] {
            let error = read(line, &["api", "update"]).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
