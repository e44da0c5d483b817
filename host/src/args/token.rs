//! How `argv` splits into flags with values, before anybody knows which flags exist.
//!
//! That is possible because every argument takes exactly one value.

/// One piece of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token<'a> {
    /// `-name value`, `-name=value` or either with two dashes; no value if the next piece is a flag or missing.
    Flag {
        name: &'a str,
        value: Option<&'a str>,
    },
    /// Text that belongs to no flag.
    Positional(&'a str),
}

/// Splits the command line, without the program's own name.
pub(crate) fn tokens(argv: &[String]) -> impl Iterator<Item = Token<'_>> {
    let mut rest = argv.iter().map(String::as_str).peekable();
    std::iter::from_fn(move || {
        let text = rest.next()?;
        let Some(flag) = flag_name(text) else {
            return Some(Token::Positional(text));
        };
        Some(match flag.split_once('=') {
            Some((name, value)) => Token::Flag {
                name,
                value: Some(value),
            },
            None => Token::Flag {
                name: flag,
                value: rest.next_if(|next| flag_name(next).is_none()),
            },
        })
    })
}

/// The text after the dashes; nothing for `-128`, `-.5`, `-` and `--`, which can only be values.
fn flag_name(text: &str) -> Option<&str> {
    let dashed = text.strip_prefix('-')?;
    let name = dashed.strip_prefix('-').unwrap_or(dashed);
    let is_number = name.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    (!name.is_empty() && !is_number).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_spellings_mean_the_same() {
        for spelling in [
            &["-moe.att.k", "2"][..],
            &["--moe.att.k", "2"],
            &["-moe.att.k=2"],
            &["--moe.att.k=2"],
        ] {
            let argv: Vec<String> = spelling.iter().map(|&text| text.into()).collect();
            let expected = Token::Flag {
                name: "moe.att.k",
                value: Some("2"),
            };
            assert_eq!(
                tokens(&argv).collect::<Vec<_>>(),
                [expected],
                "{spelling:?}"
            );
        }
    }

    #[test]
    fn values_are_told_from_flags() {
        for (next, value) in [
            ("-128", Some("-128")),
            ("-.5", Some("-.5")),
            ("-1,-2", Some("-1,-2")),
            ("-", Some("-")),
            ("", Some("")),
            ("-lr", None),
        ] {
            let argv = ["-a".to_owned(), next.to_owned()];
            assert_eq!(
                tokens(&argv).next(),
                Some(Token::Flag { name: "a", value }),
                "{next}"
            );
        }
    }

    #[test]
    fn only_the_first_equals_sign_splits() {
        let argv = [
            "-reg_scales=moe=0.5,act=2".to_owned(),
            "-a=".to_owned(),
            "stray".to_owned(),
        ];
        assert_eq!(
            tokens(&argv).collect::<Vec<_>>(),
            [
                Token::Flag {
                    name: "reg_scales",
                    value: Some("moe=0.5,act=2")
                },
                Token::Flag {
                    name: "a",
                    value: Some("")
                },
                Token::Positional("stray"),
            ]
        );
    }
}
