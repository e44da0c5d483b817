//! `moeut-host report`: one page about runs that needs nothing else, whatever state the runs are in.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use insta::assert_snapshot;
use moeut_e2e::{Sandbox, losses, tiny};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Two whole runs, and one that is broken in every way that a page can show.
fn runs(sandbox: &Sandbox) {
    let more = ["-stop_after", "12", "-test_interval", "6"];
    sandbox.run(&tiny("s-1", &more).as_strs()).ok();
    let other = [
        &more[..],
        &["-lr", "1e-2", "-n_samples", "1", "-sample_length", "3"],
    ]
    .concat();
    sandbox.run(&tiny("s-2", &other).as_strs()).ok();

    let broken = sandbox.run_folder("s-10");
    fs::create_dir_all(broken.join("plots/router")).unwrap();
    let rows = "{\"step\":1,\"train/loss\":5.5,\"odd </script><b>\":1,\"text\":\"</script><img src=x>\"}\n\
                {\"step\":2,\"train/loss\":null}\nnot json\n{\"step\":3,\"train/loss\":4.5}\n{\"step\":4,\"tr";
    fs::write(broken.join("metrics.jsonl"), rows).unwrap();
    let map = r#"{"name":"router/usage","step":3,"plot":{"kind":"heatmap","matrix":{"n_rows":1,"n_cols":2,"values":[0.25,0.75]},"x":{"label":"expert"},"y":{"label":"layer"}}}"#;
    fs::write(broken.join("plots/router/usage.json"), map).unwrap();
    fs::write(broken.join("plots/torn.json"), &map[..20]).unwrap();
    fs::create_dir_all(sandbox.work().join("save/s.sweep")).unwrap();
}

fn data(page: &str) -> Value {
    let (_, rest) = page
        .split_once("<script type=\"application/json\" id=\"data\">")
        .unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

/// The curve of a run: steps and values.
fn curve(data: &Value, metric: &str, run: usize) -> Option<(Vec<u64>, Vec<Option<f64>>)> {
    let metrics = data["metrics"].as_array().unwrap();
    let metric = metrics.iter().find(|all| all["name"] == metric)?;
    let curves = metric["curves"].as_array().unwrap();
    let curve = curves.iter().find(|curve| curve["r"] == run)?;
    let steps = curve["s"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step.as_u64().unwrap());
    let values = curve["v"].as_array().unwrap().iter().map(Value::as_f64);
    Some((steps.collect(), values.collect()))
}

#[test]
fn a_page_has_the_curves_the_differences_and_what_is_wrong() {
    let sandbox = Sandbox::new();
    runs(&sandbox);
    let outcome = sandbox.run(&["report", "save/s.sweep"]).ok();
    assert!(
        outcome.stdout.starts_with("wrote `report.html`: 3 runs, "),
        "{outcome}"
    );
    let page = fs::read_to_string(sandbox.work().join("report.html")).unwrap();
    let data = data(&page);
    let names: Vec<&str> = data["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["s-1", "s-2", "s-10"]);
    for run in [0, 1] {
        let logged = losses(&sandbox.run_folder(names[run]));
        let (steps, values) = curve(&data, "train/loss", run).unwrap();
        assert!(steps.iter().eq(logged.keys()));
        for (shown, logged) in values.iter().zip(logged.values()) {
            assert!(
                (shown.unwrap() - logged).abs() < 1e-5,
                "{shown:?} for {logged}"
            );
        }
    }
    let (steps, values) = curve(&data, "train/loss", 2).unwrap();
    assert_eq!(
        (steps, values),
        (vec![1, 2, 3], vec![Some(5.5), None, Some(4.5)])
    );
    assert!(curve(&data, "validation/val/loss", 0).is_some());

    let (_, table) = page.split_once("<table id=\"differences\">").unwrap();
    let table = table.split_once("</table>").unwrap().0;
    let row = |name: &str| {
        table
            .lines()
            .find(|line| line.contains(&format!("<th>-{name}</th>")))
    };
    let lr = row("lr").unwrap();
    assert!(lr.contains("<td>3e-3</td><td>1e-2</td>"), "{lr}");
    // What one run typed and the other left alone stands beside the default.
    let samples = row("sample_length").unwrap();
    assert!(
        samples.contains("<td><span class=\"quiet\">(100)</span></td><td>3</td>"),
        "{samples}"
    );
    assert!(
        row("batch_size").is_none_or(|row| row.contains("–")),
        "{table}"
    );

    for remark in [
        "1 rows of <code>metrics.jsonl</code> cannot be read",
        "the last row of <code>metrics.jsonl</code> is torn",
        "NaN or infinite: <code>train/loss</code> 1 of 3",
        "no <code>args.json</code>",
        "<code>startup_log.txt</code> cannot be read",
        "plots/torn.json</code> cannot be read",
    ] {
        assert!(page.contains(remark), "no `{remark}`");
    }
    // Nothing of a run's texts is markup, and nothing is fetched.
    assert!(!page.contains("</script><b>") && !page.contains("<img src=x>"));
    assert!(
        !page.contains("src=\"http")
            && !page.contains("url(http")
            && !page.contains("<link rel=\"stylesheet")
    );
    assert!(page.contains("alt=\"router/usage, s-10, step 3\" src=\"data:image/svg+xml;"));
    assert!(page.contains("<pre>&lt;/script&gt;&lt;img src=x&gt;</pre>"));
    assert_balanced(&page);
    look(&sandbox.work().join("report.html"));
}

/// Each tag that has an end has one, in order.
fn assert_balanced(page: &str) {
    const EMPTY: [&str; 6] = ["meta", "link", "input", "img", "br", "!DOCTYPE"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = page;
    while let Some((_, behind)) = rest.split_once('<') {
        let (tag, after) = behind.split_once('>').unwrap();
        rest = after;
        let name = tag
            .trim_start_matches('/')
            .split([' ', '\n'])
            .next()
            .unwrap();
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "before {:?}", after.get(..80));
        } else if !EMPTY.contains(&name) {
            open.push(name);
            // What is inside is text for other languages.
            if matches!(name, "script" | "style") {
                let end = rest.find(&format!("</{name}>")).unwrap();
                rest = &rest[end..];
            }
        }
    }
    assert_eq!(open, [""; 0]);
}

/// Opens the page in a browser, where there is one: the scripts run without an error and draw the curves.
fn look(page: &Path) {
    let Some(browser) = browser() else {
        return;
    };
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ])
        .args([
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            "--window-size=1400,2400",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .collect();
    assert_eq!(errors, [""; 0]);
    let dom = String::from_utf8_lossy(&output.stdout);
    let n_curves = dom.matches("<path class=\"curve\"").count();
    assert!(n_curves > 10, "{n_curves} curves; {said}");
    assert!(
        dom.contains("train/loss: s-1 ends at "),
        "no description of a curve"
    );
}

fn browser() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH")?;
    let files = std::env::split_paths(&path).flat_map(|dir| names.map(|name| dir.join(name)));
    files.into_iter().find(|file| file.is_file())
}

#[test]
fn what_is_no_run_is_refused_and_no_file_is_lost() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.work().join("empty")).unwrap();
    fs::write(sandbox.work().join("notes.html"), "mine").unwrap();
    let said = |args: &[&str]| {
        let outcome = sandbox.run(&[&["report"], args].concat());
        assert_eq!(outcome.code, Some(2), "{outcome}");
        outcome.stderr
    };
    assert_snapshot!(said(&["empty"]), @r"
    Error:   × `empty` is no run
      ╰─▶ it has none of `metrics.jsonl`, `args.json`, `startup_log.txt`, and there is no run below it
      help: name the folder of a run, `save/<name>`, or one with runs below it
    ");
    assert_snapshot!(said(&["save/nothing"]), @r"
    Error:   × `save/nothing` cannot be reported on
      ╰─▶ No such file or directory (os error 2)
      help: name the folder of a run, `save/<name>`, or one with runs below it
    ");
    assert_snapshot!(said(&[]), @r"
    Error:   × the report command cannot be read
      ╰─▶ no folder is named
      help: type `moeut-host report save/<name>`, or `moeut-host report --help`
    ");
    fs::write(sandbox.work().join("empty/args.json"), "{}").unwrap();
    assert_snapshot!(said(&["empty", "-out", "notes.html"]), @r"
    Error:   × the report cannot be written to `notes.html`
      ╰─▶ it exists, and is no report: it would be lost
      help: set `-out` to another file
    ");
    assert_snapshot!(said(&["empty", "-out", "no/where.html"]), @r"
    Error:   × the report cannot be written to `no/where.html`
      ╰─▶ `no` is no folder
      help: set `-out` to another file
    ");
    assert_eq!(
        fs::read_to_string(sandbox.work().join("notes.html")).unwrap(),
        "mine"
    );
    // A run without rows is a page, and so is writing it once more.
    for _ in 0..2 {
        sandbox.run(&["report", "empty", "-out", "page.html"]).ok();
    }
    let page = fs::read_to_string(sandbox.work().join("page.html")).unwrap();
    assert!(page.contains("<code>metrics.jsonl</code> cannot be read"));
    assert_balanced(&page);
}
