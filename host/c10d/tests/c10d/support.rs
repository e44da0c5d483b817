//! Ranks for tests.

use std::env;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use moeut_c10d::{Backend, Group, Store};
use tch::{Device, Kind, Tensor};

/// Far longer than anything here takes on a busy machine: only a test about time-outs sees one.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

const HOST: &str = "127.0.0.1";

/// A store's server on a free port.
pub(crate) fn server() -> Store {
    Store::tcp(HOST, 0, true, None, PATIENCE).unwrap()
}

/// A connection of its own to `server`.
pub(crate) fn client(server: &Store) -> Store {
    Store::tcp(HOST, server.port(), false, None, PATIENCE).unwrap()
}

pub(crate) fn gloo(store: &Store, rank: usize, n_ranks: usize, timeout: Duration) -> Group {
    Group::new(Backend::Gloo, store, rank, n_ranks, Device::Cpu, timeout).unwrap()
}

/// Runs `body` as each of `n_ranks` ranks, one thread each, and returns what they return, by rank.
pub(crate) fn as_threads<T: Send>(
    n_ranks: usize,
    timeout: Duration,
    body: impl Fn(usize, Group) -> T + Sync,
) -> Vec<T> {
    let server = server();
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..n_ranks)
            .map(|rank| {
                let (server, body) = (&server, &body);
                scope.spawn(move || {
                    let group = gloo(&client(server), rank, n_ranks, timeout);
                    body(rank, group)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The variables by which a process of a test knows that it is a rank.
const RANK: &str = "MOEUT_C10D_TEST_RANK";
const PORT: &str = "MOEUT_C10D_TEST_PORT";

/// The own rank and the store, where this process is a rank of a test that called [`start_processes`].
pub(crate) fn own_rank() -> Option<(usize, Store)> {
    let rank = env::var(RANK).ok()?.parse().unwrap();
    let port = env::var(PORT).unwrap().parse().unwrap();
    let store = Store::tcp(HOST, port, false, None, PATIENCE).unwrap();
    Some((rank, store))
}

/// Starts `test` of this program once per rank, each in a process of its own.
pub(crate) fn start_processes(server: &Store, test: &str, n_ranks: usize) -> Vec<Child> {
    (0..n_ranks)
        .map(|rank| {
            Command::new(env::current_exe().unwrap())
                .args(["--exact", test, "--nocapture"])
                .env(RANK, rank.to_string())
                .env(PORT, server.port().to_string())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect()
}

/// `[first, first + 1, …]`, of `kind`.
pub(crate) fn counting(first: i64, n: i64, kind: Kind) -> Tensor {
    Tensor::arange_start(first, first + n, (kind, Device::Cpu))
}

pub(crate) fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).view([-1])).unwrap()
}
