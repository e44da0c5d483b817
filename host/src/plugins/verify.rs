//! Every check that a plugin file has to pass before it is opened, one by one, for whoever wants to know which one fails.
//!
//! [`super::inspect::inspect`] is the same for loading, where the first failure is enough. Nothing of the file runs.

use super::inspect::{
    self, Refusal, check_abi, check_libtorch, check_place, check_target, describe,
};
use super::lock::{Gate, Pass};
use super::needs::{Here, Needs};
use std::path::Path;

/// One check of one file.
#[derive(Debug)]
pub struct Check {
    /// What is checked, in a word.
    pub subject: &'static str,
    /// What was found; or why the file is refused.
    pub result: Result<String, Refusal>,
}

/// Checks a file; those checks are left out that an earlier failure leaves nothing to look at.
pub fn verify(path: &Path, gate: &Gate, here: &Here) -> Vec<Check> {
    let mut checks = Checks(Vec::new());
    let Some(contents) = checks.add("file", inspect::read(path), |contents| {
        format!(
            "{} bytes, SHA-256 {}",
            contents.bytes.len(),
            contents.sha256
        )
    }) else {
        return checks.0;
    };
    checks.add("owner", check_place(path, &contents.metadata), |()| {
        "yours or root's, and not for everybody to write".to_owned()
    });
    let Some((plugin, _)) = checks.add(
        "manifest",
        inspect::read_records(&contents.bytes),
        |(plugin, components)| {
            let components = components
                .iter()
                .map(|component| (component.kind, component.name.clone()));
            format!(
                "{} {}: {}",
                plugin.name,
                plugin.version,
                describe(components)
            )
        },
    ) else {
        return checks.0;
    };
    checks.add("abi", check_abi(&plugin), |()| plugin.abi.clone());
    checks.add("target", check_target(&plugin), |()| plugin.target.clone());
    checks.add("libtorch", check_libtorch(&plugin), |()| {
        if plugin.libtorch.is_empty() {
            "none needed".to_owned()
        } else {
            plugin.libtorch.clone()
        }
    });
    checks.add("symbols", needs(&contents.bytes, here), Clone::clone);
    let pass = gate.check(&plugin.name, &contents.sha256);
    checks.add("lock", pass, |pass| match pass {
        Pass::Locked => "named with this SHA-256".to_owned(),
        Pass::Unlocked => "not named, and need not be".to_owned(),
        Pass::Changed(warning) => format!("warning: {warning}"),
    });
    checks.0
}

fn needs(bytes: &[u8], here: &Here) -> Result<String, Refusal> {
    let malformed = |error: &dyn std::fmt::Display| Refusal::NotALibrary(error.to_string());
    let needs = Needs::read(bytes).map_err(|error| malformed(&error))?;
    let resolution = here.resolve(&needs).map_err(|error| malformed(&error))?;
    if let Some(problem) = resolution.problem(moeut_torch::LIBTORCH_VERSION) {
        return Err(Refusal::Unresolved(problem));
    }
    if resolution.elsewhere.is_empty() {
        return Ok(format!("all {} are here", needs.symbols.len()));
    }
    let libraries: Vec<String> = resolution
        .elsewhere
        .iter()
        .map(|library| format!("`{library}`"))
        .collect();
    Ok(format!(
        "{} are here; the system's loader will look for {} with the others",
        needs.symbols.len() - resolution.missing.len(),
        libraries.join(", ")
    ))
}

/// A growing list of checks.
struct Checks(Vec<Check>);

impl Checks {
    /// Adds a check and hands its value on.
    fn add<T>(
        &mut self,
        subject: &'static str,
        outcome: Result<T, Refusal>,
        say: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        let (result, value) = match outcome {
            Ok(value) => (Ok(say(&value)), Some(value)),
            Err(refusal) => (Err(refusal), None),
        };
        self.0.push(Check { subject, result });
        value
    }
}
