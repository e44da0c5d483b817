//! The TensorBoard server: it answers on this machine only, and nothing of it is left when the run is over, however the
//! run ends. With the real TensorBoard of `cargo xtask tools`.
#![expect(
    clippy::unwrap_used,
    reason = "what tests share panics where a test would"
)]

use moeut_e2e::{Outcome, Running, Sandbox, python, steps_seen, tiny, wait_until};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;

/// A run that stays until it is told to end.
fn start<'a>(sandbox: &'a Sandbox, programs: &Path, more: &[&str]) -> Running<'a> {
    let args = ["-stop_after", "2", "-keep_alive", "1", "-tb_server", "1"];
    let args = tiny("a", &[&args, more].concat());
    let path = format!("{}:/usr/bin:/bin", programs.display());
    sandbox.start(&args.as_strs(), &[("PATH", &path)])
}

/// The port in the message that says where the server is.
fn port(running: &mut Running) -> u16 {
    let mut found = None;
    wait_until("the server's address", || {
        assert!(!running.has_ended(), "{}", running.stderr());
        found = address(&running.stderr());
        found.is_some()
    });
    found.unwrap()
}

fn address(stderr: &str) -> Option<u16> {
    let line = stderr
        .lines()
        .find_map(|line| line.strip_prefix("TensorBoard: http://"))?;
    line.split_once(':')?.1.trim_end_matches('/').parse().ok()
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn is_open(ip: Ipv4Addr, port: u16) -> bool {
    TcpStream::connect((ip, port)).is_ok()
}

/// Waits until nobody listens and no process is left in the sandbox, TensorBoard's own children included.
fn wait_until_gone(sandbox: &Sandbox, port: u16) {
    let folder = sandbox.work().canonicalize().unwrap();
    let is_inside = |process: fs::DirEntry| {
        fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == folder)
    };
    wait_until("the server to be gone", || {
        let mut processes = fs::read_dir("/proc").unwrap().flatten();
        !is_open(Ipv4Addr::LOCALHOST, port) && !processes.any(is_inside)
    });
}

#[test]
fn the_server_lasts_as_long_as_the_run() {
    let Some(python) = python() else { return };
    let programs = python.parent().unwrap();
    let sandbox = Sandbox::new();

    // The first port is another's, or is made so.
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 7000));
    let mut running = start(&sandbox, programs, &[]);
    let first = port(&mut running);
    assert!(first > 7000);
    assert!(get(first, "/data/environment").contains("200 OK"));
    // It listens at 127.0.0.1 and at no other of this machine's addresses.
    assert!(!is_open(Ipv4Addr::new(127, 0, 0, 2), first));
    wait_until("the metrics to be served", || {
        get(first, "/data/plugin/scalars/tags").contains("train/loss")
    });
    wait_until("the run to be done", || {
        running.stderr().contains("kept alive")
    });
    running.signal("TERM");
    let Outcome { code, stderr, .. } = running.wait();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        !stderr.contains("CTRL+C"),
        "what it says is in a file: {stderr}"
    );
    let said = fs::read_to_string(sandbox.run_folder("a").join("tensorboard.log")).unwrap();
    assert!(said.contains("CTRL+C"), "{said}");
    wait_until_gone(&sandbox, first);

    // Killed, in the midst of training: the host can end nothing any more.
    let steps = ["-stop_after", "1000000", "-tb_bind_all", "1"];
    let mut running = start(&sandbox, programs, &steps);
    let second = port(&mut running);
    assert!(is_open(Ipv4Addr::new(127, 0, 0, 2), second));
    wait_until("a step", || steps_seen(&sandbox.run_folder("a")) > 2);
    running.signal("KILL");
    assert_eq!(running.wait().code, None);
    wait_until_gone(&sandbox, second);
}

#[test]
fn without_tensorboard_a_run_says_how_to_get_it_and_goes_on() {
    let sandbox = Sandbox::new();
    let args = tiny("a", &["-stop_after", "1", "-tb_server", "1"]);
    let outcome = sandbox.run(&args.as_strs()).ok();
    let advice = "TensorBoard is not installed: `pip install tensorboard`, then `tensorboard --logdir save/a/tensorboard`";
    assert!(outcome.stderr.contains(advice), "{outcome}");
    // Nobody sits in front of a terminal: nothing is started, nothing is said.
    let args = tiny("b", &["-stop_after", "1"]);
    let outcome = sandbox.run(&args.as_strs()).ok();
    assert!(!outcome.stderr.contains("TensorBoard"), "{outcome}");
}

#[test]
fn a_child_whose_parent_is_gone_starts_nothing() {
    let sandbox = Sandbox::bare();
    let outcome = sandbox
        .run(&["__with-parent", "1", "/bin/echo", "hello"])
        .ok();
    assert_eq!(outcome.stdout, "");
}
