//! An array of SLURM jobs for a sweep: one job for each run, without W&B and without a queue of our own.
//!
//! SLURM sends SIGUSR1 to the steps of a job (those that `srun` starts) before its time is over. The run then saves, has
//! its job queued again and goes on in it: [`crate::job`].

use super::runs::Sweep;
use std::fmt::Write as _;
use std::path::Path;

/// Time between SIGUSR1 and the end of a job, seconds: for the step that is being made, and the save.
const LEAD_S: u32 = 300;

/// The script to hand to `sbatch`. At most `n_jobs` run at once.
pub fn script(sweep: &Sweep, program: &Path, n_jobs: Option<usize>) -> String {
    let last = sweep.runs.len().saturating_sub(1);
    let limit = n_jobs
        .map(|n_jobs| format!("%{n_jobs}"))
        .unwrap_or_default();
    let name = &sweep.name;
    let mut text = format!(
        "#!/bin/bash\n\
         # Runs of the sweep {name}; SLURM_ARRAY_TASK_ID says which. Add what your cluster wants: partition, time, memory.\n\
         #SBATCH --job-name={}\n\
         #SBATCH --array=0-{last}{limit}\n\
         #SBATCH --requeue\n\
         #SBATCH --signal=USR1@{LEAD_S}\n\
         #SBATCH --open-mode=append\n",
        quote(name)
    );
    if sweep
        .runs
        .iter()
        .any(|run| run.value("gpu") != Some("none"))
    {
        text.push_str("#SBATCH --gpus=1\n");
    }
    text.push_str("\ncase \"$SLURM_ARRAY_TASK_ID\" in\n");
    for (index, run) in sweep.runs.iter().enumerate() {
        let arguments: Vec<String> = run
            .arguments()
            .iter()
            .map(|argument| quote(argument))
            .collect();
        let _ = writeln!(text, "{index}) set -- {} ;;", arguments.join(" "));
    }
    text.push_str("*) echo \"no run $SLURM_ARRAY_TASK_ID: submit this file with sbatch\" >&2; exit 2 ;;\nesac\n");
    let _ = writeln!(
        text,
        "srun --ntasks=1 {} \"$@\"",
        quote(&program.display().to_string())
    );
    text
}

/// A word as a shell reads it back.
pub fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for word in [
            "-lr=1e-3",
            "",
            "a b",
            "it's",
            "$x `y` \"z\"",
            "*",
            "~",
            "a;b",
            "\n",
        ] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quote(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
        assert_eq!(quote("-lr=1e-3"), "-lr=1e-3");
    }
}
