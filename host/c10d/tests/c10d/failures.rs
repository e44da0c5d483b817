//! Ranks that are late, gone or told to stop: every wait ends, and says why.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use moeut_c10d::{Backend, Error, Group, Reduction};
use tch::{Device, Kind, Tensor};

use crate::support::{PATIENCE, as_threads, client, gloo, server};

/// The time-out of a group that is meant to see it pass.
const SHORT: Duration = Duration::from_secs(2);

fn sum(group: &Group) -> Result<(), Error> {
    let tensor = Tensor::ones([100_000], (Kind::Float, Device::Cpu));
    group.all_reduce(&[&tensor], Reduction::Sum)?.wait()
}

#[test]
fn a_rank_that_does_not_answer_is_a_timeout() {
    let done = Barrier::new(2);
    as_threads(2, SHORT, |rank, group| {
        sum(&group).unwrap();
        if rank == 0 {
            let started = Instant::now();
            let error = sum(&group).unwrap_err();
            assert!(error.is_timeout(), "{error}");
            let waited = started.elapsed();
            assert!(waited >= SHORT && waited < PATIENCE, "{waited:?}");
        }
        done.wait();
    });
}

#[test]
fn a_rank_that_is_gone_ends_the_others_wait() {
    as_threads(2, PATIENCE, |rank, group| {
        sum(&group).unwrap();
        if rank == 0 {
            let error = sum(&group).unwrap_err();
            assert!(!error.is_timeout(), "{error}");
            assert!(error.to_string().contains("by peer"), "{error}");
        }
    });
}

#[test]
fn abort_ends_waiting_here_and_at_the_peers() {
    let errors = as_threads(4, PATIENCE, |rank, group| {
        sum(&group).unwrap();
        match rank {
            // This one never comes, but is there until all others have ended.
            3 => {
                thread::sleep(Duration::from_millis(50));
                group.abort();
                sum(&group).unwrap_err()
            }
            _ => sum(&group).unwrap_err(),
        }
    });
    assert_eq!(errors[3].to_string(), "the group was aborted");
    for error in &errors[..3] {
        assert!(!error.is_timeout(), "{error}");
    }
}

#[test]
fn abort_ends_the_wait_of_another_thread() {
    let done = Barrier::new(2);
    as_threads(2, PATIENCE, |rank, group| {
        sum(&group).unwrap();
        if rank == 0 {
            let tensor = Tensor::ones([1], (Kind::Float, Device::Cpu));
            let first = group.all_reduce(&[&tensor], Reduction::Sum).unwrap();
            let queued: Vec<_> = (0..10)
                .map(|_| group.broadcast(&[&tensor], 1).unwrap())
                .collect();
            let error = thread::scope(|scope| {
                let waiting = scope.spawn(|| first.wait().unwrap_err());
                let at_barrier = scope.spawn(|| group.barrier().unwrap_err());
                assert!(!waiting.is_finished() && !at_barrier.is_finished());
                group.abort();
                at_barrier.join().unwrap();
                waiting.join().unwrap()
            });
            assert_eq!(error.to_string(), "the group was aborted");
            for work in queued {
                work.wait().unwrap_err();
            }
            group.check().unwrap_err();
            group.abort(); // twice is once
        }
        done.wait();
    });
}

#[test]
fn a_failure_leaves_no_operation_that_drop_would_wait_for() {
    as_threads(2, PATIENCE, |rank, group| {
        sum(&group).unwrap();
        if rank == 0 {
            let tensor = Tensor::ones([1], (Kind::Float, Device::Cpu));
            let unfinished = group.broadcast(&[&tensor], 1).unwrap();
            group.abort();
            drop(group);
            unfinished.wait().unwrap_err();
        }
    });
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let server = server();
    let error = thread::scope(|scope| {
        let ranks: Vec<_> = [0, 2]
            .map(|rank| {
                let store = client(&server);
                scope.spawn(move || {
                    Group::new(Backend::Gloo, &store, rank, 4, Device::Cpu, SHORT).unwrap_err()
                })
            })
            .into_iter()
            .map(|rank| rank.join().unwrap())
            .collect();
        ranks[0].clone()
    });
    assert!(error.is_timeout());
    assert_eq!(
        error.to_string(),
        "timed out after 2s: of 4 ranks these did not come: 1, 3"
    );
}

#[test]
fn a_group_that_cannot_be_is_an_error() {
    let store = server();
    let new = |backend, rank, device| {
        Group::new(backend, &store.prefixed("x"), rank, 1, device, SHORT)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        new(Backend::Gloo, 1, Device::Cpu),
        "there is no rank 1 among 1"
    );
    assert_eq!(
        new(Backend::Gloo, 0, Device::Cuda(0)),
        "Gloo does not carry tensors on Cuda(0)"
    );
    assert_eq!(
        new(Backend::Nccl, 0, Device::Cpu),
        "Nccl does not carry tensors on Cpu"
    );
    assert_eq!(
        new(Backend::Nccl, 0, Device::Cuda(0)),
        "NCCL belongs to libtorch's CUDA libraries, which are not loaded in this process"
    );
}

#[test]
fn groups_with_prefixes_of_their_own_share_a_store() {
    let server = server();
    thread::scope(|scope| {
        for rank in 0..2 {
            let store = client(&server);
            scope.spawn(move || {
                let first = gloo(&store.prefixed("first"), rank, 2, PATIENCE);
                let second = gloo(&store.prefixed("second"), rank, 2, PATIENCE);
                first.abort();
                sum(&first).unwrap_err();
                sum(&second).unwrap();
            });
        }
    });
}
