//! `lambada`: passages of novels whose last word needs the whole passage to be guessed.
//!
//! This hands out the passages, in the form published with GPT-2; the rule that judges the last word is the
//! host's.

use moeut_choices::{ChoicesError, DATA_DIR, DataDir, Published, Questions, SetFile};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(Lambada);

const PUBLISHED: Published = Published {
    set: "lambada",
    files: &["lambada_test.jsonl"],
    is_one_enough: false,
    urls: &["https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"],
    cache_folder: "Lambada",
};

/// The opened set.
struct Lambada {
    questions: Questions,
}

impl ChoiceDataset for Lambada {
    const NAME: &'static str = "lambada";
    const SUMMARY: &'static str = "LAMBADA: say the last word of a passage; 5153 passages";
    const ARGS: &'static [ArgSpec] = &[DATA_DIR];
    type Config = DataDir;

    fn open(config: DataDir, host: &Host) -> Result<Self, PluginError> {
        let questions = PUBLISHED.open(config.dir.as_deref(), host, |files, _| read(files))?;
        Ok(Self { questions })
    }

    fn info(&self) -> ChoiceInfo {
        self.questions.info(ScoringRule::LastWord)
    }

    fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        self.questions.read(first, n)
    }
}

/// A line of the file.
#[derive(Deserialize)]
struct Row {
    text: String,
}

fn read(files: &[SetFile]) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    for file in files {
        for row in file.rows::<Row>()? {
            let (line, Row { text }) = row?;
            if text.trim().is_empty() {
                return Err(line.error("`text` is empty"));
            }
            questions.list.push(Question {
                group: "lambada".to_owned(),
                prefix: String::new(),
                options: vec![text],
                answer: 0,
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

    const LINE: &str = r#"{"text": " In my palm is\n\n\"a clear stone\u00a0"}"#;

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<DataDir>(Lambada::ARGS, &[]);
    }

    #[test]
    fn a_passage_is_taken_as_it_is() {
        let questions = read(&[set_file("a", LINE.as_bytes())]).unwrap();
        let text = " In my palm is\n\n\"a clear stone\u{a0}";
        assert_eq!(questions.list[0].options, [text]);
        assert_eq!(
            why(read(&[set_file("a", br#"{"text": " "}"#)])),
            "`a` line 1: `text` is empty; the line starts `{\"text\": \" \"}`"
        );
    }

    /// The first 50 lines of the published file.
    #[test]
    fn published_passages_are_read() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        let questions = read(&files).unwrap();
        assert_eq!(questions.list.len(), 50);
        let words = questions.list.iter().map(|question| {
            let text = question.options[0].as_str();
            text.rsplit(' ').next().unwrap_or_default()
        });
        assert_eq!(
            words.take(3).collect::<Vec<_>>(),
            ["signs", "Shane", "insurance"]
        );
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = read(&[set_file("a", &overwritten(LINE.into(), place, &garbage))]);
        }
    }
}
