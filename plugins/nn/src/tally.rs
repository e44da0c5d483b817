//! Counts that are added up over passes, until someone looks.

use std::collections::BTreeMap;
use tch::Tensor;

/// Sums by name, on the device. Not part of a checkpoint: after a resume they begin anew.
#[derive(Debug, Default)]
pub struct Tally {
    sums: BTreeMap<String, Tensor>,
}

impl Tally {
    /// Adds the counts of a pass.
    pub fn add(&mut self, counts: &[(String, Tensor)]) {
        for (name, counts) in counts {
            let sum = match self.sums.remove(name) {
                Some(sum) => sum + counts,
                None => counts.shallow_clone(),
            };
            self.sums.insert(name.clone(), sum);
        }
    }

    /// What was added under a name; nothing if there was none.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.sums.get(name)
    }

    /// All names that begin with `prefix`, without it, and their sums.
    pub fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Tensor)> {
        let all = self.sums.iter();
        all.filter_map(move |(name, sum)| Some((name.strip_prefix(prefix)?, sum)))
    }
}
