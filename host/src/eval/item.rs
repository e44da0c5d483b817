//! Questions as token ids: tokenized, and checked for what cannot be scored.
//!
//! Prefix and option are tokenized on their own and then joined, as in the reference, so that each option begins with a
//! dummy prefix piece of its own.

use moeut_plugin_api::{PluginError, Question, ScoringRule};

/// A question for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Accuracy is reported by group.
    pub group: String,
    /// Index of the right option.
    pub answer: usize,
    /// Tokens before each option; may be empty.
    pub prefix: Vec<i32>,
    /// Tokens of each option.
    pub options: Vec<Vec<i32>>,
    /// What must be said at the end, if the rule is [`ScoringRule::LastWord`].
    pub last_word: Option<LastWord>,
}

/// The end of a passage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    /// What follows the last space.
    pub word: String,
    /// Number of tokens of a space and the word.
    pub n_tokens: usize,
    /// The last of these tokens.
    pub last_token: i32,
}

impl Item {
    /// All tokens of an option and what comes before it.
    pub fn sequence(&self, option: usize) -> Vec<i32> {
        [&self.prefix[..], &self.options[option]].concat()
    }

    /// Number of tokens of each option and what comes before it.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.options
            .iter()
            .map(|option| self.prefix.len() + option.len())
    }
}

/// Makes items of one set's questions.
pub struct Tokens<'a> {
    /// The set's name.
    pub set: &'a str,
    /// Its rule.
    pub rule: ScoringRule,
    /// Ids that the model knows.
    pub vocab_size: u64,
    /// The model's tokenizer.
    pub encode: &'a dyn Fn(&str) -> Result<Vec<i32>, PluginError>,
}

impl Tokens<'_> {
    /// The item of question `index`, counted from 0.
    ///
    /// # Errors
    /// If the question has no right option, or an option no token with a probability, or the tokenizer is another one
    /// than the model's.
    pub fn item(&self, index: u64, question: Question) -> Result<Item, PluginError> {
        let answer = usize::try_from(question.answer).unwrap_or(usize::MAX);
        if answer >= question.options.len() {
            return Err(self.bad(
                index,
                format!(
                    "option {answer} is said to be right, and it has {} options",
                    question.options.len()
                ),
            ));
        }
        let prefix = self.encode(index, &question.prefix)?;
        let options = question
            .options
            .iter()
            .map(|option| self.encode(index, option))
            .collect::<Result<Vec<_>, _>>()?;
        for (number, option) in options.iter().enumerate() {
            // The first token of a sequence is given, never predicted.
            let n_scored = option.len().saturating_sub(usize::from(prefix.is_empty()));
            if n_scored == 0 {
                let why = format!(
                    "option {number} (`{}`) has no token to be predicted: {} before it, {} of its own",
                    question.options[number],
                    prefix.len(),
                    option.len()
                );
                return Err(self.bad(index, why));
            }
        }
        let last_word = match self.rule {
            ScoringRule::Choice { .. } => None,
            ScoringRule::LastWord => Some(self.last_word(index, &question.options[answer])?),
        };
        Ok(Item {
            group: question.group,
            answer,
            prefix,
            options,
            last_word,
        })
    }

    fn last_word(&self, index: u64, text: &str) -> Result<LastWord, PluginError> {
        let word = text.rsplit(' ').next().unwrap_or_default();
        let tokens = self.encode(index, &format!(" {word}"))?;
        match tokens.last() {
            Some(&last_token) if !word.is_empty() => Ok(LastWord {
                word: word.to_owned(),
                n_tokens: tokens.len(),
                last_token,
            }),
            _ => Err(self.bad(
                index,
                "its text ends in a space, so there is no last word".into(),
            )),
        }
    }

    fn encode(&self, index: u64, text: &str) -> Result<Vec<i32>, PluginError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let ids = (self.encode)(text)?;
        let unknown = ids
            .iter()
            .find(|&&id| u64::try_from(id).map_or(true, |id| id >= self.vocab_size));
        match unknown {
            None => Ok(ids),
            Some(id) => Err(self.bad(
                index,
                format!(
                    "the tokenizer makes token {id} of it, and the model knows {} tokens",
                    self.vocab_size
                ),
            )),
        }
    }

    fn bad(&self, index: u64, why: String) -> PluginError {
        PluginError::new(format!(
            "question {index} of `{}` cannot be scored",
            self.set
        ))
        .why(why)
        .fix(format!(
            "correct the files of `{0}`, or evaluate without it; questions count from 0",
            self.set
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A token for each character.
    #[expect(clippy::unnecessary_wraps, reason = "the signature of a tokenizer")]
    fn encode(text: &str) -> Result<Vec<i32>, PluginError> {
        Ok(text
            .chars()
            .map(|c| i32::try_from(u32::from(c)).unwrap())
            .collect())
    }

    fn item(
        rule: ScoringRule,
        prefix: &str,
        options: &[&str],
        answer: u32,
    ) -> Result<Item, String> {
        let question = Question {
            group: "g".into(),
            prefix: prefix.into(),
            options: options.iter().map(|&option| option.into()).collect(),
            answer,
        };
        let tokens = Tokens {
            set: "toy",
            rule,
            vocab_size: 128,
            encode: &encode,
        };
        tokens
            .item(7, question)
            .map_err(|error| format!("{}: {}", error.what, error.why))
    }

    const CHOICE: ScoringRule = ScoringRule::Choice {
        is_normalized: false,
    };

    #[test]
    fn prefix_and_options_are_tokenized_apart() {
        let item = item(CHOICE, "ab", &["c", "de"], 1).unwrap();
        assert_eq!(item.sequence(0), [97, 98, 99]);
        assert_eq!(item.lengths().collect::<Vec<_>>(), [3, 4]);
        assert_eq!((item.answer, item.last_word), (1, None));
    }

    #[test]
    fn what_cannot_be_scored_is_said() {
        let what = "question 7 of `toy` cannot be scored: ";
        for (prefix, options, answer, why) in [
            (
                "ab",
                &["c"][..],
                1,
                "option 1 is said to be right, and it has 1 options",
            ),
            (
                "ab",
                &["c", ""],
                0,
                "option 1 (``) has no token to be predicted: 2 before it, 0 of its own",
            ),
            (
                "",
                &["c", "de"],
                0,
                "option 0 (`c`) has no token to be predicted: 0 before it, 1 of its own",
            ),
            (
                "é",
                &["c"],
                0,
                "the tokenizer makes token 233 of it, and the model knows 128 tokens",
            ),
        ] {
            assert_eq!(
                item(CHOICE, prefix, options, answer).unwrap_err(),
                format!("{what}{why}")
            );
        }
        let error = item(ScoringRule::LastWord, "", &["ab "], 0).unwrap_err();
        assert_eq!(
            error,
            format!("{what}its text ends in a space, so there is no last word")
        );
    }

    #[test]
    fn the_last_word_follows_the_last_space() {
        let item = item(ScoringRule::LastWord, "", &["a b\ncd"], 0).unwrap();
        let expected = LastWord {
            word: "b\ncd".into(),
            n_tokens: 5,
            last_token: i32::from(b'd'),
        };
        assert_eq!(item.last_word, Some(expected));
    }
}
