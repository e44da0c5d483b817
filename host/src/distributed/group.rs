//! The processes that train together, as the rest of the host sees them: one that is alone is a group, too.
//!
//! Everything here happens in all processes, in the same order. Tensors of one process alone are left as they are.

use super::environment::World;
use super::lookout::{Lookout, Member, STORE_TIMEOUT};
use crate::log::Terminal;
use crate::signals::Signals;
use moeut_c10d::{Backend, Error, Group as Engine, Reduction, Store, Work};
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// How long a process waits for the others when it leaves.
const FAREWELL: Duration = Duration::from_secs(5);
/// The longest time between two looks at the store.
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Tensors with their names.
type Named = Vec<(String, Tensor)>;

/// The processes of a run. Cloning shares it.
#[derive(Clone, Default)]
pub struct Group(Option<Arc<Inner>>);

struct Inner {
    world: World,
    store: Store,
    lookout: Lookout,
    timeout: Duration,
    engine: OnceLock<(Arc<Engine>, Device)>,
    /// Whether this process has told the others that it takes no further part.
    is_gone: AtomicBool,
}

/// A tensor that is to come.
#[derive(Debug, Serialize, Deserialize)]
struct Shape {
    name: String,
    size: Vec<i64>,
    dtype: String,
}

impl Shape {
    fn of((name, tensor): &(String, Tensor)) -> Result<Self, PluginError> {
        let dtype = DTYPES.iter().find(|(_, kind)| *kind == tensor.kind());
        let (dtype, _) = dtype.ok_or_else(|| {
            PluginError::new(format!("`{name}` cannot be exchanged"))
                .why(format!("its elements are {:?}", tensor.kind()))
        })?;
        Ok(Self {
            name: name.clone(),
            size: tensor.size(),
            dtype: (*dtype).to_owned(),
        })
    }

    fn empty(&self, device: Device) -> Result<(String, Tensor), PluginError> {
        let known = DTYPES.iter().find(|(dtype, _)| *dtype == self.dtype);
        let kind = known.map_or(Kind::Float, |(_, kind)| *kind);
        let tensor = Tensor::f_empty(&self.size, (kind, device));
        Ok((
            self.name.clone(),
            tensor.or_plugin_error("no memory for what other processes send")?,
        ))
    }
}

/// Element types that are exchanged by name.
const DTYPES: &[(&str, Kind)] = &[
    ("u8", Kind::Uint8),
    ("i32", Kind::Int),
    ("i64", Kind::Int64),
    ("f16", Kind::Half),
    ("bf16", Kind::BFloat16),
    ("f32", Kind::Float),
    ("f64", Kind::Double),
];

/// How a distributed run is started.
pub(super) const HOW_TO_START: &str = "start with `torchrun --no-python --nproc-per-node <n> moeut-host …`, `srun moeut-host …` or `moeut-host launch -n <n> …`";

/// What the first process says of a question that all have answered.
type Verdict = Result<(), PluginError>;

impl Group {
    /// One process alone.
    pub fn single() -> Self {
        Self(None)
    }

    /// Meets the other processes. Each operation later on takes `timeout` at most, and so does the meeting.
    ///
    /// # Errors
    /// If not all of them come, or the network refuses.
    pub fn join(
        world: World,
        timeout: Duration,
        terminal: &Arc<Terminal>,
    ) -> Result<Self, PluginError> {
        let is_keeper = world.rank == 0 && !world.has_agent_store;
        let connect = |is_keeper, timeout| {
            Store::tcp(&world.host, world.port, is_keeper, None, timeout)
                .map_err(|error| no_store(&world, &error))
        };
        let store = connect(is_keeper, timeout)?;
        let prefix = format!("moeut/{}/", world.attempt);
        let store = store.prefixed(&prefix);
        let members = call_roll(&world, &store, timeout)?;
        let lookout = Lookout::start(
            world.rank,
            members,
            connect(false, STORE_TIMEOUT)?.prefixed(&prefix),
            (!world.has_agent_store).then_some(0),
            timeout,
            terminal,
        )?;
        Ok(Self(Some(Arc::new(Inner {
            world,
            store,
            lookout,
            timeout,
            engine: OnceLock::new(),
            is_gone: AtomicBool::new(false),
        }))))
    }

    /// Gets ready to exchange tensors that live on `device`.
    ///
    /// # Errors
    /// If the engine does not start.
    pub fn connect(&self, device: Device) -> Result<(), PluginError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        let backend = if device.is_cuda() {
            Backend::Nccl
        } else {
            Backend::Gloo
        };
        let World { rank, n_ranks, .. } = inner.world;
        let store = inner.store.prefixed("engine/");
        let engine = Engine::new(backend, &store, rank, n_ranks, device, inner.timeout);
        let engine = Arc::new(engine.map_err(|error| inner.lookout.explain(&error))?);
        inner.lookout.guard(&engine);
        let _ = inner.engine.set((engine, device));
        Ok(())
    }

    /// Which process this is, from 0 on.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |inner| inner.world.rank)
    }

    /// How many there are.
    pub fn n_ranks(&self) -> usize {
        self.0.as_ref().map_or(1, |inner| inner.world.n_ranks)
    }

    /// Whether this process saves, logs and talks.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is only one process.
    pub fn is_single(&self) -> bool {
        self.0.is_none()
    }

    /// Of `n` things in a row, those of this process: the first and their number. The first processes have one more if
    /// they cannot be equal.
    pub fn share_of(&self, n: usize) -> std::ops::Range<usize> {
        share_of(n, self.rank(), self.n_ranks())
    }

    /// The first process' value, in all of them; `make` is called in the first one only.
    ///
    /// # Errors
    /// What `make` says, and if another process has ended.
    pub fn share<T, E>(&self, key: &str, make: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<PluginError>,
    {
        let Some(inner) = &self.0 else {
            return make();
        };
        let key = format!("share/{key}");
        if self.is_first() {
            let value = make()?;
            inner.put(&key, &value)?;
            return Ok(value);
        }
        Ok(inner.take(&key)?)
    }

    /// Finds out whether all processes have the same `facts` about a subject, such as `argument`; `fix` is what to do if
    /// not.
    ///
    /// # Errors
    /// In all processes if one differs from the first; it names that one.
    pub fn agree(&self, subject: &str, facts: &BTreeMap<String, String>, fix: &str) -> Verdict {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        let key = |rank| format!("agree/{subject}/{rank}");
        let verdict = format!("agree/{subject}");
        if !self.is_first() {
            inner.put(&key(self.rank()), facts)?;
            return inner.take::<Verdict>(&verdict)?;
        }
        let compare = || -> Verdict {
            for rank in 1..self.n_ranks() {
                let other = inner.take(&key(rank))?;
                compare(subject, facts, rank, &other).map_err(|error| error.fix(fix))?;
            }
            Ok(())
        };
        let found = compare();
        inner.put(&verdict, &found)?;
        found
    }

    /// Replaces each tensor by the sum over all processes.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn sum(&self, tensors: &[&Tensor]) -> Result<(), PluginError> {
        self.reduce(tensors, Reduction::Sum)
    }

    /// Replaces each tensor by the largest values of all processes.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn max(&self, tensors: &[&Tensor]) -> Result<(), PluginError> {
        self.reduce(tensors, Reduction::Max)
    }

    /// Replaces each tensor by that of the process `root`.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn broadcast(&self, tensors: &[&Tensor], root: usize) -> Result<(), PluginError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        if tensors.is_empty() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        inner.call(|engine| engine.broadcast(tensors, root)?.wait())
    }

    /// Whether all exchanges went well so far, as far as this process has waited for its device. On GPUs nobody waits for
    /// an exchange, and after one that failed, tensors hold anything.
    ///
    /// # Errors
    /// If one failed.
    pub fn check(&self) -> Result<(), PluginError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        let Some((engine, _)) = inner.engine.get() else {
            return Ok(());
        };
        engine
            .check()
            .map_err(|error| inner.lookout.explain(&error))
    }

    /// Starts the sum of tensors over all processes, in place; nothing if this one is alone.
    ///
    /// # Errors
    /// If another process has ended.
    pub(super) fn start_sum(&self, tensors: &[&Tensor]) -> Result<Option<Work>, Error> {
        self.start(|engine| engine.all_reduce(tensors, Reduction::Sum))
    }

    /// Starts to sum `from`, `[n_ranks · n]`, of which this process gets its part `into`, `[n]`.
    pub(super) fn start_scatter(
        &self,
        into: &Tensor,
        from: &Tensor,
    ) -> Result<Option<Work>, Error> {
        self.start(|engine| engine.reduce_scatter(into, from))
    }

    /// Starts to put the parts of all processes, `[n]`, one after the other into `[n_ranks · n]`.
    pub(super) fn start_gather(&self, into: &Tensor, from: &Tensor) -> Result<Option<Work>, Error> {
        self.start(|engine| engine.all_gather(into, from))
    }

    fn start(
        &self,
        call: impl FnOnce(&Engine) -> Result<Work, Error>,
    ) -> Result<Option<Work>, Error> {
        let started = self.0.as_ref().and_then(|inner| {
            let (engine, _) = inner.engine.get()?;
            inner.lookout.note_call();
            Some(engine.check().and_then(|()| call(engine)))
        });
        started.transpose()
    }

    /// What an error of a started operation comes from.
    pub(super) fn explain(&self, error: &Error) -> PluginError {
        match &self.0 {
            Some(inner) => inner.lookout.explain(error),
            None => PluginError::new("the processes cannot work together").why(error.to_string()),
        }
    }

    /// The step that this process is in, for the messages of others.
    pub fn note_step(&self, step: u64) {
        if let Some(inner) = &self.0 {
            inner.lookout.note_step(step);
        }
    }

    /// Ends all other processes because of an error in this one.
    ///
    /// Returns whether this process is one that tells the user: the culprit, or the first other one on each host.
    pub fn fail(&self, error: &PluginError) -> bool {
        let Some(inner) = &self.0 else {
            return true;
        };
        inner.lookout.report(error);
        let tells = inner.lookout.tells();
        inner.go();
        tells
    }

    /// Waits until all processes are done: one that had ended would be missed by the others. After [`Group::fail`] nobody
    /// waits for this one any more.
    ///
    /// # Errors
    /// If another process has ended before it was done.
    pub fn leave(&self) -> Result<(), PluginError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        if inner.is_gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        let all = i64::try_from(inner.world.n_ranks).unwrap_or(i64::MAX);
        inner.add("n_done", 1)?;
        let mut pause = Duration::from_millis(1);
        while inner.add("n_done", 0)? < all {
            if let Some(verdict) = inner.lookout.verdict() {
                return Err(verdict);
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(MAX_PAUSE);
        }
        inner.go();
        Ok(())
    }

    /// Agrees with the others on what signals ask for: what one process is asked, all do.
    ///
    /// # Errors
    /// If another process has ended.
    pub fn confer(&self, signals: &Signals) -> Result<(), PluginError> {
        let (Some(wishes), Some(inner)) = (signals.wishes(), &self.0) else {
            return Ok(());
        };
        let device = inner.device()?;
        let sums = Tensor::from_slice(&wishes).to_device(device);
        self.sum(&[&sums])?;
        let sums = Vec::<f64>::try_from(&sums.to_device(Device::Cpu));
        signals.agree(&sums.or_plugin_error("what the processes agreed on cannot be read")?);
        Ok(())
    }

    /// The tensors of each process, on the group's device, in all of them. `key` is used once in a run.
    ///
    /// # Errors
    /// If another process has ended, or memory does not suffice.
    pub fn gather(&self, key: &str, own: &[(String, Tensor)]) -> Result<Vec<Named>, PluginError> {
        let Some(inner) = &self.0 else {
            let own = own
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
            return Ok(vec![own.collect()]);
        };
        let device = inner.device()?;
        let key = |rank| format!("gather/{key}/{rank}");
        let shapes: Vec<Shape> = own.iter().map(Shape::of).collect::<Result<_, _>>()?;
        inner.put(&key(self.rank()), &shapes)?;
        let mut all = Vec::new();
        for rank in 0..self.n_ranks() {
            let named: Named = if rank == self.rank() {
                let to_device = |(name, tensor): &(String, Tensor)| {
                    (name.clone(), tensor.detach().to_device(device).contiguous())
                };
                own.iter().map(to_device).collect()
            } else {
                let shapes: Vec<Shape> = inner.take(&key(rank))?;
                shapes
                    .iter()
                    .map(|shape| shape.empty(device))
                    .collect::<Result<_, _>>()?
            };
            let tensors: Vec<&Tensor> = named.iter().map(|(_, tensor)| tensor).collect();
            for tensor in tensors {
                self.broadcast(&[tensor], rank)?;
            }
            all.push(named);
        }
        Ok(all)
    }

    fn reduce(&self, tensors: &[&Tensor], reduction: Reduction) -> Result<(), PluginError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        if tensors.is_empty() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        inner.call(|engine| engine.all_reduce(tensors, reduction)?.wait())
    }
}

impl Inner {
    fn call(&self, call: impl FnOnce(&Engine) -> Result<(), Error>) -> Result<(), PluginError> {
        let (engine, _) = self.engine.get().ok_or_else(not_connected)?;
        self.lookout.note_call();
        let done = engine.check().and_then(|()| call(engine));
        done.map_err(|error| self.lookout.explain(&error))
    }

    fn put<T: Serialize>(&self, key: &str, value: &T) -> Result<(), PluginError> {
        let text = serde_json::to_vec(value).map_err(|error| {
            PluginError::new("what processes share cannot be written").why(error.to_string())
        })?;
        self.store
            .set(key, &text)
            .map_err(|error| self.lookout.explain(&error))
    }

    /// Waits for a key as long as all processes live: preparing data may take hours.
    fn take<T: DeserializeOwned>(&self, key: &str) -> Result<T, PluginError> {
        let mut pause = Duration::from_millis(1);
        loop {
            match self.store.check(&[key]) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(self.lookout.explain(&error)),
            }
            if let Some(verdict) = self.lookout.verdict() {
                return Err(verdict);
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(MAX_PAUSE);
        }
        let text = self.store.get(key, self.timeout);
        let text = text.map_err(|error| self.lookout.explain(&error))?;
        read(&text)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, PluginError> {
        let sum = self.store.add(key, amount);
        sum.map_err(|error| self.lookout.explain(&error))
    }

    fn device(&self) -> Result<Device, PluginError> {
        let device = self.engine.get().map(|(_, device)| *device);
        device.ok_or_else(not_connected)
    }

    /// Ends this process' part; the one with the store waits until the others need it no more.
    fn go(&self) {
        self.is_gone.store(true, Ordering::Relaxed);
        self.lookout.end();
        let keeps_store = self.world.rank == 0 && !self.world.has_agent_store;
        let all = i64::try_from(self.world.n_ranks).unwrap_or(i64::MAX);
        let store = self.store.clone();
        let (done, is_done) = std::sync::mpsc::channel();
        // On a thread of its own: a store behind a broken cable does not answer, and nobody waits for it.
        std::thread::spawn(move || {
            let mut n_gone = store.add("n_gone", 1).unwrap_or(all);
            let begin = Instant::now();
            while keeps_store && n_gone < all && begin.elapsed() < FAREWELL {
                std::thread::sleep(MAX_PAUSE);
                n_gone = store.add("n_gone", 0).unwrap_or(all);
            }
            let _ = done.send(());
        });
        let _ = is_done.recv_timeout(FAREWELL);
    }
}

/// Everyone tells where it is, and the first process names the one that does not come.
fn call_roll(world: &World, store: &Store, timeout: Duration) -> Result<Vec<Member>, PluginError> {
    let own = Member {
        host: host_name(),
        process: std::process::id(),
    };
    let text = |value: &Member| serde_json::to_vec(value).unwrap_or_default();
    let failed = |error: &Error| no_store(world, error);
    store
        .set(&format!("member/{}", world.rank), &text(&own))
        .map_err(|error| failed(&error))?;
    if world.rank > 0 {
        // The first process needs as long at most, and then says who is missing.
        let text = store.get("roll", 2 * timeout);
        let text = text.map_err(|error| failed(&error))?;
        return read::<Result<_, PluginError>>(&text)?;
    }
    let begin = Instant::now();
    let call = |rank: usize| -> Result<Member, PluginError> {
        let left = timeout.saturating_sub(begin.elapsed()).max(MAX_PAUSE);
        let text = store
            .get(&format!("member/{rank}"), left)
            .map_err(|error| missing(rank, world.n_ranks, timeout, &error))?;
        read(&text)
    };
    let members: Result<Vec<Member>, PluginError> = (0..world.n_ranks).map(call).collect();
    let text = serde_json::to_vec(&members).unwrap_or_default();
    store.set("roll", &text).map_err(|error| failed(&error))?;
    members
}

fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, PluginError> {
    serde_json::from_slice(text).map_err(|error| {
        PluginError::new("the processes do not understand each other")
            .why(error.to_string())
            .fix("start the same `moeut-host` on all hosts")
    })
}

fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

fn missing(rank: usize, n_ranks: usize, timeout: Duration, error: &Error) -> PluginError {
    PluginError::new(format!("rank {rank} of {n_ranks} does not come"))
        .why(format!("waited for {} s: {error}", timeout.as_secs_f64()))
        .fix("look at its output, and whether its host reaches this one; `-distributed_timeout` says how long to wait")
}

fn no_store(world: &World, error: &Error) -> PluginError {
    let World { host, port, .. } = world;
    PluginError::new(format!("the meeting point `{host}:{port}` does not answer"))
        .why(error.to_string())
        .fix("check `MASTER_ADDR` and `MASTER_PORT`, and that this host may connect to that one; the first process has to run there")
}

fn not_connected() -> PluginError {
    PluginError::new("the processes are not connected")
        .why("an exchange was asked for before the device was known")
}

/// Compares another process' facts with the first one's.
fn compare(
    subject: &str,
    first: &BTreeMap<String, String>,
    rank: usize,
    other: &BTreeMap<String, String>,
) -> Verdict {
    let names = first.keys().chain(other.keys());
    let mut differing = names.filter(|&name| first.get(name) != other.get(name));
    let Some(name) = differing.next() else {
        return Ok(());
    };
    let of = |facts: &BTreeMap<String, String>| {
        facts
            .get(name)
            .map_or_else(|| "none".to_owned(), |value| format!("`{value}`"))
    };
    Err(PluginError::new(format!(
        "rank {rank} differs from rank 0 in {subject} `{name}`"
    ))
    .why(format!(
        "rank 0 has {}, rank {rank} has {}",
        of(first),
        of(other)
    )))
}

/// Of `n` things in a row, those of `rank`: as even as possible, larger shares first.
fn share_of(n: usize, rank: usize, n_ranks: usize) -> std::ops::Range<usize> {
    let (base, extra) = (n / n_ranks, n % n_ranks);
    let first = rank * base + rank.min(extra);
    first..first + base + usize::from(rank < extra)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_larger_ones_come_first() {
        let shares = |n, n_ranks| -> Vec<usize> {
            (0..n_ranks)
                .map(|rank| share_of(n, rank, n_ranks).len())
                .collect()
        };
        assert_eq!(shares(7, 3), [3, 2, 2]);
        assert_eq!(shares(2, 4), [1, 1, 0, 0]);
        for (n, n_ranks) in [(7, 3), (2, 4), (64, 8), (0, 2)] {
            let all: Vec<usize> = (0..n_ranks)
                .flat_map(|rank| share_of(n, rank, n_ranks))
                .collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_difference_is_named() {
        let facts = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            pairs.iter().map(owned).collect()
        };
        let first = facts(&[("lr", "0.1"), ("wd", "0")]);
        assert_eq!(compare("argument", &first, 2, &first), Ok(()));
        let error =
            compare("argument", &first, 2, &facts(&[("lr", "0.2"), ("wd", "0")])).unwrap_err();
        assert_eq!(error.what, "rank 2 differs from rank 0 in argument `lr`");
        assert_eq!(error.why, "rank 0 has `0.1`, rank 2 has `0.2`");
        let error = compare("plugin", &first, 1, &facts(&[("lr", "0.1")])).unwrap_err();
        assert_eq!(error.why, "rank 0 has `0`, rank 1 has none");
    }

    /// Alone, nothing is exchanged and no tensor changes.
    #[test]
    fn one_process_is_a_group() {
        let group = Group::single();
        assert_eq!(
            (group.rank(), group.n_ranks(), group.share_of(5)),
            (0, 1, 0..5)
        );
        let tensor = Tensor::from_slice(&[1.0, 2.0]);
        group.sum(&[&tensor]).unwrap();
        group.broadcast(&[&tensor], 0).unwrap();
        assert_eq!(tensor, Tensor::from_slice(&[1.0, 2.0]));
        let shared: Result<u64, PluginError> = group.share("x", || Ok(7));
        assert_eq!(shared, Ok(7));
        assert!(group.fail(&PluginError::new("x")));
    }
}
