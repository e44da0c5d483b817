//! The outcome of a parse: every argument's text, value and origin.

use super::error::ArgsError;
use super::table::typed;
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

/// All arguments that mean something in a run; the others leave nothing but a warning.
///
/// An argument that nobody gave is here with its default if its owners agree about one. Whoever needs the value that
/// holds for one component asks [`Arguments::config_for`].
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

    /// The configuration of the component that has these arguments, nested by the dots of its field names. What nobody
    /// gave has the component's own default.
    ///
    /// # Errors
    /// If a value is none of the component's choices, or a default does not parse.
    pub fn config_for(&self, defs: &[ArgDef]) -> Result<Value, ArgsError> {
        let mut values = BTreeMap::new();
        for def in defs.iter().filter(|def| def.retired.is_empty()) {
            values.insert(def.name.clone(), self.value_for(def)?);
        }
        // Every live argument has a value now, so that no default is left to go wrong.
        Ok(configuration(defs, &values).unwrap_or_default())
    }

    /// The value that holds for one owner of an argument.
    ///
    /// # Errors
    /// If it is none of the owner's choices, or the owner's default does not parse.
    pub fn value_for(&self, def: &ArgDef) -> Result<Value, ArgsError> {
        let (raw, from) = self.applies(def);
        typed(def, raw, &from)
    }

    /// The text that holds for one owner of an argument, and its origin: what was given, or the owner's own default.
    pub(super) fn applies<'a>(&'a self, def: &'a ArgDef) -> (&'a str, Source) {
        match self.raw.get(&def.name) {
            Some((raw, from)) if *from != Source::Default => (raw, from.clone()),
            _ => (&def.default, Source::Default),
        }
    }

    /// The text and origin of a flag; empty and default if there is no such flag.
    pub(super) fn raw_and_source(&self, name: &str) -> (&str, Source) {
        self.raw
            .get(name)
            .map_or(("", Source::Default), |(raw, source)| (raw, source.clone()))
    }
}
