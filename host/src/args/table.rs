//! All arguments that are known, by name, and which one an abbreviation means.

use super::error::ArgsError;
use super::owner::Owner;
use super::suggest::nearest_args;
use moeut_plugin_api::args::ArgDef;
use std::collections::BTreeMap;

/// The union of all owners' tables.
#[derive(Debug)]
pub(super) struct Table<'a> {
    rows: BTreeMap<&'a str, Row<'a>>,
}

#[derive(Debug)]
struct Row<'a> {
    def: &'a ArgDef,
    owner: &'a Owner,
}

impl<'a> Table<'a> {
    /// Joins the tables of all owners.
    ///
    /// The same argument may be there twice (several tasks have `lm.unroll`), if it means the same to both.
    pub(super) fn new(owners: &'a [Owner]) -> Result<Self, ArgsError> {
        let mut rows: BTreeMap<&str, Row<'_>> = BTreeMap::new();
        for owner in owners {
            for def in &owner.defs {
                let first = rows.entry(&def.name).or_insert(Row { def, owner });
                if !is_same(first.def, def) {
                    return Err(ArgsError::Conflict {
                        name: def.name.clone(),
                        first: first.owner.heading.clone(),
                        second: owner.heading.clone(),
                    });
                }
            }
        }
        let table = Self { rows };
        table.check_nodes()?;
        Ok(table)
    }

    /// The arguments, by name.
    pub(super) fn defs(&self) -> impl Iterator<Item = &'a ArgDef> {
        self.rows.values().map(|row| row.def)
    }

    /// The argument of exactly this name.
    pub(super) fn get(&self, name: &str) -> Option<&'a ArgDef> {
        self.rows.get(name).map(|row| row.def)
    }

    /// The argument that a user means: the exact name, else the only one that begins so.
    pub(super) fn resolve(&self, name: &str) -> Result<&'a ArgDef, ArgsError> {
        if let Some(def) = self.get(name) {
            return Ok(def);
        }
        let candidates: Vec<&ArgDef> = self
            .rows
            .range(name..)
            .take_while(|(candidate, _)| candidate.starts_with(name))
            .map(|(_, row)| row.def)
            .collect();
        match candidates[..] {
            [only] => Ok(only),
            [] => Err(ArgsError::Unknown {
                name: name.to_owned(),
                nearest: nearest_args(name, &self.defs().collect::<Vec<_>>()),
            }),
            _ => Err(ArgsError::Ambiguous {
                name: name.to_owned(),
                candidates: candidates.iter().map(|def| def.name.clone()).collect(),
            }),
        }
    }

    /// A name cannot be a value and a group of values at once, because configurations nest by dots.
    fn check_nodes(&self) -> Result<(), ArgsError> {
        for (name, row) in &self.rows {
            for (dot, _) in name.match_indices('.') {
                if let Some(leaf) = self.rows.get(&name[..dot]) {
                    return Err(ArgsError::LeafAndNode {
                        leaf: leaf.def.name.clone(),
                        leaf_owner: leaf.owner.heading.clone(),
                        child: row.def.name.clone(),
                        child_owner: row.owner.heading.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// Whether two definitions read and mean the same; field, unit and prose are each owner's own matter.
fn is_same(a: &ArgDef, b: &ArgDef) -> bool {
    a.kind == b.kind
        && a.optional == b.optional
        && a.default == b.default
        && a.choices == b.choices
        && a.retired.is_empty() == b.retired.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plugin_api::ArgSpec;

    fn owner(heading: &str, specs: &[ArgSpec]) -> Owner {
        Owner {
            heading: heading.into(),
            defs: specs.iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        }
    }

    #[test]
    fn an_exact_name_wins_over_longer_ones() {
        let owners = [owner(
            "host",
            &[
                ArgSpec::float("reg", "1"),
                ArgSpec::float("reg_scales", "1"),
            ],
        )];
        let table = Table::new(&owners).unwrap();
        assert_eq!(table.resolve("reg").unwrap().name, "reg");
        assert_eq!(table.resolve("reg_").unwrap().name, "reg_scales");
        assert_eq!(
            table.resolve("re").unwrap_err(),
            ArgsError::Ambiguous {
                name: "re".into(),
                candidates: vec!["reg".into(), "reg_scales".into()]
            }
        );
    }

    #[test]
    fn equal_definitions_of_two_owners_are_one() {
        let first = owner(
            "task `a`",
            &[ArgSpec::int("lm.unroll", "100").help("context")],
        );
        let second = owner(
            "task `b`",
            &[ArgSpec::int("lm.unroll", "100").field("seq_len")],
        );
        let third = owner("task `c`", &[ArgSpec::int("lm.unroll", "64")]);
        assert!(Table::new(&[first.clone(), second]).is_ok());
        assert_eq!(
            Table::new(&[first, third]).unwrap_err(),
            ArgsError::Conflict {
                name: "lm.unroll".into(),
                first: "task `a`".into(),
                second: "task `c`".into()
            }
        );
    }

    #[test]
    fn a_value_cannot_be_a_group() {
        let owners = [
            owner("a", &[ArgSpec::int("moe.att.k", "1")]),
            owner("b", &[ArgSpec::int("moe", "1")]),
        ];
        assert!(matches!(
            Table::new(&owners).unwrap_err(),
            ArgsError::LeafAndNode { leaf, child_owner, .. } if leaf == "moe" && child_owner == "a"
        ));
    }
}
