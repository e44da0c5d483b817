//! `moeut-host checkpoint info|convert|export`: reads their words and writes what they did. The work is in
//! [`crate::checkpoint`].

use std::fmt::Write as _;
use std::path::Path;

use crate::checkpoint::{Layout, convert, export, info};
use crate::error::HostError;
use crate::words::{Grammar, Words};

const USAGE: &str = "\
usage: moeut-host checkpoint info <checkpoint> [--tensors]      step, arguments, parameters, sizes, checksums
       moeut-host checkpoint convert <file.pth> <folder>       the reference's checkpoint, for `-restore <folder>`
       moeut-host checkpoint export <checkpoint> <folder>      model.safetensors, config.json, tokenizer for Python
                  [--layout training|clean]                    parameter names: the training code's, or MoEUTLM's
                  [--tokenizer <file>]                         instead of the one in the run's cache folder

A checkpoint is a folder `model-<step>`, a folder of those, a `.safetensors` file, or a `.pth` or `.ckpt` of the reference.
";

const GRAMMAR: Grammar = Grammar {
    everywhere: &[],
    with_value: &["layout", "tokenizer"],
    switches: &["tensors"],
    misuse,
};

/// Runs a command line without its first word, and returns what to print.
///
/// # Errors
/// For words that are no such command, and whatever the command says.
pub fn run(argv: &[String]) -> Result<String, HostError> {
    let words = Words::of(argv, GRAMMAR)?;
    if words.has("help") || words.places.is_empty() {
        return Ok(USAGE.to_owned());
    }
    match words.places[..] {
        ["info", path] => {
            words.allow(&["tensors"])?;
            Ok(info(Path::new(path), words.has("tensors"))?)
        }
        ["convert", input, folder] => {
            words.allow(&[])?;
            run_convert(Path::new(input), Path::new(folder))
        }
        ["export", checkpoint, folder] => {
            words.allow(&["layout", "tokenizer"])?;
            run_export(Path::new(checkpoint), Path::new(folder), &words)
        }
        _ => Err(misuse(format!(
            "`checkpoint {}` is no such command",
            words.places.join(" ")
        ))),
    }
}

fn run_convert(input: &Path, folder: &Path) -> Result<String, HostError> {
    let done = convert(input, folder)?;
    let mut text = format!(
        "wrote `{}`: {} tensors of the model, step {}\n",
        done.path.display(),
        done.n_tensors,
        done.step
    );
    for note in &done.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let _ = writeln!(
        text,
        "go on with `moeut-host -restore {} -name <name>`",
        folder.display()
    );
    Ok(text)
}

fn run_export(checkpoint: &Path, folder: &Path, words: &Words<'_>) -> Result<String, HostError> {
    let layout = match words.value("layout") {
        None | Some("training") => Layout::Training,
        Some("clean") => Layout::Clean,
        Some(other) => {
            return Err(HostError::new(
                format!("`--layout {other}` is unknown"),
                "layouts are `training` and `clean`",
                "type `--layout training`",
            ));
        }
    };
    let tokenizer = words.value("tokenizer").map(Path::new);
    let done = export(checkpoint, folder, layout, tokenizer)?;
    let mut text = format!("`{}` → `{}`:\n", done.from.display(), folder.display());
    for file in &done.files {
        let _ = writeln!(text, "  {file}");
    }
    for note in &done.notes {
        let _ = writeln!(text, "note: {note}");
    }
    Ok(text)
}

fn misuse(why: String) -> HostError {
    HostError::new(
        "the checkpoint command cannot be read",
        why,
        "type `moeut-host checkpoint --help`",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/e2e/fixtures/pytorch/run.pth"
    );

    fn checkpoint(line: &[&str]) -> Result<String, String> {
        let argv: Vec<String> = line.iter().map(|&word| word.to_owned()).collect();
        run(&argv).map_err(|error| error.render(false))
    }

    #[test]
    fn the_commands_are_explained_and_misuse_is_an_error() {
        assert_eq!(checkpoint(&[]).unwrap(), USAGE);
        assert_eq!(checkpoint(&["info", "--help"]).unwrap(), USAGE);
        for (line, expected) in [
            (&["info"][..], "`checkpoint info` is no such command"),
            (
                &["convert", "a"],
                "`checkpoint convert a` is no such command",
            ),
            (&["info", "a", "--fast"], "`--fast` is unknown"),
            (
                &["info", "a", "--layout", "clean"],
                "`--layout` does not belong",
            ),
            (&["export", "a", "b", "--layout"], "`--layout` has no value"),
            (
                &["export", "a", "b", "--layout=torch"],
                "layouts are `training` and `clean`",
            ),
            (&["info", "/absent"], "No such file"),
        ] {
            let error = checkpoint(line).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_checkpoint_of_the_reference_is_described() {
        let text = checkpoint(&["info", RUN, "--tensors"]).unwrap();
        let head: Vec<&str> = text.lines().skip(1).take(9).collect();
        assert_eq!(
            head,
            [
                "  kind        checkpoint of the reference",
                "  step        3",
                "  model       275 parameters, 20 tensors",
                "  other state 51 tensors",
                "  size        22933 bytes",
                "  checksums   CRC-32 of every entry agrees",
                "  arguments   40",
                "              -adam.betas 0.9,0.999",
                "              -amp 0",
            ]
        );
        let keys = text
            .lines()
            .find(|line| line.contains("unique_layers.0.pkm.keys "));
        assert!(keys.unwrap().ends_with(" F32  [3, 4, 2]"), "{text}");
        assert!(text.contains("optimizer.state.0.exp_avg "), "{text}");
    }

    #[test]
    fn a_checkpoint_of_the_reference_is_converted_described_and_exported() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name).display().to_string();
        let text = checkpoint(&["convert", RUN, &place("out")]).unwrap();
        assert!(
            text.contains("model-3`: 20 tensors of the model, step 3"),
            "{text}"
        );

        let text = checkpoint(&["info", &place("out")]).unwrap();
        assert!(
            text.contains("kind        checkpoint of moeut-host"),
            "{text}"
        );
        assert!(text.contains("275 parameters, 20 tensors"), "{text}");
        assert!(text.contains("SHA-256 of every file agrees"), "{text}");

        let tokenizer = place("tokenizer.model.model");
        std::fs::write(&tokenizer, "pieces").unwrap();
        let out = place("out");
        let clean = place("clean");
        checkpoint(&[
            "export",
            "--layout",
            "clean",
            &out,
            &clean,
            "--tokenizer",
            &tokenizer,
        ])
        .unwrap();
        let config = std::fs::read_to_string(Path::new(&clean).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["layout"], "clean");
        assert_eq!(config["step"], 3);
        assert_eq!(config["n_params"], 275);
        assert_eq!(config["model"]["ff_n_experts"], 3);
        assert_eq!(config["tokenizer"], "tokenizer.model.model");
        let copied = std::fs::read(Path::new(&clean).join("tokenizer.model.model")).unwrap();
        assert_eq!(copied, b"pieces");
        // What was exported can be loaded again.
        let text = checkpoint(&["info", &clean]).unwrap();
        assert!(text.contains("18 tensors"), "{text}");
        let back = crate::checkpoint::read_model_tensors(Path::new(&clean)).unwrap();
        assert!(
            back.iter()
                .any(|(name, _)| name == "unique_layers.0.pkm.keys")
        );

        let error = checkpoint(&["export", &out, &format!("{out}/model-3")]).unwrap_err();
        assert!(error.contains("an export would damage"), "{error}");
    }
}
