//! The words of a command that is no training: places and flags in any order.
//!
//! Not for the arguments of plugins, which [`crate::args`] reads.

use crate::error::HostError;

/// What a command accepts, and how it says that it cannot be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grammar {
    /// Flags that every form of the command has; each has a value.
    pub(crate) everywhere: &'static [&'static str],
    /// Other flags with a value.
    pub(crate) with_value: &'static [&'static str],
    /// Flags without one, besides `help` and `h`.
    pub(crate) switches: &'static [&'static str],
    /// Makes an error of the reason.
    pub(crate) misuse: fn(String) -> HostError,
}

/// A command line taken apart.
#[derive(Debug)]
pub(crate) struct Words<'a> {
    /// What is no flag.
    pub(crate) places: Vec<&'a str>,
    flags: Vec<(&'a str, &'a str)>,
    grammar: Grammar,
}

impl<'a> Words<'a> {
    /// Takes a command line apart.
    ///
    /// # Errors
    /// For a flag that the grammar lacks, and one whose value is missing.
    pub(crate) fn of(argv: &'a [String], grammar: Grammar) -> Result<Self, HostError> {
        let (mut places, mut flags) = (Vec::new(), Vec::new());
        let mut argv = argv.iter().map(String::as_str);
        while let Some(word) = argv.next() {
            let Some(flag) = word.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
                places.push(word);
                continue;
            };
            let flag = flag.trim_start_matches('-');
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            let misuse = |why: String| Err((grammar.misuse)(why));
            if grammar.has_value(name) {
                match value.or_else(|| argv.next()) {
                    Some(value) => flags.push((name, value)),
                    None => return misuse(format!("`{word}` has no value")),
                }
            } else if value.is_none() && matches!(name, "h" | "help") {
                flags.push(("help", ""));
            } else if value.is_none() && grammar.switches.contains(&name) {
                flags.push((name, ""));
            } else {
                return misuse(format!("`{word}` is unknown"));
            }
        }
        Ok(Self {
            places,
            flags,
            grammar,
        })
    }

    /// Whether a flag is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The last value of a flag.
    pub(crate) fn value(&self, name: &str) -> Option<&'a str> {
        let found = self.flags.iter().rfind(|(flag, _)| *flag == name);
        found.map(|&(_, value)| value)
    }

    /// Every value of a flag that may be given several times.
    pub(crate) fn values(&self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let given = self.flags.iter().filter(move |(flag, _)| *flag == name);
        given.map(|&(_, value)| value)
    }

    /// Refuses flags of other forms of the command.
    ///
    /// # Errors
    /// For the first one that is neither in `names` nor allowed everywhere.
    pub(crate) fn allow(&self, names: &[&str]) -> Result<(), HostError> {
        let everywhere = self.grammar.everywhere;
        let mut flags = self.flags.iter().map(|(flag, _)| *flag);
        match flags.find(|flag| !names.contains(flag) && !everywhere.contains(flag)) {
            None => Ok(()),
            Some(flag) => Err((self.grammar.misuse)(format!(
                "`--{flag}` does not belong to this command"
            ))),
        }
    }
}

impl Grammar {
    fn has_value(&self, name: &str) -> bool {
        self.everywhere.contains(&name) || self.with_value.contains(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAMMAR: Grammar = Grammar {
        everywhere: &["plugin_dir"],
        with_value: &["api"],
        switches: &["symbols", "update"],
        misuse: |why| HostError::new("no", why, "fix"),
    };

    fn read(line: &str, allowed: &[&str]) -> Result<(Vec<String>, Option<String>), String> {
        let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let text = |error: HostError| error.render(false);
        let words = Words::of(&argv, GRAMMAR).map_err(text)?;
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
