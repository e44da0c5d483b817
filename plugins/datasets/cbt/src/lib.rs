//! `cbt`: twenty sentences of a children's book, and a word that is missing in the next one; ten words to choose from.
//!
//! A group is a kind of word: common nouns (`CN`), named entities (`NE`), prepositions (`P`), verbs (`V`).

use moeut_choices::{
    ChoicesError, DATA_DIR, Line, Progress, Published, Questions, SetFile, Watch, python::strip,
};
use moeut_plugin_api::{
    ArgSpec, ChoiceDataset, ChoiceInfo, Host, PluginError, Question, ScoringRule,
};
use serde::Deserialize;
use std::path::PathBuf;

moeut_plugin_api::export_plugin!();
moeut_plugin_api::register_choice_dataset!(Cbt);

const PUBLISHED: Published = Published {
    set: "cbt",
    files: &[
        "cbtest_CN_test_*.txt",
        "cbtest_NE_test_*.txt",
        "cbtest_P_test_*.txt",
        "cbtest_V_test_*.txt",
    ],
    is_one_enough: true,
    urls: &[
        "https://huggingface.co/datasets/cbt/resolve/7503a0643517afe02a86e4750d375a9686008efa/data/CBTest.tgz",
    ],
    cache_folder: "ChildrenBooksTest/data",
};

/// The answer and the candidates other than it; a question with another number of them is left out.
const N_OPTIONS: usize = 10;
/// What stands for the missing word.
const BLANK: &str = "XXXXX";

/// Where the files are, which questions count, and how they are scored.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    /// A folder with the files.
    dir: Option<PathBuf>,
    /// Whether the option's tokens alone count, and their mean.
    is_normalized: bool,
    /// Longest question, in words of its context and its longest option.
    max_words: Option<usize>,
}

/// The opened set.
struct Cbt {
    questions: Questions,
    is_normalized: bool,
}

impl ChoiceDataset for Cbt {
    const NAME: &'static str = "cbt";
    const SUMMARY: &'static str = "Children's Book Test: the missing word of a story, one of ten";
    const ARGS: &'static [ArgSpec] = &[
        DATA_DIR,
        ArgSpec::flag("lm.eval.cbt.normalize", "0")
            .field("is_normalized")
            .help("Score an option by the mean of its tokens, as the paper's code did at first; `-compat 1` does, too"),
        // The reference's limit was meant in tokens, which a dataset does not know, and had no effect.
        ArgSpec::int("lm.eval.cbt.length_limit", "none")
            .field("max_words")
            .optional()
            .unit("words")
            .help("Leave out questions longer than that, with their longest option"),
    ];
    type Config = Config;

    fn open(config: Config, host: &Host) -> Result<Self, PluginError> {
        let questions = PUBLISHED.open(config.dir.as_deref(), host, |files, watch| {
            read(files, config.max_words, watch)
        })?;
        Ok(Self {
            questions,
            is_normalized: config.is_normalized || host.info().compat,
        })
    }

    fn info(&self) -> ChoiceInfo {
        self.questions.info(ScoringRule::Choice {
            is_normalized: self.is_normalized,
        })
    }

    fn read(&self, first: u64, n: u64) -> Result<Vec<Question>, PluginError> {
        self.questions.read(first, n)
    }
}

fn read(
    files: &[SetFile],
    max_words: Option<usize>,
    watch: Watch<'_>,
) -> Result<Questions, ChoicesError> {
    let mut questions = Questions::default();
    let (mut n_malformed, mut n_long) = (0, 0);
    for file in files {
        let group = file.name.split('_').nth(1).unwrap_or_default();
        let lines: Vec<Line> = file.lines()?.collect();
        let blocks = lines.split(|line| strip(line.text).is_empty());
        for (last, sentences) in blocks.filter_map(<[Line]>::split_last) {
            let question = question(group, sentences, last)?;
            if question.options.len() != N_OPTIONS {
                n_malformed += 1;
            } else if max_words.is_some_and(|max_words| n_words(&question) > max_words) {
                n_long += 1;
            } else {
                questions.list.push(question);
            }
        }
    }
    questions.n_skipped = n_malformed + n_long;
    for (n_skipped, reason) in [
        (n_malformed, "that do not have 10 different options"),
        (n_long, "longer than `-lm.eval.cbt.length_limit`"),
    ] {
        if n_skipped > 0 {
            let text = format!("`cbt` leaves out questions {reason}: {n_skipped}");
            watch.tell(Progress::Warning(text));
        }
    }
    Ok(questions)
}

/// Makes a question of sentences and a last line `sentence TAB answer TAB candidates`. The answer is the first option.
fn question(group: &str, sentences: &[Line], last: &Line) -> Result<Question, ChoicesError> {
    let sentences = sentences.iter().map(|line| numbered(line).map(detokenized));
    let context = sentences.collect::<Result<Vec<_>, _>>()?.join(" ");
    let fields = numbered(last)?.split('\t');
    let fields: Vec<&str> = fields.filter(|field| !field.is_empty()).collect();
    let [sentence, answer, candidates, ..] = fields[..] else {
        return Err(last.error("it is not sentence, answer and candidates with tabs between them"));
    };
    let sentence = detokenized(sentence);
    let mut pieces = sentence.split(BLANK);
    let (Some(before), Some(after)) = (pieces.next(), pieces.next()) else {
        return Err(last.error(format!("the sentence has no `{BLANK}`")));
    };
    let others = candidates
        .split('|')
        .filter(|&word| !word.is_empty() && word != answer);
    let words = [answer].into_iter().chain(others);
    Ok(Question {
        group: group.to_owned(),
        prefix: format!("{context} {before}"),
        options: words.map(|word| format!("{word}{after}")).collect(),
        answer: 0,
    })
}

/// A line without its number.
fn numbered<'a>(line: &Line<'a>) -> Result<&'a str, ChoicesError> {
    let numbered = strip(line.text).split_once(' ');
    numbered
        .map(|(_, text)| text)
        .ok_or_else(|| line.error("it does not start with a number"))
}

/// Undoes the tokenization of the Penn Treebank, in this order; the rule of the reference and of the evaluation harness.
fn detokenized(text: &str) -> String {
    const REPLACED: [(&str, &str); 10] = [
        (" '", "'"),
        (" n't", "n't"),
        ("`` ", "\""),
        ("''", "\""),
        (" :", ":"),
        (" ;", ";"),
        (" !", "!"),
        (" ?", "?"),
        (" ,", ","),
        (" .", "."),
    ];
    let replaced = |text: String, (from, to)| text.replace(from, to);
    REPLACED.into_iter().fold(text.to_owned(), replaced)
}

/// Words of the context and of the longest option.
fn n_words(question: &Question) -> usize {
    let count = |text: &str| text.split_whitespace().count();
    let options = question.options.iter().map(|option| count(option));
    count(&question.prefix) + options.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use moeut_choices::testing::{overwritten, published_files, set_file, why};
    use proptest::prelude::*;
    use std::cell::RefCell;

    use super::*;

    const SENTENCES: &str =
        "1 `` How still it is ! '' said Mary ; she did n't move .\n2 It 's me : Jack , no ?\n";
    const LAST: &str = "21 `` It was a XXXXX , '' he said .\tsound\t\tb|c|sound|d||e|f|g|h|i|j\n";

    fn read_text(text: &str, max_words: Option<usize>) -> Result<Questions, ChoicesError> {
        let file = set_file("cbtest_CN_test_1ex.txt", text.as_bytes());
        read(&[file], max_words, Watch::nobody())
    }

    #[test]
    fn argument_table_fills_the_configuration() {
        moeut_plugin_api::testing::check_args::<Config>(Cbt::ARGS, &[]);
    }

    #[test]
    fn a_block_becomes_a_story_with_ten_ends() {
        let block = format!("{SENTENCES}{LAST}");
        // Blank lines more than one, of Windows, at the start and at the end are between no blocks.
        let text = format!("\n{block} \r\n\n{}", block.trim_end().replace('\n', "\r\n"));
        let questions = read_text(&text, None).unwrap();
        let others = "bcdefghij"
            .chars()
            .map(|word| format!("{word},\" he said."));
        let expected = Question {
            group: "CN".to_owned(),
            prefix:
                "\"How still it is!\" said Mary; she didn't move. It's me: Jack, no? \"It was a "
                    .to_owned(),
            options: ["sound,\" he said.".to_owned()]
                .into_iter()
                .chain(others)
                .collect(),
            answer: 0,
        };
        assert_eq!(questions.list, [expected.clone(), expected]);
        assert_eq!(questions.n_skipped, 0);
    }

    #[test]
    fn questions_without_ten_options_are_left_out_with_a_warning() {
        let warnings = RefCell::new(Vec::new());
        let watch = Watch {
            progress: &|news| warnings.borrow_mut().push(news),
            ..Watch::nobody()
        };
        let nine = LAST.replace("|j", "");
        let eleven = LAST.replace("|j", "|j|k");
        let text = format!("{nine}\n{LAST}\n{eleven}");
        let file = set_file("cbtest_V_test_3ex.txt", text.as_bytes());
        let questions = read(&[file], None, watch).unwrap();
        assert_eq!((questions.list.len(), questions.n_skipped), (1, 2));
        let text = "`cbt` leaves out questions that do not have 10 different options: 2";
        assert_eq!(*warnings.borrow(), [Progress::Warning(text.to_owned())]);
    }

    #[test]
    fn the_limit_counts_words_of_context_and_longest_option() {
        let text = format!("1 one two\n{LAST}");
        for (max_words, n_skipped) in [(None, 0), (Some(8), 0), (Some(7), 1)] {
            assert_eq!(read_text(&text, max_words).unwrap().n_skipped, n_skipped);
        }
    }

    #[test]
    fn a_line_that_is_no_sentence_and_no_question_is_named() {
        for (text, reason) in [
            (
                "1\n2 a",
                "line 1: it does not start with a number; the line starts `1`",
            ),
            (
                "1 a\n2 a XXXXX .\tb",
                "line 2: it is not sentence, answer and candidates with tabs between them; the line starts `2 a XXXXX .\tb`",
            ),
            (
                "2 a .\tb\tb|c",
                "line 1: the sentence has no `XXXXX`; the line starts `2 a .\tb\tb|c`",
            ),
        ] {
            let expected = format!("`cbtest_CN_test_1ex.txt` {reason}");
            assert_eq!(why(read_text(text, None)), expected);
        }
    }

    /// Files of the published form, made from other books.
    #[test]
    fn files_of_the_published_form_are_read() {
        let Some(files) = published_files(&PUBLISHED) else {
            return;
        };
        let questions = read(&files, None, Watch::nobody()).unwrap();
        let groups = questions.list.chunk_by(|a, b| a.group == b.group);
        let counts: Vec<_> = groups
            .map(|group| (&*group[0].group, group.len()))
            .collect();
        assert_eq!(counts, [("CN", 400), ("NE", 155), ("P", 400), ("V", 400)]);
        assert_eq!(questions.n_skipped, 0);
    }

    proptest! {
        #[test]
        fn garbage_is_survived(place: usize, garbage in prop::collection::vec(any::<u8>(), 0..40)) {
            let bytes = overwritten(format!("{SENTENCES}{LAST}").into(), place, &garbage);
            let _ = read(&[set_file("a", &bytes)], Some(20), Watch::nobody());
        }
    }
}
