//! What a run's folder says: arguments, starts, metrics and charts. What is missing or broken is a remark, not an error.

use super::find::Place;
use super::metrics::Metrics;
use crate::log::PlotFile;
use crate::run_folder::{machine, read_args};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// Everything that the page shows of a run.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) name: String,
    pub(super) folder: PathBuf,
    /// As typed, by flag.
    pub(super) args: BTreeMap<String, String>,
    pub(super) metrics: Metrics,
    /// The paragraphs of `startup_log.txt`, the newest last.
    pub(super) starts: Vec<String>,
    /// The newest chart of each name.
    pub(super) charts: BTreeMap<String, PlotFile>,
    /// The process that trains it now.
    pub(super) process: Option<u32>,
    /// What is missing or cannot be read.
    pub(super) remarks: Vec<String>,
}

impl Run {
    /// Reads a folder; `progress` hears how many of how many bytes of metrics are read.
    pub(super) fn read(place: &Place, progress: impl FnMut(u64, u64)) -> Self {
        let folder = &place.folder;
        let mut remarks = Vec::new();
        let metrics = read_metrics(&folder.join("metrics.jsonl"), progress, &mut remarks);
        let args = match read_args(folder) {
            Ok(Some(args)) => args,
            Ok(None) => {
                remarks.push("no `args.json`: its configuration is not known".to_owned());
                BTreeMap::new()
            }
            Err(error) => {
                remarks.push(error.to_string());
                BTreeMap::new()
            }
        };
        let starts = match fs::read(folder.join("startup_log.txt")) {
            Ok(bytes) => paragraphs(&String::from_utf8_lossy(&bytes)),
            Err(error) => {
                remarks.push(format!("`startup_log.txt` cannot be read: {error}"));
                Vec::new()
            }
        };
        let mut charts = BTreeMap::new();
        read_charts(&folder.join("plots"), &mut charts, &mut remarks);
        let process = trainer(&folder.join("lock"));
        if process.is_some() {
            remarks
                .push("it is being trained: this page shows what it had logged so far".to_owned());
        }
        Self {
            name: place.name.clone(),
            folder: folder.clone(),
            args,
            metrics,
            starts,
            charts,
            process,
            remarks,
        }
    }

    /// How far it is, in a few words.
    pub(super) fn state(&self) -> String {
        let step = match self.metrics.last_step {
            Some(step) => format!("step {step}"),
            None => "no step".to_owned(),
        };
        let end = self.args.get("stop_after");
        let end = end.filter(|end| end.parse::<u64>().is_ok());
        let of = end.map_or_else(String::new, |end| format!(" of {end}"));
        let now = self
            .process
            .map(|process| format!(", process {process} trains it"));
        format!("{step}{of}{}", now.unwrap_or_default())
    }
}

fn read_metrics(
    path: &Path,
    mut progress: impl FnMut(u64, u64),
    remarks: &mut Vec<String>,
) -> Metrics {
    let mut read = || -> std::io::Result<Metrics> {
        let file = File::open(path)?;
        let n_bytes = file.metadata()?.len();
        Metrics::read(BufReader::with_capacity(1 << 20, file), |done| {
            if n_bytes > 0 {
                progress(done.min(n_bytes), n_bytes);
            }
        })
    };
    let metrics = match read() {
        Ok(metrics) => metrics,
        Err(error) => {
            remarks.push(format!("`metrics.jsonl` cannot be read: {error}"));
            return Metrics::default();
        }
    };
    if metrics.n_rows == 0 {
        remarks.push("`metrics.jsonl` has no rows yet".to_owned());
    }
    if metrics.n_unreadable > 0 {
        let n = metrics.n_unreadable;
        remarks.push(format!(
            "{n} rows of `metrics.jsonl` cannot be read and are left out"
        ));
    }
    if metrics.is_torn {
        remarks.push("the last row of `metrics.jsonl` is torn and left out".to_owned());
    }
    let not_finite: Vec<String> = metrics
        .curves
        .iter()
        .filter(|(_, curve)| curve.n_not_finite > 0)
        .map(|(name, curve)| format!("`{name}` {} of {}", curve.n_not_finite, curve.n_rows))
        .collect();
    if let [first, rest @ ..] = not_finite.as_slice() {
        let others = match rest.len() {
            0 => String::new(),
            n => format!(", and {n} other metrics"),
        };
        remarks.push(format!("values that are NaN or infinite: {first}{others}"));
    }
    metrics
}

fn paragraphs(text: &str) -> Vec<String> {
    let paragraphs = text.split("\n\n").map(str::trim_end);
    let filled = paragraphs.filter(|paragraph| !paragraph.is_empty());
    filled.map(str::to_owned).collect()
}

/// The charts in a folder and in those below it, by the names that they have in them.
fn read_charts(folder: &Path, charts: &mut BTreeMap<String, PlotFile>, remarks: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            read_charts(&path, charts, remarks);
        } else if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            let read = || -> std::io::Result<PlotFile> {
                Ok(serde_json::from_reader(BufReader::new(File::open(&path)?))?)
            };
            match read() {
                Ok(chart) => {
                    charts.insert(chart.name.clone(), chart);
                }
                Err(error) => {
                    let path = path.display();
                    remarks.push(format!("the chart `{path}` cannot be read: {error}"));
                }
            }
        }
    }
}

/// The process of this machine that holds a run's lock. Looked up without touching the lock: a run that starts at this
/// moment must get it.
fn trainer(lock: &Path) -> Option<u32> {
    let text = fs::read_to_string(lock).ok()?;
    let (process, at) = text.trim().strip_prefix("process ")?.split_once(" on ")?;
    let process: u32 = process.parse().ok()?;
    let lock = lock.canonicalize().ok()?;
    let files = fs::read_dir(format!("/proc/{process}/fd")).ok()?;
    let holds_it = files
        .flatten()
        .any(|file| fs::read_link(file.path()).is_ok_and(|path| path == lock));
    (at == machine() && holds_it).then_some(process)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_folder::RunFolder;

    fn read(folder: &Path) -> Run {
        let place = Place {
            folder: folder.to_owned(),
            name: "a".to_owned(),
        };
        Run::read(&place, |_, _| ())
    }

    #[test]
    fn an_empty_folder_is_remarks_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let run = read(dir.path());
        assert_eq!(run.state(), "no step");
        assert_eq!(run.remarks.len(), 3, "{:?}", run.remarks);
    }

    #[test]
    fn a_run_that_is_being_trained_says_so_and_keeps_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(dir.path()).unwrap();
        let args = BTreeMap::from([("stop_after".to_owned(), "40".to_owned())]);
        folder.write_args(&args).unwrap();
        fs::write(
            dir.path().join("metrics.jsonl"),
            "{\"step\":7,\"a\":null}\n{\"st",
        )
        .unwrap();
        let run = read(dir.path());
        let id = std::process::id();
        assert_eq!(run.state(), format!("step 7 of 40, process {id} trains it"));
        let remarks = run.remarks.join("\n");
        for expected in ["is torn", "NaN or infinite: `a` 1 of 1", "being trained"] {
            assert!(remarks.contains(expected), "{remarks}");
        }
        drop(folder);
        assert_eq!(read(dir.path()).state(), "step 7 of 40");
    }

    #[test]
    fn charts_have_the_names_of_their_folders() {
        let dir = tempfile::tempdir().unwrap();
        let plots = dir.path().join("plots/layer/0");
        fs::create_dir_all(&plots).unwrap();
        let table = r#"{"name":"layer/0/usage","step":5,"plot":{"kind":"table","header":["a"],"rows":[["1"]]}}"#;
        fs::write(plots.join("usage.json"), table).unwrap();
        fs::write(dir.path().join("plots/bad.json"), "{\"step\":").unwrap();
        let run = read(dir.path());
        assert_eq!(run.charts.keys().collect::<Vec<_>>(), ["layer/0/usage"]);
        assert_eq!(run.charts["layer/0/usage"].step, 5);
        let is_remark = |remark: &String| remark.contains("plots/bad.json` cannot be read");
        assert!(run.remarks.iter().any(is_remark), "{:?}", run.remarks);
    }
}
