//! The flags that a bench has of its own; all others are those of a run.

use super::misuse;
use crate::error::HostError;
use std::path::PathBuf;

/// What is to be measured how often, and where the result goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Whether stdout gets JSON.
    pub(super) is_json: bool,
    /// A file that gets JSON.
    pub(super) out: Option<PathBuf>,
    /// Shapes as typed; the device's usual ones if empty.
    pub(super) shapes: Vec<String>,
    /// Kernels by name; all that support the device if empty.
    pub(super) kernels: Vec<String>,
    /// How often.
    pub(super) effort: Effort,
}

/// How often something is done.
#[expect(clippy::struct_field_names, reason = "counts begin with `n_`")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Effort {
    /// Calls before anything is timed.
    pub(super) n_warmup: u64,
    /// Times that are taken.
    pub(super) n_rounds: u64,
    /// Calls in each of them.
    pub(super) n_calls: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            is_json: false,
            out: None,
            shapes: Vec::new(),
            kernels: Vec::new(),
            effort: Effort {
                n_warmup: 3,
                n_rounds: 7,
                n_calls: 4,
            },
        }
    }
}

impl Options {
    /// Takes the bench's own flags out of a command line; the rest comes back.
    ///
    /// # Errors
    /// For a flag without a value, and a number that is none.
    pub(super) fn take(argv: &[String]) -> Result<(Self, Vec<String>), HostError> {
        let mut options = Self::default();
        let mut rest = Vec::new();
        let mut words = argv.iter();
        while let Some(word) = words.next() {
            let flag = word
                .strip_prefix('-')
                .map(|flag| flag.trim_start_matches('-'));
            let (name, value) = match flag.and_then(|flag| flag.split_once('=')) {
                Some((name, value)) => (name, Some(value)),
                None => (flag.unwrap_or_default(), None),
            };
            if name == "json" && value.is_none() {
                options.is_json = true;
                continue;
            }
            if !matches!(
                name,
                "out" | "shape" | "kernel" | "warmup" | "rounds" | "calls"
            ) {
                rest.push(word.clone());
                continue;
            }
            let value = value
                .or_else(|| words.next().map(String::as_str))
                .ok_or_else(|| misuse(format!("`{word}` has no value")))?;
            let list = || value.split(',').map(str::to_owned).collect();
            let number = |least: u64| match value.parse() {
                Ok(number) if number >= least => Ok(number),
                _ => Err(misuse(format!(
                    "`-{name}` is `{value}`, and not a number from {least} on"
                ))),
            };
            match name {
                "out" => options.out = Some(PathBuf::from(value)),
                "shape" => options.shapes = list(),
                "kernel" => options.kernels = list(),
                "warmup" => options.effort.n_warmup = number(0)?,
                "rounds" => options.effort.n_rounds = number(1)?,
                _ => options.effort.n_calls = number(1)?,
            }
        }
        Ok((options, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(line: &str) -> Result<(Options, Vec<String>), String> {
        let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::take(&argv).map_err(|error| error.render(false))
    }

    #[test]
    fn own_flags_are_taken_out_and_the_others_stay_in_order() {
        let (options, rest) =
            take("-task c4 --json -rounds 2 -lr=-1 --shape=44M,tiny -out a.json -calls=9").unwrap();
        assert_eq!(rest, ["-task", "c4", "-lr=-1"]);
        let expected = Options {
            is_json: true,
            out: Some("a.json".into()),
            shapes: vec!["44M".into(), "tiny".into()],
            effort: Effort {
                n_warmup: 3,
                n_rounds: 2,
                n_calls: 9,
            },
            ..Options::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn numbers_that_are_none_are_named() {
        for (line, expected) in [
            ("-rounds 0", "`-rounds` is `0`, and not a number from 1 on"),
            ("-warmup x", "`-warmup` is `x`, and not a number from 0 on"),
            ("-calls", "`-calls` has no value"),
        ] {
            let error = take(line).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
