//! The resolved arguments as text: what `config show` prints.

use super::arguments::Arguments;
use super::owner::{Owner, Role};

/// One line `name = value  # source` per live argument, below a comment line for each owner that takes part in the run.
///
/// An argument of several owners is there for each, with the value that holds for it. Values are shown as typed; the
/// empty text is `""`.
pub fn render_resolved(arguments: &Arguments, owners: &[Owner]) -> String {
    let mut paragraphs = Vec::new();
    for owner in owners.iter().filter(|owner| owner.role != Role::Idle) {
        let live = owner.defs.iter().filter(|def| def.retired.is_empty());
        let lines: Vec<String> = live
            .map(|def| {
                let (raw, source) = arguments.applies(def);
                let value = if raw.is_empty() { "\"\"" } else { raw };
                format!("{} = {value}  # {source}\n", def.name)
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
    fn each_owner_has_its_values_with_their_source() {
        let owner = |heading: &str, specs: &[ArgSpec]| Owner {
            heading: heading.into(),
            component: None,
            role: Role::Active,
            defs: specs.iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        };
        let lr = ArgSpec::float("lr", "1e-3");
        let owners = [
            owner("host", &[lr, ArgSpec::text("restore", "")]),
            owner(
                "task `toy`",
                &[ArgSpec::float("lr", "1e-4"), ArgSpec::int("k", "1")],
            ),
            Owner {
                role: Role::Idle,
                ..owner("task `other`", &[lr])
            },
        ];
        let arguments = parse(&["-k=2".into()], &owners, None).unwrap();
        assert_eq!(
            render_resolved(&arguments, &owners),
            "# host\nlr = 1e-3  # default\nrestore = \"\"  # default\n\n\
             # task `toy`\nlr = 1e-4  # default\nk = 2  # command line\n"
        );
    }
}
