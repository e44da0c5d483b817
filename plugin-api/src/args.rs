//! Command-line arguments as data: what a component accepts, and how text becomes a typed value.
//!
//! A component owns one table of [`ArgSpec`]s. Each row ties a flag of the reference (`state_size`) to the typed
//! field that it fills (`d_model`); the host parses the command line against the union of all tables and hands
//! every component a configuration of just its own fields. This module knows nothing about `argv`.

use crate::PluginError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The type of an argument's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArgKind {
    /// A whole number; `1e5` is refused, as the reference does.
    Int,
    /// A real number.
    Float,
    /// `0/1`, `true/false`, `yes/no`. The reference takes any other whole number for true, which hides mistakes.
    Bool,
    /// Text.
    Str,
    /// Whole numbers separated by any of `,` `_` space `;`.
    IntList,
    /// Real numbers separated by any of `,` `_` space `;`.
    FloatList,
    /// Words separated by `,`.
    StrList,
    /// `key=number` pairs separated by any of `,` space `;`.
    FloatMap,
}

/// One row of a component's argument table; built in a `const`.
#[derive(Debug, Clone, Copy)]
pub struct ArgSpec {
    name: &'static str,
    field: &'static str,
    kind: ArgKind,
    optional: bool,
    default: &'static str,
    choices: &'static str,
    unit: &'static str,
    help: &'static str,
    retired: &'static str,
}

impl ArgSpec {
    /// An argument whose field has the flag's own name.
    pub const fn new(kind: ArgKind, name: &'static str, default: &'static str) -> Self {
        Self {
            name,
            field: name,
            kind,
            optional: false,
            default,
            choices: "",
            unit: "",
            help: "",
            retired: "",
        }
    }

    /// A whole number.
    pub const fn int(name: &'static str, default: &'static str) -> Self {
        Self::new(ArgKind::Int, name, default)
    }

    /// A real number.
    pub const fn float(name: &'static str, default: &'static str) -> Self {
        Self::new(ArgKind::Float, name, default)
    }

    /// A yes/no question.
    pub const fn flag(name: &'static str, default: &'static str) -> Self {
        Self::new(ArgKind::Bool, name, default)
    }

    /// Text.
    pub const fn text(name: &'static str, default: &'static str) -> Self {
        Self::new(ArgKind::Str, name, default)
    }

    /// An argument of the reference that has no effect: accepted, with a warning that says why.
    pub const fn retired(kind: ArgKind, name: &'static str, reason: &'static str) -> Self {
        let mut spec = Self::new(kind, name, "none");
        spec.optional = true;
        spec.retired = reason;
        spec.field = "";
        spec
    }

    /// The field of the configuration struct that it fills; dots descend into nested structs.
    #[must_use]
    pub const fn field(mut self, field: &'static str) -> Self {
        self.field = field;
        self
    }

    /// The word `none` is accepted and means the absence of a value.
    #[must_use]
    pub const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// The allowed values, separated by `|`.
    #[must_use]
    pub const fn choices(mut self, choices: &'static str) -> Self {
        self.choices = choices;
        self
    }

    /// Unit of the value, for the help text.
    #[must_use]
    pub const fn unit(mut self, unit: &'static str) -> Self {
        self.unit = unit;
        self
    }

    /// One line of help.
    #[must_use]
    pub const fn help(mut self, help: &'static str) -> Self {
        self.help = help;
        self
    }
}

/// An argument's definition as it crosses the plugin boundary: an owned [`ArgSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArgDef {
    /// The flag, without dashes: `moe.att.k`.
    pub name: String,
    /// The field of the component's configuration; empty for a retired argument.
    pub field: String,
    /// Type of the value.
    pub kind: ArgKind,
    /// Whether `none` is a value.
    pub optional: bool,
    /// The default, as a user would type it.
    pub default: String,
    /// Allowed raw values; empty means any.
    pub choices: Vec<String>,
    /// Unit of the value.
    pub unit: String,
    /// One line of help.
    pub help: String,
    /// Why it has no effect any more; empty for a live argument.
    pub retired: String,
}

impl From<&ArgSpec> for ArgDef {
    fn from(spec: &ArgSpec) -> Self {
        Self {
            name: spec.name.into(),
            field: spec.field.into(),
            kind: spec.kind,
            optional: spec.optional,
            default: spec.default.into(),
            choices: split(spec.choices, &['|']).map(str::to_owned).collect(),
            unit: spec.unit.into(),
            help: spec.help.into(),
            retired: spec.retired.into(),
        }
    }
}

/// Why a text is not a value of its argument.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{raw}` is not {expected}")]
pub struct ArgError {
    /// The text as typed.
    pub raw: String,
    /// What would have been accepted.
    pub expected: String,
}

impl ArgDef {
    /// Parses a raw value as a user types it or a sweep passes it.
    ///
    /// # Errors
    /// If the text is not of the argument's kind, or not one of its choices.
    pub fn parse(&self, raw: &str) -> Result<Value, ArgError> {
        let is_none = raw.eq_ignore_ascii_case("none");
        if is_none && (self.optional || self.kind.is_list()) {
            return Ok(Value::Null);
        }
        let is_choice = |text: &str| self.choices.iter().any(|choice| choice == text);
        // A question that also has other answers than yes and no takes all words for those, as one that has not.
        let raw = match parse_bool(raw) {
            Some(is_yes) if !is_choice(raw) && is_choice("0") && is_choice("1") => {
                ["0", "1"][usize::from(is_yes)]
            }
            _ => raw,
        };
        if !self.choices.is_empty() && !is_choice(raw) {
            return Err(self.mismatch(raw));
        }
        self.kind.parse(raw).ok_or_else(|| self.mismatch(raw))
    }

    /// What a user may type, for errors and help.
    pub fn expectation(&self) -> String {
        let mut text = if self.choices.is_empty() {
            self.kind.expectation().to_owned()
        } else {
            format!("one of {}", self.choices.join(", "))
        };
        if self.optional {
            text.push_str(" or none");
        }
        text
    }

    fn mismatch(&self, raw: &str) -> ArgError {
        ArgError {
            raw: raw.to_owned(),
            expected: self.expectation(),
        }
    }
}

impl ArgKind {
    fn is_list(self) -> bool {
        matches!(
            self,
            Self::IntList | Self::FloatList | Self::StrList | Self::FloatMap
        )
    }

    fn expectation(self) -> &'static str {
        match self {
            Self::Int => "a whole number",
            Self::Float => "a number",
            Self::Bool => "0 or 1",
            Self::Str => "text",
            Self::IntList => "whole numbers separated by commas",
            Self::FloatList => "numbers separated by commas",
            Self::StrList => "words separated by commas",
            Self::FloatMap => "pairs such as `moe=0.5,act_loss=2`",
        }
    }

    fn parse(self, raw: &str) -> Option<Value> {
        const NUMBER_SEPARATORS: &[char] = &[',', '_', ' ', ';'];
        match self {
            Self::Int => raw.trim().parse::<i64>().ok().map(Value::from),
            Self::Float => parse_float(raw),
            Self::Bool => parse_bool(raw).map(Value::from),
            Self::Str => Some(Value::from(raw)),
            Self::IntList => split(raw, NUMBER_SEPARATORS)
                .map(|part| Self::Int.parse(part))
                .collect(),
            Self::FloatList => split(raw, NUMBER_SEPARATORS).map(parse_float).collect(),
            Self::StrList => Some(split(raw, &[',']).map(Value::from).collect()),
            Self::FloatMap => split(raw, &[',', ' ', ';'])
                .map(|pair| {
                    let (key, number) = pair.split_once('=')?;
                    Some((key.to_owned(), parse_float(number)?))
                })
                .collect::<Option<Map<_, _>>>()
                .map(Value::Object),
        }
    }
}

fn split<'a>(raw: &'a str, separators: &'a [char]) -> impl Iterator<Item = &'a str> {
    raw.split(separators)
        .map(str::trim)
        .filter(|part| !part.is_empty())
}

/// JSON has no infinities, so they are no values here either.
fn parse_float(raw: &str) -> Option<Value> {
    let number = raw.trim().parse::<f64>().ok()?;
    serde_json::Number::from_f64(number).map(Value::Number)
}

fn parse_bool(raw: &str) -> Option<bool> {
    match raw.trim().to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "y" => Some(true),
        "0" | "false" | "no" | "n" => Some(false),
        _ => None,
    }
}

/// Builds a component's configuration from the values of its arguments.
///
/// `values` maps flags to parsed values; an argument that is missing there takes its default. The result nests by the
/// dots of the *field* names, ready for `serde`.
///
/// # Errors
/// If a default does not parse, which [`crate::testing::check_args`] finds before a user does.
pub fn configuration(defs: &[ArgDef], values: &BTreeMap<String, Value>) -> Result<Value, ArgError> {
    let mut root = Map::new();
    for def in defs.iter().filter(|def| !def.field.is_empty()) {
        let value = match values.get(&def.name) {
            Some(value) => value.clone(),
            None => def.parse(&def.default)?,
        };
        insert(&mut root, &def.field, value);
    }
    Ok(Value::Object(root))
}

/// Reads a component's configuration, of fields that `args` fill.
///
/// # Errors
/// If a value does not fit its field, with the flag that fills it: serde knows the position in a text that no user saw.
pub(crate) fn read_configuration<T: DeserializeOwned>(
    config: &str,
    args: &[ArgSpec],
) -> Result<T, PluginError> {
    serde_json::from_str(config).map_err(|error| {
        misfit::<T>(config, args).unwrap_or_else(|| {
            PluginError::new("the arguments do not make a configuration").why(error.to_string())
        })
    })
}

/// The first argument whose value alone, among defaults, makes no configuration.
fn misfit<T: DeserializeOwned>(config: &str, args: &[ArgSpec]) -> Option<PluginError> {
    let given: Value = serde_json::from_str(config).ok()?;
    let defs: Vec<ArgDef> = args.iter().map(ArgDef::from).collect();
    let Value::Object(defaults) = configuration(&defs, &BTreeMap::new()).ok()? else {
        return None;
    };
    let read = |fields: &Map<String, Value>| T::deserialize(Value::Object(fields.clone()));
    read(&defaults).ok()?;
    defs.iter()
        .filter(|def| !def.field.is_empty())
        .find_map(|def| {
            let pointer = format!("/{}", def.field.replace('.', "/"));
            let value = given.pointer(&pointer)?;
            let mut fields = defaults.clone();
            insert(&mut fields, &def.field, value.clone());
            let error = read(&fields).err()?;
            let name = &def.name;
            let what = PluginError::new(format!("invalid value for `-{name}`"));
            // Most fields count something, and a count below 0 is what serde refuses.
            Some(if value.as_i64().is_some_and(|number| number < 0) {
                what.why(format!("`{value}` is not 0 or more"))
                    .fix(format!("set `-{name}` to 0 or more"))
            } else {
                what.why(error.to_string())
                    .fix(format!("`moeut-host --help` says what `-{name}` takes"))
            })
        })
}

fn insert(node: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            node.insert(path.to_owned(), value);
        }
        Some((head, rest)) => {
            let child = node
                .entry(head.to_owned())
                .or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(child) = child {
                insert(child, rest, value);
            }
        }
    }
}

/// Joins tables of arguments, or of a profile's pairs, at compile time:
/// `&joined::<_, { SHARED.len() + OWN.len() }>(SHARED, OWN)`.
///
/// # Panics
/// At compile time, if `first` is empty or `N` is not the sum of the lengths.
pub const fn joined<T: Copy, const N: usize>(first: &[T], second: &[T]) -> [T; N] {
    assert!(
        first.len() + second.len() == N,
        "N is not the sum of the lengths"
    );
    let mut all = [first[0]; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < first.len() {
            first[at]
        } else {
            second[at - first.len()]
        };
        at += 1;
    }
    all
}

/// A named bundle of ordinary arguments: `-profile demo` stands for all of `args`.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// What follows `-profile`.
    pub name: &'static str,
    /// One line of help.
    pub help: &'static str,
    /// Pairs of flag and raw value.
    pub args: &'static [(&'static str, &'static str)],
}

/// A [`Profile`] as it crosses the plugin boundary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileDef {
    /// What follows `-profile`.
    pub name: String,
    /// One line of help.
    pub help: String,
    /// Pairs of flag and raw value.
    pub args: Vec<(String, String)>,
}

impl From<&Profile> for ProfileDef {
    fn from(profile: &Profile) -> Self {
        Self {
            name: profile.name.into(),
            help: profile.help.into(),
            args: profile
                .args
                .iter()
                .map(|&(name, raw)| (name.into(), raw.into()))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(spec: ArgSpec, raw: &str) -> Result<Value, ArgError> {
        ArgDef::from(&spec).parse(raw)
    }

    #[test]
    fn values_follow_the_reference_rules() {
        for (spec, raw, value) in [
            (ArgSpec::int("a", "0"), "-128", json!(-128)),
            (ArgSpec::float("a", "0"), "1e5", json!(1e5)),
            (ArgSpec::flag("a", "0"), "1", json!(true)),
            (ArgSpec::flag("a", "0"), "yes", json!(true)),
            (ArgSpec::flag("a", "0"), "False", json!(false)),
            (
                ArgSpec::text("a", "0").choices("0|some|1"),
                "yes",
                json!("1"),
            ),
            (
                ArgSpec::text("a", "0").choices("0|some|1"),
                "some",
                json!("some"),
            ),
            (ArgSpec::int("a", "0").optional(), "NONE", json!(null)),
            (
                ArgSpec::new(ArgKind::IntList, "a", ""),
                "1,2_3 4;;5",
                json!([1, 2, 3, 4, 5]),
            ),
            (ArgSpec::new(ArgKind::IntList, "a", ""), "none", json!(null)),
            (
                ArgSpec::new(ArgKind::FloatList, "a", ""),
                "0.9,0.999",
                json!([0.9, 0.999]),
            ),
            (
                ArgSpec::new(ArgKind::StrList, "a", ""),
                "c++,,html",
                json!(["c++", "html"]),
            ),
            (
                ArgSpec::new(ArgKind::FloatMap, "a", ""),
                "moe=0.5, act=2",
                json!({"moe": 0.5, "act": 2.0}),
            ),
        ] {
            assert_eq!(parse(spec, raw), Ok(value), "{raw}");
        }
    }

    #[derive(Debug, Deserialize)]
    struct Sizes {
        #[expect(dead_code, reason = "only whether it can be read is asked")]
        n: usize,
        #[expect(dead_code, reason = "as above")]
        inner: Inner,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "as above")]
        k: u8,
    }

    #[test]
    fn a_value_that_does_not_fit_its_field_names_the_flag() {
        let args = [
            ArgSpec::int("count", "1").field("n"),
            ArgSpec::int("top", "2").field("inner.k"),
        ];
        for (config, what, why) in [
            (
                json!({"n": 1, "inner": {"k": -3}}),
                "invalid value for `-top`",
                "`-3` is not 0 or more",
            ),
            (
                json!({"n": -1, "inner": {"k": -3}}),
                "invalid value for `-count`",
                "`-1` is not 0 or more",
            ),
            (
                json!({"n": 1, "inner": {"k": 300}}),
                "invalid value for `-top`",
                "invalid value: integer `300`, expected u8",
            ),
        ] {
            let error = read_configuration::<Sizes>(&config.to_string(), &args).unwrap_err();
            assert_eq!((error.what.as_str(), error.why.as_str()), (what, why));
        }
    }

    #[test]
    fn malformed_values_say_what_is_accepted() {
        for (spec, raw, message) in [
            (ArgSpec::int("a", "0"), "1e5", "`1e5` is not a whole number"),
            (
                ArgSpec::int("a", "0"),
                "none",
                "`none` is not a whole number",
            ),
            (
                ArgSpec::float("a", "0").optional(),
                "x",
                "`x` is not a number or none",
            ),
            (ArgSpec::float("a", "0"), "inf", "`inf` is not a number"),
            (ArgSpec::flag("a", "0"), "7", "`7` is not 0 or 1"),
            (
                ArgSpec::text("a", "b").choices("b|c"),
                "d",
                "`d` is not one of b, c",
            ),
            (
                ArgSpec::text("a", "b").choices("1|c"),
                "yes",
                "`yes` is not one of 1, c",
            ),
            (
                ArgSpec::new(ArgKind::FloatMap, "a", ""),
                "moe",
                "`moe` is not pairs such as `moe=0.5,act_loss=2`",
            ),
        ] {
            assert_eq!(parse(spec, raw).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn configuration_nests_by_field_and_fills_in_defaults() {
        let defs: Vec<ArgDef> = [
            ArgSpec::int("state_size", "128").field("d_model"),
            ArgSpec::int("pkm.n_heads", "1").field("moe.top_k"),
            ArgSpec::retired(
                ArgKind::Str,
                "moe.layer_encoding",
                "the code that read it is gone",
            ),
        ]
        .iter()
        .map(ArgDef::from)
        .collect();
        let values = BTreeMap::from([("pkm.n_heads".to_owned(), json!(16))]);
        assert_eq!(
            configuration(&defs, &values),
            Ok(json!({"d_model": 128, "moe": {"top_k": 16}}))
        );
    }
}
