//! A sweep file of the reference, or with nested parameters or Python's words, as one that `wandb agent` starts us with.
//!
//! `program` and `command` become ours, arguments get their full names, and values what the command line takes. Everything
//! else stays; comments do not, since a parser does not see them.

use super::Mistake;
use super::file::{SweepFile, text_of};
use super::yaml::{Data, Node, Scalar};
use std::fmt::Write as _;

/// The new file.
///
/// # Errors
/// If a value is none.
pub fn convert(file: &SweepFile) -> Result<String, Mistake> {
    let mut text =
        String::from("program: moeut-host\ncommand:\n  - ${env}\n  - ${program}\n  - ${args}\n");
    let Data::Map(entries) = &file.root.data else {
        return Ok(text);
    };
    for (key, node) in entries {
        match key.text.as_str() {
            "program" | "command" => {}
            "parameters" => {
                text.push_str("parameters:\n");
                parameters(node, "", &mut text)?;
            }
            name => write(name, node, 0, &mut text),
        }
    }
    Ok(text)
}

/// All parameters below a node, with their full names.
fn parameters(tree: &Node, prefix: &str, text: &mut String) -> Result<(), Mistake> {
    let Data::Map(entries) = &tree.data else {
        return Ok(());
    };
    for (key, node) in entries {
        let name = format!("{prefix}{}", key.text);
        if let Some(below) = node.get("parameters") {
            parameters(below, &format!("{name}."), text)?;
            continue;
        }
        let _ = writeln!(text, "  {}:", word(&name));
        let Data::Map(settings) = &node.data else {
            continue;
        };
        for (setting, value) in settings {
            match (setting.text.as_str(), &value.data) {
                ("value", _) => {
                    let _ = writeln!(text, "    value: {}", word(&text_of(value, &name)?));
                }
                ("values", Data::List(items)) => {
                    text.push_str("    values:\n");
                    for item in items {
                        let _ = writeln!(text, "      - {}", word(&text_of(item, &name)?));
                    }
                }
                ("values", _) => {
                    let _ = writeln!(
                        text,
                        "    values:\n      - {}",
                        word(&text_of(value, &name)?)
                    );
                }
                (other, _) => write(other, value, 4, text),
            }
        }
    }
    Ok(())
}

/// A named value, indented.
fn write(name: &str, node: &Node, indent: usize, text: &mut String) {
    let _ = write!(text, "{:indent$}{}:", "", word(name));
    value(node, indent, text);
}

fn value(node: &Node, indent: usize, text: &mut String) {
    let deeper = indent + 2;
    match &node.data {
        Data::Scalar(Scalar {
            text: scalar,
            is_plain,
        }) => {
            let scalar = if *is_plain {
                scalar.clone()
            } else {
                quoted(scalar)
            };
            let _ = writeln!(text, " {scalar}");
        }
        Data::List(items) if items.is_empty() => text.push_str(" []\n"),
        Data::Map(entries) if entries.is_empty() => text.push_str(" {}\n"),
        Data::List(items) => {
            text.push('\n');
            for item in items {
                let _ = write!(text, "{:deeper$}-", "");
                value(item, deeper, text);
            }
        }
        Data::Map(entries) => {
            text.push('\n');
            for (key, node) in entries {
                write(&key.text, node, deeper, text);
            }
        }
    }
}

/// Text that YAML reads back as the same text or number, in quotes only where it would not.
fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-+./".contains(c);
    let begins_well = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        || text.parse::<f64>().is_ok_and(f64::is_finite);
    let is_other = matches!(
        text.to_ascii_lowercase().as_str(),
        "true" | "false" | "yes" | "no" | "on" | "off" | "null" | "y" | "n"
    );
    if begins_well && !is_other && text.chars().all(is_plain) {
        return text.to_owned();
    }
    quoted(text)
}

/// In double quotes, whose escapes are those of JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn read(text: &str) -> SweepFile {
        SweepFile::parse(Path::new("a.yaml"), text).unwrap()
    }

    #[test]
    fn a_file_of_the_reference_becomes_ours() {
        let file = read(
            "program: main.py\ncommand:\n  - ${env}\n  - python3\n  - ${program}\n  - ${args}\nmethod: grid\n\
             metric:\n  name: validation/mean_accuracy\n  goal: maximize\nparameters:\n  log:\n    value: wandb\n  \
             amp: {value: True}\n  moe: {parameters: {layer_encoding: {value: null}}}\n  task: {values: pes2o_transformer}\n  \
             lr: {distribution: log_uniform_values, min: 1e-4, max: 0.01}\n  langs: {value: 'c++, x'}\n  m: {values: [True, 'on', -5]}\n",
        );
        insta::assert_snapshot!(convert(&file).unwrap(), @r#"
        program: moeut-host
        command:
          - ${env}
          - ${program}
          - ${args}
        method: grid
        metric:
          name: validation/mean_accuracy
          goal: maximize
        parameters:
          log:
            value: wandb
          amp:
            value: 1
          moe.layer_encoding:
            value: none
          task:
            values:
              - pes2o_transformer
          lr:
            distribution: log_uniform_values
            min: 1e-4
            max: 0.01
          langs:
            value: "c++, x"
          m:
            values:
              - 1
              - "on"
              - -5
        "#);
    }

    /// Python's words and nesting are gone, and nothing else is.
    #[test]
    fn a_converted_file_means_the_same_and_is_converted_to_itself() {
        let first = read(
            "method: random\ndescription: \"a: b # c\"\nrun_cap: 3\nearly_terminate: {type: hyperband, min_iter: [3]}\nparameters:\n  \
             b: {parameters: {x: {values: ['', 'a b', 1e-3, no], probabilities: [0.25, 0.25, 0.25, 0.25]}}}\n  a: {value: -1}\n  c: {value: 'yes'}\n",
        );
        let text = convert(&first).unwrap();
        let second = read(&text);
        assert_eq!(second.parameters.len(), 3);
        for (old, new) in first.parameters.iter().zip(&second.parameters) {
            assert_eq!((&old.name, &old.domain), (&new.name, &new.domain), "{text}");
        }
        assert_eq!(
            (second.method, second.run_cap),
            (first.method, first.run_cap)
        );
        assert_eq!(
            second.root.get("description").map(|node| &node.data),
            first.root.get("description").map(|node| &node.data)
        );
        assert_eq!(convert(&read(&text)).unwrap(), text);
    }
}
