//! What a run needs to be repeated: the exact command, the program, the machine, and the plugin files by checksum.
//!
//! A text for people, one block for each start; nothing reads it back.

use crate::plugins::Registry;
use crate::run_folder::machine;
use std::fmt::Write;

/// Beginnings of the variables that change what a run does.
const VARIABLES: &[&str] = &[
    "CUBLAS_",
    "CUDA_",
    "LD_LIBRARY_PATH",
    "MALLOC_",
    "MKL_",
    "MOEUT_",
    "NCCL_",
    "NVIDIA_",
    "OMP_",
    "PYTORCH_",
    "SLURM_",
    "TORCH_",
];

/// Parts of names whose values nobody should find in a log.
const SECRETS: &[&str] = &["JWT", "KEY", "PASSWORD", "SECRET", "TOKEN"];

/// One start of the program with `argv`, which is without the program's name; `libraries` are lines about the machine.
pub fn describe(argv: &[String], registry: &Registry, libraries: &str) -> String {
    let mut text = String::new();
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let folder = std::env::current_dir().unwrap_or_default();
    let _ = writeln!(
        text,
        "start        {seconds} s after 1970, {}, process {}, in {}",
        machine(),
        std::process::id(),
        folder.display()
    );
    let _ = writeln!(text, "command      {}", command_line(argv));
    let _ = writeln!(
        text,
        "moeut-host   {}, commit {}",
        env!("CARGO_PKG_VERSION"),
        known(option_env!("MOEUT_GIT_HASH").unwrap_or_default())
    );
    text.push_str(libraries);
    for (name, value) in
        variables(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    {
        let _ = writeln!(text, "variable     {name}={}", quoted(&value));
    }
    let mut files: Vec<_> = registry
        .components()
        .map(|component| &component.library.manifest)
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files.dedup_by(|a, b| a.path == b.path);
    for manifest in files {
        let _ = writeln!(
            text,
            "plugin       {} {}, commit {}, sha256 {}, {}",
            manifest.plugin.name,
            manifest.plugin.version,
            known(&manifest.plugin.git),
            manifest.sha256,
            manifest.path.display()
        );
    }
    text.push('\n');
    text
}

/// What to type in a shell to start the same again.
pub fn command_line(argv: &[String]) -> String {
    let words = argv.iter().map(|word| quoted(word));
    std::iter::once("moeut-host".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The word as a POSIX shell reads it back.
pub(crate) fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn known(commit: &str) -> &str {
    if commit.is_empty() { "unknown" } else { commit }
}

/// Those that matter, without secrets, by name.
fn variables(all: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let mut kept: Vec<_> = all
        .filter(|(name, _)| {
            VARIABLES
                .iter()
                .any(|beginning| name.starts_with(beginning))
        })
        .filter(|(name, _)| !SECRETS.iter().any(|part| name.contains(part)))
        .collect();
    kept.sort();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_command_back() {
        let argv = [
            "-name",
            "it's mine",
            "-lr=1e-3",
            "-restore",
            "",
            "-reg_scales",
            "a=1;b=2",
        ];
        assert_eq!(
            command_line(&argv.map(String::from)),
            r"moeut-host -name 'it'\''s mine' -lr=1e-3 -restore '' -reg_scales 'a=1;b=2'"
        );
    }

    #[test]
    fn secrets_and_strangers_stay_out() {
        let all = [
            ("SLURM_JWT", "x"),
            ("HOME", "y"),
            ("OMP_NUM_THREADS", "2"),
            ("CUDA_VISIBLE_DEVICES", "0"),
        ];
        let kept = variables(
            all.into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]);
    }
}
