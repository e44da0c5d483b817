//! `piqa`: a goal of everyday life and two ways to reach it, one of which works.

use moeut_choices::{
    ChoicesError, DATA_DIR, DataDir, Published, Questions, SetFile, python::strip,
};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(Piqa);

const PUBLISHED: Published = Published {
    set: "piqa",
    files: &["valid.jsonl", "valid-labels.lst"],
    is_one_enough: false,
    urls: &[
        "https://raw.githubusercontent.com/ybisk/ybisk.github.io/master/piqa/data/valid.jsonl",
        "https://raw.githubusercontent.com/ybisk/ybisk.github.io/master/piqa/data/valid-labels.lst",
    ],
    cache_folder: "PIQA/data",
};

/// The opened set.
struct Piqa {
    questions: Questions,
}

impl ChoiceDataset for Piqa {
    const NAME: &'static str = "piqa";
    const SUMMARY: &'static str = "PIQA: which of two ways reaches a goal; 1838 questions";
    const ARGS: &'static [ArgSpec] = &[DATA_DIR];
    type Config = DataDir;

    fn open(config: DataDir, host: &Host) -> Result<Self, PluginError> {
        let questions = PUBLISHED.open(config.dir.as_deref(), host, |files, _| read(files))?;
        Ok(Self { questions })
    }

    fn info(&self) -> ChoiceInfo {
        self.questions.info(ScoringRule::Choice {
            is_normalized: true,
        })
    }

    fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        self.questions.read(first, n)
    }
}

/// A line of `valid.jsonl`.
#[derive(Deserialize)]
struct Row {
    goal: String,
    sol1: String,
    sol2: String,
}

fn read(files: &[SetFile]) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    // `Published` gives both or none.
    let [rows, labels] = files else {
        return Ok(questions);
    };
    let mut answers = Vec::new();
    for line in labels.lines()?.filter(|line| !line.text.trim().is_empty()) {
        answers.push(match strip(line.text) {
            "0" => 0,
            "1" => 1,
            _ => return Err(line.error("the label is not 0 or 1")),
        });
    }
    for row in rows.rows::<Row>()? {
        let (_, row) = row?;
        questions.list.push(Question {
            group: "val".to_owned(),
            prefix: format!("Question: {}\nAnswer:", strip(&row.goal)),
            options: vec![format!(" {}", row.sol1), format!(" {}", row.sol2)],
            answer: answers.get(questions.list.len()).copied().unwrap_or(0),
        });
    }
    if answers.len() != questions.list.len() {
        let (n_labels, n_questions) = (answers.len(), questions.list.len());
        return Err(labels.error(format!(
            "does not fit `{}`: labels {n_labels}, questions {n_questions}",
            rows.place
        )));
    }
    Ok(questions)
}

#[cfg(test)]
mod tests {
    use moeut_choices::testing::{overwritten, published_files, set_file, why};
    use proptest::prelude::*;

    use super::*;

    const LINE: &str = r#"{"goal": " dresser\u001f ", "sol1": "a pin ", "sol2": " two  pins"}"#;

    fn read_texts(rows: &[u8], labels: &str) -> Result<Questions, ChoicesError> {
        read(&[
            set_file("valid", rows),
            set_file("labels", labels.as_bytes()),
        ])
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<DataDir>(Piqa::ARGS, &[]);
    }

    #[test]
    fn the_goal_is_stripped_and_the_ways_are_not() {
        let questions = read_texts(LINE.as_bytes(), "1\r\n\n").unwrap();
        assert_eq!(
            questions.list,
            [Question {
                group: "val".to_owned(),
                prefix: "Question: dresser\nAnswer:".to_owned(),
                options: vec![" a pin ".to_owned(), "  two  pins".to_owned()],
                answer: 1,
            }]
        );
    }

    #[test]
    fn wrong_labels_are_named() {
        for (labels, expected) in [
            (
                "0\n2\n",
                "`labels` line 2: the label is not 0 or 1; the line starts `2`",
            ),
            (
                "0\n1\n",
                "`labels` does not fit `valid`: labels 2, questions 1",
            ),
            ("\n", "`labels` is empty"),
        ] {
            assert_eq!(why(read_texts(LINE.as_bytes(), labels)), expected);
        }
        let twice = format!("{LINE}\n{LINE}");
        assert_eq!(
            why(read_texts(twice.as_bytes(), "0")),
            "`labels` does not fit `valid`: labels 1, questions 2"
        );
    }

    /// The published files.
    #[test]
    fn published_questions_are_read() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        let questions = read(&files).unwrap();
        assert_eq!((questions.list.len(), questions.n_skipped), (1838, 0));
        let n_second = questions
            .list
            .iter()
            .filter(|question| question.answer == 1)
            .count();
        assert_eq!(n_second, 928);
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = read_texts(&overwritten(LINE.into(), place, &garbage), "0");
            let _ = read_texts(LINE.as_bytes(), &String::from_utf8_lossy(&garbage));
        }
    }
}
