//! The one error type of `xtask`: what went wrong, why, and what to type; or a child's exit code, passed on.
//!
//! Not a copy of the host's error types: `xtask` must build before anything else does.

use std::{fmt, io, path::Path, process::ExitStatus};

/// Why a command stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something that the user can act on.
    Explained {
        /// What could not be done, in the user's words.
        what: String,
        /// The cause, with the actual values.
        why: String,
        /// Something to type.
        fix: String,
    },
    /// A child process ended with this exit code and has said why itself.
    Child(u8),
}

impl Failure {
    pub(crate) fn new(
        what: impl Into<String>,
        why: impl fmt::Display,
        fix: impl Into<String>,
    ) -> Self {
        Self::Explained {
            what: what.into(),
            why: why.to_string(),
            fix: fix.into(),
        }
    }

    /// An operation on `path` that the operating system refused.
    pub(crate) fn io(verb: &str, path: &Path, error: &io::Error) -> Self {
        let path = path.display();
        Self::new(
            format!("cannot {verb} `{path}`"),
            error,
            "check the permissions with `ls -ld` and the free space with `df -h`, then run the command again",
        )
    }

    /// A program that could not be started at all.
    pub(crate) fn start(program: &str, error: &io::Error) -> Self {
        Self::new(
            format!("cannot start `{program}`"),
            error,
            format!("check that `{program} --version` works in this shell"),
        )
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Explained { .. } => 1,
            Self::Child(code) => *code,
        }
    }
}

/// The message as it is shown; empty for a child, which has written its own.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Explained { what, why, fix } => {
                writeln!(f, "Error:   × {what}\n  ╰─▶ {why}\n  help: {fix}")
            }
            Self::Child(_) => Ok(()),
        }
    }
}

/// Success, or the child's exit code (128 + signal number if a signal ended it, as shells do).
pub(crate) fn passed(status: ExitStatus) -> Result<(), Failure> {
    use std::os::unix::process::ExitStatusExt;

    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    match u8::try_from(code) {
        Ok(0) => Ok(()),
        Ok(code) => Err(Failure::Child(code)),
        Err(_) => Err(Failure::Child(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn code_of(script: &str) -> u8 {
        let status = Command::new("sh").args(["-c", script]).status().unwrap();
        passed(status).map_or_else(|failure| failure.exit_code(), |()| 0)
    }

    #[test]
    fn exit_code_of_a_child_is_passed_on() {
        assert_eq!(code_of("exit 0"), 0);
        assert_eq!(code_of("exit 101"), 101);
        assert_eq!(code_of("kill -9 $$"), 137);
    }

    #[test]
    fn message_has_what_why_and_fix() {
        let text = Failure::new("cannot do it", "no `x`", "run `y`").to_string();
        assert_eq!(
            text,
            "Error:   × cannot do it\n  ╰─▶ no `x`\n  help: run `y`\n"
        );
    }
}
