//! `ai2arc`: questions of school exams in science, of the AI2 Reasoning Challenge; the tests of both parts.

use moeut_choices::{ChoicesError, DATA_DIR, DataDir, Published, Questions, SetFile};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(Ai2Arc);

const PUBLISHED: Published = Published {
    set: "ai2arc",
    files: &["ARC-Easy-Test.jsonl", "ARC-Challenge-Test.jsonl"],
    is_one_enough: true,
    urls: &["https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip"],
    cache_folder: "AI2ARC/data",
};

/// Questions with more or fewer choices are left out, as in the reference: chance would be another for them.
const N_CHOICES: usize = 4;

/// The opened set.
struct Ai2Arc {
    questions: Questions,
}

impl ChoiceDataset for Ai2Arc {
    const NAME: &'static str = "ai2arc";
    const SUMMARY: &'static str = "ARC: questions of school science, easy and hard ones";
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

/// A line of a file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    question: Stem,
    answer_key: String,
}

#[derive(Deserialize)]
struct Stem {
    stem: String,
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    /// `A` to `E`, or `1` to `5`.
    label: String,
}

fn read(files: &[SetFile]) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    for file in files {
        let group = file.name.strip_suffix("-Test.jsonl").unwrap_or(&file.name);
        for row in file.rows::<Row>()? {
            let (line, row) = row?;
            let Stem { stem, choices } = row.question;
            let key = row.answer_key;
            // Looked up before the number of choices, so that no damage passes for a question left out.
            let Some(answer) = (0..).zip(&choices).find(|(_, choice)| choice.label == key) else {
                return Err(line.error(format!("no choice has the label `{key}` of the answer")));
            };
            let answer = answer.0;
            if choices.len() != N_CHOICES {
                questions.n_skipped += 1;
                continue;
            }
            let options = choices.iter().map(|choice| format!(" {}", choice.text));
            questions.list.push(Question {
                group: group.to_owned(),
                prefix: format!("Question: {stem}\nAnswer:"),
                options: options.collect(),
                answer,
            });
        }
    }
    Ok(questions)
}

#[cfg(test)]
mod tests {
    use moeut_choices::testing::{overwritten, published_files, set_file, why};
    use proptest::prelude::*;

    use super::*;

    /// A question with choices of these labels.
    fn line(labels: &str, answer: char) -> String {
        let choice = |label| format!(r#"{{"text":"is {label}","label":"{label}"}}"#);
        let choices: Vec<_> = labels.chars().map(choice).collect();
        let choices = choices.join(",");
        format!(
            r#"{{"id":"x","question":{{"stem":"What ","choices":[{choices}]}},"answerKey":"{answer}"}}"#
        )
    }

    fn read_text(text: &str) -> Result<Questions, ChoicesError> {
        read(&[set_file("ARC-Easy-Test.jsonl", text.as_bytes())])
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<DataDir>(Ai2Arc::ARGS, &[]);
    }

    #[test]
    fn labels_are_letters_or_digits_and_other_numbers_of_choices_are_left_out() {
        let lines = [
            line("1234", '3'),
            line("ABC", 'A'),
            line("ABCDE", 'E'),
            line("ABCD", 'B'),
        ];
        let questions = read_text(&lines.join("\n")).unwrap();
        assert_eq!(questions.n_skipped, 2);
        let question = |labels: &str, answer| Question {
            group: "ARC-Easy".to_owned(),
            prefix: "Question: What \nAnswer:".to_owned(),
            options: labels.chars().map(|label| format!(" is {label}")).collect(),
            answer,
        };
        assert_eq!(questions.list, [question("1234", 2), question("ABCD", 1)]);
    }

    #[test]
    fn an_answer_that_is_no_choice_is_named() {
        for labels in ["ABCD", "ABC"] {
            let why = why(read_text(&format!("\n{}", line(labels, '1'))));
            let expected = "`ARC-Easy-Test.jsonl` line 2: no choice has the label `1` of the answer; the line starts ";
            assert!(why.starts_with(expected), "{why}");
        }
    }

    /// The published easy questions, and the first 50 of the hard ones.
    #[test]
    fn published_questions_are_read() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        let counts = files.iter().map(|file| {
            let questions = read(std::slice::from_ref(file)).unwrap();
            let group = questions.list[0].group.clone();
            (group, questions.list.len(), questions.n_skipped)
        });
        assert_eq!(
            counts.collect::<Vec<_>>(),
            [
                ("ARC-Easy".to_owned(), 2365, 11),
                ("ARC-Challenge".to_owned(), 50, 0)
            ]
        );
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            let bytes = overwritten(line("ABCD", 'A').into(), place, &garbage);
            let _ = read(&[set_file("a", &bytes)]);
        }
    }
}
