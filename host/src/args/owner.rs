//! Who accepts an argument: the host itself or a component of a plugin.

use super::host_table::host_args;
use moeut_plugin_api::ComponentInfo;
use moeut_plugin_api::args::{ArgDef, ProfileDef};

/// A source of arguments and profiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// How help and errors call it: ``host``, ``task `moeut_c4` (moeut-task-moeut-c4 0.1.0)``.
    pub heading: String,
    /// Its arguments, in the order of the help text.
    pub defs: Vec<ArgDef>,
    /// Its bundles of arguments.
    pub profiles: Vec<ProfileDef>,
}

impl Owner {
    /// The host.
    pub fn host() -> Self {
        Self {
            heading: "host".into(),
            defs: host_args().iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        }
    }

    /// A component; `plugin` names its plugin and version.
    pub fn component(info: &ComponentInfo, plugin: &str) -> Self {
        Self {
            heading: format!("{} `{}` ({plugin})", info.kind, info.name),
            defs: info.args.clone(),
            profiles: info.profiles.clone(),
        }
    }
}
