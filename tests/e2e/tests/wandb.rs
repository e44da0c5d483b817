//! Weights & Biases: its own programs read, upload and start our runs, and whatever happens to it leaves training alone.
//!
//! A stand-in of its server is on this machine (`fixtures/wandb/server.py`); nothing goes anywhere else.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use moeut_e2e::{
    Outcome, Running, Sandbox, checkpoint_files, losses, python, steps_seen, tiny, wait_until,
};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A machine with W&B installed, and a server of its own.
struct Lab {
    sandbox: Sandbox,
    /// Folder of the programs of the Python tools.
    bin: PathBuf,
    server: Child,
}

impl Lab {
    /// `sweep` is what the server hands out to agents.
    fn new(sweep: &Value) -> Option<Self> {
        let python = python()?;
        let sandbox = Sandbox::new();
        let folder = sandbox.work().join("server");
        fs::create_dir(&folder).unwrap();
        let list = folder.join("sweep.json");
        fs::write(&list, sweep.to_string()).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/wandb/server.py");
        let server = Command::new(&python)
            .args([&script, &folder, &list])
            .spawn()
            .unwrap();
        wait_until("the server", || folder.join("port").exists());
        Some(Self {
            sandbox,
            bin: python.parent().unwrap().to_owned(),
            server,
        })
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        let port = fs::read_to_string(self.sandbox.work().join("server/port")).unwrap();
        let host = self.sandbox.program();
        let folders = [&self.bin, host.parent().unwrap()].map(|path| path.display().to_string());
        vec![
            ("WANDB_BASE_URL", format!("http://127.0.0.1:{port}")),
            ("WANDB_API_KEY", "k".repeat(40)),
            ("WANDB_ERROR_REPORTING", "false".to_owned()),
            ("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "0.2".to_owned()),
            ("PATH", format!("{}:/usr/bin:/bin", folders.join(":"))),
        ]
    }

    /// Starts the host, with `more` variables.
    fn start(&self, args: &[&str], more: &[(&str, &str)]) -> Running<'_> {
        let variables = self.variables();
        let given = variables
            .iter()
            .map(|(name, value)| (*name, value.as_str()));
        let all: Vec<(&str, &str)> = given.chain(more.iter().copied()).collect();
        self.sandbox.start(args, &all)
    }

    fn run(&self, name: &str, more_args: &[&str], more: &[(&str, &str)]) -> Outcome {
        let args = tiny(name, &[&["-log", "wandb"], more_args].concat());
        self.start(&args.as_strs(), more).wait()
    }

    /// A program of W&B.
    fn wandb(&self, args: &[&str]) -> Command {
        let mut command = self.sandbox.foreign(&self.bin.join("wandb"));
        command.args(args).envs(self.variables());
        command
    }

    /// What a program of W&B says.
    fn wandb_says(&self, args: &[&str]) -> String {
        let output = self.wandb(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{args:?}\n{stdout}{stderr}");
        stdout + &stderr
    }

    /// The records of a run's file as W&B's own reader shows them: kind and content.
    fn records(&self, folder: &Path) -> Vec<(String, Value)> {
        let text = self.wandb_says(&["leet", "inspect", "--json", folder.to_str().unwrap()]);
        let records = text.lines().map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let kind = record["type"].as_str().unwrap().to_owned();
            (kind.clone(), record[&kind].clone())
        });
        records.collect()
    }

    /// What the server knows.
    fn state(&self) -> Value {
        let text = fs::read_to_string(self.sandbox.work().join("server/state.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// What the server knows about a run.
    fn uploaded(&self, run: &str) -> Value {
        self.state()["runs"][run].clone()
    }

    /// The first artifact of a run.
    fn artifact(&self, run: &str) -> Value {
        let state = self.state();
        let mut artifacts = state["artifacts"].as_object().unwrap().values();
        let found = artifacts.find(|artifact| artifact["runName"] == run);
        found
            .unwrap_or_else(|| panic!("no artifact in {state}"))
            .clone()
    }

    /// The folders of W&B below a run's folder, oldest first.
    fn folders(&self, name: &str) -> Vec<PathBuf> {
        folders_in(&self.sandbox.run_folder(name).join("wandb"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().contains("offline-run-"))
        .collect();
    paths.sort();
    paths
}

fn of_kind<'a>(records: &'a [(String, Value)], kind: &str) -> Vec<&'a Value> {
    let found = records.iter().filter(|(found, _)| found == kind);
    found.map(|(_, record)| record).collect()
}

/// Step and training loss of rows that have one.
fn losses_of<'a>(rows: impl IntoIterator<Item = &'a Value>) -> Vec<(u64, f64)> {
    rows.into_iter()
        .filter_map(|row| Some((row["iteration"].as_u64()?, row["train/loss"].as_f64()?)))
        .collect()
}

fn logged(folder: &Path) -> Vec<(u64, f64)> {
    losses(folder).into_iter().collect()
}

fn rows(run: &Value) -> &Vec<Value> {
    run["history"].as_array().unwrap()
}

#[test]
fn an_offline_run_is_read_and_uploaded_by_wandbs_own_programs() {
    let Some(lab) = Lab::new(&json!([])) else {
        return;
    };
    let more = [
        "-stop_after",
        "6",
        "-test_interval",
        "3",
        "-n_samples",
        "1",
        "-sample_length",
        "4",
        "-prompt",
        "fn <T>",
        "-grad_clip",
        "none",
        "-wandb_project",
        "ours",
    ];
    let offline = [
        ("WANDB_MODE", "offline"),
        ("WANDB_TAGS", "a, b"),
        ("WANDB_NOTES", "mine"),
    ];
    let outcome = lab.run("first", &more, &offline).ok();
    let [folder] = &lab.folders("first")[..] else {
        panic!("{outcome}");
    };
    let shown = folder
        .strip_prefix(lab.sandbox.work())
        .unwrap()
        .display()
        .to_string();
    assert!(
        outcome.stderr.contains(&format!("`wandb sync {shown}`")),
        "{outcome}"
    );

    let records = lab.records(folder);
    let run = of_kind(&records, "run")[0];
    assert_eq!(run["display_name"], "first");
    assert_eq!(run["project"], "ours");
    assert_eq!(run["tags"], json!(["a", "b"]));
    assert_eq!(run["notes"], "mine");
    let config = &run["config"]["update"];
    assert_eq!(config["lr"], 3e-3);
    assert_eq!(config["moe.n_experts"], 4);
    assert_eq!(config["grad_clip"], Value::Null);
    assert_eq!(config["task"], "moeut_c4");
    assert_eq!(config["experiment_name"], "first");
    assert_eq!(config["is_sweep"], false);

    let history: Vec<&Value> = of_kind(&records, "history")
        .iter()
        .map(|row| &row["item"])
        .collect();
    let run_folder = lab.sandbox.run_folder("first");
    assert_eq!(losses_of(history.iter().copied()), logged(&run_folder));
    let steps = history.iter().map(|row| row["_step"].as_u64().unwrap());
    assert!(steps.eq(0..history.len() as u64), "rows are counted");
    let text = history
        .iter()
        .find_map(|row| row.get("examples/0.path").or(row["examples/0"].get("path")));
    let text =
        fs::read_to_string(folder.join("files").join(text.unwrap().as_str().unwrap())).unwrap();
    assert!(text.contains("&lt;T&gt;"), "{text}");
    assert_eq!(
        of_kind(&records, "exit")[0]["exit_code"]
            .as_u64()
            .unwrap_or(0),
        0
    );

    lab.wandb_says(&["sync", folder.to_str().unwrap()]);
    let id = run["run_id"].as_str().unwrap();
    let uploaded = lab.uploaded(id);
    assert_eq!(losses_of(rows(&uploaded)), logged(&run_folder));
    assert_eq!(uploaded["exitcode"], 0);
    assert_eq!(uploaded["config"]["lr"]["value"], 3e-3);
    let last = logged(&run_folder).pop().unwrap();
    assert_eq!(uploaded["summary"]["train/loss"], last.1);
    let files = uploaded["files"].as_object().unwrap();
    assert!(
        files
            .keys()
            .any(|file| file.starts_with("media/html/examples/0_")),
        "{files:?}"
    );
    check_table(&lab, id);
}

/// W&B's pages take the table of texts from its artifact.
fn check_table(lab: &Lab, run: &str) {
    let artifact = lab.artifact(run);
    assert_eq!(artifact["state"], "COMMITTED");
    assert_eq!(artifact["artifactTypeName"], "run_table");
    let table = artifact["files"]["examples/all.table.json"]
        .as_str()
        .unwrap();
    let table: Value = serde_json::from_str(table).unwrap();
    assert_eq!(table["columns"], json!(["prompt", "text"]));
    assert_eq!(table["data"][0][0], "fn <T>");
    let uploaded = lab.uploaded(run);
    let named = uploaded["summary"]["examples/all"]["artifact_path"]
        .as_str()
        .unwrap();
    assert!(
        named.contains(artifact["clientID"].as_str().unwrap()),
        "{named}"
    );
}

#[test]
fn an_online_run_is_uploaded_while_it_trains_and_goes_on_as_the_same_run() {
    let Some(lab) = Lab::new(&json!([])) else {
        return;
    };
    let args = tiny(
        "a",
        &[
            "-log",
            "all",
            "-stop_after",
            "1000000",
            "-save_interval",
            "none",
            // Charts of hundreds of steps a second are more than the stand-in takes in the time that a stopped run has.
            "-details_log_interval",
            "none",
        ],
    );
    let mut running = lab.start(&args.as_strs(), &[]);
    let folder = lab.sandbox.run_folder("a");
    let mut id = String::new();
    wait_until("an upload", || {
        let folders = lab.folders("a");
        let name = folders.first().map(|path| path.display().to_string());
        id = name
            .and_then(|name| Some(name.rsplit_once('-')?.1.to_owned()))
            .unwrap_or_default();
        running.has_ended()
            || lab.uploaded(&id)["history"]
                .as_array()
                .is_some_and(|rows| rows.len() > 2)
    });
    running.signal("TERM");
    let outcome = running.wait().ok();
    assert!(
        outcome.stderr.contains(&format!("/runs/{id}")),
        "the address of the run\n{outcome}"
    );
    let uploaded = lab.uploaded(&id);
    assert_eq!(losses_of(rows(&uploaded)), logged(&folder), "{outcome}");
    assert_eq!(uploaded["exitcode"], 128 + 15, "{outcome}");
    assert_eq!(uploaded["preempting"], true);
    assert!(folder.join("tensorboard").is_dir());

    let n_before = rows(&uploaded).len();
    let stopped_at = steps_seen(&folder);
    let until = (stopped_at + 5).to_string();
    let args = tiny("a", &["-log", "wandb", "-stop_after", &until]);
    let outcome = lab.start(&args.as_strs(), &[]).wait().ok();
    let uploaded = lab.uploaded(&id);
    assert_eq!(losses_of(rows(&uploaded)), logged(&folder), "{outcome}");
    let counted = rows(&uploaded)
        .iter()
        .map(|row| row["_step"].as_u64().unwrap());
    assert!(
        counted.eq(0..rows(&uploaded).len() as u64),
        "no row is counted twice"
    );
    assert!(rows(&uploaded).len() > n_before);
    assert_eq!(uploaded["exitcode"], 0);
    assert_eq!(lab.folders("a").len(), 2);
}

/// The process id of the service that a run has started, from the list of processes.
fn service_of(sandbox: &Sandbox) -> Option<String> {
    let lock = fs::read_to_string(sandbox.run_folder("a").join("lock")).ok()?;
    let host = lock.split_whitespace().nth(1)?.to_owned();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|id| id.chars().all(|c| c.is_ascii_digit()))
        .find(|id| {
            let read =
                |file: &str| fs::read_to_string(format!("/proc/{id}/{file}")).unwrap_or_default();
            let parent = read("stat");
            let parent = parent
                .rsplit(')')
                .next()
                .and_then(|rest| rest.split_whitespace().nth(1));
            parent == Some(&host) && read("cmdline").contains("wandb-core")
        })
}

#[test]
fn a_service_that_is_killed_leaves_training_and_the_file_alone() {
    let Some(lab) = Lab::new(&json!([])) else {
        return;
    };
    let args = tiny(
        "a",
        &[
            "-log",
            "wandb",
            "-stop_after",
            "1000000",
            "-save_interval",
            "none",
        ],
    );
    let mut running = lab.start(&args.as_strs(), &[("WANDB_RUN_ID", "r1")]);
    let folder = lab.sandbox.run_folder("a");
    wait_until("an upload", || {
        running.has_ended()
            || lab.uploaded("r1")["history"]
                .as_array()
                .is_some_and(|rows| !rows.is_empty())
    });
    let service = service_of(&lab.sandbox).expect("a service runs");
    let status = Command::new("sh")
        .args(["-c", &format!("kill -KILL {service}")])
        .status();
    assert!(status.unwrap().success());
    wait_until("the message", || {
        running.has_ended() || running.stderr().contains("upload it with `wandb sync ")
    });
    let seen = steps_seen(&folder);
    wait_until("more steps", || {
        running.has_ended() || steps_seen(&folder) > seen + 3
    });
    running.signal("TERM");
    let outcome = running.wait().ok();

    let [of_run] = &lab.folders("a")[..] else {
        panic!("{outcome}");
    };
    let records = lab.records(of_run);
    let history: Vec<&Value> = of_kind(&records, "history")
        .iter()
        .map(|row| &row["item"])
        .collect();
    assert_eq!(losses_of(history), logged(&folder));
    assert_eq!(of_kind(&records, "exit").len(), 1);
    lab.wandb_says(&["sync", of_run.to_str().unwrap()]);
    // W&B's sync sends all rows; those that were there have the same numbers as before.
    let uploaded = lab.uploaded("r1");
    let mut sent = losses_of(rows(&uploaded));
    sent.sort_by(|a, b| a.partial_cmp(b).unwrap());
    sent.dedup();
    assert_eq!(sent, logged(&folder));
}

#[test]
fn without_wandb_or_a_key_a_run_is_recorded_and_says_what_to_type() {
    let Some(lab) = Lab::new(&json!([])) else {
        return;
    };
    for (name, missing, advice) in [
        (
            "a",
            ("PATH", "/nowhere"),
            "type `pip install wandb==0.31.0`",
        ),
        ("b", ("WANDB_API_KEY", ""), "type `wandb login`"),
    ] {
        let outcome = lab.run(name, &["-stop_after", "3"], &[missing]).ok();
        assert!(outcome.stderr.contains(advice), "{outcome}");
        let [folder] = &lab.folders(name)[..] else {
            panic!("{outcome}");
        };
        let records = lab.records(folder);
        assert_eq!(
            of_kind(&records, "history").len(),
            rows_logged(&lab.sandbox.run_folder(name))
        );
    }
    let outcome = lab
        .run("c", &["-stop_after", "2"], &[("WANDB_MODE", "disabled")])
        .ok();
    assert!(
        lab.folders("c").is_empty() && !outcome.stderr.contains("W&B"),
        "{outcome}"
    );
}

fn rows_logged(folder: &Path) -> usize {
    fs::read_to_string(folder.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .count()
}

#[test]
fn wandb_takes_our_sweep_files() {
    let Some(lab) = Lab::new(&json!([])) else {
        return;
    };
    let sweeps = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sweeps");
    for (number, name) in ["c4_moeut_1b_switchead.yaml", "small/ablation_k.yaml"]
        .iter()
        .enumerate()
    {
        let file = sweeps.join(name);
        let said = lab.wandb_says(&["sweep", "-e", "ent", "-p", "lm", file.to_str().unwrap()]);
        assert!(said.contains("wandb agent ent/lm/swp"), "{said}");
        let taken = lab.state()["sweeps"][number].clone();
        let taken = taken.as_str().unwrap();
        assert!(taken.contains("program: moeut-host\n"), "{taken}");
    }
}

/// Every argument of a tiny run as an agent passes it, with Python's words for some.
fn agent_args(more: &[(&str, Value)]) -> Value {
    let args = tiny("-", &[]);
    let mut all = json!({});
    for pair in args.as_strs().chunks(2) {
        let flag = pair[0].trim_start_matches('-');
        if flag != "name" {
            all[flag] = pair[1].into();
        }
    }
    let python = [
        ("log", json!("wandb")),
        ("amp", json!(false)),
        ("grad_clip", Value::Null),
        ("stop_after", json!(5)),
    ];
    for (flag, value) in python.iter().chain(more) {
        all[*flag] = value.clone();
    }
    all
}

#[test]
fn an_agent_of_wandb_runs_a_sweep_and_stops_a_run_which_saves() {
    let endless = [
        ("stop_after", json!(1_000_000)),
        ("save_interval", Value::Null),
        ("name", json!("long")),
    ];
    let sweep = json!([
        {"args": agent_args(&[("lr", json!(1e-3))])},
        {"args": agent_args(&[("lr", json!(2e-3)), ("moe.n_experts", json!(8))])},
        {"args": agent_args(&[("lr", json!(3e-3)), ("name", json!("same"))])},
        {"args": agent_args(&[("lr", json!(4e-3)), ("name", json!("same")), ("deterministic", json!(true))])},
        {"args": agent_args(&endless), "stops": true},
    ]);
    let Some(lab) = Lab::new(&sweep) else {
        return;
    };
    let mut agent = lab.wandb(&["agent", "ent/lm/swp"]);
    let output = agent.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    for (number, (name, lr)) in (1..).zip([
        ("agent-1", 1e-3),
        ("agent-2", 2e-3),
        ("same-agent-3", 3e-3),
        ("same-agent-4", 4e-3),
    ]) {
        let uploaded = lab.uploaded(&format!("agent-{number}"));
        let folder = lab.sandbox.run_folder(name);
        assert_eq!(losses_of(rows(&uploaded)), logged(&folder), "{said}");
        assert_eq!(losses_of(rows(&uploaded)).len(), 5, "{said}");
        assert_eq!(uploaded["config"]["lr"]["value"], lr);
        assert_eq!(uploaded["config"]["is_sweep"]["value"], true);
        assert_eq!(uploaded["sweep"], "swp");
        assert_eq!(uploaded["exitcode"], 0);
        assert_eq!(
            folders_in(&lab.sandbox.work().join("wandb")).len(),
            5,
            "WANDB_DIR is the agent's"
        );
    }
    let folder = lab.sandbox.run_folder("long-agent-5");
    let step = steps_seen(&folder);
    checkpoint_files(&folder, step);
    let uploaded = lab.uploaded("agent-5");
    assert_eq!(losses_of(rows(&uploaded)), logged(&folder), "{said}");
    assert_eq!(uploaded["exitcode"], 128 + 15, "it was not killed");
    assert_eq!(
        uploaded["preempting"],
        Value::Null,
        "who stops it does not want it back"
    );
}

/// Mounts a small file system, which a test that decides must be able to.
fn mount(at: &Path) -> bool {
    fs::create_dir_all(at).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=48k", "none"])
        .arg(at)
        .output();
    let is_mounted = mounted.is_ok_and(|output| output.status.success());
    let is_ci = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(
        is_mounted || !is_ci,
        "no file system can be mounted at {}",
        at.display()
    );
    is_mounted
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_of_the_logs_does_not_stop_training() {
    let sandbox = Sandbox::new();
    let logs = sandbox.work().join("logs");
    if !mount(&logs) {
        return;
    }
    let _mounted = Mounted(logs.clone());
    let folder = sandbox.run_folder("a");
    fs::create_dir_all(&folder).unwrap();
    for name in ["metrics.jsonl", "tensorboard"] {
        std::os::unix::fs::symlink(logs.join(name), folder.join(name)).unwrap();
    }
    fs::create_dir(logs.join("tensorboard")).unwrap();
    let variables = [
        ("WANDB_MODE", "offline"),
        ("WANDB_DIR", logs.to_str().unwrap()),
    ];
    let args = tiny("a", &["-log", "all", "-stop_after", "200"]);
    let outcome = sandbox.start(&args.as_strs(), &variables).wait().ok();
    for log in ["jsonl", "tensorboard", "wandb"] {
        assert!(
            outcome.stderr.contains(&format!("log `{log}` failed")),
            "{log}\n{outcome}"
        );
        assert!(
            outcome
                .stderr
                .contains(&format!("log `{log}` lost its last ")),
            "{log}\n{outcome}"
        );
    }
    assert!(
        outcome.stderr.contains("No space left on device"),
        "{outcome}"
    );
    checkpoint_files(&folder, 200);
}

/// A pipe that is full already, or whose reader is gone.
#[test]
fn a_reader_of_stderr_that_stops_does_not_stop_training() {
    const CAPACITY: usize = 64 * 1024;
    let sandbox = Sandbox::new();
    for (name, is_gone) in [("full", false), ("gone", true)] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&vec![b'x'; CAPACITY]).unwrap();
        let mut host = sandbox.foreign(&sandbox.program());
        let args = tiny(name, &["-stop_after", "20", "-test_interval", "1"]);
        host.args(args.as_strs())
            .stdout(Stdio::null())
            .stderr(writer);
        let mut child = host.spawn().unwrap();
        drop(host);
        if is_gone {
            drop(reader);
        }
        let mut status = None;
        wait_until("the end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success(), "{name}");
        checkpoint_files(&sandbox.run_folder(name), 20);
    }
}
