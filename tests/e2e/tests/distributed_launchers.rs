//! Several processes under PyTorch's own launcher, and on two hosts that a cable joins.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: what they cannot do fails the test"
)]

use moeut_e2e::{
    Args, Sandbox, checkpoint_files, losses, skip, steps_seen, tiny, torchrun, wait_until,
};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// 60 steps, a checkpoint at every seventh.
fn args(name: &str, timeout: &'static str) -> Args {
    let own = [
        "-stop_after",
        "60",
        "-save_interval",
        "7",
        "-test_interval",
        "20",
        "-distributed_timeout",
        timeout,
    ];
    tiny(name, &own)
}

/// The processes that `parent` has started, with a variable of their environment.
fn child_with(parent: u32, variable: &str) -> Option<u32> {
    let is_wanted = |process: &u32| {
        let folder = Path::new("/proc").join(process.to_string());
        let stat = fs::read_to_string(folder.join("stat")).unwrap_or_default();
        // `17 (name) S 16 …`: the parent is the second word behind the name.
        let parent_of = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(1));
        let environment = fs::read(folder.join("environ")).unwrap_or_default();
        let mut variables = environment.split(|&byte| byte == 0);
        parent_of == Some(parent.to_string().as_str())
            && variables.any(|found| found == variable.as_bytes())
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.into_iter().find(is_wanted)
}

/// torchrun starts the host as it starts a Python script; a process that dies makes it start all anew, and they go on
/// from the last checkpoint.
#[test]
fn torchrun_starts_and_restarts() {
    let Some(torchrun) = torchrun() else {
        return;
    };
    let sandbox = Sandbox::new();
    let straight = args("straight", "30");
    for outcome in sandbox.run_ranks(2, &straight.as_strs()) {
        outcome.ok();
    }

    let again = args("again", "30");
    let log = sandbox.work().join("torchrun.log");
    let mut launcher = sandbox.foreign(&torchrun);
    launcher
        .args([
            "--standalone",
            "--no-python",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
        ])
        .args(["--monitor-interval", "0.2"])
        .arg(sandbox.program())
        .args(again.as_strs())
        // It looks for programs that say what the machine is.
        .env("PATH", "/usr/bin:/bin")
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap());
    let mut launcher = launcher.spawn().unwrap();
    let folder = sandbox.run_folder("again");
    wait_until("a step to be killed in", || {
        steps_seen(&folder) >= 20 || launcher.try_wait().unwrap().is_some()
    });
    let victim = child_with(launcher.id(), "RANK=1").unwrap_or_else(|| {
        panic!(
            "no process of rank 1: {}",
            fs::read_to_string(&log).unwrap()
        )
    });
    let killed = Command::new("sh")
        .args(["-c", &format!("kill -9 {victim}")])
        .status();
    assert!(killed.unwrap().success());
    wait_until("torchrun to end", || launcher.try_wait().unwrap().is_some());
    let said = fs::read_to_string(&log).unwrap();
    assert!(launcher.wait().unwrap().success(), "{said}");
    assert!(said.contains("going on from step"), "{said}");
    assert!(steps_seen(&folder) == 60);

    let straight = sandbox.run_folder("straight");
    assert_eq!(losses(&folder), losses(&straight));
    assert!(checkpoint_files(&folder, 60) == checkpoint_files(&straight, 60));
}

/// Two network namespaces, which are hosts as far as the network goes, and a cable between them.
struct Hosts {
    names: [String; 2],
}

impl Hosts {
    const ADDRESSES: [&'static str; 2] = ["10.77.0.1", "10.77.0.2"];

    /// Nothing if this user may not make any.
    fn new() -> Option<Self> {
        let hosts = Self {
            names: ["a", "b"].map(|name| format!("moeut-{name}-{}", std::process::id())),
        };
        let [a, b] = &hosts.names;
        if !ip(&format!("netns add {a}")) {
            skip("two hosts need network namespaces: root, and `ip` of iproute2");
            return None;
        }
        assert!(ip(&format!("netns add {b}")));
        assert!(ip(&format!(
            "link add cable netns {a} type veth peer name cable netns {b}"
        )));
        for (name, address) in hosts.names.iter().zip(Self::ADDRESSES) {
            assert!(ip(&format!("-n {name} address add {address}/24 dev cable")));
            assert!(ip(&format!("-n {name} link set lo up")));
            assert!(ip(&format!("-n {name} link set cable up")));
        }
        Some(hosts)
    }

    fn cable(&self, state: &str) {
        assert!(ip(&format!("-n {} link set cable {state}", self.names[0])));
    }

    /// The program on one of the hosts, under that host's name.
    fn command(&self, sandbox: &Sandbox, host: usize, rank: usize, args: &Args) -> Command {
        let mut command = sandbox.foreign(Path::new("ip"));
        let named = format!("echo node-{host} > /proc/sys/kernel/hostname && exec \"$0\" \"$@\"");
        command
            .args([
                "netns",
                "exec",
                &self.names[host],
                "unshare",
                "--uts",
                "sh",
                "-c",
                &named,
            ])
            .arg(sandbox.program())
            .args(args.as_strs())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "4")
            .env("LOCAL_RANK", (rank % 2).to_string())
            .env("MASTER_ADDR", Self::ADDRESSES[0])
            .env("MASTER_PORT", "29500");
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&format!("netns delete {name}"));
        }
    }
}

fn ip(line: &str) -> bool {
    let status = Command::new("ip")
        .args(line.split_whitespace())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// The cable is pulled in the middle of a run: both sides end by themselves and say who is gone, and the next start goes
/// on as if nothing had happened.
#[test]
fn two_hosts_and_a_cable() {
    let Some(hosts) = Hosts::new() else {
        return;
    };
    let sandbox = Sandbox::new();
    let start = |name: &str| {
        let args = args(name, "8");
        let command = |rank: usize| hosts.command(&sandbox, rank / 2, rank, &args);
        sandbox.start_commands((0..4).map(command))
    };
    for outcome in start("straight").wait() {
        outcome.ok();
    }

    let folder = sandbox.run_folder("pulled");
    let mut ranks = start("pulled");
    wait_until("a step", || steps_seen(&folder) >= 20 || ranks.has_ended(0));
    hosts.cable("down");
    let outcomes = ranks.wait();
    for outcome in &outcomes {
        assert_eq!(outcome.code, Some(2), "{outcome}");
    }
    let words = |rank: usize| {
        let words = outcomes[rank].stderr.split_whitespace();
        words.collect::<Vec<_>>().join(" ")
    };
    assert!(
        words(0).contains("on `node-1`: has been silent for"),
        "{}",
        words(0)
    );
    assert!(
        words(2).contains("on `node-0`: cannot be reached any more"),
        "{}",
        words(2)
    );
    // One process of each host is enough.
    assert_eq!((words(1).as_str(), words(3).as_str()), ("", ""));

    hosts.cable("up");
    for outcome in start("pulled").wait() {
        outcome.ok();
    }
    let straight = sandbox.run_folder("straight");
    assert_eq!(losses(&folder), losses(&straight));
    assert!(checkpoint_files(&folder, 60) == checkpoint_files(&straight, 60));
}
