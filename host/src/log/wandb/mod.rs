//! Weights & Biases: every run is recorded in a file that W&B's own programs read, and uploaded beside it.
//!
//! ```text
//! wandb/offline-run-<date>_<time>-<id>/   below the run's folder, or below WANDB_DIR
//!     run-<id>.wandb                      all records, see `datastore` and `records`
//!     files/media/…                       what a row of history names, see `media`
//!     logs/                               of the service that uploads, see `service` and `uploader`
//! ```
//! The file comes first: it does not depend on the service, so that nothing is lost when that is missing, dies or has no
//! network. A run that goes on later keeps its id, which is in the checkpoint, and starts another file; W&B puts the files
//! of one id behind each other. Rows are counted on through all of them, as the reference's are, and have the number of the
//! step as `iteration`.

mod artifact;
mod datastore;
mod media;
mod records;
mod service;
mod settings;
mod uploader;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use moeut_plot::Plot;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{End, Level, Notice, Record, Sink, SinkError};
use crate::run_folder::machine;
use crate::signals::Ending;
use crate::startup_log::quoted;
use crate::whole_file;
use artifact::Artifact;
use datastore::DataStore;
use media::{Media, Place};
use records::{Environment, RunInfo};
use settings::{Mode, Settings, Surroundings};
use uploader::{Upload, Uploader};

/// The number that charts are drawn over.
const STEP_METRIC: &str = "iteration";

/// How often values that stand for the whole run are written.
const SUMMARY_PERIOD: Duration = Duration::from_secs(15);

/// What remains of a run's bounded end for the other things to do.
const RESERVE: Duration = Duration::from_secs(1);

/// A run in Weights & Biases, as a checkpoint remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WandbRun {
    /// Its id, unique in the project.
    pub id: String,
    /// The project.
    pub project: String,
    /// The user or team; empty for the owner of the key.
    pub entity: String,
}

/// What a run is started with.
#[derive(Debug, Clone, Copy)]
pub struct WandbStart<'a> {
    /// The run's folder.
    pub folder: &'a Path,
    /// The run's name.
    pub name: Option<&'a str>,
    /// `-wandb_project`.
    pub project: Option<&'a str>,
    /// Whether tables are left out.
    pub drops_tables: bool,
    /// Arguments and what else describes the run.
    pub config: &'a [(String, Value)],
    /// The run that this start goes on with.
    pub earlier: Option<&'a WandbRun>,
}

/// Records a run, and has it uploaded.
#[derive(Debug)]
pub struct Wandb {
    store: DataStore,
    /// The folder `files`.
    files: PathBuf,
    run: WandbRun,
    start: Instant,
    n_records: u64,
    /// Number of the next row of history.
    row: u64,
    /// Metrics that are in the file with what they are drawn over.
    defined: BTreeSet<String>,
    /// The last value of each, as JSON, since the summary was written.
    summary: BTreeMap<String, String>,
    summarized: Instant,
    drops_tables: bool,
    is_silent: bool,
    is_sweep: bool,
    notices: Vec<Notice>,
    uploader: Option<Uploader>,
    by_hand: String,
}

/// The `-name` that the variables of W&B give to a run that was given `name` or none: `wandb agent` passes none, or the same
/// to all runs. `restores`: a checkpoint gives the name, if nothing else does. Nothing if there is nothing to change.
pub fn run_name(name: Option<&str>, restores: bool) -> Option<String> {
    settings::run_name(&SURROUNDINGS, name, restores)
}

const SURROUNDINGS: Surroundings<'static> = Surroundings {
    variable: &|name| std::env::var(name).ok(),
    read: &|path| fs::read_to_string(path).ok(),
};

impl Wandb {
    /// Starts a file, and its upload; nothing if `WANDB_MODE=disabled` says that there is no run.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn open(start: WandbStart<'_>) -> Result<Option<Self>, SinkError> {
        let settings = Settings::new(&SURROUNDINGS, start.project, start.name);
        if settings.mode == Mode::Disabled {
            return Ok(None);
        }
        Self::with_settings(start, settings).map(Some)
    }

    fn with_settings(start: WandbStart<'_>, mut settings: Settings) -> Result<Self, SinkError> {
        let earlier = start.earlier;
        if settings.run_id.is_empty() {
            settings.run_id = earlier.map_or_else(draw_id, |run| run.id.clone());
        }
        let earlier = earlier.filter(|run| run.id == settings.run_id);
        if let Some(run) = earlier {
            settings.project.clone_from(&run.project);
            if settings.entity.is_empty() {
                settings.entity.clone_from(&run.entity);
            }
        }
        let run = WandbRun {
            id: settings.run_id.clone(),
            project: settings.project.clone(),
            entity: settings.entity.clone(),
        };
        let root = settings
            .dir
            .as_deref()
            .unwrap_or(start.folder)
            .join("wandb");
        let row = earlier.map_or(0, |_| next_row(&root, &run.id));
        let now = SystemTime::now();
        let dir = create_dir(&root, now, &run.id)?;
        let file = dir.join(format!("run-{}.wandb", run.id));
        let info = run_info(
            &settings,
            start.config,
            settings.resumes || earlier.is_some(),
        );
        let mut sink = Self {
            store: DataStore::create(&file)?,
            files: dir.join("files"),
            run,
            start: Instant::now(),
            n_records: 0,
            row,
            defined: BTreeSet::new(),
            summary: BTreeMap::new(),
            summarized: Instant::now(),
            drops_tables: start.drops_tables,
            is_silent: settings.is_silent,
            is_sweep: !settings.sweep_id.is_empty(),
            notices: Vec::new(),
            uploader: None,
            by_hand: format!("`wandb sync {}`", quoted(&dir.to_string_lossy())),
        };
        fs::create_dir_all(&sink.files).map_err(SinkError::io("create", &sink.files))?;
        sink.append(&[
            records::header(),
            records::run(&info, now),
            records::environment(&this_process(), now),
        ])?;
        if settings.mode == Mode::Online {
            sink.upload(file, &dir, settings);
        }
        Ok(sink)
    }

    fn upload(&mut self, file: PathBuf, dir: &Path, settings: Settings) {
        if settings.api_key.is_empty() {
            let text = format!(
                "W&B: there is no key for `{}`, so the run is recorded and not uploaded; type `wandb login` before the \
                 next run, and upload this one with {}",
                settings.base_url, self.by_hand
            );
            self.notices.push((Level::Warning, text));
            return;
        }
        self.uploader = Some(Uploader::start(Upload {
            // The service has a working folder of its own.
            file: std::path::absolute(&file).unwrap_or(file),
            logs: dir.join("logs"),
            settings,
            by_hand: self.by_hand.clone(),
        }));
    }

    /// The run, for the checkpoints.
    pub fn run(&self) -> &WandbRun {
        &self.run
    }

    fn append(&mut self, records: &[records::Record]) -> Result<(), SinkError> {
        let encoded: Vec<Vec<u8>> = (self.n_records + 1..)
            .zip(records)
            .map(|(number, record)| record.encode(number))
            .collect();
        self.store.append(&encoded)?;
        self.n_records += records.len() as u64;
        Ok(())
    }

    /// Texts and charts of a record, by name, and tables once more.
    fn media(&mut self, record: &Record) -> (Vec<(String, Media)>, Vec<Artifact>) {
        let row = self.row;
        let texts = record.texts.iter();
        let mut all: Vec<(String, Media)> = texts
            .map(|(name, text)| (name.clone(), media::text(Place { name, row }, text)))
            .collect();
        let mut artifacts = Vec::new();
        for (name, plot) in &record.plots {
            if self.drops_tables && matches!(plot, Plot::Table(_)) {
                let text = "W&B: tables are left out, as `-wandb_bug_workaround 1` says";
                if self.defined.insert(text.to_owned()) {
                    self.notices.push((Level::Warning, text.to_owned()));
                }
                continue;
            }
            let mut media = media::plot(Place { name, row }, plot);
            if let (Plot::Table(_), [(path, bytes)]) = (plot, &media.files[..]) {
                let artifact = Artifact::new(&self.run.id, name, (path, bytes), draw_long_id);
                for (key, value) in artifact.references() {
                    media.json[key] = value;
                }
                artifacts.push(artifact);
            }
            all.push((name.clone(), media));
        }
        (all, artifacts)
    }

    /// Has a table uploaded once more, as an artifact. The service has a working folder of its own.
    fn artifact_record(&self, artifact: &Artifact) -> records::Record {
        let place = self.files.join(&artifact.path);
        let place = std::path::absolute(&place).unwrap_or(place);
        records::artifact(artifact, &self.run, &place.to_string_lossy())
    }

    /// Written beside and renamed, so that no upload sees half a file.
    fn write_file(&self, path: &str, bytes: &[u8]) -> Result<(), SinkError> {
        let path = self.files.join(path);
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            whole_file::write(&path, bytes)
        };
        write().map_err(SinkError::io("write", &path))
    }

    fn summary_record(&self) -> records::Record {
        records::summary(&self.summary)
    }
}

impl Sink for Wandb {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "wandb"
    }

    fn write(&mut self, record: &Record) -> Result<(), SinkError> {
        let (media, artifacts) = self.media(record);
        for (path, bytes) in media.iter().flat_map(|(_, media)| &media.files) {
            self.write_file(path, bytes)?;
        }
        let mut names = BTreeSet::new();
        let mut values = Vec::new();
        // The first of a name wins, so that no metric can replace what W&B itself reads.
        let mut add = |name: &str, json: String| {
            if names.insert(name.to_owned()) {
                values.push((name.to_owned(), json));
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        add("_step", self.row.to_string());
        add("_runtime", number(self.start.elapsed().as_secs_f64()));
        add("_timestamp", number(now.unwrap_or_default().as_secs_f64()));
        add(STEP_METRIC, record.step.to_string());
        for (name, value) in &record.scalars {
            add(name, number(*value));
        }
        for (name, media) in &media {
            add(name, media.json.to_string());
        }

        let scalars = record.scalars.iter().map(|(name, _)| name);
        let fresh: Vec<&String> = scalars
            .filter(|name| !self.defined.contains(*name))
            .collect();
        let mut written: Vec<records::Record> = fresh
            .iter()
            .map(|name| records::metric(name, STEP_METRIC))
            .collect();
        let files: Vec<&String> = media
            .iter()
            .flat_map(|(_, media)| media.files.iter().map(|(path, _)| path))
            .collect();
        written.extend(
            artifacts
                .iter()
                .map(|artifact| self.artifact_record(artifact)),
        );
        if !files.is_empty() {
            written.push(records::files(files));
        }
        written.push(records::history(self.row, &values));
        self.append(&written)?;

        self.row += 1;
        self.defined.extend(fresh.into_iter().cloned());
        self.summary.extend(values);
        if self.summarized.elapsed() >= SUMMARY_PERIOD {
            // What fails here is written with the next one.
            self.append(&[self.summary_record()])?;
            self.summary.clear();
            self.summarized = Instant::now();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.store.sync()
    }

    fn finish(&mut self, end: End) -> Result<(), SinkError> {
        let seconds = self.start.elapsed().as_secs();
        let own = serde_json::json!({"runtime": seconds}).to_string();
        self.summary.insert("_wandb".to_owned(), own);
        let mut last = vec![self.summary_record()];
        let code = match end {
            End::Finished => 0,
            End::Failed => 1,
            End::Stopped(ending) => {
                // Ctrl-C is a user's decision, and so is what an agent passes on; whoever sends other signals means to start
                // the run again.
                if ending != Ending::Interrupted && !self.is_sweep {
                    last.push(records::preempting());
                }
                128 + ending.number()
            }
        };
        last.push(records::exit(code, seconds));
        self.append(&last)?;
        self.flush()?;
        if let Some(uploader) = &self.uploader {
            uploader.finish(end.patience().saturating_sub(RESERVE));
        } else {
            let text = format!("W&B run `{}`: upload it with {}", self.run.id, self.by_hand);
            self.notices.push((Level::Info, text));
        }
        Ok(())
    }

    fn take_notices(&mut self) -> Vec<Notice> {
        let mut notices = std::mem::take(&mut self.notices);
        notices.extend(self.uploader.iter().flat_map(Uploader::take_notices));
        notices.retain(|(level, _)| !self.is_silent || *level != Level::Info);
        notices
    }
}

/// JSON as W&B's programs write and read it, which has words for what is not finite.
fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => Value::from(value).to_string(),
    }
}

/// Eight letters and digits, as W&B's own ids.
fn draw_id() -> String {
    const DIGITS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // Its keys are random in each process.
    let mut random = RandomState::new().build_hasher().finish();
    let mut digit = || {
        let digit = random % 36;
        random /= 36;
        char::from(DIGITS[usize::try_from(digit).unwrap_or_default()])
    };
    (0..8).map(|_| digit()).collect()
}

/// An id that no server gives out.
fn draw_long_id() -> String {
    (0..16).map(|_| draw_id()).collect()
}

/// One more than the last row of the run's earlier files that are still there.
fn next_row(root: &Path, id: &str) -> u64 {
    let suffix = format!("-{id}");
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().ends_with(&suffix))
        .filter_map(|entry| fs::read(entry.path().join(format!("run-{id}.wandb"))).ok())
        .flat_map(|file| datastore::records(&file))
        .filter_map(|record| records::row_of(&record))
        .max()
        .map_or(0, |row| row + 1)
}

/// A folder that is new; one of the same second is passed by.
fn create_dir(root: &Path, now: SystemTime, id: &str) -> Result<PathBuf, SinkError> {
    fs::create_dir_all(root).map_err(SinkError::io("create", root))?;
    let mut time = now;
    loop {
        let dir = root.join(format!("offline-run-{}-{id}", date(time)));
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                time += Duration::from_secs(1);
            }
            Err(error) => return Err(SinkError::io("create", &dir)(error)),
        }
    }
}

/// `20261126_001002`, in UTC. Days to date after H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn date(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March here, so that a leap day is the last of its year; eras are of 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}")
}

fn run_info(settings: &Settings, config: &[(String, Value)], is_resumed: bool) -> RunInfo {
    let is_sweep = !settings.sweep_id.is_empty();
    let more = [
        ("is_sweep".to_owned(), is_sweep.into()),
        ("_wandb".to_owned(), serde_json::json!({})),
    ];
    RunInfo {
        id: settings.run_id.clone(),
        entity: settings.entity.clone(),
        project: settings.project.clone(),
        display_name: settings.display_name.clone(),
        group: settings.group.clone(),
        job_type: settings.job_type.clone(),
        notes: settings.notes.clone(),
        tags: settings.tags.clone(),
        sweep_id: settings.sweep_id.clone(),
        host: machine(),
        commit: option_env!("MOEUT_GIT_HASH").unwrap_or_default().to_owned(),
        config: config.iter().cloned().chain(more).collect(),
        is_resumed,
    }
}

fn this_process() -> Environment {
    let text = |path: std::io::Result<PathBuf>| path.unwrap_or_default().display().to_string();
    Environment {
        args: std::env::args().skip(1).collect(),
        program: text(std::env::current_exe()),
        host: machine(),
        folder: text(std::env::current_dir()),
        n_cpus: std::thread::available_parallelism().map_or(0, |n| n.get() as u64),
    }
}

#[cfg(test)]
mod tests;
