//! The resolved arguments as text: what `config show` prints.

use super::arguments::Arguments;
use super::owner::Owner;
use std::collections::BTreeSet;

/// One line `name = value  # source` per live argument, below a comment line for each owner.
///
/// Values are shown as typed; the empty text is `""`.
pub fn render_resolved(arguments: &Arguments, owners: &[Owner]) -> String {
    let mut shown = BTreeSet::new();
    let mut paragraphs = Vec::new();
    for owner in owners {
        let lines: Vec<String> = owner
            .defs
            .iter()
            .filter(|def| shown.insert(&def.name))
            .filter_map(|def| arguments.raw.get_key_value(&def.name))
            .map(|(name, (raw, source))| {
                let value = if raw.is_empty() { "\"\"" } else { raw };
                format!("{name} = {value}  # {source}\n")
            })
            .collect();
        if !lines.is_empty() {
            paragraphs.push(format!("# {}\n{}", owner.heading, lines.concat()));
        }
    }
    paragraphs.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use moeut_plugin_api::ArgSpec;
    use moeut_plugin_api::args::ArgDef;

    #[test]
    fn values_come_with_their_source() {
        let owner = |heading: &str, specs: &[ArgSpec]| Owner {
            heading: heading.into(),
            defs: specs.iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        };
        let lr = ArgSpec::float("lr", "1e-3");
        let owners = [
            owner("host", &[lr, ArgSpec::text("restore", "")]),
            owner("task `toy`", &[lr, ArgSpec::int("k", "1")]),
        ];
        let arguments = parse(&["-k=2".into()], &owners, None).unwrap();
        assert_eq!(
            render_resolved(&arguments, &owners),
            "# host\nlr = 1e-3  # default\nrestore = \"\"  # default\n\n# task `toy`\nk = 2  # command line\n"
        );
    }
}
