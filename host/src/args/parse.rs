//! Phase two: the whole command line against all tables.

use super::arguments::{Arguments, Source};
use super::error::ArgsError;
use super::host_table::NOT_SAVED;
use super::owner::{Owner, Role};
use super::profiles::{self, Bundle};
use super::table::{Idleness, Row, Table};
use super::token::{Token, tokens};
use moeut_plugin_api::ComponentKind;
use std::collections::BTreeMap;

/// Reads the command line (without the program's name) and fills up what it does not say.
///
/// For each argument the first of these that has it counts: the command line, `stored` (an earlier start's
/// [`Arguments::raw_map`]), the profiles, the default. The [`Role`]s of the owners decide who has a say about values, and
/// whose arguments have no effect.
///
/// # Errors
/// For any mistake in one of these sources, and for owners whose tables contradict each other.
pub fn parse(
    argv: &[String],
    owners: &[Owner],
    stored: Option<&BTreeMap<String, String>>,
) -> Result<Arguments, ArgsError> {
    let table = Table::new(owners)?;
    let empty = BTreeMap::new();
    let given = command_line(argv, &table)?;
    let stored = stored.unwrap_or(&empty);
    let profiles = profiles::expand(profile_names(&given, stored)?, owners, &table)?;
    let sources = Sources {
        given: &given,
        stored,
        profiles: &profiles,
    };

    let mut arguments = Arguments {
        not_saved: NOT_SAVED,
        ..Arguments::default()
    };
    let mut idle: BTreeMap<ComponentKind, Vec<&str>> = BTreeMap::new();
    for row in table.rows() {
        let name = row.name();
        let Some((raw, from)) = sources.find(row) else {
            continue;
        };
        let value = row.parse(raw, &from)?;
        match row.idleness() {
            None => {
                arguments.values.insert(name.to_owned(), value);
                arguments
                    .raw
                    .insert(name.to_owned(), (raw.to_owned(), from));
            }
            Some(_) if from == Source::Stored => {}
            Some(Idleness::Retired(reason)) => arguments
                .warnings
                .push(format!("`-{name}` has no effect: {reason}")),
            Some(Idleness::Of(owner)) => {
                if let Some((kind, _)) = owner.component {
                    idle.entry(kind).or_default().push(name);
                }
            }
        }
    }
    let notices = idle
        .iter()
        .map(|(&kind, names)| notice(kind, names, owners));
    arguments.warnings.extend(notices);
    for name in stored.keys().filter(|name| table.get(name).is_none()) {
        arguments.warnings.push(format!(
            "the stored argument `{name}` is unknown and was left out"
        ));
    }
    Ok(arguments)
}

/// Says which arguments have no effect because the run uses other components of their owners' kind.
fn notice(kind: ComponentKind, names: &[&str], owners: &[Owner]) -> String {
    let flags: Vec<String> = names.iter().map(|name| format!("`-{name}`")).collect();
    let used = owners.iter().filter(|owner| owner.role == Role::Active);
    let used: Vec<String> = used
        .filter_map(|owner| owner.component.as_ref())
        .filter(|(used, _)| *used == kind)
        .map(|(_, name)| format!("`{name}`"))
        .collect();
    let verb = if names.len() == 1 { "has" } else { "have" };
    format!(
        "{} {verb} no effect with {kind} {}",
        flags.join(", "),
        used.join(", ")
    )
}

/// What the user typed, by full name; the last one wins.
fn command_line(argv: &[String], table: &Table<'_>) -> Result<BTreeMap<String, String>, ArgsError> {
    let mut given = BTreeMap::new();
    let mut after = None;
    for token in tokens(argv) {
        match token {
            Token::Positional(text) => {
                return Err(ArgsError::Positional {
                    text: text.to_owned(),
                    after,
                });
            }
            Token::Flag { name, value } => {
                let row = table.resolve(name)?;
                let name = row.name().to_owned();
                let Some(value) = value else {
                    let expected = row.expectation();
                    return Err(ArgsError::MissingValue { name, expected });
                };
                given.insert(name.clone(), python_none(value).to_owned());
                after = Some(name);
            }
        }
    }
    Ok(given)
}

/// A W&B agent writes YAML's `null` as Python's `None`, also where `none` is a choice. `True` and `False`, which it
/// writes too, are values of yes/no arguments already.
fn python_none(raw: &str) -> &str {
    if raw == "None" { "none" } else { raw }
}

/// The value of `-profile`. A run keeps its profiles: its stored values would hide those of another one.
fn profile_names<'a>(
    given: &'a BTreeMap<String, String>,
    stored: &'a BTreeMap<String, String>,
) -> Result<&'a str, ArgsError> {
    match (given.get("profile"), stored.get("profile")) {
        (Some(given), Some(stored)) => {
            if profiles::names(given).eq(profiles::names(stored)) {
                Ok(given)
            } else {
                Err(ArgsError::ProfileDiffers {
                    given: given.clone(),
                    stored: stored.clone(),
                })
            }
        }
        (Some(raw), None) | (None, Some(raw)) => Ok(raw),
        (None, None) => Ok(""),
    }
}

struct Sources<'a> {
    given: &'a BTreeMap<String, String>,
    stored: &'a BTreeMap<String, String>,
    profiles: &'a Bundle,
}

impl<'a> Sources<'a> {
    /// Nothing if nobody gave a value and the owners do not agree about a default.
    fn find(&self, row: &Row<'a>) -> Option<(&'a str, Source)> {
        let name = row.name();
        if let Some(raw) = self.given.get(name) {
            Some((raw, Source::CommandLine))
        } else if let Some(raw) = self.stored.get(name).filter(|_| !NOT_SAVED.contains(&name)) {
            Some((raw, Source::Stored))
        } else if let Some((raw, profile)) = self.profiles.get(name) {
            Some((raw, Source::Profile(profile.clone())))
        } else {
            Some((row.default()?, Source::Default))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Role::{Active, Idle, Possible};
    use super::*;
    use moeut_plugin_api::args::{ArgDef, ProfileDef};
    use moeut_plugin_api::{ArgKind, ArgSpec};
    use serde_json::json;

    fn profile(name: &str, args: &[(&str, &str)]) -> ProfileDef {
        ProfileDef {
            name: name.into(),
            help: String::new(),
            args: args
                .iter()
                .map(|&(flag, raw)| (flag.into(), raw.into()))
                .collect(),
        }
    }

    /// The host and a task with some of the reference's arguments.
    fn owners() -> Vec<Owner> {
        let task = Owner {
            heading: "task `toy` (moeut-task-toy 0.1.0)".into(),
            component: Some((ComponentKind::Task, "toy".into())),
            role: Role::Active,
            defs: [
                ArgSpec::int("state_size", "128").field("d_model"),
                ArgSpec::flag("lm.eval.enabled", "1"),
                ArgSpec::int("moe.att.k", "2").field("attention.top_k"),
                ArgSpec::int("plot.n_steps", "-128"),
                ArgSpec::retired(
                    ArgKind::Str,
                    "moe.layer_encoding",
                    "the code that read it is gone",
                ),
            ]
            .iter()
            .map(ArgDef::from)
            .collect(),
            profiles: vec![
                profile("small", &[("state_size", "32"), ("batch_size", "8")]),
                profile("tiny", &[("profile", "small"), ("state_size", "16")]),
                profile("slow", &[("lr", "1e-5"), ("batch_size", "2")]),
            ],
        };
        vec![Owner::host(), task]
    }

    fn run(line: &str, stored: &[(&str, &str)]) -> Result<Arguments, ArgsError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        let stored = stored
            .iter()
            .map(|&(name, raw)| (name.to_owned(), raw.to_owned()))
            .collect();
        parse(&argv, &owners(), Some(&stored))
    }

    #[test]
    fn values_as_the_reference_reads_them() {
        for (line, name, value) in [
            ("-lr 0.1", "lr", json!(0.1)),
            ("--lr=0.1 -lr=0.2", "lr", json!(0.2)),
            ("-lm.eval.enable 0", "lm.eval.enabled", json!(false)),
            ("--lm.eval.enabled=False", "lm.eval.enabled", json!(false)),
            ("-plot.n_steps -5", "plot.n_steps", json!(-5)),
            ("", "plot.n_steps", json!(-128)),
            ("--stop_after=None", "stop_after", json!(null)),
            (
                "-lr_sched.steps 10_20;30",
                "lr_sched.steps",
                json!([10, 20, 30]),
            ),
            (
                "-reg_scales moe=0.5,act_loss=2",
                "reg_scales",
                json!({"moe": 0.5, "act_loss": 2.0}),
            ),
        ] {
            assert_eq!(run(line, &[]).unwrap().values[name], value, "{line}");
        }
    }

    #[test]
    fn command_line_beats_stored_beats_profile_beats_default() {
        let profiled = Source::Profile("small".into());
        for (line, stored, raw, source) in [
            ("", &[][..], "128", Source::Default),
            ("-profile small", &[], "8", profiled.clone()),
            (
                "-profile small",
                &[("batch_size", "64"), ("profile", "small")],
                "64",
                Source::Stored,
            ),
            ("", &[("profile", "small")], "8", profiled),
            (
                "-batch_size 2 -profile small",
                &[("batch_size", "64")],
                "2",
                Source::CommandLine,
            ),
        ] {
            assert_eq!(
                run(line, stored).unwrap().raw["batch_size"],
                (raw.into(), source),
                "{line}"
            );
        }
    }

    #[test]
    fn later_profiles_override_and_profiles_include_others() {
        let raw = |line: &str| {
            let map = run(line, &[]).unwrap().raw_map();
            ["state_size", "batch_size", "lr"].map(|name| map[name].clone())
        };
        assert_eq!(raw("-profile small,slow"), ["32", "2", "1e-5"]);
        assert_eq!(raw("-profile slow,small"), ["32", "8", "1e-5"]);
        assert_eq!(raw("-profile tiny"), ["16", "8", "1e-3"]);
    }

    #[test]
    fn one_start_leaves_its_gpu_and_reset_behind() {
        let first = run("-gpu none -reset 1 -restore x -seed 5", &[])
            .unwrap()
            .raw_map();
        assert_eq!(first["seed"], "5");
        assert!(NOT_SAVED.iter().all(|name| !first.contains_key(*name)));
        let again = run("", &[("reset", "1")]).unwrap();
        assert_eq!(again.values["reset"], json!(false));
    }

    #[test]
    fn what_has_no_effect_is_a_warning() {
        let arguments = run("-moe.layer_encoding none", &[("moe.gone", "1")]).unwrap();
        assert_eq!(
            arguments.warnings,
            [
                "`-moe.layer_encoding` has no effect: the code that read it is gone",
                "the stored argument `moe.gone` is unknown and was left out",
            ]
        );
        assert!(!arguments.raw_map().contains_key("moe.layer_encoding"));
    }

    /// A dense model beside one with experts; which of them is in the run is for the test to say.
    fn models(roles: [Role; 2]) -> Vec<Owner> {
        let tables: [&[ArgSpec]; 2] = [
            &[
                ArgSpec::text("act", "relu").choices("relu|gelu"),
                ArgSpec::float("ff_multiplier", "2"),
            ],
            &[
                ArgSpec::text("act", "gelu").choices("gelu|topk"),
                ArgSpec::retired(ArgKind::Float, "ff_multiplier", "experts have widths"),
                ArgSpec::int("n_experts", "8"),
                ArgSpec::int("top_k", "2"),
            ],
        ];
        let mut owners = vec![Owner::host()];
        for ((name, specs), role) in ["dense", "moe"].into_iter().zip(tables).zip(roles) {
            owners.push(Owner {
                heading: format!("model `{name}`"),
                component: Some((ComponentKind::Model, name.into())),
                role,
                defs: specs.iter().map(ArgDef::from).collect(),
                profiles: Vec::new(),
            });
        }
        owners
    }

    fn run_models(line: &str, roles: [Role; 2]) -> Result<Arguments, ArgsError> {
        let argv: Vec<String> = line.split_whitespace().map(String::from).collect();
        parse(&argv, &models(roles), None)
    }

    #[test]
    fn each_component_keeps_its_own_default() {
        for (roles, shared) in [
            ([Possible, Possible], None),
            ([Active, Idle], Some("relu")),
            ([Idle, Active], Some("gelu")),
        ] {
            let arguments = run_models("", roles).unwrap();
            let raw = arguments.raw_map().get("act").cloned();
            assert_eq!(raw.as_deref(), shared, "{roles:?}");
            let act = |defs: &[ArgDef]| arguments.config_for(defs).unwrap()["act"].clone();
            let owners = models(roles);
            assert_eq!(
                [act(&owners[1].defs), act(&owners[2].defs)],
                ["relu", "gelu"]
            );
        }
    }

    #[test]
    fn choices_are_those_of_the_runs_owners() {
        for (raw, roles, is_fine) in [
            ("topk", [Possible, Possible], true),
            ("topk", [Idle, Active], true),
            ("topk", [Active, Idle], false),
            ("tanh", [Possible, Possible], false),
        ] {
            let arguments = run_models(&format!("-act {raw}"), roles);
            assert_eq!(arguments.is_ok(), is_fine, "{raw} {roles:?}");
        }
        let arguments = run_models("-act topk", [Possible, Possible]).unwrap();
        let error = arguments.config_for(&models([Possible; 2])[1].defs);
        assert_eq!(
            error.unwrap_err().why(),
            "`topk` is not one of relu, gelu (from: command line)"
        );
    }

    #[test]
    fn arguments_of_other_components_are_accepted_with_a_notice() {
        let line = "-n_experts 4 -top_k 3 -ff_multiplier 4";
        for (roles, warnings) in [
            ([Possible, Possible], &[][..]),
            (
                [Active, Idle],
                &["`-n_experts`, `-top_k` have no effect with model `dense`"],
            ),
            (
                [Idle, Active],
                &["`-ff_multiplier` has no effect: experts have widths"],
            ),
        ] {
            let arguments = run_models(line, roles).unwrap();
            assert_eq!(arguments.warnings, warnings, "{roles:?}");
            let has = |name| arguments.raw_map().contains_key(name);
            let expected = [roles[1] != Idle, roles[0] != Idle];
            assert_eq!([has("n_experts"), has("ff_multiplier")], expected);
        }
        assert!(run_models("-n_expert 4", [Active, Idle]).is_ok());
        assert!(run_models("-n_expertz 4", [Active, Idle]).is_err());
        assert!(run_models("-n_experts many", [Active, Idle]).is_err());
    }

    #[test]
    fn a_component_gets_its_own_fields() {
        let defs = &owners()[1].defs;
        assert_eq!(
            run("-moe.att.k 3", &[])
                .unwrap()
                .config_for(&defs[..3])
                .unwrap()["attention"],
            json!({"top_k": 3})
        );
    }

    #[test]
    fn mistakes_say_what_why_and_fix() {
        for (line, stored, [what, why, fix]) in [
            (
                "-stat_size 8",
                &[][..],
                [
                    "unknown argument `-stat_size`",
                    "neither the host nor a component of this task has an argument that begins so",
                    "did you mean `-state_size`?",
                ],
            ),
            (
                "-n_s 1 -test_ 5",
                &[],
                [
                    "ambiguous argument `-test_`",
                    "it may stand for `-test_batch_size`, `-test_interval`, `-test_only`, `-test_pretrained`",
                    "write more of the name",
                ],
            ),
            (
                "-reset -lr 1",
                &[],
                [
                    "no value for `-reset`",
                    "it takes 0 or 1",
                    "write `-reset <value>`, or `-reset=<value>` if the value begins with a dash",
                ],
            ),
            (
                "-batch_size 1e5",
                &[],
                [
                    "invalid value for `-batch_size`",
                    "`1e5` is not a whole number (from: command line)",
                    "set `-batch_size` to a whole number",
                ],
            ),
            (
                "",
                &[("lr", "fast")],
                [
                    "invalid value for `-lr`",
                    "`fast` is not a number (from: stored)",
                    "give `-lr` on the command line, with a number",
                ],
            ),
            (
                "-name my run",
                &[],
                [
                    "unexpected text `run`",
                    "`-name` takes one value and has it already",
                    "quote a value with spaces: `-name '… run'`; or put a flag before it",
                ],
            ),
            (
                "-profile smal",
                &[],
                [
                    "unknown profile `smal`",
                    "known profiles: `slow`, `small`, `tiny`",
                    "did you mean `small`?",
                ],
            ),
            (
                "-profile slow",
                &[("profile", "small")],
                [
                    "this run has another profile than `slow`",
                    "it was started with `small`",
                    "leave out `-profile`, or start a new run with another `-name` or with `-reset 1`",
                ],
            ),
        ] {
            let error = run(line, stored).unwrap_err();
            assert_eq!(
                [error.what(), error.why(), error.fix()],
                [what, why, fix],
                "{line}"
            );
        }
    }
}
