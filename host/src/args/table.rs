//! All arguments that are known, by name, and which one an abbreviation means.
//!
//! Several owners may share an argument: they agree about its type, and each has its own default, choices and help.

use super::arguments::Source;
use super::error::ArgsError;
use super::owner::{Owner, Role};
use super::suggest::nearest_args;
use moeut_plugin_api::args::ArgDef;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Bound;

/// The union of all owners' tables.
#[derive(Debug)]
pub(super) struct Table<'a> {
    rows: BTreeMap<&'a str, Row<'a>>,
}

/// One argument, as each of its owners defines it; never empty, in the owners' order.
#[derive(Debug)]
pub(super) struct Row<'a> {
    shares: Vec<(&'a ArgDef, &'a Owner)>,
}

impl<'a> Table<'a> {
    /// Joins the tables of all owners.
    ///
    /// The owners of one argument must agree about its type and about whether `none` is a value, except those that
    /// only accept it for the sake of old command lines.
    pub(super) fn new(owners: &'a [Owner]) -> Result<Self, ArgsError> {
        let mut rows: BTreeMap<&str, Row<'_>> = BTreeMap::new();
        for owner in owners {
            for def in &owner.defs {
                let row = rows.entry(&def.name).or_insert(Row { shares: Vec::new() });
                row.add(def, owner)?;
            }
        }
        let table = Self { rows };
        table.check_nodes()?;
        Ok(table)
    }

    /// The arguments, by name.
    pub(super) fn rows(&self) -> impl Iterator<Item = &Row<'a>> {
        self.rows.values()
    }

    /// The argument of exactly this name.
    pub(super) fn get(&self, name: &str) -> Option<&Row<'a>> {
        self.rows.get(name)
    }

    /// The argument that a user means: the exact name, else the only one that begins so.
    pub(super) fn resolve(&self, name: &str) -> Result<&Row<'a>, ArgsError> {
        if let Some(row) = self.get(name) {
            return Ok(row);
        }
        let candidates: Vec<&Row<'a>> = self
            .rows
            .range::<str, _>((Bound::Included(name), Bound::Unbounded))
            .take_while(|(candidate, _)| candidate.starts_with(name))
            .map(|(_, row)| row)
            .collect();
        match candidates[..] {
            [only] => Ok(only),
            [] => Err(ArgsError::Unknown {
                name: name.to_owned(),
                nearest: nearest_args(name, &self.rows().map(Row::def).collect::<Vec<_>>()),
            }),
            _ => Err(ArgsError::Ambiguous {
                name: name.to_owned(),
                candidates: candidates.iter().map(|row| row.name().into()).collect(),
            }),
        }
    }

    /// A name cannot be a value and a group of values at once, because configurations nest by dots.
    fn check_nodes(&self) -> Result<(), ArgsError> {
        for row in self.rows() {
            for (dot, _) in row.name().match_indices('.') {
                if let Some(leaf) = self.get(&row.name()[..dot]) {
                    return Err(ArgsError::LeafAndNode {
                        leaf: leaf.name().into(),
                        leaf_owner: leaf.owner().heading.clone(),
                        child: row.name().into(),
                        child_owner: row.owner().heading.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl<'a> Row<'a> {
    fn add(&mut self, def: &'a ArgDef, owner: &'a Owner) -> Result<(), ArgsError> {
        let is_live = |def: &ArgDef| def.retired.is_empty();
        let other = self.shares.iter().find(|(other, _)| is_live(other));
        if let Some((first, first_owner)) = other
            && is_live(def)
            && (first.kind, first.optional) != (def.kind, def.optional)
        {
            let takes = |def: &ArgDef| {
                ArgDef {
                    choices: Vec::new(),
                    ..def.clone()
                }
                .expectation()
            };
            return Err(ArgsError::Conflict {
                name: def.name.clone(),
                first: format!("{} takes {}", first_owner.heading, takes(first)),
                second: format!("{} {}", owner.heading, takes(def)),
            });
        }
        self.shares.push((def, owner));
        Ok(())
    }

    /// Its name.
    pub(super) fn name(&self) -> &'a str {
        &self.def().name
    }

    /// What it takes, for an error.
    pub(super) fn expectation(&self) -> String {
        self.def().expectation()
    }

    /// The owners of one role to whom it means something, with their definitions.
    fn live(&self, role: Role) -> Vec<&'a ArgDef> {
        let of_role = self.shares.iter().filter(|(_, owner)| owner.role == role);
        of_role
            .map(|&(def, _)| def)
            .filter(|def| def.retired.is_empty())
            .collect()
    }

    /// The definitions that decide what a value means: those of the run's owners, or else of all that may become such.
    fn deciding(&self) -> Vec<&'a ArgDef> {
        let active = self.live(Role::Active);
        if active.is_empty() {
            self.live(Role::Possible)
        } else {
            active
        }
    }

    /// The typed value of a text.
    ///
    /// Every owner of the run has to accept it. Of owners that may not take part one is enough.
    pub(super) fn parse(&self, raw: &str, from: &Source) -> Result<Value, ArgsError> {
        for def in self.live(Role::Active) {
            typed(def, raw, from)?;
        }
        let mut refusal = None;
        for def in self.deciding().into_iter().chain(self.live(Role::Idle)) {
            match typed(def, raw, from) {
                Ok(value) => return Ok(value),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        // An argument that only ever was: whatever it was set to has no effect.
        refusal.map_or(Ok(Value::Null), Err)
    }

    /// The default, where the owners that decide agree about one.
    pub(super) fn default(&self) -> Option<&'a str> {
        let defs = self.deciding();
        let first = defs.first()?;
        let is_agreed = defs.iter().all(|def| def.default == first.default);
        is_agreed.then_some(first.default.as_str())
    }

    /// Why it has no effect on a run, if it has none.
    pub(super) fn idleness(&self) -> Option<Idleness<'a>> {
        if !self.deciding().is_empty() {
            return None;
        }
        let used = self
            .shares
            .iter()
            .find(|(_, owner)| owner.role != Role::Idle);
        match used {
            Some((def, _)) => Some(Idleness::Retired(&def.retired)),
            None => Some(Idleness::Of(self.owner())),
        }
    }

    /// The first definition that means something.
    fn def(&self) -> &'a ArgDef {
        self.first().0
    }

    fn owner(&self) -> &'a Owner {
        self.first().1
    }

    fn first(&self) -> (&'a ArgDef, &'a Owner) {
        let live = self.shares.iter().find(|(def, _)| def.retired.is_empty());
        *live.unwrap_or(&self.shares[0])
    }
}

/// Why an argument has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Idleness<'a> {
    /// The run's owners only accept it; the reason they give.
    Retired(&'a str),
    /// Nobody in this run has it, but this owner, who is idle, does.
    Of(&'a Owner),
}

/// The value that one owner makes of a text.
pub(super) fn typed(def: &ArgDef, raw: &str, from: &Source) -> Result<Value, ArgsError> {
    def.parse(raw).map_err(|error| ArgsError::Value {
        name: def.name.clone(),
        from: from.clone(),
        raw: error.raw,
        expected: error.expected,
    })
}

#[cfg(test)]
mod tests {
    use super::Role::{Active, Idle, Possible};
    use super::*;
    use moeut_plugin_api::{ArgKind, ArgSpec, ComponentKind};

    fn owner(heading: &str, role: Role, specs: &[ArgSpec]) -> Owner {
        Owner {
            heading: heading.into(),
            component: Some((ComponentKind::Model, heading.into())),
            role,
            defs: specs.iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        }
    }

    fn parse(owners: &[Owner], name: &str, raw: &str) -> Result<Value, String> {
        let table = Table::new(owners).unwrap();
        let value = table.get(name).unwrap().parse(raw, &Source::CommandLine);
        value.map_err(|error| error.why())
    }

    #[test]
    fn an_exact_name_wins_over_longer_ones() {
        let owners = [owner(
            "host",
            Role::Active,
            &[
                ArgSpec::float("reg", "1"),
                ArgSpec::float("reg_scales", "1"),
            ],
        )];
        let table = Table::new(&owners).unwrap();
        assert_eq!(table.resolve("reg").unwrap().name(), "reg");
        assert_eq!(table.resolve("reg_").unwrap().name(), "reg_scales");
        assert_eq!(
            table.resolve("re").unwrap_err(),
            ArgsError::Ambiguous {
                name: "re".into(),
                candidates: vec!["reg".into(), "reg_scales".into()]
            }
        );
    }

    #[test]
    fn owners_of_one_argument_agree_about_its_type_only() {
        let own = |spec| owner("model `a`", Possible, &[spec]);
        let first = own(ArgSpec::int("moe.att.k", "2").help("per head"));
        for (second, is_fine) in [
            (ArgSpec::int("moe.att.k", "4").choices("1|2|4"), true),
            (ArgSpec::retired(ArgKind::Str, "moe.att.k", "gone"), true),
            (ArgSpec::text("moe.att.k", "2"), false),
            (ArgSpec::int("moe.att.k", "2").optional(), false),
        ] {
            let owners = [first.clone(), own(second)];
            assert_eq!(Table::new(&owners).is_ok(), is_fine, "{second:?}");
        }
        let error =
            Table::new(&[first, own(ArgSpec::text("moe.att.k", "2").choices("2|3"))]).unwrap_err();
        assert_eq!(
            error.why(),
            "model `a` takes a whole number, model `a` text"
        );
    }

    #[test]
    fn each_owner_of_the_run_has_to_accept_a_value_and_one_of_the_others() {
        let spec = |choices| ArgSpec::text("mode", "a").choices(choices);
        let run = |first, second| {
            [
                owner("model `a`", first, &[spec("a|b")]),
                owner("model `b`", second, &[spec("a|c")]),
            ]
        };
        for (owners, raw, is_fine) in [
            (run(Possible, Possible), "c", true),
            (run(Possible, Possible), "d", false),
            (run(Active, Idle), "b", true),
            (run(Active, Idle), "c", false),
            (run(Active, Active), "a", true),
            (run(Active, Active), "b", false),
            (run(Idle, Idle), "c", true),
        ] {
            let value = parse(&owners, "mode", raw);
            assert_eq!(value.is_ok(), is_fine, "{raw} {value:?}");
        }
        assert_eq!(
            parse(&run(Active, Idle), "mode", "c").unwrap_err(),
            "`c` is not one of a, b (from: command line)"
        );
    }

    #[test]
    fn a_default_counts_where_the_owners_of_the_run_agree() {
        let run = |second| {
            [
                owner("model `a`", Role::Active, &[ArgSpec::int("k", "2")]),
                owner("model `b`", second, &[ArgSpec::int("k", "4")]),
            ]
        };
        for (second, default) in [(Role::Active, None), (Role::Idle, Some("2"))] {
            let owners = run(second);
            let table = Table::new(&owners).unwrap();
            assert_eq!(table.get("k").unwrap().default(), default);
        }
    }

    #[test]
    fn what_has_no_effect_says_why() {
        let live = ArgSpec::int("k", "2");
        let retired = ArgSpec::retired(ArgKind::Int, "k", "gone");
        let idleness = |specs: [(Role, ArgSpec); 2]| {
            let owners = specs.map(|(role, spec)| owner("x", role, &[spec]));
            let table = Table::new(&owners).unwrap();
            match table.get("k").unwrap().idleness() {
                None => "live".to_owned(),
                Some(Idleness::Retired(reason)) => reason.to_owned(),
                Some(Idleness::Of(owner)) => format!("{:?}", owner.role),
            }
        };
        assert_eq!(idleness([(Active, live), (Active, retired)]), "live");
        assert_eq!(idleness([(Active, live), (Idle, live)]), "live");
        assert_eq!(idleness([(Active, retired), (Idle, live)]), "gone");
        assert_eq!(idleness([(Idle, live), (Idle, retired)]), "Idle");
    }

    #[test]
    fn a_value_cannot_be_a_group() {
        let owners = [
            owner("a", Role::Active, &[ArgSpec::int("moe.att.k", "1")]),
            owner("b", Role::Idle, &[ArgSpec::int("moe", "1")]),
        ];
        assert!(matches!(
            Table::new(&owners).unwrap_err(),
            ArgsError::LeafAndNode { leaf, child_owner, .. } if leaf == "moe" && child_owner == "a"
        ));
    }
}
