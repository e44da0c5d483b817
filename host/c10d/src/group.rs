//! Ranks that compute together.

#![expect(unsafe_code, reason = "calls into the C++ shim")]

use std::ffi::{c_char, c_int};
use std::net::{IpAddr, Ipv4Addr};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tch::{Device, Tensor};
use torch_sys::C_tensor;

use crate::address;
use crate::ffi::{self, RawGroup, RawText, RawWork, check, milliseconds};
use crate::work::aborted;
use crate::{Error, Store, Work};

/// Who carries the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Between CPUs, over TCP.
    Gloo,
    /// Between GPUs. It needs libtorch's CUDA libraries loaded.
    Nccl,
}

/// How the ranks' elements become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// The ranks of a run as seen by one of them.
///
/// All ranks call the same operations with tensors of the same shape and kind in the same order, else they wait for each
/// other until the time-out or mix their data. Tensors are contiguous and on the group's device. Each call and the time
/// that it waits is bounded by the time-out given to [`new`](Self::new); an operation that queues behind others counts
/// from its own start.
///
/// Dropping it waits for operations under way; after [`abort`](Self::abort) there are none.
#[derive(Debug)]
pub struct Group {
    raw: *mut RawGroup,
    /// c10d numbers operations without a lock of its own. Held to start one, never to wait for one.
    start: Mutex<()>,
    is_aborted: Arc<AtomicBool>,
}

// SAFETY: `start` lets one thread at a time start an operation, which is all that c10d's groups do not guard themselves:
// Gloo's queue and connections have mutexes, NCCL's communicators and `abort` are made to be used from its watchdog's
// thread, too.
unsafe impl Send for Group {}
// SAFETY: as above.
unsafe impl Sync for Group {}

impl Group {
    /// Meets the other ranks through `store`, whose prefix no other group may use or have used, and connects to them.
    /// `device` is where the tensors will be: `Device::Cpu` for Gloo.
    ///
    /// Gloo binds to the interfaces in `GLOO_SOCKET_IFNAME`, else to the one through which the store's host is reached.
    ///
    /// # Errors
    /// If a rank does not come within `timeout`: then the error names those that are missing. If the machine cannot be
    /// reached under any of its addresses, a connection fails, or NCCL is not there.
    pub fn new(
        backend: Backend,
        store: &Store,
        rank: usize,
        n_ranks: usize,
        device: Device,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let (Ok(c_rank), Ok(c_ranks)) = (c_int::try_from(rank), c_int::try_from(n_ranks)) else {
            return Err(Error::new(&format!("{n_ranks} ranks are too many")));
        };
        if rank >= n_ranks {
            let message = format!("there is no rank {rank} among {n_ranks}");
            return Err(Error::new(&message));
        }
        let own = address::route_to(store.host()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let ranks = Meeting::new(store, rank, n_ranks, own, timeout)?;
        let prefix = store.key("group");
        let prefix = RawText::new(prefix.as_bytes());
        let timeout_ms = milliseconds(timeout);
        let mut raw = ptr::null_mut();
        match (backend, device) {
            (Backend::Gloo, Device::Cpu) => {
                let address = address::visible(own, || ranks.addresses())?.to_string();
                let interfaces = address::chosen_interfaces();
                let interfaces: Vec<RawText> = interfaces
                    .iter()
                    .map(|name| RawText::new(name.as_bytes()))
                    .collect();
                // SAFETY: store and texts outlive the call; the shim fills `raw` on success.
                unsafe {
                    check(ffi::moeut_c10d_gloo_new(
                        store.raw(),
                        prefix,
                        c_rank,
                        c_ranks,
                        timeout_ms,
                        interfaces.as_ptr(),
                        interfaces.len(),
                        RawText::new(address.as_bytes()),
                        &raw mut raw,
                    ))
                }?;
            }
            (Backend::Nccl, Device::Cuda(index)) => {
                // No machine has as many; the shim refuses the number.
                let index = c_int::try_from(index).unwrap_or(c_int::MAX);
                // SAFETY: as above.
                unsafe {
                    check(ffi::moeut_c10d_nccl_new(
                        store.raw(),
                        prefix,
                        c_rank,
                        c_ranks,
                        timeout_ms,
                        index,
                        &raw mut raw,
                    ))
                }?;
            }
            (Backend::Gloo | Backend::Nccl, _) => {
                let message = format!("{backend:?} does not carry tensors on {device:?}");
                return Err(Error::new(&message));
            }
        }
        Ok(Self {
            raw,
            start: Mutex::new(()),
            is_aborted: Arc::default(),
        })
    }

    /// Combines the ranks' tensors element by element, in place. Several travel as one and have to be of one kind.
    ///
    /// # Errors
    /// If a tensor does not fit the group or the others, or the group is aborted or broken.
    pub fn all_reduce(&self, tensors: &[&Tensor], op: Reduction) -> Result<Work, Error> {
        let tensors = pointers(tensors);
        let op = match op {
            Reduction::Sum => 0,
            Reduction::Max => 1,
            Reduction::Min => 2,
        };
        self.start(|work| {
            // SAFETY: the tensors outlive the call, and the engine keeps what it needs of them.
            unsafe {
                ffi::moeut_c10d_all_reduce(self.raw, tensors.as_ptr(), tensors.len(), op, work)
            }
        })
    }

    /// Overwrites the other ranks' tensors with those of rank `root`.
    ///
    /// # Errors
    /// If a tensor does not fit the group, there is no rank `root`, or the group is aborted or broken.
    pub fn broadcast(&self, tensors: &[&Tensor], root: usize) -> Result<Work, Error> {
        let tensors = pointers(tensors);
        // No group has as many ranks; the engine refuses the number.
        let root = c_int::try_from(root).unwrap_or(c_int::MAX);
        self.start(|work| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                ffi::moeut_c10d_broadcast(self.raw, tensors.as_ptr(), tensors.len(), root, work)
            }
        })
    }

    /// Fills `into` with the ranks' `from`, one after the other.
    ///
    /// # Shapes
    /// `from`: `[n]`, `into`: `[n_ranks · n]`, of one kind.
    ///
    /// # Errors
    /// If the tensors do not fit the group or each other, or the group is aborted or broken.
    pub fn all_gather(&self, into: &Tensor, from: &Tensor) -> Result<Work, Error> {
        self.start(|work| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::moeut_c10d_all_gather(self.raw, into.as_ptr(), from.as_ptr(), work) }
        })
    }

    /// Sums the ranks' `from`, cuts the sum into one part per rank and writes the own one to `into`.
    ///
    /// # Shapes
    /// `from`: `[n_ranks · n]`, `into`: `[n]`, of one kind.
    ///
    /// # Errors
    /// If the tensors do not fit the group or each other, or the group is aborted or broken.
    pub fn reduce_scatter(&self, into: &Tensor, from: &Tensor) -> Result<Work, Error> {
        self.start(|work| {
            // SAFETY: as in `all_reduce`.
            unsafe { ffi::moeut_c10d_reduce_scatter(self.raw, into.as_ptr(), from.as_ptr(), work) }
        })
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// If a rank is gone or does not come within the time-out, or the group is aborted or broken.
    pub fn barrier(&self) -> Result<(), Error> {
        // SAFETY: the group is alive.
        self.start(|work| unsafe { ffi::moeut_c10d_barrier(self.raw, work) })?
            .wait()
    }

    /// Whether all went well that was not waited for: on NCCL the host runs ahead of the GPUs, and after a failure there
    /// goes on with tensors that hold anything.
    ///
    /// # Errors
    /// If an operation failed, or the group was aborted.
    pub fn check(&self) -> Result<(), Error> {
        if self.is_aborted.load(Ordering::SeqCst) {
            return Err(aborted());
        }
        let mut has_failed = false;
        // SAFETY: the group is alive.
        unsafe {
            check(ffi::moeut_c10d_group_has_failed(
                self.raw,
                &raw mut has_failed,
            ))
        }?;
        if has_failed {
            return Err(Error::new(
                "an operation between the GPUs timed out or failed",
            ));
        }
        Ok(())
    }

    /// Ends all waiting in this group, of other threads, too, with an error, here at once and at the peers as soon as they
    /// see the connection close. The group is of no use afterwards.
    pub fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
        // SAFETY: the group is alive; the shim's `abort` may run beside any other call.
        let aborted = unsafe { check(ffi::moeut_c10d_group_abort(self.raw)) };
        // A connection that cannot even be closed is one that nobody waits for.
        drop(aborted);
    }

    fn start(
        &self,
        operation: impl FnOnce(*mut *mut RawWork) -> *mut c_char,
    ) -> Result<Work, Error> {
        let _one_at_a_time = self.start.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_aborted.load(Ordering::SeqCst) {
            return Err(aborted());
        }
        let mut work = ptr::null_mut();
        // SAFETY: `operation` calls one function of the shim, which fills `work` on success.
        unsafe { check(operation(&raw mut work)) }?;
        Ok(Work::new(work, Arc::clone(&self.is_aborted)))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by the shim, freed once.
        unsafe { ffi::moeut_c10d_group_free(self.raw) };
    }
}

/// The ranks of a group before they are connected: each leaves its address in the store and waits for the others'.
struct Meeting {
    store: Store,
    ranks: Vec<String>,
}

impl Meeting {
    fn new(
        store: &Store,
        rank: usize,
        n_ranks: usize,
        own: IpAddr,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let meeting = Self {
            store: store.prefixed("ranks"),
            ranks: (0..n_ranks).map(|rank| rank.to_string()).collect(),
        };
        let own = own.to_string();
        meeting.store.set(&meeting.ranks[rank], own.as_bytes())?;
        let keys: Vec<&str> = meeting.ranks.iter().map(String::as_str).collect();
        match meeting.store.wait(&keys, timeout) {
            Ok(()) => Ok(meeting),
            Err(error) if error.is_timeout() => Err(meeting.missing(timeout)),
            Err(error) => Err(error),
        }
    }

    fn missing(&self, timeout: Duration) -> Error {
        let is_missing = |rank: &&str| matches!(self.store.check(&[rank]), Ok(false));
        let missing: Vec<&str> = self
            .ranks
            .iter()
            .map(String::as_str)
            .filter(is_missing)
            .collect();
        let (missing, n_ranks) = (missing.join(", "), self.ranks.len());
        Error::new(&format!(
            "timed out after {timeout:?}: of {n_ranks} ranks these did not come: {missing}"
        ))
    }

    fn addresses(&self) -> Result<Vec<IpAddr>, Error> {
        let address = |rank: &String| {
            let text = self.store.get(rank, Duration::ZERO)?;
            let text = String::from_utf8_lossy(&text);
            text.parse().map_err(|_| {
                Error::new(&format!("rank {rank} is at `{text}`, which is no address"))
            })
        };
        self.ranks.iter().map(address).collect()
    }
}

/// The tensors' handles, which live as long as the tensors.
pub(crate) fn pointers(tensors: &[&Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(|tensor| tensor.as_ptr()).collect()
}
