//! Which runs a table or figure is made of.
//!
//! A JSON object from the name of a table or figure to names of runs. `runs/paper.json` has the paper's, which are the
//! names of its sweep files; `runs/small.json` those of `reproduce`. `-runs <file>` names another one.

use moeut_host::error::HostError;
use std::collections::BTreeMap;
use std::path::Path;

/// The paper's runs.
const PAPER: &str = include_str!("../runs/paper.json");
/// Those of the small reproduction.
pub(crate) const SMALL: &str = include_str!("../runs/small.json");

/// Names of runs by product.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Roster(BTreeMap<String, Vec<String>>);

impl Roster {
    /// Reads a file, or takes the paper's.
    ///
    /// # Errors
    /// If the file is not there or has another form.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, HostError> {
        let Some(path) = path else {
            return Self::parse(PAPER, "the paper's runs");
        };
        let what = format!("`{}` cannot be read", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| {
            HostError::new(
                &what,
                error.to_string(),
                "set `-runs` to a file that is there",
            )
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a text; `name` says in errors which.
    ///
    /// # Errors
    /// If it has another form.
    pub(crate) fn parse(text: &str, name: &str) -> Result<Self, HostError> {
        serde_json::from_str(text).map(Self).map_err(|error| {
            HostError::new(
                format!("{name}: this is no list of runs"),
                error.to_string(),
                "write it as `{\"group_size\": [\"run\", \"run\"]}`",
            )
        })
    }

    /// The runs of a table or figure.
    pub(crate) fn of(&self, product: &str) -> &[String] {
        self.0.get(product).map_or(&[], Vec::as_slice)
    }

    /// Names of products that are none of `known`.
    pub(crate) fn strangers(&self, known: &[&str]) -> Vec<&str> {
        let names = self.0.keys().map(String::as_str);
        names.filter(|name| !known.contains(name)).collect()
    }
}
