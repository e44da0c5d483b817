//! A SLURM job that may be stopped and queued again: the record that leads its next start to its checkpoints.
//!
//! ```text
//! jobs/slurm_<job id>_<array task>     the folder of the run's checkpoints, one line
//! ```
//! The job's script types the same command again. `SLURM_RESTART_COUNT` above 0 says that it is not the first time;
//! then the record counts as `-restore`, and `-reset` does not: what would be removed is what the job has done so far.
//!
//! Source: reference `framework/helpers/training_helper.py`; there a missing record is an error, here the job starts
//! as typed, because a job may be stopped before it could save anything.

use crate::error::HostError;
use moeut_plugin_api::PluginError;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where records are, below the folder that the program is started in.
const FOLDER: &str = "jobs";

/// The SLURM job that this process is part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    id: String,
    array_task: String,
    n_restarts: u64,
}

impl Job {
    /// The job, as SLURM's variables tell it; `lookup` reads the environment.
    pub fn find(lookup: impl Fn(&str) -> Option<String>) -> Option<Self> {
        // The names become that of a file.
        let word = |name: &str| {
            lookup(name).filter(|text| {
                !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            })
        };
        Some(Self {
            id: word("SLURM_JOB_ID")?,
            array_task: word("SLURM_ARRAY_TASK_ID").unwrap_or_else(|| "0".to_owned()),
            n_restarts: word("SLURM_RESTART_COUNT")
                .and_then(|count| count.parse().ok())
                .unwrap_or(0),
        })
    }

    fn record_path(&self) -> PathBuf {
        Path::new(FOLDER).join(format!("slurm_{}_{}", self.id, self.array_task))
    }

    /// The checkpoints of the job's earlier start, if there was one and it left a record.
    ///
    /// # Errors
    /// If the record cannot be read.
    pub fn earlier_checkpoints(&self) -> Result<Option<PathBuf>, HostError> {
        if self.n_restarts == 0 {
            return Ok(None);
        }
        let path = self.record_path();
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(PathBuf::from(text.trim()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HostError::new(
                format!("the job's record `{}` cannot be read", path.display()),
                error.to_string(),
                "check its permissions, or name the checkpoints yourself with `-restore`",
            )),
        }
    }

    /// Writes the record: the job's next start goes on from the checkpoints in this folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn record(&self, checkpoints: &Path) -> Result<(), PluginError> {
        let path = self.record_path();
        let absolute = std::path::absolute(checkpoints).unwrap_or_else(|_| checkpoints.to_owned());
        std::fs::create_dir_all(FOLDER)
            .and_then(|()| std::fs::write(&path, format!("{}\n", absolute.display())))
            .map_err(|error| {
                PluginError::new(format!("the job's record `{}` is not written", path.display()))
                    .why(error.to_string())
                    .fix("if the job is queued again, type `-restore` with the folder of its checkpoints")
            })
    }

    /// Asks SLURM to queue the job again.
    ///
    /// # Errors
    /// If `scontrol` is missing or refuses.
    pub fn requeue(&self) -> Result<(), PluginError> {
        let failed = |why: String| {
            PluginError::new(format!("the job {} is not queued again", self.id))
                .why(why)
                .fix("the run is saved; submit the job once more")
        };
        let output = Command::new("scontrol")
            .args(["requeue", &self.id])
            .output()
            .map_err(|error| failed(format!("`scontrol` does not start: {error}")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(failed(format!("`scontrol requeue` says: {}", said.trim())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(variables: &[(&str, &str)]) -> Option<Job> {
        Job::find(|wanted| {
            let found = variables.iter().find(|(name, _)| *name == wanted);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_names_the_job() {
        assert_eq!(job(&[]), None);
        assert_eq!(job(&[("SLURM_JOB_ID", "../x")]), None);
        let plain = job(&[("SLURM_JOB_ID", "17")]).unwrap();
        assert_eq!(plain.record_path(), Path::new("jobs/slurm_17_0"));
        let task = job(&[("SLURM_JOB_ID", "17"), ("SLURM_ARRAY_TASK_ID", "3")]).unwrap();
        assert_eq!(task.record_path(), Path::new("jobs/slurm_17_3"));
    }

    #[test]
    fn a_first_start_has_nothing_to_go_on_from() {
        let first = job(&[("SLURM_JOB_ID", "none_such")]).unwrap();
        assert_eq!(first.earlier_checkpoints().unwrap(), None);
        let again = job(&[("SLURM_JOB_ID", "none_such"), ("SLURM_RESTART_COUNT", "1")]).unwrap();
        assert_eq!(again.n_restarts, 1);
        assert_eq!(again.earlier_checkpoints().unwrap(), None, "no record");
    }
}
