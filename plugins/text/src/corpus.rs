//! The published corpora in gzip-JSONL shards: how their files are named, where they lie, how much there is.
//! Facts only; reading is in [`crate::shards`].

/// A part of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// For training models and tokenizers.
    Train,
    /// For validation.
    Validation,
}

impl Split {
    /// As it stands in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

/// A corpus of gzip-JSONL shards with the key `text`.
///
/// # Source
/// Reference code `dataset/text/c4.py`, `pes2o.py`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// The reference's class name; the first folder of the cache.
    pub class: &'static str,
    /// `en`, `v2`, …; also the folder that holds the shards.
    pub variant: String,
    /// Shards of the training split as published.
    pub n_train_shards: usize,
    /// Shards of the validation split as published.
    pub n_validation_shards: usize,
    /// The tokenizer is trained on this many of the first training shards.
    pub n_tokenizer_shards: usize,
    /// Path on the hub, before the variant.
    hub_path: &'static str,
    /// Before the split in a file name.
    prefix: &'static str,
    /// Between split and number in a file name.
    separator: char,
}

impl Corpus {
    /// C4 in one of its published variants (`en`, `realnewslike`, `en.noblocklist`, `en.noclean`); another name is
    /// taken to have as many shards as `en`.
    pub fn c4(variant: &str) -> Self {
        let (n_train_shards, n_validation_shards) = match variant {
            "realnewslike" => (512, 1),
            "en.noclean" => (7168, 64),
            _ => (1024, 8),
        };
        Self {
            class: "C4",
            variant: variant.to_owned(),
            n_train_shards,
            n_validation_shards,
            n_tokenizer_shards: 10,
            hub_path: "datasets/allenai/c4/resolve/1ddc917116b730e1859edef32896ec5c16be51d0",
            prefix: "c4-",
            separator: '.',
        }
    }

    /// peS2o (`v2` in the paper).
    pub fn pes2o(variant: &str) -> Self {
        Self {
            class: "PES2O",
            variant: variant.to_owned(),
            n_train_shards: 20,
            n_validation_shards: 2,
            n_tokenizer_shards: 1,
            hub_path: "datasets/allenai/peS2o/resolve/main/data",
            prefix: "",
            separator: '-',
        }
    }

    /// Shards of a split as published.
    pub fn n_shards(&self, split: Split) -> usize {
        match split {
            Split::Train => self.n_train_shards,
            Split::Validation => self.n_validation_shards,
        }
    }

    /// `c4-train.00000-of-01024.json.gz`
    pub fn file_name(&self, split: Split, index: usize) -> String {
        format!(
            "{}{index:05}-of-{:05}.json.gz",
            self.stem(split),
            self.n_shards(split)
        )
    }

    /// Whether a file name is that of a shard of `split`, of whatever total number of shards.
    pub fn is_shard(&self, split: Split, file_name: &str) -> bool {
        let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        file_name
            .strip_prefix(self.stem(split).as_str())
            .and_then(|rest| rest.strip_suffix(".json.gz"))
            .and_then(|rest| rest.split_once("-of-"))
            .is_some_and(|(index, total)| number(index) && number(total))
    }

    /// `datasets/…/en/c4-train.00000-of-01024.json.gz`, to be put behind the hub's address.
    pub fn hub_file(&self, split: Split, index: usize) -> String {
        format!(
            "{}/{}/{}",
            self.hub_path,
            self.variant,
            self.file_name(split, index)
        )
    }

    /// The name of the folder of one vocabulary: `C4-en-8000`.
    pub fn variant_id(&self, vocab_size: usize) -> String {
        format!("{}-{}-{vocab_size}", self.class, self.variant)
    }

    fn stem(&self, split: Split) -> String {
        format!("{}{}{}", self.prefix, split.name(), self.separator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_names() {
        let c4 = Corpus::c4("en");
        assert_eq!(
            c4.hub_file(Split::Validation, 3),
            "datasets/allenai/c4/resolve/1ddc917116b730e1859edef32896ec5c16be51d0/en/c4-validation.00003-of-00008.json.gz"
        );
        let pes2o = Corpus::pes2o("v2");
        assert_eq!(
            pes2o.hub_file(Split::Train, 19),
            "datasets/allenai/peS2o/resolve/main/data/v2/train-00019-of-00020.json.gz"
        );
        assert_eq!(c4.variant_id(8000), "C4-en-8000");
        assert_eq!(pes2o.variant_id(8000), "PES2O-v2-8000");
    }

    #[test]
    fn only_shards_of_the_split_are_taken() {
        let c4 = Corpus::c4("en");
        assert!(c4.is_shard(Split::Train, "c4-train.00007-of-01024.json.gz"));
        assert!(c4.is_shard(Split::Train, "c4-train.00000-of-00002.json.gz"));
        for other in [
            "c4-validation.00000-of-00008.json.gz",
            "c4-train.00007-of-01024.json.gz.part",
            "c4-train.7-of-01024.json.gz",
            "c4-train.00007.json.gz",
            "NOTICE",
        ] {
            assert!(!c4.is_shard(Split::Train, other), "{other}");
        }
    }
}
