//! `moeut-host report`: one HTML page about runs, to be looked at side by side and to be passed on.
//!
//! ```text
//! metrics.jsonl     →  metrics, curve   →  curves, final and best values
//! args.json         →  settings         →  what differs between the runs, with defaults
//! startup_log.txt   →  run              →  environment
//! plots/<name>.json →  moeut_plot       →  heat maps and other charts
//! ```
//! The page needs no network and no other file. A run that is broken, empty or still going on is shown as far as it
//! goes, and the page says what is missing.

mod curve;
mod find;
mod metrics;
mod page;
mod run;
mod settings;

use crate::cli::{open_registry, print};
use crate::error::HostError;
use crate::log::{Level, Terminal};
use crate::whole_file::{self, folder_of};
use crate::words::{Grammar, Words};
use find::{Place, find};
use run::Run;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

const USAGE: &str = "\
usage: moeut-host report <run folder> … [-out <file>]

Writes one HTML page about runs: curves, final and best values, charts, differences in the configuration, environment.
A folder is that of a run, `save/<name>`, that of a sweep, `save/<sweep>.sweep`, or any with runs below it. The page is
`report.html` unless -out says otherwise; it needs no network. Runs may still be going on.
";

const GRAMMAR: Grammar = Grammar {
    everywhere: &["plugin_dir", "plugin_verify"],
    with_value: &["out", "o"],
    switches: &[],
    misuse,
};

/// Runs a command line without its first word.
///
/// # Errors
/// If a folder has no runs, or the page cannot be written.
pub fn command(argv: &[String], terminal: &Arc<Terminal>) -> Result<(), HostError> {
    let words = Words::of(argv, GRAMMAR)?;
    if words.has("help") {
        print(USAGE);
        return Ok(());
    }
    if words.places.is_empty() {
        return Err(misuse("no folder is named".to_owned()));
    }
    let out = words
        .value("out")
        .or(words.value("o"))
        .unwrap_or("report.html");
    let out = Path::new(out);
    check_target(out)?;
    let (places, mut remarks) = find(&words.places)?;

    let read = |place: &Place| {
        let label = format!("reading `{}`", place.name);
        Run::read(place, |done, all| terminal.work(&label, done, all))
    };
    let mut runs: Vec<Run> = places.iter().map(read).collect();
    let registry = Arc::new(open_registry(argv)?);
    let mut values = Vec::new();
    for run in &mut runs {
        let (of_run, remark) = settings::values(run, &registry, terminal);
        values.push(of_run);
        run.remarks.extend(remark);
    }
    for run in &runs {
        let of_run = run.remarks.iter();
        remarks.extend(of_run.map(|remark| format!("`{}`: {remark}", run.name)));
    }
    let page = page::render(&runs, &values, &remarks);
    write(out, &page.html)?;
    terminal.finish();
    for remark in &remarks {
        terminal.message(Level::Info, &format!("note: {remark}"));
    }
    print(&format!(
        "wrote `{}`: {} runs, {} metrics, {} charts, {:.1} MB\n",
        out.display(),
        runs.len(),
        page.n_metrics,
        page.n_charts,
        page.html.len() as f64 / 1e6
    ));
    Ok(())
}

fn misuse(why: String) -> HostError {
    HostError::new(
        "the report command cannot be read",
        why,
        "type `moeut-host report save/<name>`, or `moeut-host report --help`",
    )
}

/// Refuses a file that is no report, before anything is read.
fn check_target(out: &Path) -> Result<(), HostError> {
    let refuse = |why: String| {
        let what = format!("the report cannot be written to `{}`", out.display());
        Err(HostError::new(what, why, "set `-out` to another file"))
    };
    if out.is_dir() {
        return refuse("it is a folder".to_owned());
    }
    let folder = folder_of(out);
    if !folder.is_dir() {
        return refuse(format!("`{}` is no folder", folder.display()));
    }
    let Ok(file) = std::fs::File::open(out) else {
        return Ok(());
    };
    let mut beginning = Vec::new();
    let read = file.take(1000).read_to_end(&mut beginning);
    let is_report = String::from_utf8_lossy(&beginning).contains(page::MARK);
    if read.is_ok() && (is_report || beginning.is_empty()) {
        return Ok(());
    }
    refuse("it exists, and is no report: it would be lost".to_owned())
}

fn write(out: &Path, html: &str) -> Result<(), HostError> {
    whole_file::write(out, html.as_bytes()).map_err(|error| {
        HostError::new(
            format!("the report cannot be written to `{}`", out.display()),
            error.to_string(),
            "check permissions and free space, or set `-out` to another file",
        )
    })
}
