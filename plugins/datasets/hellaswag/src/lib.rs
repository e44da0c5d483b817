//! `hellaswag`: descriptions of videos and of how things are done, each with four ways to go on.

use moeut_choices::{ChoicesError, DATA_DIR, Published, Questions, SetFile, python};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;
use std::path::PathBuf;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(HellaSwag);

const PUBLISHED: Published = Published {
    set: "hellaswag",
    files: &["hellaswag_val.jsonl"],
    is_one_enough: false,
    urls: &["https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"],
    cache_folder: "HellaSwag/data",
};

/// Where the file is, and how its texts are cleaned.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// A folder with the file.
    dir: Option<PathBuf>,
    /// What becomes of tags such as `[step]`.
    clean: Clean,
}

/// What becomes of tags in brackets, which come from how-to pages; `[title]` is always the end of a sentence.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Clean {
    /// They stay. The reference's regular expression `\\[.*?\\]` has a backslash too many and deletes another thing: a
    /// backslash with one of `.*?\` behind it. The paper's numbers are with it.
    Reference,
    /// They are deleted, which is what was meant, and what the evaluation harness does that the reference follows.
    Brackets,
}

/// The opened set.
struct HellaSwag {
    questions: Questions,
}

impl ChoiceDataset for HellaSwag {
    const NAME: &'static str = "hellaswag";
    const SUMMARY: &'static str = "HellaSwag: which of four sentences goes on; 10042 questions";
    const ARGS: &'static [ArgSpec] = &[
        DATA_DIR,
        ArgSpec::text("lm.eval.hellaswag.clean", "reference")
            .field("clean")
            .choices("reference|brackets")
            .help("Leave tags such as [step] in the texts, as the paper's code, or delete them"),
    ];
    type Config = Config;

    fn open(config: Config, host: &Host) -> Result<Self, PluginError> {
        let questions = PUBLISHED.open(config.dir.as_deref(), host, |files, _| {
            read(files, config.clean)
        })?;
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

/// A line of the file.
#[derive(Deserialize)]
struct Row {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: [String; 4],
    label: u32,
}

fn read(files: &[SetFile], clean: Clean) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    for file in files {
        for row in file.rows::<Row>()? {
            let (line, row) = row?;
            if row.label as usize >= row.endings.len() {
                return Err(line.error(format!("the label {} is not 0 to 3", row.label)));
            }
            let start = python::capitalize(&row.ctx_b);
            let context = format!("{}: {} {start}", row.activity_label, row.ctx_a);
            let endings = row.endings.iter();
            questions.list.push(Question {
                group: "val".to_owned(),
                prefix: clean.apply(&context),
                options: endings
                    .map(|ending| format!(" {}", clean.apply(ending)))
                    .collect(),
                answer: row.label,
            });
        }
    }
    Ok(questions)
}

impl Clean {
    fn apply(self, text: &str) -> String {
        let text = python::strip(text).replace(" [title]", ". ");
        let text = match self {
            Self::Reference => without_escapes(&text),
            Self::Brackets => without_brackets(&text),
        };
        text.replace("  ", " ")
    }
}

/// Without each backslash that one of `.*?\` follows, and that one.
fn without_escapes(text: &str) -> String {
    let mut kept = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let is_escape = c == '\\' && chars.next_if(|&next| ".*?\\".contains(next)).is_some();
        if !is_escape {
            kept.push(c);
        }
    }
    kept
}

/// Without each `[…]` that is closed on its own line.
fn without_brackets(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('[') {
        kept.push_str(before);
        rest = match after.split_once([']', '\n']) {
            Some((tag, behind)) if after[tag.len()..].starts_with(']') => behind,
            _ => {
                kept.push('[');
                after
            }
        };
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use moeut_choices::testing::{overwritten, published_files, set_file, why};
    use proptest::prelude::*;

    use super::*;

    const LINE: &str = r#"{"ind": 1, "activity_label": "Pole vault", "ctx_a": "[header] How to [title] Run ", "ctx_b": "a Woman", "ctx": "", "endings": ["[step] go", " b ", "c [substeps] d", "d\\.e"], "label": 3}"#;

    fn read_text(text: &str, clean: Clean) -> Result<Questions, ChoicesError> {
        read(&[set_file("a", text.as_bytes())], clean)
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<Config>(HellaSwag::ARGS, &[]);
    }

    #[test]
    fn texts_are_cleaned_as_the_reference_does_or_as_it_meant() {
        for (clean, prefix, options) in [
            (
                Clean::Reference,
                "Pole vault: [header] How to. Run A woman",
                [" [step] go", " b", " c [substeps] d", " de"],
            ),
            (
                Clean::Brackets,
                "Pole vault: How to. Run A woman",
                ["  go", " b", " c d", " d\\.e"],
            ),
        ] {
            let question = &read_text(LINE, clean).unwrap().list[0];
            assert_eq!(question.prefix, prefix);
            assert_eq!(question.options, options);
            assert_eq!((&*question.group, question.answer), ("val", 3));
        }
    }

    /// Results of Python's `re.sub` with the two expressions.
    #[test]
    fn what_is_deleted_is_what_the_expressions_delete() {
        for (text, reference, brackets) in [
            ("a\\.b\\\\\\.c\\d\\", "abc\\d\\", "a\\.b\\\\\\.c\\d\\"),
            ("[a[b]c]", "[a[b]c]", "c]"),
            ("a]b[c", "a]b[c", "a]b[c"),
            ("[a\nb][c]", "[a\nb][c]", "[a\nb]"),
            ("[a\n[b]", "[a\n[b]", "[a\n"),
            ("[]é[é]", "[]é[é]", "é"),
        ] {
            assert_eq!(without_escapes(text), reference);
            assert_eq!(without_brackets(text), brackets);
        }
    }

    #[test]
    fn a_label_without_an_ending_is_named() {
        let text = LINE.replace("\"label\": 3", "\"label\": 4");
        let why_not = why(read_text(&text, Clean::Reference));
        assert!(
            why_not.starts_with("`a` line 1: the label 4 is not 0 to 3; "),
            "{why_not}"
        );
        let text = LINE.replace("\"[step] go\", ", "");
        let why_not = why(read_text(&text, Clean::Reference));
        assert!(
            why_not.contains("invalid length 3, expected an array of length 4"),
            "{why_not}"
        );
    }

    /// The first 50 lines of the published file.
    #[test]
    fn published_questions_are_read() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        for (clean, n_tags) in [(Clean::Reference, 20), (Clean::Brackets, 0)] {
            let questions = read(&files, clean).unwrap();
            assert_eq!((questions.list.len(), questions.n_skipped), (50, 0));
            let has_tag = |question: &&Question| question.prefix.contains('[');
            assert_eq!(questions.list.iter().filter(has_tag).count(), n_tags);
        }
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            for clean in [Clean::Reference, Clean::Brackets] {
                let bytes = overwritten(LINE.into(), place, &garbage);
                let _ = read(&[set_file("a", &bytes)], clean);
            }
        }
    }
}
