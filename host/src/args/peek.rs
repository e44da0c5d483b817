//! Phase one: single values from a command line whose other arguments nobody knows yet.

use super::token::{Token, tokens};

/// All values of the flag `name`, in order; the last one counts.
///
/// Takes the full name only: an abbreviation needs the names of plugins that are not loaded yet.
pub fn peek(argv: &[String], name: &str) -> Vec<String> {
    tokens(argv)
        .filter_map(|token| match token {
            Token::Flag {
                name: flag,
                value: Some(value),
            } if flag == name => Some(value.to_owned()),
            Token::Flag { .. } | Token::Positional(_) => None,
        })
        .collect()
}

/// Whether `-h`, `-help` or `--help` is there.
pub fn asks_for_help(argv: &[String]) -> bool {
    tokens(argv).any(|token| {
        matches!(
            token,
            Token::Flag {
                name: "h" | "help",
                ..
            }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_all_values_in_any_spelling() {
        let argv = [
            "-plugin_dir",
            "a",
            "--unknown=1",
            "--plugin_dir=b",
            "-plugin_dirs",
            "c",
            "-plugin_dir",
        ];
        assert_eq!(peek(&argv.map(String::from), "plugin_dir"), ["a", "b"]);
    }

    #[test]
    fn a_value_is_no_request_for_help() {
        assert!(asks_for_help(&[
            "-task".into(),
            "toy".into(),
            "--help".into()
        ]));
        assert!(!asks_for_help(&["-name".into(), "help".into()]));
    }
}
