//! `-profile a,b`: named bundles of arguments.

use super::error::ArgsError;
use super::owner::Owner;
use super::suggest::nearest;
use super::table::Table;
use std::collections::{BTreeMap, BTreeSet};

/// Text by flag, with the profile that set it.
pub(super) type Bundle = BTreeMap<String, (String, String)>;

/// The names in the value of `-profile`.
pub(super) fn names(raw: &str) -> impl Iterator<Item = &str> {
    raw.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty() && !name.eq_ignore_ascii_case("none"))
}

/// Merges the profiles that `raw` names; later ones override earlier ones.
///
/// A name that several owners have stands for the bundles of all of them, in the owners' order. A bundle includes
/// others by setting `profile` itself.
pub(super) fn expand(raw: &str, owners: &[Owner], table: &Table<'_>) -> Result<Bundle, ArgsError> {
    let mut bundle = Bundle::new();
    for name in names(raw) {
        Expansion {
            owners,
            table,
            open: Vec::new(),
        }
        .apply(name, &mut bundle)?;
    }
    Ok(bundle)
}

struct Expansion<'a> {
    owners: &'a [Owner],
    table: &'a Table<'a>,
    /// The profiles that led here; including one of them again would add nothing.
    open: Vec<String>,
}

impl Expansion<'_> {
    fn apply(&mut self, name: &str, bundle: &mut Bundle) -> Result<(), ArgsError> {
        if self.open.iter().any(|open| open == name) {
            return Ok(());
        }
        self.open.push(name.to_owned());
        let mut is_known = false;
        for owner in self.owners {
            for profile in owner.profiles.iter().filter(|profile| profile.name == name) {
                is_known = true;
                for (flag, raw) in &profile.args {
                    if flag == "profile" {
                        for included in names(raw) {
                            self.apply(included, bundle)?;
                        }
                    } else if self.table.get(flag).is_some() {
                        bundle.insert(flag.clone(), (raw.clone(), name.to_owned()));
                    } else {
                        return Err(ArgsError::ProfileArgument {
                            profile: name.to_owned(),
                            owner: owner.heading.clone(),
                            name: flag.clone(),
                        });
                    }
                }
            }
        }
        self.open.pop();
        if is_known {
            Ok(())
        } else {
            Err(self.unknown(name))
        }
    }

    fn unknown(&self, name: &str) -> ArgsError {
        let known: BTreeSet<&str> = self
            .owners
            .iter()
            .flat_map(|owner| &owner.profiles)
            .map(|profile| profile.name.as_str())
            .collect();
        ArgsError::UnknownProfile {
            name: name.to_owned(),
            nearest: nearest(name, known.iter().copied()),
            known: known.into_iter().map(str::to_owned).collect(),
        }
    }
}
