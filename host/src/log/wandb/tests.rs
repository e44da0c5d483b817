//! What W&B reads of a run: its own reader, `wandb leet inspect`, on a file that we wrote, and ours on all the rest.

use super::*;
use moeut_plot::{
    Axis, Bars, Clustermap, Confusion, Frames, Heatmap, Histogram, Image, Matrix, Series, Table,
    XyChart,
};
use std::process::Command;

fn open(folder: &Path, earlier: Option<&WandbRun>) -> Wandb {
    let start = WandbStart {
        folder,
        name: Some("a"),
        project: None,
        drops_tables: false,
        config: &[("lr".to_owned(), 0.5.into())],
        earlier,
    };
    let settings = Settings {
        mode: Mode::Offline,
        project: "lm".to_owned(),
        ..Settings::default()
    };
    Wandb::with_settings(start, settings).unwrap()
}

/// The rows of the newest file.
fn rows(sink: &Wandb) -> Vec<u64> {
    let id = &sink.run.id;
    let file = sink.files.with_file_name(format!("run-{id}.wandb"));
    let records = datastore::records(&fs::read(file).unwrap());
    records
        .iter()
        .filter_map(|it| records::row_of(it))
        .collect()
}

fn scalar(step: u64) -> Record {
    Record {
        step,
        scalars: vec![("train/loss".to_owned(), 1.0)],
        ..Record::default()
    }
}

#[test]
fn a_run_that_goes_on_counts_its_rows_on_in_a_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = open(dir.path(), None);
    for step in [10, 20, 30] {
        first.write(&scalar(step)).unwrap();
    }
    // Killed: there is no end in the file.
    let run = first.run().clone();
    let mut second = open(dir.path(), Some(&run));
    assert_eq!(second.run(), &run);
    second.write(&scalar(20)).unwrap();
    assert_eq!(rows(&first), [0, 1, 2]);
    assert_eq!(rows(&second), [3]);
    let mut other = open(dir.path(), None);
    other.write(&scalar(1)).unwrap();
    assert_ne!(other.run().id, run.id);
    assert_eq!(rows(&other), [0]);
}

#[test]
fn what_a_metric_is_drawn_over_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = open(dir.path(), None);
    let n_before = sink.n_records;
    sink.write(&scalar(1)).unwrap();
    assert_eq!(sink.n_records - n_before, 2);
    sink.write(&scalar(2)).unwrap();
    assert_eq!(sink.n_records - n_before, 3);
}

#[test]
fn tables_are_left_out_if_asked_to_and_that_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = open(dir.path(), None);
    sink.drops_tables = true;
    for step in [1, 2] {
        let plots = vec![("t".to_owned(), Plot::Table(Table::default()))];
        let record = Record {
            plots,
            ..scalar(step)
        };
        sink.write(&record).unwrap();
    }
    assert_eq!(sink.take_notices().len(), 1);
    assert_eq!(fs::read_dir(&sink.files).unwrap().count(), 0);
}

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, expected) in [
        (0, "19700101_000000"),
        (951_868_799, "20000229_235959"),
        (1_700_000_000, "20231114_221320"),
        (4_107_542_400, "21000301_000000"),
    ] {
        assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
    }
}

#[test]
fn ids_are_drawn() {
    let (first, second) = (draw_id(), draw_id());
    assert_ne!(first, second);
    assert!(first.len() == 8 && first.chars().all(|c| c.is_ascii_alphanumeric()));
}

/// One chart of each kind, and what W&B calls it.
fn charts() -> Vec<(&'static str, Plot)> {
    let matrix = || Matrix {
        n_rows: 2,
        n_cols: 2,
        values: vec![1.0, 0.5, 0.5, 1.0],
    };
    let series = || Series {
        y: vec![1.0, f64::NAN, 3.0],
        ..Series::default()
    };
    let image = |caption: &str| Image {
        width: 2,
        height: 1,
        rgb: vec![200; 6],
        caption: caption.to_owned(),
    };
    let axis = Axis::default;
    vec![
        (
            "table-file",
            Plot::Table(Table {
                header: vec!["k".to_owned()],
                rows: vec![vec!["v".to_owned()]],
            }),
        ),
        (
            "histogram",
            Plot::Histogram(Histogram {
                edges: vec![0.0, 1.0, 2.0],
                counts: vec![3, 4],
                sum: 7.0,
                sum_squares: 9.0,
                range: (0.0, 2.0),
            }),
        ),
        ("image-file", Plot::Images(vec![image("one")])),
        (
            "images/separated",
            Plot::Images(vec![image("one"), image("two")]),
        ),
        (
            "plotly-file",
            Plot::Bars(Bars {
                series: vec![series()],
                ..Bars::default()
            }),
        ),
        (
            "plotly-file",
            Plot::Xy(XyChart {
                series: vec![series()],
                ..XyChart::default()
            }),
        ),
        (
            "plotly-file",
            Plot::Heatmap(Heatmap {
                matrix: matrix(),
                ..Heatmap::default()
            }),
        ),
        (
            "plotly-file",
            Plot::Confusion(Confusion {
                counts: matrix(),
                names: Vec::new(),
            }),
        ),
        (
            "plotly-file",
            Plot::Clustermap(Clustermap {
                matrix: matrix(),
                names: Vec::new(),
            }),
        ),
        (
            "video-file",
            Plot::Frames(Frames {
                frames: vec![
                    ("layer 0".to_owned(), matrix()),
                    ("layer 1".to_owned(), matrix()),
                ],
                x: axis(),
                y: axis(),
                range: None,
            }),
        ),
    ]
}

/// W&B's own reader, if `cargo xtask tools` has installed it; a machine that decides has it.
fn reader() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let wandb = root.join(".tools/venv/bin/wandb");
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(wandb.exists() || !is_ci, "type `cargo xtask tools`");
    wandb.exists().then_some(wandb)
}

#[test]
fn wandbs_own_reader_finds_every_kind_of_value() {
    let Some(wandb) = reader() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut sink = open(dir.path(), None);
    let charts = charts();
    let plots = charts.iter().zip(0..);
    let record = Record {
        step: 40,
        scalars: vec![
            ("a.b/c".to_owned(), 0.25),
            ("nan".to_owned(), f64::NAN),
            ("_step".to_owned(), 9.0),
        ],
        texts: vec![("text".to_owned(), "a < b".to_owned())],
        plots: plots
            .map(|((_, plot), n)| (format!("plot/{n}"), plot.clone()))
            .collect(),
    };
    sink.write(&record).unwrap();
    sink.finish(End::Stopped(Ending::Terminated)).unwrap();
    let notices = sink.take_notices();
    assert!(
        notices[0].1.contains("upload it with `wandb sync "),
        "{notices:?}"
    );

    let folder = sink.files.parent().unwrap();
    let output = Command::new(wandb)
        .args(["leet", "inspect", "--json"])
        .arg(folder)
        .env("WANDB_ERROR_REPORTING", "false")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let records: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let find = |kind: &str| {
        let found = records.iter().find(|record| record["type"] == kind);
        found.unwrap_or_else(|| panic!("no {kind} in {text}"))[kind].clone()
    };
    let row = find("history")["item"].clone();
    assert_eq!(row["a.b/c"], 0.25);
    assert_eq!(row["_step"], 0, "it is W&B's");
    assert_eq!(row["iteration"], 40);
    assert_eq!(row["text"]["_type"], "html-file");
    for (n, (kind, _)) in charts.iter().enumerate() {
        assert_eq!(&row[format!("plot/{n}")]["_type"], kind, "{n} in {row}");
    }
    assert_eq!(row["plot/1"]["values"], serde_json::json!([3, 4]));
    let artifact = find("artifact");
    let id = artifact["client_id"].as_str().unwrap();
    assert_eq!(id.len(), 128);
    assert_eq!(
        row["plot/0"]["artifact_path"],
        format!("wandb-client-artifact://{id}/plot/0.table.json")
    );
    let entry = &artifact["manifest"]["contents"][0];
    let uploaded = fs::read(entry["local_path"].as_str().unwrap()).unwrap();
    assert_eq!(entry["size"], uploaded.len().to_string());
    let files = find("files")["files"].clone();
    let files: Vec<&str> = files
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["path"].as_str().unwrap())
        .collect();
    // The text, nine charts, of which one is in the row itself and one has two files.
    assert_eq!(files.len(), 11, "{files:?}");
    for file in files {
        assert!(sink.files.join(file).is_file(), "{file}");
    }
    assert_eq!(find("exit")["exit_code"], 143);
    find("preempting");
    assert_eq!(find("summary")["update"]["a.b/c"], 0.25);
    assert_eq!(find("run")["config"]["update"]["lr"], 0.5);
}
