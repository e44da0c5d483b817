//! The published corpora: how their files are named and ordered, where they lie, what of them is text.
//! Facts only; reading is in [`crate::shards`].

use crate::numpy::Rng;

/// Seed of every order in the reference.
const SEED: u32 = 123;

/// Ends every document, as plain text; its pieces are ordinary ones.
pub const SEPARATOR: &str = "<STORY_SEP>";

/// A part of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// For training models and tokenizers.
    Train,
    /// For validation.
    Validation,
    /// For the final test.
    Test,
}

impl Split {
    /// As it stands in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl From<moeut_plugin_api::Split> for Split {
    fn from(split: moeut_plugin_api::Split) -> Self {
        match split {
            moeut_plugin_api::Split::Train => Self::Train,
            moeut_plugin_api::Split::Validation => Self::Validation,
            moeut_plugin_api::Split::Test => Self::Test,
        }
    }
}

/// A corpus of text in many files.
///
/// # Source
/// Reference code `dataset/text/c4.py`, `pes2o.py`, `slimpajama.py`, `thestack.py`.
#[derive(Debug, Clone, PartialEq)]
pub struct Corpus {
    /// The reference's class name; the first folder of the cache.
    pub class: &'static str,
    /// Key of the text in a JSON line, or column of a Parquet file.
    pub key: String,
    /// Put behind every document; may be empty.
    pub separator: &'static str,
    /// The tokenizer is trained on this many of the first training shards.
    pub n_tokenizer_shards: usize,
    /// At least so many chunks are used, however few tokens are wanted.
    pub min_chunks: usize,
    /// Whether windows are handed out in random order.
    pub is_shuffled: bool,
    /// Path on the hub to what [`Corpus::files`] begins with.
    pub(crate) hub_path: &'static str,
    /// Leading folders of [`Corpus::files`] that a folder of shards may leave out.
    pub(crate) n_optional_folders: usize,
    layout: Layout,
}

/// How files are named.
#[derive(Debug, Clone, PartialEq)]
enum Layout {
    /// `en/c4-train.00000-of-01024.json.gz`
    Numbered {
        variant: String,
        prefix: &'static str,
        separator: char,
        n_train: usize,
        n_validation: usize,
    },
    /// `train/chunk3/example_train_1579.jsonl.zst`
    SlimPajama,
    /// `data/python/train-00056-of-00206.parquet`
    TheStack { languages: Vec<&'static str> },
    /// Any files; the share of the documents that validates where no file says that it does.
    Loose { valid_share: f64 },
}

/// The Stack's languages in the paper, and their files.
const LANGUAGES: &[(&str, u32)] = &[
    ("assembly", 3),
    ("c++", 214),
    ("haskell", 7),
    ("html", 802),
    ("javascript", 499),
    ("python", 206),
    ("rust", 40),
    ("scala", 17),
];

impl Corpus {
    /// C4 in one of its published variants (`en`, `realnewslike`, `en.noblocklist`, `en.noclean`); another name is
    /// taken to have as many shards as `en`.
    pub fn c4(variant: &str) -> Self {
        let (n_train, n_validation) = match variant {
            "realnewslike" => (512, 1),
            "en.noclean" => (7168, 64),
            _ => (1024, 8),
        };
        Self {
            hub_path: "datasets/allenai/c4/resolve/1ddc917116b730e1859edef32896ec5c16be51d0",
            ..Self::new(
                "C4",
                10,
                Layout::Numbered {
                    variant: variant.to_owned(),
                    prefix: "c4-",
                    separator: '.',
                    n_train,
                    n_validation,
                },
            )
        }
    }

    /// peS2o (`v2` in the paper).
    pub fn pes2o(variant: &str) -> Self {
        Self {
            hub_path: "datasets/allenai/peS2o/resolve/main/data",
            ..Self::new(
                "PES2O",
                1,
                Layout::Numbered {
                    variant: variant.to_owned(),
                    prefix: "",
                    separator: '-',
                    n_train: 20,
                    n_validation: 2,
                },
            )
        }
    }

    /// SlimPajama.
    pub fn slim_pajama() -> Self {
        Self {
            hub_path: "datasets/cerebras/SlimPajama-627B/resolve/main",
            // `chunk1` is there in every split.
            n_optional_folders: 0,
            ..Self::new("SlimPajama", 200, Layout::SlimPajama)
        }
    }

    /// The Stack in some of [`Corpus::the_stack_languages`]; `None` if one is unknown, or there is none. Order and
    /// repetitions do not matter.
    pub fn the_stack(languages: &[String]) -> Option<Self> {
        let mut known = languages
            .iter()
            .map(|language| Self::the_stack_languages().find(|name| name == language))
            .collect::<Option<Vec<_>>>()?;
        known.sort_unstable();
        known.dedup();
        if known.is_empty() {
            return None;
        }
        Some(Self {
            key: "content".to_owned(),
            separator: "",
            min_chunks: known.len(),
            is_shuffled: true,
            hub_path: "datasets/bigcode/the-stack/resolve/main",
            ..Self::new(
                "TheStack",
                known.len().max(20),
                Layout::TheStack { languages: known },
            )
        })
    }

    /// The languages that the paper takes from The Stack.
    pub fn the_stack_languages() -> impl Iterator<Item = &'static str> {
        LANGUAGES.iter().map(|&(language, _)| language)
    }

    /// Any files of text below a folder, with the text at `key`.
    pub fn loose(key: &str, valid_share: f64) -> Self {
        Self {
            key: key.to_owned(),
            ..Self::new("TextFiles", 10, Layout::Loose { valid_share })
        }
    }

    fn new(class: &'static str, n_tokenizer_shards: usize, layout: Layout) -> Self {
        Self {
            class,
            key: "text".to_owned(),
            separator: SEPARATOR,
            n_tokenizer_shards,
            min_chunks: 1,
            is_shuffled: false,
            hub_path: "",
            n_optional_folders: 1,
            layout,
        }
    }

    /// The published files of a split in their logical order; empty if there is no such split.
    ///
    /// SlimPajama's are permuted, each split by a generator of its own. Of The Stack, each language in the order of
    /// names takes a permutation from one generator, whose first tenth is for validation, and languages take turns.
    pub fn files(&self, split: Split) -> Vec<String> {
        match &self.layout {
            Layout::Numbered { variant, .. } => (0..self.n_numbered(split))
                .map(|index| format!("{variant}/{}", self.file_name(split, index)))
                .collect(),
            Layout::SlimPajama => slim_pajama_files(split),
            Layout::TheStack { languages } => the_stack_files(languages, split),
            Layout::Loose { .. } => Vec::new(),
        }
    }

    /// `c4-train.00000-of-01024.json.gz`
    ///
    /// # Panics
    /// If the corpus numbers its files otherwise, which is a bug in the caller.
    pub fn file_name(&self, split: Split, index: usize) -> String {
        let stem = self.stem(split);
        assert!(stem.is_some(), "`{}` has no numbered shards", self.class);
        let n = self.n_numbered(split);
        format!("{}{index:05}-of-{n:05}.json.gz", stem.unwrap_or_default())
    }

    /// Whether a path is that of a shard of `split`, of whatever total number of shards; for corpora whose order is
    /// that of the names.
    pub(crate) fn is_numbered_shard(&self, split: Split, path: &str) -> bool {
        let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let name = path.rsplit('/').next().unwrap_or(path);
        self.stem(split)
            .and_then(|stem| name.strip_prefix(stem.as_str()))
            .and_then(|rest| rest.strip_suffix(".json.gz"))
            .and_then(|rest| rest.split_once("-of-"))
            .is_some_and(|(index, total)| number(index) && number(total))
    }

    /// The share of documents for validation, if the corpus is any files.
    pub(crate) fn valid_share(&self) -> Option<f64> {
        match self.layout {
            Layout::Loose { valid_share } => Some(valid_share),
            Layout::Numbered { .. } | Layout::SlimPajama | Layout::TheStack { .. } => None,
        }
    }

    /// The name of the folder of one vocabulary: `C4-en-8000`, `TheStack-python_rust-8000`.
    pub fn variant_id(&self, vocab_size: usize) -> String {
        let name = match &self.layout {
            Layout::Numbered { variant, .. } => format!("-{variant}"),
            Layout::TheStack { languages } => format!("-{}", languages.join("_")),
            Layout::SlimPajama | Layout::Loose { .. } => String::new(),
        };
        format!("{}{name}-{vocab_size}", self.class)
    }

    fn n_numbered(&self, split: Split) -> usize {
        match (&self.layout, split) {
            (Layout::Numbered { n_train, .. }, Split::Train) => *n_train,
            (Layout::Numbered { n_validation, .. }, Split::Validation) => *n_validation,
            _ => 0,
        }
    }

    /// What a numbered file begins with.
    fn stem(&self, split: Split) -> Option<String> {
        match &self.layout {
            Layout::Numbered {
                prefix, separator, ..
            } => Some(format!("{prefix}{}{separator}", split.name())),
            Layout::SlimPajama | Layout::TheStack { .. } | Layout::Loose { .. } => None,
        }
    }
}

fn slim_pajama_files(split: Split) -> Vec<String> {
    let (kind, n_in_chunks): (_, &[u32]) = match split {
        Split::Train => (
            "train",
            &[5912, 5911, 5919, 5917, 5933, 5915, 5906, 5921, 5920, 5912],
        ),
        Split::Validation => ("holdout", &[6279, 6278, 6286, 6284, 6301]),
        Split::Test => ("holdout", &[6282, 6273, 6289, 6288, 6279]),
    };
    let files: Vec<(usize, u32)> = (1..)
        .zip(n_in_chunks)
        .flat_map(|(chunk, &n)| (0..n).map(move |index| (chunk, index)))
        .collect();
    let folder = split.name();
    Rng::new(SEED)
        .permutation(n_in_chunks.iter().sum())
        .into_iter()
        .map(|place| {
            let (chunk, index) = files[place as usize];
            format!("{folder}/chunk{chunk}/example_{kind}_{index}.jsonl.zst")
        })
        .collect()
}

fn the_stack_files(languages: &[&str], split: Split) -> Vec<String> {
    let mut rng = Rng::new(SEED);
    let mut rows = Vec::new();
    for &(language, n_files) in LANGUAGES.iter().filter(|(it, _)| languages.contains(it)) {
        let order = rng.permutation(n_files);
        let n_validation = (n_files as usize / 10).max(1);
        let indices = match split {
            Split::Train => &order[n_validation..],
            Split::Validation => &order[..n_validation],
            Split::Test => &[],
        };
        let name = |index| format!("data/{language}/train-{index:05}-of-{n_files:05}.parquet");
        rows.push(indices.iter().map(name).collect::<Vec<String>>());
    }
    let n_rounds = rows.iter().map(Vec::len).max().unwrap_or(0);
    (0..n_rounds)
        .flat_map(|round| rows.iter().filter_map(move |row| row.get(round).cloned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::known_answers;

    fn the_stack(languages: &str) -> Corpus {
        let languages: Vec<String> = languages.split(',').map(str::to_owned).collect();
        Corpus::the_stack(&languages).unwrap()
    }

    #[test]
    fn published_names() {
        let c4 = Corpus::c4("en");
        assert_eq!(
            c4.files(Split::Validation)[3],
            "en/c4-validation.00003-of-00008.json.gz"
        );
        assert_eq!(c4.files(Split::Train).len(), 1024);
        assert!(c4.files(Split::Test).is_empty());
        let pes2o = Corpus::pes2o("v2");
        assert_eq!(
            pes2o.files(Split::Train)[19],
            "v2/train-00019-of-00020.json.gz"
        );
        let all = "python,html,c++,rust,javascript,haskell,scala,assembly";
        for (corpus, id) in [
            (c4, "C4-en-8000"),
            (pes2o, "PES2O-v2-8000"),
            (Corpus::slim_pajama(), "SlimPajama-8000"),
            (the_stack("rust,python"), "TheStack-python_rust-8000"),
            (
                the_stack(all),
                "TheStack-assembly_c++_haskell_html_javascript_python_rust_scala-8000",
            ),
        ] {
            assert_eq!(corpus.variant_id(8000), id);
        }
    }

    #[test]
    fn only_shards_of_the_split_are_taken() {
        let c4 = Corpus::c4("en");
        let is_shard = |path| c4.is_numbered_shard(Split::Train, path);
        assert!(is_shard("en/c4-train.00007-of-01024.json.gz"));
        assert!(is_shard("c4-train.00000-of-00002.json.gz"));
        for other in [
            "c4-validation.00000-of-00008.json.gz",
            "c4-train.00007-of-01024.json.gz.part",
            "c4-train.7-of-01024.json.gz",
            "c4-train.00007.json.gz",
            "NOTICE",
        ] {
            assert!(!is_shard(other), "{other}");
        }
    }

    /// Golden: the reference's orders under NumPy 2.4.6.
    #[test]
    fn slim_pajamas_order_is_the_references() {
        let answers = known_answers();
        for split in [Split::Train, Split::Validation, Split::Test] {
            let expected = &answers["slimpajama"][split.name()];
            let found = Corpus::slim_pajama().files(split);
            assert_eq!(found.len() as u64, expected["n"].as_u64().unwrap());
            let first: Vec<String> = serde_json::from_value(expected["first12"].clone()).unwrap();
            assert_eq!(found[..12], first);
        }
    }

    /// Golden: the reference's orders under NumPy 2.4.6, for several sets of languages.
    #[test]
    fn the_stacks_split_and_order_are_the_references() {
        let answers = known_answers();
        let table = answers["thestack"].as_object().unwrap();
        assert_eq!(table.len(), 5);
        for (languages, expected) in table {
            let corpus = the_stack(languages);
            for (split, n, first) in [
                (Split::Train, "n_train", "train_first16"),
                (Split::Validation, "n_valid", "valid_first8"),
            ] {
                let found = corpus.files(split);
                assert_eq!(found.len() as u64, expected[n].as_u64().unwrap());
                let first: Vec<(String, u32)> =
                    serde_json::from_value(expected[first].clone()).unwrap();
                for (file, (language, index)) in found.iter().zip(first) {
                    let start = format!("data/{language}/train-{index:05}-of-");
                    assert!(file.starts_with(&start), "{languages}: {file}");
                }
            }
            assert!(corpus.files(Split::Test).is_empty());
        }
    }

    /// As counted from the reference.
    #[test]
    fn the_stacks_validation_has_a_tenth_of_each_language() {
        let corpus = the_stack("python,html,c++,rust,javascript,haskell,scala,assembly");
        let files = corpus.files(Split::Validation);
        let n_of = |language: &str| {
            let folder = format!("data/{language}/");
            files.iter().filter(|it| it.starts_with(&folder)).count()
        };
        let n: Vec<usize> = Corpus::the_stack_languages().map(n_of).collect();
        assert_eq!(n, [1, 21, 1, 80, 49, 20, 4, 1]);
        assert_eq!(corpus.min_chunks, 8);
        assert_eq!(corpus.n_tokenizer_shards, 20);
    }

    #[test]
    fn an_unknown_language_is_none() {
        assert!(Corpus::the_stack(&["cobol".to_owned()]).is_none());
        assert!(Corpus::the_stack(&[]).is_none());
    }
}
