//! Which experts the feed-forward layers of a model select for each token of a held-out text.
//!
//! [`crate::trace`] writes it into the folder of a run; the figures about experts are made from it.

use crate::run::{Reason, Run};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Kinds of token that figures about tokens look at, the commonest ones.
const MOST_TOKENS: usize = 6000;

/// The whole file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Selections {
    /// Step of the checkpoint.
    pub(crate) step: u64,
    /// Tokens that were asked for; the text may have fewer.
    pub(crate) n_wanted: u64,
    /// Index of the distinct layer at each place of the stack.
    pub(crate) groups: Vec<usize>,
    /// Experts of a layer.
    pub(crate) n_experts: usize,
    /// The text of each id.
    pub(crate) texts: BTreeMap<i32, String>,
    /// Ids in the order of the text.
    pub(crate) tokens: Vec<i32>,
    /// By token and layer.
    pub(crate) experts: Vec<Vec<Vec<u32>>>,
}

/// Where the file is.
pub(crate) fn path(folder: &Path) -> PathBuf {
    folder.join("export/token_experts.json")
}

/// For products that need nothing else.
pub(crate) fn sources(folder: &Path) -> Vec<PathBuf> {
    vec![path(folder)]
}

/// What is known about all occurrences of one id.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) id: i32,
    pub(crate) n: usize,
    /// Distinct experts in each layer.
    pub(crate) experts: Vec<BTreeSet<u32>>,
}

impl Selections {
    /// Reads the file of a run.
    ///
    /// # Errors
    /// If it is not there, or damaged.
    pub(crate) fn of(run: &Run) -> Result<Self, Reason> {
        let path = path(&run.folder);
        let shown = path.display();
        let text = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                format!(
                    "there is no `{shown}`; `moeut-paper trace {}` makes it",
                    run.name
                )
            }
            _ => format!("`{shown}` cannot be read: {error}"),
        })?;
        let selections: Self = serde_json::from_slice(&text)
            .map_err(|error| format!("`{shown}` is damaged: {error}"))?;
        if selections.is_consistent() {
            Ok(selections)
        } else {
            Err(format!(
                "`{shown}` is damaged: its parts do not fit together"
            ))
        }
    }

    fn is_consistent(&self) -> bool {
        let n_layers = self.groups.len();
        let is_expert = |&expert: &u32| (expert as usize) < self.n_experts;
        n_layers > 0
            && !self.tokens.is_empty()
            && self.experts.len() == self.tokens.len()
            && self.experts.iter().all(|layers| {
                layers.len() == n_layers
                    && layers.iter().all(|experts| experts.iter().all(is_expert))
            })
    }

    /// The places of each distinct layer in the stack.
    pub(crate) fn places(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut places: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (place, &group) in self.groups.iter().enumerate() {
            places.entry(group).or_default().push(place);
        }
        places
    }

    /// How often each expert is selected at a place.
    pub(crate) fn counts(&self, place: usize) -> Vec<u64> {
        let mut counts = vec![0; self.n_experts];
        for expert in self.experts.iter().flat_map(|layers| &layers[place]) {
            counts[*expert as usize] += 1;
        }
        counts
    }

    /// Kinds of token, the commonest first; of as common ones the lower id.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let n_layers = self.groups.len();
        let mut kinds: BTreeMap<i32, Kind> = BTreeMap::new();
        for (&id, layers) in self.tokens.iter().zip(&self.experts) {
            let kind = kinds.entry(id).or_insert_with(|| Kind {
                id,
                n: 0,
                experts: vec![BTreeSet::new(); n_layers],
            });
            kind.n += 1;
            for (all, here) in kind.experts.iter_mut().zip(layers) {
                all.extend(here);
            }
        }
        let mut kinds: Vec<Kind> = kinds.into_values().collect();
        kinds.sort_by_key(|kind| std::cmp::Reverse(kind.n));
        kinds.truncate(MOST_TOKENS);
        kinds
    }
}

/// Mean and standard deviation (of a sample); nothing of nothing.
pub(crate) fn mean_and_std(values: &[f64]) -> Option<(f64, f64)> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let std = if values.len() > 1 {
        (squares / (n - 1.0)).sqrt()
    } else {
        0.0
    };
    (!values.is_empty()).then_some((mean, std))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_token_gather_the_experts_of_their_occurrences() {
        let selections = Selections {
            step: 1,
            n_wanted: 3,
            groups: vec![0, 1, 0],
            n_experts: 4,
            texts: BTreeMap::new(),
            tokens: vec![7, 5, 7],
            experts: vec![
                vec![vec![0], vec![1], vec![2]],
                vec![vec![3], vec![3], vec![3]],
                vec![vec![1], vec![1], vec![2]],
            ],
        };
        assert!(selections.is_consistent());
        assert_eq!(
            selections.places(),
            BTreeMap::from([(0, vec![0, 2]), (1, vec![1])])
        );
        assert_eq!(selections.counts(0), [1, 1, 0, 1]);
        let kinds = selections.kinds();
        let sizes = |kind: &Kind| kind.experts.iter().map(BTreeSet::len).collect::<Vec<_>>();
        assert_eq!(
            (kinds[0].id, kinds[0].n, sizes(&kinds[0])),
            (7, 2, vec![2, 1, 1])
        );
        assert_eq!((kinds[1].id, sizes(&kinds[1])), (5, vec![1, 1, 1]));
        let broken = Selections {
            n_experts: 3,
            ..selections
        };
        assert!(!broken.is_consistent());
    }

    #[test]
    fn the_deviation_is_that_of_a_sample() {
        assert_eq!(mean_and_std(&[1.0, 3.0]), Some((2.0, 2f64.sqrt())));
        assert_eq!(mean_and_std(&[5.0]), Some((5.0, 0.0)));
        assert_eq!(mean_and_std(&[]), None);
    }
}
