//! What the engine says when something goes wrong, as people read it.

/// A call of the engine that did not work, in the engine's words: one line, without its C++ stack and source files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    message: String,
}

/// Where libtorch starts to append its C++ stack.
const STACKS: [&str; 2] = ["\nException raised from", "\nC++ CapturedTraceback"];

impl Error {
    pub(crate) fn new(text: &str) -> Self {
        let end = STACKS.iter().filter_map(|stack| text.find(stack)).min();
        let text = without_source_file(&text[..end.unwrap_or(text.len())]);
        Self {
            message: text.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    }

    /// Whether somebody did not answer in time, as against one that is known to be gone.
    pub fn is_timeout(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        ["timed out", "timeout"]
            .iter()
            .any(|word| message.contains(word))
    }
}

/// Gloo starts its errors with the place in its code: `[/path/pair.cc:547] `.
fn without_source_file(text: &str) -> &str {
    match text
        .strip_prefix("[/")
        .and_then(|rest| rest.split_once("] "))
    {
        Some((_, message)) => message,
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_the_engine_are_cut() {
        let error = Error::new("[/pytorch/gloo/pair.cc:547] Connection closed\nby peer");
        assert_eq!(error.to_string(), "Connection closed by peer");
        let error = Error::new("wait timeout after 300ms\nException raised from doWait at x.cpp:1");
        assert_eq!(error.to_string(), "wait timeout after 300ms");
        assert_eq!(Error::new("[rank 1] gone").to_string(), "[rank 1] gone");
    }

    #[test]
    fn waiting_in_vain_is_told_from_a_peer_that_is_gone() {
        assert!(Error::new("Timed out waiting 1000ms for recv operation to complete").is_timeout());
        assert!(Error::new("wait timeout after 300ms, keys: /go").is_timeout());
        assert!(!Error::new("Connection closed by peer [127.0.0.1]:4711").is_timeout());
    }
}
