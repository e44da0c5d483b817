//! Ranks as processes, which can die. Each test starts itself once more per rank.

use std::process::{Child, Output};

use moeut_c10d::{Group, Reduction};
use tch::{Device, Kind, Tensor};

use crate::support::{PATIENCE, counting, gloo, numbers, own_rank, server, start_processes};

fn sum(group: &Group, tensor: &Tensor) -> Result<(), moeut_c10d::Error> {
    group.all_reduce(&[tensor], Reduction::Sum)?.wait()
}

/// A rank that went well said nothing: neither on stderr, nor on stdout besides what the test harness says.
fn assert_quiet_success(rank: Child) {
    let Output {
        status,
        stdout,
        stderr,
    } = rank.wait_with_output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr),
    );
    assert!(status.success(), "{status}\n{stdout}\n{stderr}");
    assert_eq!(stderr, "");
    for line in stdout.lines().filter(|line| !line.is_empty()) {
        let is_harness = line.starts_with("running 1 test") || line.starts_with("test ");
        assert!(is_harness, "{stdout}");
    }
}

#[test]
fn processes_work_together_and_leave_the_terminal_clean() {
    const RANKS: i64 = 4;
    if let Some((rank, store)) = own_rank() {
        let group = gloo(&store, rank, 4, PATIENCE);
        let tensor = counting(0, 50_000, Kind::Float) * (rank as f64 + 1.0);
        sum(&group, &tensor).unwrap();
        let expected = counting(0, 50_000, Kind::Float) * 10.0;
        assert!(tensor.equal(&expected));
        let own = Tensor::from_slice(&[i64::try_from(rank).unwrap()]);
        let all = Tensor::zeros([RANKS], (Kind::Int64, Device::Cpu));
        group.all_gather(&all, &own).unwrap().wait().unwrap();
        assert_eq!(numbers(&all), [0.0, 1.0, 2.0, 3.0]);
        group.barrier().unwrap();
        return;
    }
    let server = server();
    let name = "processes::processes_work_together_and_leave_the_terminal_clean";
    for rank in start_processes(&server, name, 4) {
        assert_quiet_success(rank);
    }
}

#[test]
fn the_death_of_a_process_ends_the_others_wait() {
    if let Some((rank, store)) = own_rank() {
        let group = gloo(&store, rank, 3, PATIENCE);
        let tensor = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        sum(&group, &tensor).unwrap();
        store.set(&format!("ready/{rank}"), b"").unwrap();
        if rank == 2 {
            // Until it is killed.
            store.get("never", PATIENCE).unwrap_err();
            return;
        }
        let error = sum(&group, &tensor).unwrap_err();
        assert!(!error.is_timeout(), "{error}");
        return;
    }
    let server = server();
    let name = "processes::the_death_of_a_process_ends_the_others_wait";
    let mut ranks = start_processes(&server, name, 3);
    server.get("ready/2", PATIENCE).unwrap();
    let mut killed = ranks.pop().unwrap();
    killed.kill().unwrap();
    assert!(!killed.wait().unwrap().success());
    for rank in ranks {
        assert_quiet_success(rank);
    }
}
