//! Operations of Python whose results differ from those of Rust's operations of the same name.
//!
//! The reference builds its texts with them, and a character more or less is another score.

/// `str.strip`: Python also takes the four separators U+001C to U+001F for white space.
pub fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// `str.capitalize`: the first character is upper case, all others are lower case.
///
/// For `ǆ` and its like, Georgian letters and Greek vowels with an iota below, Python takes the title case instead of
/// the upper case. Rust has no table of that, and these 120 characters occur in no set.
pub fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else {
        return String::new();
    };
    // `ß` becomes `Ss`.
    let mut upper = first.to_uppercase();
    let mut capitalized: String = upper.next().into_iter().collect();
    capitalized.extend(upper.flat_map(char::to_lowercase));
    // The whole text is lowered, since a sigma at the end of a word depends on what comes before it.
    let n_bytes: usize = first.to_lowercase().map(char::len_utf8).sum();
    capitalized + &text.to_lowercase()[n_bytes..]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Results of Python 3.11.
    #[test]
    fn capitalized_texts_are_those_of_python() {
        for (text, capitalized) in [
            ("", ""),
            ("a Woman", "A woman"),
            ("then", "Then"),
            (", THEN", ", then"),
            ("éCOLE", "École"),
            ("ßEN", "Ssen"),
            ("ﬁX", "Fix"),
            ("ΑΣ", "Ας"),
            ("ΣΑΣ", "Σας"),
            ("İi", "İi"),
            ("1ST", "1st"),
        ] {
            assert_eq!(capitalize(text), capitalized, "{text}");
        }
    }

    #[test]
    fn pythons_white_space_is_stripped() {
        assert_eq!(strip("\u{1c}\u{1f} \u{a0}\u{3000}\ta b\u{85}\r\n"), "a b");
        assert_eq!(strip("\u{200b}a\u{feff}"), "\u{200b}a\u{feff}");
    }

    proptest! {
        /// The bytes that are skipped in the lowered text are those of its first character.
        #[test]
        fn any_text_can_be_capitalized(text in any::<String>()) {
            let n_first = text.chars().next().map_or(0, |first| first.to_lowercase().count());
            let rest: String = text.to_lowercase().chars().skip(n_first).collect();
            prop_assert!(capitalize(&text).ends_with(&rest));
        }
    }
}
