//! The outcome of a parse: every argument's text, value and origin.

use super::error::ArgsError;
use moeut_plugin_api::args::{ArgDef, configuration};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// Where a value came from; the first of these that has one wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Typed by the user or passed by a sweep agent.
    CommandLine,
    /// Stored by an earlier start of the run, or in the checkpoint that is restored.
    Stored,
    /// The named bundle of arguments.
    Profile(String),
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine => f.write_str("command line"),
            Self::Stored => f.write_str("stored"),
            Self::Profile(name) => write!(f, "profile `{name}`"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// All live arguments of a run; retired ones leave nothing but a warning.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Arguments {
    /// Text as typed, and where it came from, by flag.
    pub raw: BTreeMap<String, (String, Source)>,
    /// Typed values, by flag; `null` for `none`.
    pub values: BTreeMap<String, Value>,
    /// What has no effect and why; one sentence each.
    pub warnings: Vec<String>,
    /// Flags that one start of a run does not leave to the next.
    pub(super) not_saved: &'static [&'static str],
}

impl Arguments {
    /// The texts to store in `args.json` and checkpoints, by flag.
    pub fn raw_map(&self) -> BTreeMap<String, String> {
        self.raw
            .iter()
            .filter(|(name, _)| !self.not_saved.contains(&name.as_str()))
            .map(|(name, (raw, _))| (name.clone(), raw.clone()))
            .collect()
    }

    /// The configuration of the component that has these arguments, nested by the dots of its field names.
    ///
    /// # Errors
    /// If `defs` were not among the owners of the parse and one of their defaults does not parse.
    pub fn config_for(&self, defs: &[ArgDef]) -> Result<Value, ArgsError> {
        configuration(defs, &self.values).map_err(|error| ArgsError::Value {
            name: defs
                .iter()
                .find(|def| def.default == error.raw)
                .map_or_else(String::new, |def| def.name.clone()),
            from: Source::Default,
            raw: error.raw,
            expected: error.expected,
        })
    }

    /// The text and origin of a flag; empty and default if there is no such flag.
    pub(super) fn raw_and_source(&self, name: &str) -> (&str, Source) {
        self.raw
            .get(name)
            .map_or(("", Source::Default), |(raw, source)| (raw, source.clone()))
    }
}
