//! Checks NCCL on the GPUs of this machine, or of several as `torchrun` starts it: each operation against arithmetic,
//! operations started during backward, an abort and a time-out, and how fast all-reduce is.
//!
//! ```text
//! cargo run --release -p moeut-c10d --example nccl
//! ```
//!
//! Started by hand it starts itself once per GPU. Prints a line per check and ends with 1 if one failed. The tests of
//! the crate cannot do this: they run where there is no GPU.

#![expect(clippy::print_stdout, reason = "prints its results")]

use std::env;
use std::net::TcpListener;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use moeut_c10d::{Backend, GradHooks, Group, Reduction, Store, prepare_environment};
use tch::{Cuda, Device, Kind, Tensor};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const PATIENCE: Duration = Duration::from_mins(2);
/// The time-out of the group that is meant to see it pass.
const SHORT: Duration = Duration::from_secs(8);
const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Int64];

fn main() -> ExitCode {
    if let Err(error) = prepare_environment() {
        println!("FAIL environment: {error}");
        return ExitCode::FAILURE;
    }
    match moeut_torch::cuda::load() {
        Ok(true) => {}
        Ok(false) => {
            println!("FAIL libtorch sees no GPU");
            return ExitCode::FAILURE;
        }
        Err(error) => {
            println!("FAIL {}: {}", error.what, error.why);
            return ExitCode::FAILURE;
        }
    }
    let is_well = match env::var("RANK") {
        Ok(_) => Process::from_environment().and_then(|process| process.check_all()),
        Err(_) => start_ranks(),
    };
    match is_well {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("FAIL {error}");
            ExitCode::FAILURE
        }
    }
}

/// One process per GPU, with the variables of `torchrun`.
fn start_ranks() -> Result<bool, Box<dyn std::error::Error>> {
    let n_ranks = Cuda::device_count();
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    println!("{n_ranks} GPUs");
    let mut ranks = Vec::new();
    for rank in 0..n_ranks {
        let process = Command::new(env::current_exe()?)
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", n_ranks.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .spawn()?;
        ranks.push(process);
    }
    let mut is_well = true;
    for (rank, process) in ranks.iter_mut().enumerate() {
        let status = process.wait()?;
        println!("rank {rank}: {status}");
        is_well &= status.success();
    }
    Ok(is_well)
}

struct Process {
    rank: usize,
    n_ranks: usize,
    device: Device,
    store: Store,
}

impl Process {
    fn from_environment() -> Result<Self, Box<dyn std::error::Error>> {
        let number = |name: &str| -> Result<usize, Box<dyn std::error::Error>> {
            let value = env::var(name).map_err(|_| format!("{name} is not set"))?;
            Ok(value.parse().map_err(|_| format!("{name} is `{value}`"))?)
        };
        let (rank, n_ranks) = (number("RANK")?, number("WORLD_SIZE")?);
        let port = u16::try_from(number("MASTER_PORT")?)?;
        let host = env::var("MASTER_ADDR").map_err(|_| "MASTER_ADDR is not set")?;
        let has_agent = env::var("TORCHELASTIC_USE_AGENT_STORE").is_ok_and(|set| set == "True");
        let is_server = rank == 0 && !has_agent;
        let store = Store::tcp(&host, port, is_server, None, PATIENCE)?;
        Ok(Self {
            rank,
            n_ranks,
            device: Device::Cuda(number("LOCAL_RANK")?),
            store: store.prefixed("nccl-check"),
        })
    }

    fn group(&self, name: &str, timeout: Duration) -> Result<Group, moeut_c10d::Error> {
        let (store, rank, n_ranks) = (self.store.prefixed(name), self.rank, self.n_ranks);
        Group::new(Backend::Nccl, &store, rank, n_ranks, self.device, timeout)
    }

    fn check_all(&self) -> Result<bool, Box<dyn std::error::Error>> {
        let group = Arc::new(self.group("all", PATIENCE)?);
        let mut is_well = true;
        for kind in KINDS {
            is_well &= self.report(
                &format!("all_reduce {kind:?}"),
                self.all_reduce(&group, kind),
            );
            is_well &= self.report(&format!("broadcast {kind:?}"), self.broadcast(&group, kind));
            is_well &= self.report(
                &format!("all_gather {kind:?}"),
                self.all_gather(&group, kind),
            );
            let outcome = self.reduce_scatter(&group, kind);
            is_well &= self.report(&format!("reduce_scatter {kind:?}"), outcome);
        }
        is_well &= self.report("barrier", group.barrier().map_err(Into::into));
        is_well &= self.report("overlap with backward", self.overlap(&group));
        is_well &= self.report("bandwidth", self.bandwidth(&group));
        is_well &= self.report("check", group.check().map_err(Into::into));
        let started = Instant::now();
        drop(group);
        is_well &= self.report(&format!("leave ({:.2?})", started.elapsed()), Ok(()));
        is_well &= self.report("a world of one", self.alone());
        if self.n_ranks > 1 {
            is_well &= self.report("abort", self.abort());
            is_well &= self.report("time-out", self.timeout());
        }
        Ok(is_well)
    }

    /// Failures of all ranks, successes of the first.
    fn report(&self, what: &str, outcome: Outcome) -> bool {
        let is_well = outcome.is_ok();
        match outcome {
            Ok(()) if self.rank == 0 => println!("PASS {what}"),
            Ok(()) => {}
            Err(error) => println!("FAIL rank {} {what}: {error}", self.rank),
        }
        is_well
    }

    fn ranks(&self) -> i64 {
        i64::try_from(self.n_ranks).unwrap_or(i64::MAX)
    }

    /// Rank `r` has `[r·10, r·10 + 1, …]`; whole numbers below 256 are exact in bfloat16.
    fn tensor_of(&self, rank: usize, n: i64, kind: Kind) -> Tensor {
        let first = i64::try_from(rank).unwrap_or(0) * 10;
        Tensor::arange_start(first, first + n, (kind, self.device))
    }

    fn own(&self, n: i64, kind: Kind) -> Tensor {
        self.tensor_of(self.rank, n, kind)
    }

    fn of_all(&self, n: i64, kind: Kind) -> Tensor {
        let all: Vec<Tensor> = (0..self.n_ranks)
            .map(|rank| self.tensor_of(rank, n, kind))
            .collect();
        Tensor::stack(&all, 0)
    }

    fn all_reduce(&self, group: &Group, kind: Kind) -> Outcome {
        for op in [Reduction::Sum, Reduction::Max, Reduction::Min] {
            let expected = |n| {
                let all = self.of_all(n, kind);
                match op {
                    Reduction::Sum => all.sum_dim_intlist(0i64, false, kind),
                    Reduction::Max => all.amax(0i64, false),
                    Reduction::Min => all.amin(0i64, false),
                }
            };
            let tensors = [1, 7, 30].map(|n| self.own(n, kind));
            group.all_reduce(&tensors.each_ref(), op)?.wait()?;
            let alone = self.own(13, kind);
            group.all_reduce(&[&alone], op)?.wait()?;
            for (tensor, n) in tensors.iter().chain([&alone]).zip([1, 7, 30, 13]) {
                equal(tensor, &expected(n))?;
            }
        }
        Ok(())
    }

    fn broadcast(&self, group: &Group, kind: Kind) -> Outcome {
        for root in 0..self.n_ranks {
            let (long, short) = (self.own(11, kind), self.own(1, kind));
            group.broadcast(&[&long, &short], root)?.wait()?;
            equal(&long, &self.tensor_of(root, 11, kind))?;
            equal(&short, &self.tensor_of(root, 1, kind))?;
        }
        Ok(())
    }

    fn all_gather(&self, group: &Group, kind: Kind) -> Outcome {
        let into = Tensor::zeros([5 * self.ranks()], (kind, self.device));
        group.all_gather(&into, &self.own(5, kind))?.wait()?;
        equal(&into, &self.of_all(5, kind).view([-1]))
    }

    fn reduce_scatter(&self, group: &Group, kind: Kind) -> Outcome {
        let n = 3 * self.ranks();
        let into = Tensor::zeros([3], (kind, self.device));
        group.reduce_scatter(&into, &self.own(n, kind))?.wait()?;
        let sum = self.of_all(n, kind).sum_dim_intlist(0i64, false, kind);
        let first = 3 * i64::try_from(self.rank)?;
        equal(&into, &sum.narrow(0, first, 3))
    }

    /// Gradients that start to travel in the autograd thread arrive right.
    fn overlap(&self, group: &Arc<Group>) -> Outcome {
        let params: Vec<Tensor> = (0..8)
            .map(|_| {
                let param = Tensor::full([256, 256], 0.01, (Kind::Float, self.device));
                param.set_requires_grad(true)
            })
            .collect();
        let backward = |scale: f64| {
            let input = Tensor::full([256, 256], scale, (Kind::Float, self.device));
            let output = params
                .iter()
                .fold(input, |hidden, param| hidden.matmul(param));
            output.sum(Kind::Float).backward();
        };
        // The gradients of rank `r` are `r + 1` times those of scale 1.
        backward(1.0);
        let factor: f64 = (1..=self.n_ranks).map(|rank| rank as f64).sum();
        let expected: Vec<Tensor> = params.iter().map(|param| param.grad() * factor).collect();
        for param in &params {
            let _zeroed = param.grad().zero_();
        }

        let grads = Mutex::new(params.iter().map(Tensor::grad).collect::<Vec<_>>());
        let started = Arc::new(Mutex::new(Vec::new()));
        let (works, in_hook) = (Arc::clone(&started), Arc::clone(group));
        let hooks = GradHooks::new(&params.iter().collect::<Vec<_>>(), move |index| {
            if let (Ok(grads), Ok(mut works)) = (grads.lock(), works.lock()) {
                works.push(in_hook.all_reduce(&[&grads[index]], Reduction::Sum));
            }
        })?;
        backward(self.rank as f64 + 1.0);
        drop(hooks);
        let works = std::mem::take(&mut *started.lock().map_err(|_| "a hook panicked")?);
        if works.len() != params.len() {
            return Err(format!("{} of {} hooks ran", works.len(), params.len()).into());
        }
        for work in works {
            work?.wait()?;
        }
        for (param, expected) in params.iter().zip(&expected) {
            let gap = (param.grad() - expected).abs().max() / expected.abs().max();
            let gap = gap.double_value(&[]);
            // Sums of float32 in another order.
            if gap > 1e-5 {
                return Err(format!("relative error {gap:.1e}").into());
            }
        }
        Ok(())
    }

    /// Bytes of the tensor per second, and what each GPU sends and receives of it: `2 (n - 1) / n` times that.
    fn bandwidth(&self, group: &Group) -> Outcome {
        const REPEATS: u32 = 20;
        let per_link = 2.0 * (self.n_ranks as f64 - 1.0) / self.n_ranks as f64;
        for megabytes in [1, 4, 16, 64, 256, 1024] {
            let n_bytes = megabytes << 20;
            let tensor = Tensor::zeros([n_bytes / 2], (Kind::BFloat16, self.device));
            let run = |repeats: u32| -> Result<f64, moeut_c10d::Error> {
                group.barrier()?;
                let started = Instant::now();
                for _ in 0..repeats {
                    group.all_reduce(&[&tensor], Reduction::Sum)?.wait()?;
                }
                self.synchronize();
                Ok(started.elapsed().as_secs_f64() / f64::from(repeats))
            };
            run(3)?;
            let seconds = run(REPEATS)?;
            if self.rank == 0 {
                let speed = n_bytes as f64 / seconds / 1e9;
                println!(
                    "     {megabytes:>5} MiB: {:>8.3} ms, {speed:.1} GB/s, {:.1} GB/s per GPU",
                    seconds * 1e3,
                    speed * per_link
                );
            }
        }
        Ok(())
    }

    fn synchronize(&self) {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(i64::try_from(index).unwrap_or(0));
        }
    }

    fn alone(&self) -> Outcome {
        let store = self.store.prefixed(&format!("alone/{}", self.rank));
        let group = Group::new(Backend::Nccl, &store, 0, 1, self.device, PATIENCE)?;
        let (tensor, into) = (self.own(9, Kind::Float), self.own(9, Kind::Float));
        group.all_reduce(&[&tensor], Reduction::Sum)?.wait()?;
        group.broadcast(&[&tensor], 0)?.wait()?;
        group.all_gather(&into, &tensor)?.wait()?;
        group.reduce_scatter(&into, &tensor)?.wait()?;
        group.barrier()?;
        equal(&tensor, &self.own(9, Kind::Float))?;
        equal(&into, &tensor)
    }

    /// Rank 0 calls an operation that no other rank calls, and aborts from another thread. The others look on.
    fn abort(&self) -> Outcome {
        let group = self.group("abort", PATIENCE)?;
        let tensor = self.own(1000, Kind::Float);
        group.all_reduce(&[&tensor], Reduction::Sum)?.wait()?;
        self.synchronize();
        if self.rank > 0 {
            self.store.get("aborted", PATIENCE)?;
            group.abort();
            return Ok(());
        }
        let started = Instant::now();
        thread::scope(|scope| {
            let aborting = scope.spawn(|| {
                thread::sleep(Duration::from_secs(1));
                group.abort();
            });
            let work = group.all_reduce(&[&tensor], Reduction::Sum);
            let waited = work.and_then(moeut_c10d::Work::wait);
            let read = tensor
                .f_sum(Kind::Float)
                .and_then(|sum| sum.f_double_value(&[]));
            println!(
                "     abort: {waited:?}, read {read:?} after {:.2?}",
                started.elapsed()
            );
            aborting.join().map_err(|_| "a panic while aborting")
        })?;
        self.store.set("aborted", b"")?;
        match group.check() {
            Ok(()) => Err("the group does not know that it was aborted".into()),
            Err(_) if started.elapsed() < PATIENCE => Ok(()),
            Err(error) => Err(format!("{error}, but only after {:.2?}", started.elapsed()).into()),
        }
    }

    /// As above, without anybody to end it but the watchdog.
    fn timeout(&self) -> Outcome {
        let group = self.group("timeout", SHORT)?;
        let tensor = self.own(1000, Kind::Float);
        group.all_reduce(&[&tensor], Reduction::Sum)?.wait()?;
        self.synchronize();
        if self.rank > 0 {
            self.store.get("timed-out", PATIENCE)?;
            group.abort();
            return Ok(());
        }
        let started = Instant::now();
        let waited = group
            .all_reduce(&[&tensor], Reduction::Sum)
            .and_then(moeut_c10d::Work::wait);
        let read = tensor
            .f_sum(Kind::Float)
            .and_then(|sum| sum.f_double_value(&[]));
        println!(
            "     time-out: {waited:?}, read {read:?} after {:.2?}",
            started.elapsed()
        );
        let mut told = group.check();
        while told.is_ok() && started.elapsed() < SHORT * 3 {
            thread::sleep(Duration::from_millis(100));
            told = group.check();
        }
        println!("     time-out: {told:?} after {:.2?}", started.elapsed());
        self.store.set("timed-out", b"")?;
        match told {
            Ok(()) => Err("the group does not know that its time-out has passed".into()),
            Err(_) => Ok(()),
        }
    }
}

fn equal(tensor: &Tensor, expected: &Tensor) -> Outcome {
    if tensor.f_equal(expected)? {
        return Ok(());
    }
    let gap = (tensor - expected).abs().max().double_value(&[]);
    Err(format!("differs by up to {gap}").into())
}
