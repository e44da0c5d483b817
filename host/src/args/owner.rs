//! Who accepts an argument: the host itself or a component of a plugin.

use super::host_table::host_args;
use moeut_plugin_api::args::{ArgDef, ProfileDef};
use moeut_plugin_api::{ComponentInfo, ComponentKind};

/// Whether an owner takes part in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It does.
    Active,
    /// Only the task's plan will tell.
    Possible,
    /// It is installed, but not used: its arguments are accepted without effect, because sweeps set them.
    Idle,
}

/// A source of arguments and profiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// How help and errors call it: ``host``, ``task `moeut_c4` (moeut-task-moeut-c4 0.1.0)``.
    pub heading: String,
    /// Kind and name, if it is a component.
    pub component: Option<(ComponentKind, String)>,
    /// Whether it takes part in the run.
    pub role: Role,
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
            component: None,
            role: Role::Active,
            defs: host_args().iter().map(ArgDef::from).collect(),
            profiles: Vec::new(),
        }
    }

    /// A component; `plugin` names its plugin and version.
    pub fn component(info: &ComponentInfo, plugin: &str, role: Role) -> Self {
        Self {
            heading: format!("{} `{}` ({plugin})", info.kind, info.name),
            component: Some((info.kind, info.name.clone())),
            role,
            defs: info.args.clone(),
            profiles: info.profiles.clone(),
        }
    }
}
