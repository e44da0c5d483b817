//! What can be wrong with a command line, by cause, and what to type instead.

use super::arguments::Source;

/// A mistake in the arguments; displays as *what*.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// No argument begins like this.
    #[error("unknown argument `-{name}`")]
    Unknown {
        /// As typed, without dashes.
        name: String,
        /// Similar names, best first.
        nearest: Vec<String>,
    },
    /// An abbreviation of several arguments.
    #[error("ambiguous argument `-{name}`")]
    Ambiguous {
        /// As typed, without dashes.
        name: String,
        /// What it may stand for.
        candidates: Vec<String>,
    },
    /// A flag at the end, or before another flag.
    #[error("no value for `-{name}`")]
    MissingValue {
        /// The flag's full name.
        name: String,
        /// What would have been accepted.
        expected: String,
    },
    /// Text that is not a value of its argument.
    #[error("invalid value for `-{name}`")]
    Value {
        /// The flag's full name.
        name: String,
        /// Where the text came from.
        from: Source,
        /// The text.
        raw: String,
        /// What would have been accepted.
        expected: String,
    },
    /// Text that belongs to no flag.
    #[error("unexpected text `{text}`")]
    Positional {
        /// As typed.
        text: String,
        /// The flag before it, which already has its value.
        after: Option<String>,
    },
    /// Two arguments of which only one may be given.
    #[error("`-{first}` and `-{second}` are both given")]
    Exclusive {
        /// One of them.
        first: String,
        /// The other.
        second: String,
    },
    /// No loaded component has this profile.
    #[error("unknown profile `{name}`")]
    UnknownProfile {
        /// As typed.
        name: String,
        /// Similar profiles, best first.
        nearest: Vec<String>,
        /// All profiles there are.
        known: Vec<String>,
    },
    /// A profile sets an argument that does not exist.
    #[error("profile `{profile}` sets an unknown argument `-{name}`")]
    ProfileArgument {
        /// The profile.
        profile: String,
        /// Who has the profile.
        owner: String,
        /// The argument.
        name: String,
    },
    /// The run was started with other profiles than the command line names.
    #[error("this run has another profile than `{given}`")]
    ProfileDiffers {
        /// From the command line.
        given: String,
        /// From the earlier start.
        stored: String,
    },
    /// Two components disagree about the type of one argument.
    #[error("two definitions of `-{name}`")]
    Conflict {
        /// The flag.
        name: String,
        /// Who defined it first, and what it takes.
        first: String,
        /// Who defines it differently, and how.
        second: String,
    },
    /// One argument's name is the group of another's.
    #[error("`-{leaf}` is an argument and a group of arguments")]
    LeafAndNode {
        /// The shorter name.
        leaf: String,
        /// Who has it.
        leaf_owner: String,
        /// The longer name.
        child: String,
        /// Who has that.
        child_owner: String,
    },
    /// The host's own table does not fill its own configuration: a bug that the tests of the table find.
    #[error("the host's arguments do not make a configuration")]
    HostConfig {
        /// What serde says.
        reason: String,
    },
}

impl ArgsError {
    /// The failure, in the user's words.
    pub fn what(&self) -> String {
        self.to_string()
    }

    /// The cause, with the actual values; empty if there is nothing to add.
    pub fn why(&self) -> String {
        match self {
            Self::Unknown { .. } => {
                "neither the host nor a component of this task has an argument that begins so"
                    .into()
            }
            Self::Ambiguous { candidates, .. } => format!("it may stand for {}", flags(candidates)),
            Self::MissingValue { expected, .. } => format!("it takes {expected}"),
            Self::Value {
                from,
                raw,
                expected,
                ..
            } => format!("`{raw}` is not {expected} (from: {from})"),
            Self::Positional {
                after: Some(flag), ..
            } => format!("`-{flag}` takes one value and has it already"),
            Self::Positional { after: None, .. } => {
                "arguments are pairs of a flag and a value".into()
            }
            Self::Exclusive { .. } => "each determines the other".into(),
            Self::UnknownProfile { known, .. } if known.is_empty() => {
                "no loaded component has profiles".into()
            }
            Self::UnknownProfile { known, .. } => format!("known profiles: {}", quoted(known, "")),
            Self::ProfileArgument { owner, .. } => format!("the profile is of {owner}"),
            Self::ProfileDiffers { stored, .. } => format!("it was started with `{stored}`"),
            Self::Conflict { first, second, .. } => {
                format!("{first}, {second}")
            }
            Self::LeafAndNode {
                leaf_owner,
                child,
                child_owner,
                ..
            } => {
                format!("{leaf_owner} defines it, and {child_owner} defines `-{child}`")
            }
            Self::HostConfig { reason } => reason.clone(),
        }
    }

    /// Something to type or change; empty if nobody can know.
    pub fn fix(&self) -> String {
        match self {
            Self::Unknown { nearest, .. } if nearest.is_empty() => {
                "run `moeut-host --help` with this `-task` for all arguments".into()
            }
            Self::Unknown { nearest, .. } => format!("did you mean {}?", flags(nearest)),
            Self::Ambiguous { .. } => "write more of the name".into(),
            Self::MissingValue { name, .. } => {
                format!(
                    "write `-{name} <value>`, or `-{name}=<value>` if the value begins with a dash"
                )
            }
            Self::Value {
                name,
                from: Source::CommandLine,
                expected,
                ..
            } => {
                format!("set `-{name}` to {expected}")
            }
            Self::Value { name, expected, .. } => {
                format!("give `-{name}` on the command line, with {expected}")
            }
            Self::Positional {
                text,
                after: Some(flag),
            } => {
                format!("quote a value with spaces: `-{flag} '… {text}'`; or put a flag before it")
            }
            Self::Positional { .. } => "put a flag before it, as in `-task <name>`".into(),
            Self::Exclusive { first, second } => format!("leave out `-{first}` or `-{second}`"),
            Self::UnknownProfile { nearest, .. } if nearest.is_empty() => {
                "run `moeut-host --help` with this `-task` for its profiles".into()
            }
            Self::UnknownProfile { nearest, .. } => {
                format!("did you mean {}?", quoted(nearest, ""))
            }
            Self::ProfileArgument { profile, .. } => {
                format!("leave out `{profile}`, or choose the task and model that it was made for")
            }
            Self::ProfileDiffers { .. } => {
                "leave out `-profile`, or start a new run with another `-name` or with `-reset 1`"
                    .into()
            }
            Self::Conflict { .. } | Self::LeafAndNode { .. } => {
                "use versions of the two that agree, or remove one from the plugin folder".into()
            }
            Self::HostConfig { .. } => String::new(),
        }
    }
}

/// `-a`, `-b` in backticks.
fn flags(names: &[String]) -> String {
    quoted(names, "-")
}

fn quoted(names: &[String], dash: &str) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{dash}{name}`")).collect();
    quoted.join(", ")
}
