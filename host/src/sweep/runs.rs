//! From a sweep file and a command line to the runs, each with its name and arguments, all of them checked.
//!
//! A grid is W&B's: all combinations, the parameters sorted by name, the last one changing fastest. A random sweep draws
//! each parameter of each run from one stream of numbers that a seed fixes; W&B's own draws are not repeatable.
//!
//! What the command line says replaces what the file says, whatever it may be there.

use super::Mistake;
use super::file::{Method, Parameter, SweepFile};
use super::space::Domain;
use crate::args::{ArgsError, HostConfig, nearest, parse};
use crate::error::HostError;
use crate::log::Terminal;
use crate::plan::{candidates, resolve};
use crate::plugins::Registry;
use crate::train::sampling::Uniform;
use moeut_plugin_api::PluginError;
use std::sync::Arc;

/// Larger grids are a mistake.
const MAX_RUNS: usize = 10_000;

/// Arguments that say where metrics go. Values that need W&B are left out: the sweep is run without it.
const LOG: &str = "log";
const NAME: &str = "name";

/// What the command line adds to the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wish {
    /// Arguments by full name; the last one counts.
    pub arguments: Vec<(String, String)>,
    /// Number of draws of a random sweep.
    pub n_draws: Option<usize>,
    /// Fixes the draws.
    pub seed: u64,
}

/// A sweep, ready to be trained.
#[derive(Debug)]
pub struct Sweep {
    /// Its name, which those of its runs begin with.
    pub name: String,
    /// Parameters that differ between the runs.
    pub axes: Vec<String>,
    /// The runs in order.
    pub runs: Vec<SweepRun>,
    /// What is not as the file says.
    pub warnings: Vec<String>,
}

/// One run.
#[derive(Debug, Clone)]
pub struct SweepRun {
    /// Its name, and that of its folder.
    pub name: String,
    /// Its arguments, sorted by name; all that the file says.
    pub parameters: Vec<(String, String)>,
    /// The host's part of them.
    pub config: HostConfig,
    /// First validation stream; none if the task does not validate.
    pub validation: Option<String>,
}

impl SweepRun {
    /// The value of a parameter.
    pub fn value(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The command line of the run, without the program.
    pub fn arguments(&self) -> Vec<String> {
        command_line(&self.name, &self.parameters)
    }
}

impl Sweep {
    /// Makes the runs of a file.
    ///
    /// # Errors
    /// If the method needs W&B's server, there are no or too many runs, or an argument is wrong.
    pub fn new(
        file: &SweepFile,
        wish: &Wish,
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
    ) -> Result<Self, HostError> {
        let given = |name: &str| {
            wish.arguments
                .iter()
                .rfind(|(other, _)| other == name)
                .map(|(_, value)| value)
        };
        let name = match given(NAME) {
            Some(name) => name.clone(),
            None => file
                .path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        };
        let parameters = merge(&file.parameters, &wish.arguments);
        let mut warnings = file.warnings.clone();
        for parameter in &parameters {
            let is_of_wandb =
                matches!(&parameter.domain, Domain::Fixed(value) if needs_wandb(value));
            if parameter.name == NAME && given(NAME).is_none() {
                warnings.push(format!(
                    "`name` has no effect: the runs are called after the sweep, `{name}`"
                ));
            } else if parameter.name == LOG && parameter.line.is_some() && is_of_wandb {
                warnings.push(
                    "`log` is left out, since no W&B is needed here; with it: `-log wandb`"
                        .to_owned(),
                );
            }
        }
        let points = match &file.method {
            Method::Grid => grid(file, &parameters)?,
            Method::Random => draw(file, &parameters, wish)?,
            Method::OfServer(method) => {
                return Err(Mistake::new(
                    file.method_line,
                    format!("the method `{method}` is not there"),
                    "it chooses runs by the results of earlier ones, which W&B's server does",
                    "write `method: grid` or `method: random`, or start it with `wandb sweep` and `wandb agent`",
                )
                .in_file(&file.path));
            }
        };
        let is_varied = |parameter: &&Parameter| match file.method {
            Method::Grid => parameter
                .domain
                .grid()
                .is_some_and(|values| values.len() > 1),
            Method::Random | Method::OfServer(_) => !matches!(parameter.domain, Domain::Fixed(_)),
        };
        let axes = parameters
            .iter()
            .filter(is_varied)
            .map(|one| one.name.clone())
            .collect();
        let place = Place {
            file,
            parameters: &parameters,
        };
        let n_points = points.len();
        let mut runs = Vec::new();
        for (index, values) in points.into_iter().enumerate() {
            let run_name = if n_points == 1 {
                name.clone()
            } else {
                format!("{name}-{}", index + 1)
            };
            let names = parameters.iter().map(|one| one.name.clone());
            let values: Vec<(String, String)> = names.zip(values).collect();
            runs.push(place.check(run_name, values, registry, terminal)?);
        }
        Ok(Self {
            name,
            axes,
            runs,
            warnings,
        })
    }
}

fn needs_wandb(value: &str) -> bool {
    ["wandb", "all"].contains(&value)
}

/// The file's parameters with those of the command line in their places; others behind them.
fn merge(of_file: &[Parameter], given: &[(String, String)]) -> Vec<Parameter> {
    let mut parameters = of_file.to_vec();
    for (name, value) in given {
        let domain = Domain::Fixed(value.clone());
        let parameter = Parameter {
            name: name.clone(),
            line: None,
            domain,
        };
        match parameters.iter_mut().find(|other| other.name == *name) {
            Some(other) => *other = parameter,
            None => parameters.push(parameter),
        }
    }
    parameters
}

/// All combinations, the last parameter changing fastest.
fn grid(file: &SweepFile, parameters: &[Parameter]) -> Result<Vec<Vec<String>>, HostError> {
    let cap = file.run_cap.unwrap_or(usize::MAX);
    // Before any values are made: one of the others may be a range without end.
    if let Some(parameter) = parameters.iter().find(|one| one.domain.grid_size() == 0.0) {
        let line = parameter.line.unwrap_or(file.method_line);
        return Err(Mistake::new(
            line,
            format!("`{}` cannot be part of a grid", parameter.name),
            "a grid takes `value`, `values`, whole numbers from `min` to `max`, and `q_uniform`",
            "write `values`, or `method: random`",
        )
        .in_file(&file.path));
    }
    let n_points: f64 = parameters
        .iter()
        .map(|one| one.domain.grid_size())
        .product();
    if n_points > MAX_RUNS as f64 {
        return Err(too_many(file, n_points));
    }
    let mut points = vec![Vec::new()];
    for parameter in parameters {
        let values = parameter.domain.grid().unwrap_or_default();
        let longer = |point: &Vec<String>| {
            let point = point.clone();
            let add =
                move |value: &String| [point.as_slice(), std::slice::from_ref(value)].concat();
            values.iter().map(add).collect::<Vec<_>>()
        };
        points = points.iter().flat_map(longer).collect();
    }
    points.truncate(cap);
    Ok(points)
}

/// Independent draws.
fn draw(
    file: &SweepFile,
    parameters: &[Parameter],
    wish: &Wish,
) -> Result<Vec<Vec<String>>, HostError> {
    let cap = file.run_cap.unwrap_or(usize::MAX);
    let Some(n_draws) = wish.n_draws.or(file.run_cap).map(|wished| wished.min(cap)) else {
        return Err(Mistake::new(
            file.method_line,
            "nobody says how many runs there are",
            "a random sweep has no end of its own",
            "add `-n <number>`, or write `run_cap: <number>` into the file",
        )
        .in_file(&file.path));
    };
    if n_draws > MAX_RUNS {
        return Err(too_many(file, n_draws as f64));
    }
    let mut uniform = Uniform::new(wish.seed);
    let mut points = Vec::new();
    for _ in 0..n_draws {
        // Every parameter takes a number, so that fixing one of them leaves the draws of the others.
        let point: Result<_, PluginError> = parameters
            .iter()
            .map(|one| one.domain.at(uniform.draw()))
            .collect();
        points.push(point?);
    }
    Ok(points)
}

fn too_many(file: &SweepFile, n_runs: f64) -> HostError {
    Mistake::new(
        file.method_line,
        format!("the sweep has {n_runs} runs"),
        format!("more than {MAX_RUNS} are taken for a mistake"),
        "write fewer `values`",
    )
    .in_file(&file.path)
}

fn command_line(name: &str, parameters: &[(String, String)]) -> Vec<String> {
    let is_passed =
        |(name, value): &&(String, String)| name != NAME && !(name == LOG && needs_wandb(value));
    let arguments = parameters
        .iter()
        .filter(is_passed)
        .map(|(name, value)| format!("-{name}={value}"));
    std::iter::once(format!("-{NAME}={name}"))
        .chain(arguments)
        .collect()
}

/// Where a mistake is: in which line of the file, or on the command line.
struct Place<'a> {
    file: &'a SweepFile,
    parameters: &'a [Parameter],
}

impl Place<'_> {
    /// Resolves the arguments as the run itself will.
    fn check(
        &self,
        name: String,
        parameters: Vec<(String, String)>,
        registry: &Arc<Registry>,
        terminal: &Arc<Terminal>,
    ) -> Result<SweepRun, HostError> {
        let argv = command_line(&name, &parameters);
        let owners = candidates(&argv, registry).map_err(|error| self.locate(error))?;
        for (name, _) in &parameters {
            // Abbreviations would make two parameters of one.
            let mut known = owners
                .iter()
                .flat_map(|owner| &owner.defs)
                .map(|def| def.name.as_str());
            if !known.any(|known| known == name) {
                let known = owners
                    .iter()
                    .flat_map(|owner| &owner.defs)
                    .map(|def| def.name.as_str());
                let error = ArgsError::Unknown {
                    name: name.clone(),
                    nearest: nearest(name, known),
                };
                return Err(self.locate(error.into()));
            }
        }
        parse(&argv, &owners, None).map_err(|error| self.locate_value(error))?;
        let resolved =
            resolve(&argv, None, registry, terminal).map_err(|error| self.locate(error))?;
        let config =
            HostConfig::new(&resolved.arguments).map_err(|error| self.locate_value(error))?;
        let Some(plan) = resolved.plan else {
            let why = "neither the file nor the command line has `task`";
            let error = HostError::new(
                "the sweep has no task",
                why,
                "write `task: {value: moeut_c4}`",
            );
            return Err(error.at(&format!("{}: ", self.file.path.display())));
        };
        let validation = plan.validation.first().map(|stream| stream.name.clone());
        Ok(SweepRun {
            name,
            parameters,
            config,
            validation,
        })
    }

    /// An error of the arguments, which were not typed as it thinks.
    fn locate_value(&self, error: ArgsError) -> HostError {
        match &error {
            ArgsError::Value {
                name,
                raw,
                expected,
                ..
            } if self.line(name).is_some() => {
                let line = self.line(name).unwrap_or_default();
                let why = format!("`{raw}` is not {expected}");
                Mistake::new(line, error.what(), why, format!("write {expected}"))
                    .in_file(&self.file.path)
            }
            _ => self.locate(error.into()),
        }
    }

    /// Adds the line of the parameter that the error names.
    fn locate(&self, error: HostError) -> HostError {
        let what = error.to_string();
        let is_named = |parameter: &&Parameter| {
            let name = &parameter.name;
            what.contains(&format!("`{name}`")) || what.contains(&format!("`-{name}`"))
        };
        let by_value = |parameter: &&Parameter| match &parameter.domain {
            Domain::Fixed(value) => what.contains(&format!("`{value}`")),
            _ => false,
        };
        let named = self.parameters.iter().find(is_named);
        let named = named.or_else(|| self.parameters.iter().find(by_value));
        match named.and_then(|parameter| parameter.line) {
            Some(line) => error.at(&format!("{}, line {line}: ", self.file.path.display())),
            None => error,
        }
    }

    fn line(&self, name: &str) -> Option<usize> {
        self.parameters.iter().find(|one| one.name == name)?.line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn file(text: &str) -> SweepFile {
        SweepFile::parse(Path::new("a.yaml"), text).unwrap()
    }

    fn joined(points: Result<Vec<Vec<String>>, HostError>) -> Vec<String> {
        points
            .unwrap()
            .iter()
            .map(|point| point.join(" "))
            .collect()
    }

    /// The order that `grid_search_next_runs` of W&B's sweep engine gives for the same file.
    #[test]
    fn a_grid_is_sorted_by_name_and_its_last_parameter_changes_fastest() {
        let file = file(
            "method: grid\nparameters:\n  z: {values: [2, 1]}\n  b: {value: x}\n  a: {values: [q, p, q]}\n  m: {parameters: {k: {min: 1, max: 2}}}\n",
        );
        assert_eq!(
            joined(grid(&file, &file.parameters)),
            [
                "q x 1 2", "q x 1 1", "q x 2 2", "q x 2 1", "p x 1 2", "p x 1 1", "p x 2 2",
                "p x 2 1"
            ]
        );
    }

    #[test]
    fn a_cap_ends_a_grid_and_a_random_sweep() {
        let grid_file = file("method: grid\nrun_cap: 2\nparameters:\n  z: {values: [3, 2, 1]}\n");
        assert_eq!(joined(grid(&grid_file, &grid_file.parameters)), ["3", "2"]);
        let random = file("method: random\nrun_cap: 2\nparameters:\n  z: {values: [3, 2, 1]}\n");
        let wish = |n_draws| Wish {
            n_draws,
            ..Wish::default()
        };
        for (n_draws, n_points) in [(None, 2), (Some(1), 1), (Some(5), 2)] {
            assert_eq!(
                draw(&random, &random.parameters, &wish(n_draws))
                    .unwrap()
                    .len(),
                n_points
            );
        }
    }

    #[test]
    fn a_seed_fixes_the_draws_and_fixing_a_parameter_leaves_the_others() {
        let text =
            "method: random\nparameters:\n  a: {min: 0.0, max: 1.0}\n  b: {min: 0.0, max: 1.0}\n";
        let file = file(text);
        let draws = |parameters: &[Parameter], seed| {
            let wish = Wish {
                n_draws: Some(3),
                seed,
                ..Wish::default()
            };
            draw(&file, parameters, &wish).unwrap()
        };
        let first = draws(&file.parameters, 0);
        assert_eq!(first, draws(&file.parameters, 0));
        assert_ne!(first, draws(&file.parameters, 1));
        let fixed = draws(&merge(&file.parameters, &[("a".into(), "7".into())]), 0);
        for (fixed, free) in fixed.iter().zip(&first) {
            assert_eq!(fixed[0], "7");
            assert_eq!(fixed[1], free[1]);
        }
    }

    #[test]
    fn the_command_line_replaces_what_the_file_says() {
        let file = file("method: grid\nparameters:\n  a: {values: [1, 2]}\n  b: {value: 3}\n");
        let given = [("a", "5"), ("c", "6"), ("a", "7")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(
            joined(grid(&file, &merge(&file.parameters, &given))),
            ["7 3 6"]
        );
    }

    #[test]
    fn what_a_grid_cannot_have_is_refused() {
        for (text, message) in [
            (
                "method: grid\nparameters:\n  a: {value: 1}\n  b: {min: 0.0, max: 1.0}\n",
                "a.yaml, line 4: `b` cannot be part of a grid",
            ),
            (
                "method: grid\nparameters:\n  a: {min: 0, max: 100000}\n",
                "a.yaml, line 1: the sweep has 100001 runs",
            ),
        ] {
            let file = file(text);
            assert_eq!(
                grid(&file, &file.parameters).unwrap_err().to_string(),
                message
            );
        }
        let random = file("method: random\nparameters:\n  a: {value: 1}\n");
        let error = draw(&random, &random.parameters, &Wish::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a.yaml, line 1: nobody says how many runs there are"
        );
    }

    #[test]
    fn names_and_logs_are_the_sweeps_business() {
        let own = |pairs: &[(&str, &str)]| {
            let pairs: Vec<(String, String)> = pairs
                .iter()
                .map(|&(a, b)| (a.to_owned(), b.to_owned()))
                .collect();
            command_line("s-1", &pairs).join(" ")
        };
        assert_eq!(
            own(&[("log", "wandb"), ("name", "sut"), ("lr", "-1")]),
            "-name=s-1 -lr=-1"
        );
        assert_eq!(own(&[("log", "tb")]), "-name=s-1 -log=tb");
    }
}
