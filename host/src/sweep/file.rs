//! A sweep file as W&B defines it: method and parameters, checked, each with its line.
//!
//! ```yaml
//! program: moeut-host                # read by `wandb agent` only, as is `command`
//! command: ["${env}", "${program}", "${args}"]
//! method: grid                       # or `random`
//! run_cap: 10                        # at most so many runs
//! parameters:
//!   task: {value: moeut_c4}
//!   moe:                             # nested: the same as `moe.n_experts`
//!     parameters:
//!       n_experts: {values: [8, 16]}
//! ```
//! What a `wandb agent` would write in Python's words means here what it means to Python: plain `true`, `yes` and `on` are
//! 1, `false`, `no` and `off` are 0, `null`, `~` and nothing are `none`. Whether an argument exists is asked later, when
//! the task is known ([`super::runs`]).

use super::Mistake;
use super::space::{Domain, Shape};
use super::yaml::{self, Data, Node, Scalar};
use crate::args::nearest;
use crate::error::HostError;
use std::path::{Path, PathBuf};

/// Keys of W&B's schema; those without effect here are its server's and agent's business.
const KEYS: &[&str] = &[
    "apiVersion",
    "command",
    "controller",
    "description",
    "early_terminate",
    "entity",
    "image_uri",
    "job",
    "kind",
    "method",
    "metric",
    "metrics",
    "name",
    "parameters",
    "program",
    "project",
    "run_cap",
    "scheduler",
];

/// Keys of one parameter.
const PARAMETER_KEYS: &[&str] = &[
    "distribution",
    "max",
    "min",
    "mu",
    "parameters",
    "probabilities",
    "q",
    "sigma",
    "value",
    "values",
];

const DISTRIBUTIONS: &[&str] = &[
    "categorical",
    "categorical_w_probabilities",
    "constant",
    "int_uniform",
    "log_normal",
    "log_uniform",
    "log_uniform_values",
    "normal",
    "q_log_normal",
    "q_log_uniform",
    "q_log_uniform_values",
    "q_normal",
    "q_uniform",
    "uniform",
];

/// How runs are chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Method {
    /// All combinations.
    Grid,
    /// Draws.
    Random,
    /// W&B's server chooses, by the results so far.
    OfServer(String),
}

/// A sweep file.
#[derive(Debug)]
pub struct SweepFile {
    /// Where it is.
    pub path: PathBuf,
    /// Everything in it.
    pub root: Node,
    /// How runs are chosen.
    pub method: Method,
    /// Line of the method.
    pub method_line: usize,
    /// At most so many runs.
    pub run_cap: Option<usize>,
    /// In W&B's order: sorted by name, on each level of nesting.
    pub parameters: Vec<Parameter>,
    /// What has no effect, or is not as W&B wants it.
    pub warnings: Vec<String>,
}

/// One parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Name of the argument.
    pub name: String,
    /// Where its name is, if it is from the file.
    pub line: Option<usize>,
    /// What it may be.
    pub domain: Domain,
}

impl SweepFile {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or is no sweep.
    pub fn read(path: &Path) -> Result<Self, HostError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            HostError::new(
                format!("the sweep file `{}` cannot be read", path.display()),
                error.to_string(),
                "name a YAML file, for instance one of `sweeps/small`",
            )
        })?;
        Self::parse(path, &text).map_err(|mistake| mistake.in_file(path))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// If it is no sweep.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Mistake> {
        let root = yaml::parse(text)?;
        let Data::Map(entries) = &root.data else {
            return Err(Mistake::new(
                root.line,
                "this is no sweep",
                "a sweep has names with values: `method`, `parameters`",
                "see `sweeps/small` for examples",
            ));
        };
        for (key, _) in entries {
            check_key(&key.text, KEYS, key.line, "key")?;
        }
        let mut warnings = Vec::new();
        if root.get("early_terminate").is_some() {
            warnings.push(
                "`early_terminate` has no effect here: each run is trained to its end".to_owned(),
            );
        }
        let method_node = required(&root, &root, "method", "`method: grid` or `method: random`")?;
        let method = match scalar(method_node, "method")?.text.as_str() {
            "grid" => Method::Grid,
            "random" => Method::Random,
            other if ["bayes", "custom"].contains(&other) => Method::OfServer(other.to_owned()),
            other => {
                return Err(Mistake::new(
                    method_node.line,
                    format!("unknown method `{other}`"),
                    "methods are `grid` and `random`, and for `wandb agent` `bayes` and `custom`",
                    "write `method: grid`",
                ));
            }
        };
        let run_cap = match root.get("run_cap") {
            None => None,
            Some(node) => Some(whole(node, "run_cap")?),
        };
        let tree = required(
            &root,
            &root,
            "parameters",
            "the arguments of the runs below `parameters:`",
        )?;
        let mut parameters = Vec::new();
        collect(tree, "", &mut parameters, &mut warnings)?;
        for (index, parameter) in parameters.iter().enumerate() {
            if parameters[..index]
                .iter()
                .any(|other| other.name == parameter.name)
            {
                return Err(Mistake::new(
                    parameter.line.unwrap_or(tree.line),
                    format!("`{}` is here twice", parameter.name),
                    "once with dots and once nested",
                    "delete one of the two",
                ));
            }
        }
        let method_line = method_node.line;
        Ok(Self {
            path: path.to_owned(),
            method,
            method_line,
            run_cap,
            parameters,
            warnings,
            root,
        })
    }
}

/// All parameters below a node, sorted on each level, with their full names.
fn collect(
    tree: &Node,
    prefix: &str,
    parameters: &mut Vec<Parameter>,
    warnings: &mut Vec<String>,
) -> Result<(), Mistake> {
    let Data::Map(entries) = &tree.data else {
        return Err(Mistake::new(
            tree.line,
            "`parameters` has no names",
            "each argument is a name with `value` or `values` below",
            "write for instance `lr: {value: 0.001}`",
        ));
    };
    let mut entries: Vec<_> = entries.iter().collect();
    entries.sort_by(|(a, _), (b, _)| a.text.cmp(&b.text));
    for (key, node) in entries {
        let name = format!("{prefix}{}", key.text);
        let Data::Map(settings) = &node.data else {
            let example = match &node.data {
                Data::Scalar(scalar) => scalar.text.clone(),
                Data::List(_) | Data::Map(_) => "1".to_owned(),
            };
            return Err(Mistake::new(
                key.line,
                format!("`{name}` does not say what it is"),
                "an argument has `value`, `values` or `distribution` below",
                format!("write `{name}: {{value: {example}}}`"),
            ));
        };
        for (setting, _) in settings {
            check_key(
                &setting.text,
                PARAMETER_KEYS,
                setting.line,
                &format!("key of `{name}`"),
            )?;
        }
        match node.get("parameters") {
            Some(below) if settings.len() == 1 => {
                collect(below, &format!("{name}."), parameters, warnings)?;
            }
            Some(_) => {
                return Err(Mistake::new(
                    key.line,
                    format!("`{name}` is a value and a group"),
                    "beside `parameters` nothing else may stand",
                    "delete one of the two",
                ));
            }
            None => {
                let domain = domain(&name, node, warnings)?;
                parameters.push(Parameter {
                    name,
                    line: Some(key.line),
                    domain,
                });
            }
        }
    }
    Ok(())
}

/// The distribution that a parameter names, or that its settings mean.
fn distribution<'a>(name: &str, node: &'a Node) -> Result<&'a str, Mistake> {
    let given = match node.get("distribution") {
        Some(distribution) => {
            let text = &scalar(distribution, "distribution")?.text;
            check_key(text, DISTRIBUTIONS, distribution.line, "distribution")?;
            Some(text.as_str())
        }
        None => None,
    };
    let has = |key: &str| node.get(key).is_some();
    Ok(match given {
        Some(given) => given,
        None if has("value") => "constant",
        None if has("values") && has("probabilities") => "categorical_w_probabilities",
        None if has("values") => "categorical",
        None if has("min") && has("max") => {
            let is_whole = |key: &str| node.get(key).is_some_and(|node| whole_text(node).is_some());
            if is_whole("min") && is_whole("max") {
                "int_uniform"
            } else {
                "uniform"
            }
        }
        None => {
            return Err(Mistake::new(
                node.line,
                format!("`{name}` does not say what it is"),
                "it has neither `value` nor `values`, nor `min` and `max`, nor a `distribution`",
                "write `value: …` below it",
            ));
        }
    })
}

/// What a parameter may be.
fn domain(name: &str, node: &Node, warnings: &mut Vec<String>) -> Result<Domain, Mistake> {
    let kind = distribution(name, node)?;
    let (needs, may): (&[&str], &[&str]) = match kind {
        "constant" => (&["value"], &[]),
        "categorical" => (&["values"], &[]),
        "categorical_w_probabilities" => (&["values", "probabilities"], &[]),
        "int_uniform" | "uniform" | "log_uniform" | "log_uniform_values" => (&["min", "max"], &[]),
        "q_uniform" | "q_log_uniform" | "q_log_uniform_values" => (&["min", "max"], &["q"]),
        "normal" | "log_normal" => (&[], &["mu", "sigma"]),
        _ => (&[], &["mu", "sigma", "q"]),
    };
    check_settings(name, kind, node, needs, may)?;
    let number =
        |key: &str, default: f64| node.get(key).map_or(Ok(default), |node| real(node, key));
    let q = if may.contains(&"q") {
        Some(number("q", 1.0)?)
    } else {
        None
    };
    if q.is_some_and(|q| q <= 0.0) || number("sigma", 1.0)? < 0.0 {
        let (key, rule) = if q.is_some_and(|q| q <= 0.0) {
            ("q", "above 0")
        } else {
            ("sigma", "0 or more")
        };
        let line = node.get(key).map_or(node.line, |node| node.line);
        let what = format!("`{key}` of `{name}` is too small");
        return Err(Mistake::new(
            line,
            what,
            format!("it has to be {rule}"),
            format!("write a `{key}` that is {rule}"),
        ));
    }
    let ends = || -> Result<(f64, f64), Mistake> {
        let (min, max) = (number("min", 0.0)?, number("max", 0.0)?);
        if min < max {
            return Ok((min, max));
        }
        let why = format!("`min` is {min} and `max` is {max}");
        Err(Mistake::new(
            node.line,
            format!("`{name}` has no values"),
            why,
            "write a `min` below `max`",
        ))
    };
    let (mu, sigma) = (number("mu", 0.0)?, number("sigma", 1.0)?);
    let shape = match kind {
        "constant" => {
            return Ok(Domain::Fixed(text_of(
                required(node, node, "value", "`value`")?,
                name,
            )?));
        }
        "categorical" => return Ok(Domain::Values(values(name, node, warnings)?)),
        "categorical_w_probabilities" => return weighted(name, node, warnings),
        "int_uniform" => {
            let (_, _) = ends()?;
            let whole = |key: &str| {
                let end = required(node, node, key, key)?;
                whole_text(end).ok_or_else(|| mistyped(end, key, "a whole number"))
            };
            return Ok(Domain::Integers {
                min: whole("min")?,
                max: whole("max")?,
            });
        }
        "normal" | "q_normal" => Shape::Normal { mu, sigma },
        "log_normal" | "q_log_normal" => Shape::LogNormal { mu, sigma },
        _ => {
            let (min, max) = ends()?;
            match kind.trim_start_matches("q_") {
                "uniform" => Shape::Uniform { min, max },
                "log_uniform" => Shape::LogUniform { min, max },
                _ if min > 0.0 => Shape::LogUniform {
                    min: min.ln(),
                    max: max.ln(),
                },
                _ => {
                    return Err(Mistake::new(
                        node.line,
                        format!("`{name}` has no logarithms"),
                        format!("`min` is {min}"),
                        "write a `min` above 0",
                    ));
                }
            }
        }
    };
    Ok(Domain::Real { shape, q })
}

/// Refuses what a distribution lacks or does not have.
fn check_settings(
    name: &str,
    kind: &str,
    node: &Node,
    needs: &[&str],
    may: &[&str],
) -> Result<(), Mistake> {
    if let Some(missing) = needs.iter().find(|key| node.get(key).is_none()) {
        return Err(Mistake::new(
            node.line,
            format!("`{name}` has no `{missing}`"),
            format!("the distribution `{kind}` needs it"),
            format!("write `{missing}: …` below `{name}`"),
        ));
    }
    let Data::Map(settings) = &node.data else {
        return Ok(());
    };
    let stray = settings.iter().find(|(key, _)| {
        key.text != "distribution" && !needs.contains(&&*key.text) && !may.contains(&&*key.text)
    });
    match stray {
        None => Ok(()),
        Some((key, _)) => Err(Mistake::new(
            key.line,
            format!("`{name}` has a `{}` too many", key.text),
            format!("the distribution `{kind}` does not have it"),
            "delete the line, or write another `distribution`",
        )),
    }
}

/// The values to choose from. A single one without a list is W&B's `value`; a sweep of the reference has it so.
fn values(name: &str, node: &Node, warnings: &mut Vec<String>) -> Result<Vec<String>, Mistake> {
    let node = required(node, node, "values", "`values`")?;
    match &node.data {
        Data::List(items) if items.is_empty() => Err(Mistake::new(
            node.line,
            format!("`{name}` has no values"),
            "the list is empty",
            "write at least one value",
        )),
        Data::List(items) => items.iter().map(|item| text_of(item, name)).collect(),
        Data::Scalar(_) => {
            warnings.push(format!(
                "line {}: `values` of `{name}` is no list: read as `value`",
                node.line
            ));
            Ok(vec![text_of(node, name)?])
        }
        Data::Map(_) => Err(mistyped(node, "values", "a list")),
    }
}

fn weighted(name: &str, node: &Node, warnings: &mut Vec<String>) -> Result<Domain, Mistake> {
    const ROUNDING: f64 = 1e-6;
    let values = values(name, node, warnings)?;
    let list = required(node, node, "probabilities", "`probabilities`")?;
    let Data::List(items) = &list.data else {
        return Err(mistyped(list, "probabilities", "a list"));
    };
    let weights: Vec<f64> = items
        .iter()
        .map(|item| real(item, "probabilities"))
        .collect::<Result<_, _>>()?;
    let sum: f64 = weights.iter().sum();
    if weights.len() != values.len()
        || (sum - 1.0).abs() > ROUNDING
        || weights.iter().any(|weight| *weight < 0.0)
    {
        return Err(Mistake::new(
            list.line,
            format!("these are no probabilities of `{name}`"),
            format!(
                "there are {} for {} values, and their sum is {sum}",
                weights.len(),
                values.len()
            ),
            "write one for each value, none below 0, with the sum 1",
        ));
    }
    Ok(Domain::Weighted(values.into_iter().zip(weights).collect()))
}

/// A value as the command line has it. A list is joined by commas, as list arguments are.
///
/// # Errors
/// For a map, and a list of anything but scalars.
pub fn text_of(node: &Node, name: &str) -> Result<String, Mistake> {
    match &node.data {
        Data::Scalar(scalar) => Ok(argument(scalar)),
        Data::List(items) => {
            let items: Vec<String> = items
                .iter()
                .map(|item| scalar(item, name).map(argument))
                .collect::<Result<_, _>>()?;
            Ok(items.join(","))
        }
        Data::Map(_) => Err(mistyped(node, name, "a value or a list of values")),
    }
}

/// A scalar in the words of the command line. Quotes make it text, whatever it says.
fn argument(scalar: &Scalar) -> String {
    if !scalar.is_plain {
        return scalar.text.clone();
    }
    match scalar.text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => "1".to_owned(),
        "false" | "no" | "off" => "0".to_owned(),
        "" | "~" | "null" | "none" => "none".to_owned(),
        _ => scalar.text.clone(),
    }
}

fn required<'a>(root: &Node, node: &'a Node, name: &str, fix: &str) -> Result<&'a Node, Mistake> {
    node.get(name).ok_or_else(|| {
        Mistake::new(
            root.line,
            format!("`{name}` is missing"),
            "a sweep cannot do without it",
            format!("write {fix}"),
        )
    })
}

fn scalar<'a>(node: &'a Node, name: &str) -> Result<&'a Scalar, Mistake> {
    match &node.data {
        Data::Scalar(scalar) => Ok(scalar),
        Data::List(_) | Data::Map(_) => Err(mistyped(node, name, "a single value")),
    }
}

fn real(node: &Node, name: &str) -> Result<f64, Mistake> {
    let number = scalar(node, name)?.text.parse::<f64>().ok();
    number
        .filter(|number| number.is_finite())
        .ok_or_else(|| mistyped(node, name, "a number"))
}

fn whole(node: &Node, name: &str) -> Result<usize, Mistake> {
    let number = scalar(node, name)?.text.parse::<usize>().ok();
    number
        .filter(|&number| number > 0)
        .ok_or_else(|| mistyped(node, name, "a whole number above 0"))
}

fn whole_text(node: &Node) -> Option<i64> {
    scalar(node, "").ok()?.text.parse().ok()
}

fn mistyped(node: &Node, name: &str, expected: &str) -> Mistake {
    let found = match &node.data {
        Data::Scalar(scalar) => format!("`{}`", scalar.text),
        Data::List(_) => "a list".to_owned(),
        Data::Map(_) => "names with values".to_owned(),
    };
    Mistake::new(
        node.line,
        format!("`{name}` is not {expected}"),
        format!("it is {found}"),
        format!("write {expected}"),
    )
}

fn check_key(key: &str, known: &[&str], line: usize, kind: &str) -> Result<(), Mistake> {
    if known.contains(&key) {
        return Ok(());
    }
    let near = nearest(key, known.iter().copied());
    let fix = match near.first() {
        Some(near) => format!("did you mean `{near}`?"),
        None => "delete it, or correct its name".to_owned(),
    };
    let known: Vec<String> = known.iter().map(|known| format!("`{known}`")).collect();
    Err(Mistake::new(
        line,
        format!("unknown {kind} `{key}`"),
        format!("known are {}", known.join(", ")),
        fix,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(parameters: &str) -> Result<SweepFile, Mistake> {
        let text = format!("method: grid\nparameters:\n{parameters}");
        SweepFile::parse(Path::new("a.yaml"), &text)
    }

    fn domain_of(settings: &str) -> Domain {
        parse(&format!("  x: {settings}\n"))
            .unwrap()
            .parameters
            .remove(0)
            .domain
    }

    #[test]
    fn each_spelling_has_its_domain() {
        let texts = |values: &[&str]| {
            values
                .iter()
                .map(|&value| value.to_owned())
                .collect::<Vec<_>>()
        };
        let real = |shape, q| Domain::Real { shape, q };
        for (settings, domain) in [
            ("{value: 1}", Domain::Fixed("1".into())),
            ("{value: [1, 2]}", Domain::Fixed("1,2".into())),
            (
                "{distribution: constant, value: a b}",
                Domain::Fixed("a b".into()),
            ),
            ("{values: [2, x]}", Domain::Values(texts(&["2", "x"]))),
            ("{min: 1, max: 3}", Domain::Integers { min: 1, max: 3 }),
            (
                "{min: 1, max: 3.0}",
                real(Shape::Uniform { min: 1.0, max: 3.0 }, None),
            ),
            (
                "{distribution: q_uniform, min: 1, max: 3}",
                real(Shape::Uniform { min: 1.0, max: 3.0 }, Some(1.0)),
            ),
            (
                "{distribution: log_uniform_values, min: 1, max: 1.0}",
                Domain::Fixed("unreachable".into()),
            ),
            (
                "{distribution: log_uniform, min: -3, max: 0}",
                real(
                    Shape::LogUniform {
                        min: -3.0,
                        max: 0.0,
                    },
                    None,
                ),
            ),
            (
                "{distribution: normal}",
                real(
                    Shape::Normal {
                        mu: 0.0,
                        sigma: 1.0,
                    },
                    None,
                ),
            ),
            (
                "{distribution: q_log_normal, mu: 2, sigma: 0.5, q: 0.1}",
                real(
                    Shape::LogNormal {
                        mu: 2.0,
                        sigma: 0.5,
                    },
                    Some(0.1),
                ),
            ),
            (
                "{values: [a, b], probabilities: [0.25, 0.75]}",
                Domain::Weighted(vec![("a".into(), 0.25), ("b".into(), 0.75)]),
            ),
        ] {
            if settings.contains("max: 1.0") {
                assert!(
                    parse(&format!("  x: {settings}\n")).is_err(),
                    "an empty range"
                );
            } else {
                assert_eq!(domain_of(settings), domain, "{settings}");
            }
        }
    }

    #[test]
    fn pythons_words_become_those_of_the_command_line() {
        for (yaml, text) in [
            ("True", "1"),
            ("yes", "1"),
            ("false", "0"),
            ("off", "0"),
            ("null", "none"),
            ("~", "none"),
            ("None", "none"),
            ("", "none"),
            ("'true'", "true"),
            ("1e-3", "1e-3"),
            ("-5", "-5"),
        ] {
            assert_eq!(
                domain_of(&format!("\n      value: {yaml}")),
                Domain::Fixed(text.into()),
                "{yaml}"
            );
        }
    }

    /// `a-b` comes before `a.x` as text, but behind the group `a`.
    #[test]
    fn parameters_are_sorted_on_each_level() {
        let nested = "  b: {value: 1}\n  a-b: {value: 1}\n  a:\n    parameters:\n      y: {value: 1}\n      x: {value: 1}\n";
        let names: Vec<String> = parse(nested)
            .unwrap()
            .parameters
            .into_iter()
            .map(|one| one.name)
            .collect();
        assert_eq!(names, ["a.x", "a.y", "a-b", "b"]);
    }

    #[test]
    fn a_bare_value_in_the_place_of_a_list_is_a_warning() {
        let file = parse("  task: {values: pes2o_transformer}\n").unwrap();
        assert_eq!(
            file.parameters[0].domain,
            Domain::Values(vec!["pes2o_transformer".into()])
        );
        assert_eq!(
            file.warnings,
            ["line 3: `values` of `task` is no list: read as `value`"]
        );
    }

    #[test]
    fn mistakes_are_found_in_their_lines() {
        for (parameters, line, what) in [
            ("  x: 3\n", 3, "`x` does not say what it is"),
            ("  x: {}\n", 3, "`x` does not say what it is"),
            (
                "  a: {value: 1}\n  x: {valeu: 3}\n",
                4,
                "unknown key of `x` `valeu`",
            ),
            ("  x: {values: []}\n", 3, "`x` has no values"),
            ("  x: {values: {a: 1}}\n", 3, "`values` is not a list"),
            (
                "  x: {value: {a: 1}}\n",
                3,
                "`x` is not a value or a list of values",
            ),
            (
                "  x: {value: 1, values: [1]}\n",
                3,
                "`x` has a `values` too many",
            ),
            ("  x: {min: 2, max: 1}\n", 3, "`x` has no values"),
            ("  x: {min: 0, max: a}\n", 3, "`max` is not a number"),
            (
                "  x: {distribution: gaussian}\n",
                3,
                "unknown distribution `gaussian`",
            ),
            (
                "  x: {distribution: uniform, min: 0}\n",
                3,
                "`x` has no `max`",
            ),
            (
                "  x: {distribution: log_uniform_values, min: 0, max: 1}\n",
                3,
                "`x` has no logarithms",
            ),
            (
                "  x: {distribution: q_uniform, min: 0, max: 1, q: 0}\n",
                3,
                "`q` of `x` is too small",
            ),
            (
                "  x: {values: [1, 2], probabilities: [0.5, 0.6]}\n",
                3,
                "these are no probabilities of `x`",
            ),
            (
                "  a.b: {value: 1}\n  a: {parameters: {b: {value: 2}}}\n",
                3,
                "`a.b` is here twice",
            ),
            (
                "  a: {value: 1, parameters: {b: {value: 2}}}\n",
                3,
                "`a` is a value and a group",
            ),
            ("  - x\n", 3, "`parameters` has no names"),
        ] {
            let mistake = parse(parameters).unwrap_err();
            assert_eq!(
                (mistake.line, mistake.what.as_str()),
                (line, what),
                "{parameters}: {mistake:?}"
            );
        }
        for (text, line, what) in [
            ("parameters: {}\n", 1, "`method` is missing"),
            ("method: grid\n", 1, "`parameters` is missing"),
            (
                "\nmethod: simulated\nparameters: {}\n",
                2,
                "unknown method `simulated`",
            ),
            (
                "method: grid\nparameter: {}\n",
                2,
                "unknown key `parameter`",
            ),
            (
                "method: grid\nrun_cap: 0\nparameters: {}\n",
                2,
                "`run_cap` is not a whole number above 0",
            ),
            ("- a\n", 1, "this is no sweep"),
        ] {
            let mistake = SweepFile::parse(Path::new("a.yaml"), text).unwrap_err();
            assert_eq!(
                (mistake.line, mistake.what.as_str()),
                (line, what),
                "{text}: {mistake:?}"
            );
        }
    }
}
