//! The key-value store.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use moeut_c10d::Store;

use crate::support::{PATIENCE, client, server};

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn a_value_is_what_was_set_last() {
    let server = server();
    let client = client(&server);
    client.set("key", b"first").unwrap();
    server.set("key", &[0, 255, 10]).unwrap();
    assert_eq!(client.get("key", SHORT).unwrap(), [0, 255, 10]);
    server.set("empty", b"").unwrap();
    assert_eq!(client.get("empty", SHORT).unwrap(), b"");
}

#[test]
fn get_waits_for_the_key_and_holds_up_nobody() {
    let store = server();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.get("late", PATIENCE).unwrap());
        // The same connection is free meanwhile, also for the value that ends the wait.
        assert!(!store.check(&["late"]).unwrap());
        store.set("late", b"here").unwrap();
        assert_eq!(waiting.join().unwrap(), b"here");
    });
}

#[test]
fn get_in_vain_times_out() {
    let error = server().get("never", SHORT).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    assert!(error.to_string().contains("never"), "{error}");
    assert!(!error.to_string().contains("Exception raised"), "{error}");
}

#[test]
fn check_wants_all_keys() {
    let store = server();
    store.set("a", b"1").unwrap();
    assert!(store.check(&["a"]).unwrap());
    assert!(!store.check(&["a", "b"]).unwrap());
}

#[test]
fn add_gives_each_caller_a_sum_of_its_own() {
    let server = server();
    let mut sums = thread::scope(|scope| {
        let callers: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| client(&server).add("count", 2).unwrap()))
            .collect();
        callers
            .into_iter()
            .map(|caller| caller.join().unwrap())
            .collect::<Vec<_>>()
    });
    sums.sort_unstable();
    assert_eq!(sums, [2, 4, 6, 8]);
    assert_eq!(server.add("count", -8).unwrap(), 0);
}

#[test]
fn prefixes_keep_keys_apart() {
    let store = server();
    let (a, b) = (store.prefixed("a"), store.prefixed("b"));
    a.set("key", b"of a").unwrap();
    assert!(!b.check(&["key"]).unwrap());
    assert!(!store.check(&["key"]).unwrap());
    b.prefixed("inner").set("key", b"of inner").unwrap();
    assert_eq!(b.get("inner/key", SHORT).unwrap(), b"of inner");
    assert_eq!(a.clone().get("key", SHORT).unwrap(), b"of a");
}

#[test]
fn a_server_can_wait_for_its_ranks() {
    let port = free_port();
    let connect = |is_server| Store::tcp("127.0.0.1", port, is_server, Some(2), PATIENCE).unwrap();
    thread::scope(|scope| {
        // The client comes first and waits, too.
        let client = scope.spawn(|| connect(false));
        assert_eq!(connect(true).port(), port);
        assert_eq!(client.join().unwrap().port(), port);
    });
}

#[test]
fn a_server_without_its_ranks_times_out() {
    let error = Store::tcp("127.0.0.1", 0, true, Some(2), SHORT).unwrap_err();
    assert!(error.is_timeout(), "{error}");
}

#[test]
fn nobody_at_the_address_is_a_timeout_and_a_taken_port_an_error() {
    let error = Store::tcp("127.0.0.1", free_port(), false, None, SHORT).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    let taken = server().port();
    let held = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = held.local_addr().unwrap().port();
    assert_ne!(port, taken);
    let error = Store::tcp("127.0.0.1", port, true, None, SHORT).unwrap_err();
    assert!(!error.is_timeout(), "{error}");
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}
