//! The questions of an opened set, as the host reads them.

use moeut_plugin_api::{ChoiceInfo, PluginError, Question, ScoringRule};

/// All questions of a set, and how many were left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Questions {
    /// In the order of the files.
    pub list: Vec<Question>,
    /// Questions of the files that the set's rules leave out.
    pub n_skipped: u64,
}

impl Questions {
    /// Sizes, and how the set is scored.
    pub fn info(&self, rule: ScoringRule) -> ChoiceInfo {
        ChoiceInfo {
            n_questions: self.list.len() as u64,
            n_skipped: self.n_skipped,
            rule,
        }
    }

    /// Questions `first..first + n`.
    ///
    /// # Errors
    /// If one of them does not exist.
    pub fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        let range = || {
            let first = usize::try_from(first).ok()?;
            let end = first.checked_add(usize::try_from(n).ok()?)?;
            self.list.get(first..end)
        };
        range().map(<[Question]>::to_vec).ok_or_else(|| {
            PluginError::new(format!("{n} questions from {first} on cannot be read"))
                .why(format!("there are {}", self.list.len()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_add_up_and_what_is_beyond_is_an_error() {
        let question = |answer| Question {
            group: "val".to_owned(),
            prefix: String::new(),
            options: vec![String::new(); 5],
            answer,
        };
        let questions = Questions {
            list: (0..5).map(question).collect(),
            n_skipped: 0,
        };
        let pages = [(0, 2), (2, 3), (5, 0)];
        let read = pages.map(|(first, n)| questions.read(first, n).unwrap());
        assert_eq!(read.concat(), questions.list);
        for (first, n) in [(4, 2), (6, 0), (u64::MAX, 2)] {
            let error = questions.read(first, n).unwrap_err();
            assert_eq!(error.why, "there are 5");
        }
    }
}
