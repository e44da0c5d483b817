//! In which arguments runs differ, and what each run used where nobody said anything.

use super::run::Run;
use crate::args::Role;
use crate::log::Terminal;
use crate::plan::resolve;
use crate::plugins::Registry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What differs in any case and says nothing.
const NAMES: [&str; 1] = ["name"];

/// The value of an argument in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) text: String,
    /// It is that of an owner's default.
    pub(super) is_default: bool,
}

/// The arguments of a run, by flag.
pub(super) type Values = BTreeMap<String, Value>;

/// All arguments of a run, with the defaults of the plugins that are here, and a remark if they do not take them.
pub(super) fn values(
    run: &Run,
    registry: &Arc<Registry>,
    terminal: &Arc<Terminal>,
) -> (Values, Option<String>) {
    let typed = |text: &String| Value {
        text: text.clone(),
        is_default: false,
    };
    let mut values: Values = run
        .args
        .iter()
        .map(|(name, text)| (name.clone(), typed(text)))
        .collect();
    if run.args.is_empty() {
        return (values, None);
    }
    match resolve(&[], Some(&run.args), registry, terminal) {
        Ok(resolved) => {
            for (name, (text, _)) in resolved.arguments.raw {
                let is_default = true;
                values.entry(name).or_insert(Value { text, is_default });
            }
            // A run stores all of its arguments, so that what it was told is what differs from the default.
            let active = resolved
                .owners
                .iter()
                .filter(|owner| owner.role != Role::Idle);
            for def in active.flat_map(|owner| &owner.defs) {
                if let Some(value) = values.get_mut(&def.name) {
                    value.is_default |= value.text == def.default;
                }
            }
            (values, None)
        }
        Err(error) => {
            let remark =
                format!("its defaults are not known, because of the plugins here: {error}");
            (values, Some(remark))
        }
    }
}

/// The arguments in which runs differ: by name, each run's value, or none where the run has no such argument.
pub(super) fn differences(all: &[Values]) -> Vec<(&str, Vec<Option<&Value>>)> {
    let names: BTreeSet<&str> = all
        .iter()
        .flat_map(|values| values.keys().map(String::as_str))
        .collect();
    let row = |name| {
        all.iter()
            .map(|values| values.get(name))
            .collect::<Vec<_>>()
    };
    let differs = |row: &[Option<&Value>]| {
        let mut texts = row.iter().map(|value| value.map(|value| &value.text));
        let first = texts.next();
        texts.any(|text| Some(text) != first)
    };
    names
        .into_iter()
        .filter(|name| !NAMES.contains(name))
        .map(|name| (name, row(name)))
        .filter(|(_, row)| differs(row))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_shown() {
        let values = |all: &[(&str, &str, bool)]| -> Values {
            let all = all.iter().map(|&(name, text, is_default)| {
                let text = text.to_owned();
                (name.to_owned(), Value { text, is_default })
            });
            all.collect()
        };
        let all = [
            values(&[
                ("lr", "1e-3", true),
                ("k", "2", false),
                ("name", "a", false),
            ]),
            // Typed as the default is: no difference.
            values(&[
                ("lr", "1e-3", false),
                ("k", "4", false),
                ("name", "b", false),
                ("g", "1", true),
            ]),
        ];
        let found = differences(&all);
        let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["g", "k"]);
        assert_eq!(found[0].1[0], None);
        assert!(found[0].1[1].unwrap().is_default);
        assert_eq!(differences(&all[..1]), []);
    }
}
