//! `plots/<name>.json`: the newest of each chart, for the report and for scripts.
//!
//! ```text
//! {"name":"validation/expert_coocurence","step":2000,"plot":{"kind":"heatmap",…}}
//! ```
//! A name with slashes is a file in a folder. JSON has no NaN and no infinity: both are `null`.

use std::fs;
use std::path::PathBuf;

use moeut_plot::Plot;
use serde::{Deserialize, Serialize};

use super::{Record, Sink, SinkError, path_of};
use crate::whole_file;

/// Writes charts into a folder.
#[derive(Debug)]
pub struct PlotFiles {
    dir: PathBuf,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlotFile<T = Plot> {
    /// The chart's name.
    pub name: String,
    /// Optimizer steps done.
    pub step: u64,
    /// The chart.
    pub plot: T,
}

impl PlotFiles {
    /// Charts go to `dir`, which is made with the first one.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Written beside and renamed, so that a reader finds a whole chart whenever it looks.
    fn replace(&self, file: &PlotFile<&Plot>) -> Result<(), SinkError> {
        let path = self.dir.join(format!("{}.json", path_of(&file.name)));
        let dir = path.parent().unwrap_or(&self.dir);
        let write = || {
            fs::create_dir_all(dir)?;
            whole_file::write(&path, &serde_json::to_vec(file)?)
        };
        write().map_err(SinkError::io("write", &path))
    }
}

impl Sink for PlotFiles {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's signature")]
    fn name(&self) -> &str {
        "plots"
    }

    fn write(&mut self, record: &Record) -> Result<(), SinkError> {
        let step = record.step;
        record.plots.iter().try_for_each(|(name, plot)| {
            let name = name.clone();
            self.replace(&PlotFile { name, step, plot })
        })
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moeut_plot::{Axis, Series, XyChart};

    fn chart(y: &[f64]) -> Plot {
        Plot::Xy(XyChart {
            x: Axis::default(),
            y: Axis::default(),
            series: vec![Series {
                y: y.to_vec(),
                ..Series::default()
            }],
        })
    }

    #[test]
    fn the_newest_chart_of_a_name_is_there_with_its_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = PlotFiles::new(dir.path().join("plots"));
        for (step, y) in [(10, [1.0, 2.0]), (20, [3.0, f64::NAN])] {
            let plots = vec![
                ("a/b".to_owned(), chart(&y)),
                ("../c".to_owned(), chart(&y)),
            ];
            let record = Record {
                step,
                plots,
                ..Record::default()
            };
            sink.write(&record).unwrap();
        }
        let text = fs::read_to_string(dir.path().join("plots/a/b.json")).unwrap();
        let file: PlotFile = serde_json::from_str(&text).unwrap();
        assert_eq!((file.name.as_str(), file.step), ("a/b", 20));
        let Plot::Xy(found) = file.plot else {
            panic!("{text}");
        };
        let y: Vec<String> = found.series[0].y.iter().map(f64::to_string).collect();
        assert_eq!(y, ["3", "NaN"]);
        assert!(dir.path().join("plots/_/c.json").is_file());
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing outside"
        );
    }
}
