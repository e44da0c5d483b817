//! `blimp`: pairs of sentences that differ in one point of grammar; the model must find the good one likelier.
//!
//! A group is a phenomenon, which is a file of the published archive.

use moeut_choices::{
    ChoicesError, DATA_DIR, DataDir, Published, Questions, SetFile, Watch, archive::zip_members,
};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;
use std::io::Cursor;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(Blimp);

const PUBLISHED: Published = Published {
    set: "blimp",
    files: &["BLiMP.zip"],
    is_one_enough: false,
    urls: &["https://github.com/alexwarstadt/blimp/raw/master/BLiMP.zip"],
    cache_folder: "BLiMP/data",
};

/// The members of the archive that have sentences.
const MEMBERS: &str = "data/*.jsonl";

/// The opened set.
struct Blimp {
    questions: Questions,
}

impl ChoiceDataset for Blimp {
    const NAME: &'static str = "blimp";
    const SUMMARY: &'static str =
        "BLiMP: which of two sentences is grammatical; 67 phenomena, 1000 pairs each";
    const ARGS: &'static [ArgSpec] = &[DATA_DIR];
    type Config = DataDir;

    fn open(config: DataDir, host: &Host) -> Result<Self, PluginError> {
        let questions = PUBLISHED.open(config.dir.as_deref(), host, read)?;
        Ok(Self { questions })
    }

    fn info(&self) -> ChoiceInfo {
        self.questions.info(ScoringRule::Choice {
            is_normalized: false,
        })
    }

    fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        self.questions.read(first, n)
    }
}

/// A line of a member.
#[derive(Deserialize)]
struct Row {
    sentence_good: String,
    sentence_bad: String,
}

fn read(files: &[SetFile], watch: Watch<'_>) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    for archive in files {
        let bytes = Cursor::new(&archive.bytes);
        let mut members = zip_members(&archive.place, archive.url, bytes, &[MEMBERS], watch)?;
        if members.is_empty() {
            return Err(archive.error(format!("has no file named `{MEMBERS}`")));
        }
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for member in &members {
            let group = member.name.strip_suffix(".jsonl").unwrap_or(&member.name);
            for row in member.rows::<Row>()? {
                let (_, row) = row?;
                questions.list.push(Question {
                    group: group.to_owned(),
                    prefix: String::new(),
                    options: vec![row.sentence_good, row.sentence_bad],
                    answer: 0,
                });
            }
        }
    }
    Ok(questions)
}

#[cfg(test)]
mod tests {
    use moeut_choices::testing::{overwritten, published_files, set_file, why, zip_of};
    use proptest::prelude::*;

    use super::*;

    const LINE: &str = "{\"sentence_good\": \" It is.\", \"sentence_bad\": \"It are. \"}\n";

    fn read_zip(members: &[(&str, String)]) -> Result<Questions, ChoicesError> {
        read(&[set_file("BLiMP.zip", &zip_of(members))], Watch::nobody())
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<DataDir>(Blimp::ARGS, &[]);
    }

    /// The published archive.
    #[test]
    fn each_phenomenon_has_a_thousand_pairs() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        let questions = read(&files, Watch::nobody()).unwrap().list;
        let groups: Vec<_> = questions.chunk_by(|a, b| a.group == b.group).collect();
        assert_eq!(groups.len(), 67);
        assert!(groups.iter().all(|group| group.len() == 1000));
        assert!(groups.is_sorted_by_key(|group| &group[0].group));
        let pair = &questions[0];
        assert_eq!(pair.group, "adjunct_island");
        assert_eq!(
            pair.options,
            [
                "Who should Derek hug after shocking Richard?",
                "Who should Derek hug Richard after shocking?"
            ]
        );
        assert_eq!((&*pair.prefix, pair.answer), ("", 0));
    }

    #[test]
    fn members_are_read_by_name_and_junk_is_passed_over() {
        let junk = ["data/.DS_Store", "__MACOSX/data/._a.jsonl", "readme.jsonl"];
        let mut members: Vec<_> = junk.map(|name| (name, "junk".to_owned())).into();
        members.extend(["data/b.jsonl", "data/a.jsonl"].map(|name| (name, LINE.repeat(2))));
        let questions = read_zip(&members).unwrap().list;
        let groups: Vec<_> = questions.iter().map(|question| &*question.group).collect();
        assert_eq!(groups, ["a", "a", "b", "b"]);
        assert_eq!(questions[0].options, [" It is.", "It are. "]);
    }

    #[test]
    fn an_archive_without_sentences_is_an_error() {
        assert_eq!(
            why(read_zip(&[("data/a.txt", LINE.to_owned())])),
            "`BLiMP.zip` has no file named `data/*.jsonl`"
        );
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            let zip = overwritten(zip_of(&[("data/a.jsonl", LINE.to_owned())]), place, &garbage);
            let _ = read(&[set_file("BLiMP.zip", &zip)], Watch::nobody());
            let line = overwritten(LINE.into(), place, &garbage);
            let _ = read_zip(&[("data/a.jsonl", String::from_utf8_lossy(&line).into_owned())]);
        }
    }
}
