//! The one error type that crosses the plugin boundary: what happened, why, and what to type.

use serde::{Deserialize, Serialize};

/// An error that a user can act on, in three parts.
///
/// - `what`: the failure in the user's words, names and values in backticks, no full stop
/// - `why`: the cause, with the actual values; empty if there is nothing to add
/// - `fix`: something to type or change; empty if nobody can know
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}{}{why}", if why.is_empty() { "" } else { ": " })]
pub struct PluginError {
    /// The failure, in the user's words.
    pub what: String,
    /// The cause, with the values that led to it.
    pub why: String,
    /// What to do about it.
    pub fix: String,
}

impl PluginError {
    /// An error that so far only says what happened.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            ..Self::default()
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn why(mut self, why: impl Into<String>) -> Self {
        self.why = why.into();
        self
    }

    /// Adds the way out.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = fix.into();
        self
    }
}
