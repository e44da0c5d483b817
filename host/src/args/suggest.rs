//! What the user may have meant.

use moeut_plugin_api::args::ArgDef;

/// At most this many suggestions.
const LIMIT: usize = 3;

/// The names nearest to an unknown argument, best first.
///
/// The last part of a dotted name and the field that a flag fills count as names too: who knows the paper types
/// `d_model`, but the flag is the reference's `state_size`.
pub(super) fn nearest_args(name: &str, defs: &[&ArgDef]) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next() == Some(name);
    let mut found: Vec<String> = defs
        .iter()
        .filter(|def| last(&def.name) || last(&def.field))
        .map(|def| def.name.clone())
        .collect();
    found.truncate(LIMIT);
    if found.is_empty() {
        found = nearest(name, defs.iter().map(|def| def.name.as_str()));
    }
    found
}

/// The candidates within a third of the name's length in edits, best first.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let limit = (name.len() / 3).max(1);
    let mut ranked: Vec<(usize, &str)> = candidates
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .filter(|&(distance, _)| distance <= limit)
        .collect();
    ranked.sort_unstable();
    ranked.dedup();
    ranked
        .into_iter()
        .take(LIMIT)
        .map(|(_, candidate)| candidate.to_owned())
        .collect()
}

/// Levenshtein distance: insertions, deletions and replacements.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, char_a) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, char_b) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(char_a != char_b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plugin_api::ArgSpec;

    #[test]
    fn distances() {
        for (a, b, distance) in [
            ("", "abc", 3),
            ("lr", "lr", 0),
            ("kitten", "sitting", 3),
            ("wd", "dw", 2),
        ] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }

    #[test]
    fn typos_fields_and_last_parts_are_found() {
        let defs: Vec<ArgDef> = [
            ArgSpec::int("state_size", "128").field("d_model"),
            ArgSpec::int("batch_size", "128"),
            ArgSpec::int("moe.n_experts", "8"),
            ArgSpec::int("moe.att.n_experts", "8"),
        ]
        .iter()
        .map(ArgDef::from)
        .collect();
        let defs: Vec<&ArgDef> = defs.iter().collect();
        for (name, expected) in [
            ("bach_size", &["batch_size"][..]),
            ("d_model", &["state_size"]),
            ("n_experts", &["moe.n_experts", "moe.att.n_experts"]),
            ("elephant", &[]),
        ] {
            assert_eq!(nearest_args(name, &defs), expected, "{name}");
        }
    }
}
