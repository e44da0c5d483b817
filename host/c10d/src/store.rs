//! The key-value store through which ranks find each other: c10d's TCP store, as `torchrun` starts it.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::Error;
use crate::ffi::{self, RawStore, RawText, check, milliseconds, take_bytes};

/// A connection to a server that keeps bytes under names. Clones share the connection.
///
/// Calls of several threads are safe. One that has to wait for a key does so on a connection of its own and holds up no
/// other; such a connection is kept for the next that waits.
#[derive(Debug, Clone)]
pub struct Store {
    connection: Arc<Connection>,
    prefix: String,
}

#[derive(Debug)]
struct Connection {
    raw: OwnedStore,
    host: String,
    port: u16,
    /// Connections that nobody waits on. A fresh one for each wait would cost the server a reverse lookup of the
    /// client's address each time, which takes seconds where the name server does not answer.
    idle: Mutex<Vec<OwnedStore>>,
}

#[derive(Debug)]
struct OwnedStore(*mut RawStore);

// SAFETY: c10d guards each use of a TCP store's connection by a mutex; the shim only calls its functions.
unsafe impl Send for OwnedStore {}
// SAFETY: as above.
unsafe impl Sync for OwnedStore {}

impl Drop for OwnedStore {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once.
        unsafe { ffi::moeut_c10d_store_free(self.0) };
    }
}

impl Store {
    /// Connects to the store at `host:port`, and starts it there first with `is_server`; the server lives as long as the
    /// `Store` and the groups made with it. Port 0 with `is_server` is any free one, see [`port`](Self::port).
    ///
    /// With `n_ranks` the server waits until as many clients, itself included, have come; all of them have to pass it
    /// then. A client waits for the server in any case.
    ///
    /// # Errors
    /// If the port is taken, or nobody answers or comes within `timeout`.
    pub fn tcp(
        host: &str,
        port: u16,
        is_server: bool,
        n_ranks: Option<usize>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        let mut bound_port = 0;
        let n_ranks = n_ranks.map(|n_ranks| n_ranks as u64);
        // SAFETY: the arguments outlive the call; the shim fills `raw` and `bound_port` on success.
        unsafe {
            check(ffi::moeut_c10d_store_tcp(
                RawText::new(host.as_bytes()),
                port,
                is_server,
                n_ranks.as_ref().map_or(ptr::null(), ptr::from_ref),
                milliseconds(timeout),
                &raw mut raw,
                &raw mut bound_port,
            ))
        }?;
        let connection = Arc::new(Connection {
            raw: OwnedStore(raw),
            host: host.to_owned(),
            port: bound_port,
            idle: Mutex::default(),
        });
        let prefix = String::new();
        Ok(Self { connection, prefix })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        self.connection.port
    }

    /// The same store, whose keys live below `prefix` and meet no others.
    #[must_use]
    pub fn prefixed(&self, prefix: &str) -> Self {
        Self {
            connection: Arc::clone(&self.connection),
            prefix: self.key(prefix) + "/",
        }
    }

    /// Stores `value` under `key`, instead of what was there.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = self.key(key);
        // SAFETY: the arguments outlive the call.
        unsafe {
            check(ffi::moeut_c10d_store_set(
                self.raw(),
                RawText::new(key.as_bytes()),
                RawText::new(value),
            ))
        }
    }

    /// What is stored under `key`; waits until somebody has stored it.
    ///
    /// # Errors
    /// If nobody has within `timeout`, or the server does not answer.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, Error> {
        if !self.check(&[key])? {
            self.wait(&[key], timeout)?;
        }
        let key = self.key(key);
        let (mut bytes, mut length) = (ptr::null_mut(), 0);
        // SAFETY: the arguments outlive the call; on success the shim hands over `length` bytes at `bytes`.
        unsafe {
            check(ffi::moeut_c10d_store_get(
                self.raw(),
                RawText::new(key.as_bytes()),
                &raw mut bytes,
                &raw mut length,
            ))?;
            Ok(take_bytes(bytes, length))
        }
    }

    /// Whether all of `keys` are there; does not wait.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn check(&self, keys: &[&str]) -> Result<bool, Error> {
        let keys = self.keys(keys);
        let keys: Vec<RawText> = keys
            .iter()
            .map(|key| RawText::new(key.as_bytes()))
            .collect();
        let mut has_all = false;
        // SAFETY: the keys outlive the call.
        unsafe {
            check(ffi::moeut_c10d_store_check(
                self.raw(),
                keys.as_ptr(),
                keys.len(),
                &raw mut has_all,
            ))
        }?;
        Ok(has_all)
    }

    /// Adds `amount` to the number under `key`, which starts at 0, and returns the sum; of several callers each gets its
    /// own. Such a key is for `add` alone.
    ///
    /// # Errors
    /// If the server does not answer.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = self.key(key);
        let mut sum = 0;
        // SAFETY: the arguments outlive the call.
        unsafe {
            check(ffi::moeut_c10d_store_add(
                self.raw(),
                RawText::new(key.as_bytes()),
                amount,
                &raw mut sum,
            ))
        }?;
        Ok(sum)
    }

    /// Waits until all of `keys` are there.
    pub(crate) fn wait(&self, keys: &[&str], timeout: Duration) -> Result<(), Error> {
        let keys = self.keys(keys);
        let keys: Vec<RawText> = keys
            .iter()
            .map(|key| RawText::new(key.as_bytes()))
            .collect();
        let idle = || {
            self.connection
                .idle
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let left = idle().pop();
        let waiting = left.map_or_else(|| self.connect(), Ok)?;
        // SAFETY: the keys outlive the call.
        unsafe {
            check(ffi::moeut_c10d_store_wait(
                waiting.0,
                keys.as_ptr(),
                keys.len(),
                milliseconds(timeout),
            ))
        }?;
        idle().push(waiting);
        Ok(())
    }

    fn connect(&self) -> Result<OwnedStore, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: the shim fills `raw` on success.
        unsafe { check(ffi::moeut_c10d_store_clone(self.raw(), &raw mut raw)) }?;
        Ok(OwnedStore(raw))
    }

    pub(crate) fn raw(&self) -> *mut RawStore {
        self.connection.raw.0
    }

    pub(crate) fn host(&self) -> &str {
        &self.connection.host
    }

    /// `name` below this store's prefix.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn keys(&self, names: &[&str]) -> Vec<String> {
        names.iter().map(|name| self.key(name)).collect()
    }
}
