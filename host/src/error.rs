//! How the program tells a user what went wrong: what, why, fix; and with which exit code.

use crate::args::ArgsError;
use crate::checkpoint::CheckpointError;
use crate::train::TrainError;
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};
use moeut_plugin_api::PluginError;
use textwrap::{WordSeparator, WordSplitter};

/// Exit code of every error that a user can cause.
pub const EXIT_USER_ERROR: u8 = 2;

/// An error on its way to the terminal.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct HostError {
    what: String,
    #[source]
    why: Option<Why>,
    fix: String,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Why(String);

impl HostError {
    /// An error in its three parts; empty ones are left out.
    pub fn new(what: impl Into<String>, why: impl Into<String>, fix: impl Into<String>) -> Self {
        let why = why.into();
        Self {
            what: what.into(),
            why: (!why.is_empty()).then_some(Why(why)),
            fix: fix.into(),
        }
    }

    /// With the place of the failure in front.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        let what = format!("{place}{}", self.what);
        Self { what, ..self }
    }

    /// The text for the terminal, in color only if asked for.
    pub fn render(&self, in_color: bool) -> String {
        let theme = if in_color {
            GraphicalTheme::unicode()
        } else {
            GraphicalTheme::unicode_nocolor()
        };
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_width(100)
            // Names of files and commands are copied from here: lines break at spaces only.
            .with_word_separator(WordSeparator::AsciiSpace)
            .with_word_splitter(WordSplitter::NoHyphenation)
            .with_break_words(false)
            .with_links(false);
        let mut text = String::from("Error: ");
        if handler.render_report(&mut text, self).is_err() {
            text.push_str(&self.what);
        }
        text
    }
}

impl Diagnostic for HostError {
    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        (!self.fix.is_empty()).then(|| Box::new(&self.fix) as _)
    }
}

impl From<&HostError> for PluginError {
    fn from(error: &HostError) -> Self {
        let why = error.why.as_ref().map_or("", |Why(why)| why);
        Self::new(&error.what).why(why).fix(&error.fix)
    }
}

impl From<PluginError> for HostError {
    fn from(error: PluginError) -> Self {
        Self::new(error.what, error.why, error.fix)
    }
}

impl From<ArgsError> for HostError {
    fn from(error: ArgsError) -> Self {
        Self::new(error.what(), error.why(), error.fix())
    }
}

impl From<ArgsError> for PluginError {
    fn from(error: ArgsError) -> Self {
        Self::new(error.what()).why(error.why()).fix(error.fix())
    }
}

impl From<CheckpointError> for HostError {
    fn from(error: CheckpointError) -> Self {
        PluginError::from(error).into()
    }
}

impl From<TrainError> for HostError {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Component(error) => error.into(),
            TrainError::Checkpoint(error) => error.into(),
            TrainError::NonFinite(report) => PluginError::from(*report).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_three_parts() {
        let error = HostError::new("unknown task `x`", "found `y`", "did you mean `y`?");
        assert_eq!(
            error.render(false),
            "Error:   × unknown task `x`\n  ╰─▶ found `y`\n  help: did you mean `y`?\n"
        );
        assert_eq!(HostError::new("a", "", "").render(false), "Error:   × a\n");
    }
}
