//! The help text of arguments, by owner. Plain text without colors, so the same on every terminal.

use super::owner::{Owner, Role};
use moeut_plugin_api::args::{ArgDef, ArgKind};
use std::collections::BTreeSet;

/// Where the descriptions begin.
const COLUMN: usize = 38;

/// One paragraph per owner that may take part in the run, one line per argument, wrapped at `width` columns.
///
/// An argument that several owners define alike is shown with the first of them.
pub fn help_text(owners: &[Owner], width: usize) -> String {
    let mut shown = BTreeSet::new();
    let mut text = String::new();
    let (idle, used): (Vec<&Owner>, Vec<&Owner>) =
        owners.iter().partition(|owner| owner.role == Role::Idle);
    for owner in used {
        let is_new = |def: &&ArgDef| {
            let field = String::new(); // the only part that help does not show
            shown.insert(format!(
                "{:?}",
                ArgDef {
                    field,
                    ..(*def).clone()
                }
            ))
        };
        let defs: Vec<&ArgDef> = owner.defs.iter().filter(is_new).collect();
        let (live, retired): (Vec<&ArgDef>, Vec<&ArgDef>) =
            defs.iter().partition(|def| def.retired.is_empty());
        if defs.is_empty() && owner.profiles.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.extend([&owner.heading, ":\n"]);
        for def in live {
            let flag = format!("-{} {}", def.name, placeholder(def));
            text.push_str(&entry(&flag, &def.help, &facts(def), width));
        }
        for profile in &owner.profiles {
            let flag = format!("-profile {}", profile.name);
            text.push_str(&entry(&flag, &profile.help, "", width));
        }
        if !retired.is_empty() {
            let names: Vec<String> = retired.iter().map(|def| format!("-{}", def.name)).collect();
            text.push_str(&entry(
                "accepted without effect",
                &names.join(" "),
                "",
                width,
            ));
        }
    }
    let idle = idle.iter().filter(|owner| !owner.defs.is_empty());
    let idle: Vec<String> = idle.map(|owner| format!("  {}\n", owner.heading)).collect();
    if !idle.is_empty() {
        text.push_str("\nnot used by this run, which accepts their arguments without effect:\n");
        text.push_str(&idle.concat());
    }
    text
}

fn placeholder(def: &ArgDef) -> String {
    let mut words: Vec<&str> = def.choices.iter().map(String::as_str).collect();
    if words.is_empty() {
        words.push(match def.kind {
            ArgKind::Int => "int",
            ArgKind::Float => "float",
            ArgKind::Bool => "0|1",
            ArgKind::Str => "text",
            ArgKind::IntList => "int,…",
            ArgKind::FloatList => "float,…",
            ArgKind::StrList => "text,…",
            ArgKind::FloatMap => "key=float,…",
        });
    }
    if def.optional {
        words.push("none");
    }
    format!("<{}>", words.join("|"))
}

fn facts(def: &ArgDef) -> String {
    let default = if def.default.is_empty() {
        "\"\""
    } else {
        &def.default
    };
    if def.unit.is_empty() {
        format!("[default {default}]")
    } else {
        format!("[{}; default {default}]", def.unit)
    }
}

/// One flag and its description, of which `facts` is not broken; a long flag gets a line of its own.
fn entry(flag: &str, help: &str, facts: &str, width: usize) -> String {
    let facts = (!facts.is_empty()).then_some(facts);
    let mut lines = Vec::new();
    let mut line = format!("  {flag}");
    if line.chars().count() + 2 > COLUMN {
        lines.push(std::mem::take(&mut line));
    }
    for word in help.split_whitespace().chain(facts) {
        let mut used = line.chars().count();
        if used >= COLUMN && used + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        line.push_str(&" ".repeat(COLUMN.saturating_sub(used).max(1)));
        line.push_str(word);
    }
    lines.push(line);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plugin_api::ArgSpec;
    use moeut_plugin_api::args::ProfileDef;

    fn owners() -> [Owner; 2] {
        let owner = |heading: &str, specs: &[ArgSpec], profiles| Owner {
            heading: heading.into(),
            component: None,
            role: Role::Active,
            defs: specs.iter().map(ArgDef::from).collect(),
            profiles,
        };
        let demo = ProfileDef {
            name: "demo".into(),
            help: "Minutes on a laptop".into(),
            args: Vec::new(),
        };
        let lr = ArgSpec::float("lr", "1e-3").help("Peak learning rate");
        [
            owner(
                "host",
                &[
                    lr,
                    ArgSpec::int("stop_after", "none")
                        .optional()
                        .unit("steps")
                        .help("Length"),
                ],
                vec![],
            ),
            owner(
                "task `toy` (moeut-task-toy 0.1.0)",
                &[
                    lr,
                    ArgSpec::text("transformer.universal.group_type", "abab")
                        .choices("abab|aabb")
                        .help("Order of layers"),
                    ArgSpec::retired(ArgKind::Str, "moe.layer_encoding", "gone"),
                ],
                vec![demo],
            ),
        ]
    }

    #[test]
    fn grouped_by_owner_with_default_unit_and_choices() {
        assert_eq!(
            help_text(&owners(), 80),
            "\
host:
  -lr <float>                         Peak learning rate [default 1e-3]
  -stop_after <int|none>              Length [steps; default none]

task `toy` (moeut-task-toy 0.1.0):
  -transformer.universal.group_type <abab|aabb>
                                      Order of layers [default abab]
  -profile demo                       Minutes on a laptop
  accepted without effect             -moe.layer_encoding
"
        );
    }

    #[test]
    fn each_owner_shows_its_own_default_and_idle_ones_only_their_names() {
        let [_, mut task] = owners();
        task.defs = [
            ArgSpec::int("k", "2").help("Experts"),
            ArgSpec::int("n", "1"),
        ]
        .iter()
        .map(ArgDef::from)
        .collect();
        let mut model = task.clone();
        model.heading = "model `m`".into();
        model.defs[0].default = "4".into();
        let mut idle = model.clone();
        (idle.heading, idle.role) = ("model `other`".into(), Role::Idle);
        assert_eq!(
            help_text(&[task, model, idle], 80),
            "\
task `toy` (moeut-task-toy 0.1.0):
  -k <int>                            Experts [default 2]
  -n <int>                            [default 1]
  -profile demo                       Minutes on a laptop

model `m`:
  -k <int>                            Experts [default 4]
  -profile demo                       Minutes on a laptop

not used by this run, which accepts their arguments without effect:
  model `other`
"
        );
    }

    #[test]
    fn long_lines_wrap_below_their_beginning() {
        assert_eq!(
            help_text(&owners()[..1], 60).lines().nth(2),
            Some("                                      [default 1e-3]")
        );
    }
}
