//! What a plugin tells about each component, and the five kinds there are.

use crate::args::{ArgDef, ArgSpec, Profile, ProfileDef};
use crate::kernel::Capabilities;
use serde::{Deserialize, Serialize};

/// What a component is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComponentKind {
    /// A training job.
    Task,
    /// A source of tokens.
    Dataset,
    /// Questions of an evaluation.
    ChoiceDataset,
    /// A language model.
    Model,
    /// A grouped matrix product.
    Kernel,
}

impl std::fmt::Display for ComponentKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Task => "task",
            Self::Dataset => "dataset",
            Self::ChoiceDataset => "eval set",
            Self::Model => "model",
            Self::Kernel => "kernel",
        })
    }
}

/// A component's description, made by its plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentInfo {
    /// What it is.
    pub kind: ComponentKind,
    /// Its name.
    pub name: String,
    /// Other names that mean it.
    pub aliases: Vec<String>,
    /// One line.
    pub summary: String,
    /// What it accepts on the command line.
    pub args: Vec<ArgDef>,
    /// Its bundles of arguments.
    pub profiles: Vec<ProfileDef>,
    /// What it can do, if it is a kernel.
    pub capabilities: Option<Capabilities>,
}

impl ComponentInfo {
    pub(crate) fn new(kind: ComponentKind, name: &str, summary: &str) -> Self {
        Self {
            kind,
            name: name.into(),
            aliases: Vec::new(),
            summary: summary.into(),
            args: Vec::new(),
            profiles: Vec::new(),
            capabilities: None,
        }
    }

    pub(crate) fn aliases(mut self, aliases: &[&str]) -> Self {
        self.aliases = aliases.iter().map(|&alias| alias.into()).collect();
        self
    }

    pub(crate) fn args(mut self, specs: &[ArgSpec]) -> Self {
        self.args = specs.iter().map(ArgDef::from).collect();
        self
    }

    pub(crate) fn profiles(mut self, profiles: &[Profile]) -> Self {
        self.profiles = profiles.iter().map(ProfileDef::from).collect();
        self
    }

    pub(crate) fn capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = Some(capabilities);
        self
    }
}
