//! YAML with the line of everything, and scalars as typed: `0.00025` stays that text on its way to a command line.
//!
//! Anchors, aliases and tags are refused: no sweep needs them, and an alias is how a small file becomes a huge one.

use super::Mistake;
use saphyr_parser::{Event, Parser, ScalarStyle};

/// Deeper files are refused; a sweep has at most as many levels as argument names have dots.
const MAX_DEPTH: usize = 32;

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Counted from 1.
    pub line: usize,
    /// The value.
    pub data: Data,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// Text.
    Scalar(Scalar),
    /// Values in order.
    List(Vec<Node>),
    /// Values by name, in the file's order; names are different.
    Map(Vec<(Key, Node)>),
}

/// Text as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scalar {
    /// Without quotes.
    pub text: String,
    /// Whether it had none; then `null` and `true` are no texts.
    pub is_plain: bool,
}

/// A name in a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Counted from 1.
    pub line: usize,
    /// The name.
    pub text: String,
}

impl Node {
    /// The value below a name; nothing if this is no map or has no such name.
    pub fn get(&self, name: &str) -> Option<&Node> {
        let Data::Map(entries) = &self.data else {
            return None;
        };
        let found = entries.iter().find(|(key, _)| key.text == name);
        found.map(|(_, node)| node)
    }
}

/// Reads a file of one document.
///
/// # Errors
/// For text that is no YAML, for names that come twice, and for what the module leaves out.
pub fn parse(text: &str) -> Result<Node, Mistake> {
    let mut open: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| {
            let why = error.info().to_owned();
            Mistake::new(
                error.marker().line(),
                "this is no YAML",
                why,
                "correct the line; YAML is indented by spaces",
            )
        })?;
        let line = span.start.line();
        let node = match event {
            Event::Alias(_) => return Err(left_out(line, "an alias (`*name`)")),
            Event::Scalar(_, _, _, Some(_))
            | Event::SequenceStart(_, Some(_))
            | Event::MappingStart(_, Some(_)) => {
                return Err(left_out(line, "a tag (`!name`)"));
            }
            Event::Scalar(text, style, ..) => {
                let text = text.into_owned();
                let is_plain = style == ScalarStyle::Plain;
                match open.last_mut() {
                    Some(Open {
                        key: key @ None,
                        data: Data::Map(entries),
                        ..
                    }) => {
                        if entries.iter().any(|(key, _)| key.text == text) {
                            return Err(Mistake::new(
                                line,
                                format!("`{text}` is here twice"),
                                "only one of them can count",
                                "delete one of the two",
                            ));
                        }
                        *key = Some(Key { line, text });
                        continue;
                    }
                    _ => Node {
                        line,
                        data: Data::Scalar(Scalar { text, is_plain }),
                    },
                }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                let container = begin(&open, line, matches!(event, Event::MappingStart(..)))?;
                open.push(container);
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open { line, data, .. }) => Node { line, data },
                None => continue,
            },
            Event::DocumentStart(_) if root.is_some() => {
                return Err(left_out(line, "a second document (`---`)"));
            }
            Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::StreamStart
            | Event::StreamEnd
            | Event::Nothing => {
                continue;
            }
        };
        match open.last_mut() {
            Some(parent) => parent.add(node),
            None => root = Some(node),
        }
    }
    root.ok_or_else(|| {
        Mistake::new(
            1,
            "the file is empty",
            "",
            "see `sweeps/small` for examples",
        )
    })
}

/// A map or list that begins here.
fn begin(open: &[Open], line: usize, is_map: bool) -> Result<Open, Mistake> {
    let parent = open.last();
    if parent.is_some_and(|parent| parent.key.is_none() && matches!(parent.data, Data::Map(_))) {
        return Err(left_out(line, "a name that is no text"));
    }
    if open.len() == MAX_DEPTH {
        let why = format!("there are more than {MAX_DEPTH} levels");
        let fix = "write names with dots instead";
        return Err(Mistake::new(
            line,
            "the file is nested too deeply",
            why,
            fix,
        ));
    }
    let data = if is_map {
        Data::Map(Vec::new())
    } else {
        Data::List(Vec::new())
    };
    Ok(Open {
        line,
        key: None,
        data,
    })
}

/// A list or map whose end has not come yet.
struct Open {
    line: usize,
    /// A name that waits for its value.
    key: Option<Key>,
    data: Data,
}

impl Open {
    fn add(&mut self, node: Node) {
        match (&mut self.data, self.key.take()) {
            (Data::Map(entries), Some(key)) => entries.push((key, node)),
            (Data::List(items), _) => items.push(node),
            // A scalar is never open, and a map takes its name first.
            (Data::Map(_) | Data::Scalar(_), _) => {}
        }
    }
}

fn left_out(line: usize, what: &str) -> Mistake {
    Mistake::new(
        line,
        format!("{what} is not read"),
        "sweep files are read without it",
        "write the value out",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_spelling_are_kept() {
        let root = parse(
            "method: grid\nparameters:\n  lr: {value: 1e-3}\n  s: {values: ['1', \"a\\nb\", x]}\n",
        )
        .unwrap();
        let lr = root
            .get("parameters")
            .and_then(|node| node.get("lr"))
            .unwrap();
        assert_eq!(lr.line, 3);
        let value = lr.get("value").unwrap();
        assert_eq!(
            value.data,
            Data::Scalar(Scalar {
                text: "1e-3".into(),
                is_plain: true
            })
        );
        let values = root
            .get("parameters")
            .and_then(|node| node.get("s")?.get("values"))
            .unwrap();
        let Data::List(values) = &values.data else {
            panic!("{values:?}")
        };
        let texts: Vec<(&str, bool)> = values
            .iter()
            .map(|node| match &node.data {
                Data::Scalar(Scalar { text, is_plain }) => (text.as_str(), *is_plain),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(texts, [("1", false), ("a\nb", false), ("x", true)]);
    }

    #[test]
    fn mistakes_have_their_lines() {
        let deep = "[".repeat(MAX_DEPTH + 1);
        for (text, line, what) in [
            ("a: 1\nb: [1, 2\n", 3, "this is no YAML"),
            ("a: 1\n\tb: 2\n", 1, "this is no YAML"),
            ("a: 1\nb: 2\na: 3\n", 3, "`a` is here twice"),
            ("a: &x 1\nb: *x\n", 2, "an alias (`*name`) is not read"),
            ("a: !!str 1\n", 1, "a tag (`!name`) is not read"),
            (
                "a: 1\n---\nb: 1\n",
                2,
                "a second document (`---`) is not read",
            ),
            ("? [1]\n: 2\n", 1, "a name that is no text is not read"),
            (&deep, 1, "the file is nested too deeply"),
            ("", 1, "the file is empty"),
            ("# only this\n", 1, "the file is empty"),
        ] {
            let mistake = parse(text).unwrap_err();
            assert_eq!(
                (mistake.line, mistake.what.as_str()),
                (line, what),
                "{text}: {mistake:?}"
            );
        }
    }
}
