//! Gradients of the whole batch from those of all processes, exchanged while the backward pass still runs.
//!
//! ```text
//! bucket         parameters in a row, last ones first, of 25 MB together: the order in which backward reaches them
//! replicated     each bucket: grad ← Σ_ranks grad;                          every process updates every parameter
//! sharded        each bucket: part r of Σ_ranks grad → process r;           every process updates its part,
//!                after the update: part r of the parameters → everyone      and holds that part's optimizer state
//! ```
//! A bucket is sent as soon as the last of its gradients is there; buckets go in one order in all processes, whatever
//! the order in which they are ready. Only the last microbatch's backward sends. The loss of each process is already
//! weighted by its share of the batch, so sums are the gradients of the whole batch's mean.
//!
//! Source: PyTorch's `DistributedDataParallel` for buckets (arXiv 2006.15704), stage 1 of `ZeRO` for shards (arXiv 1910.02054).

use super::group::Group;
use moeut_c10d::{Error, GradHooks, Work};
use moeut_plugin_api::PluginError;
use moeut_torch::OrPluginError;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{TchError, Tensor};

/// Bytes of a bucket, as in PyTorch: large enough for the network's bandwidth, small enough to overlap.
const BUCKET_BYTES: usize = 25 << 20;

/// Shards begin at multiples of so many elements, for vector loads.
const ALIGNMENT: usize = 64;

/// The part of a parameter that this process updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index of the parameter.
    pub param: usize,
    /// Its elements, row by row.
    pub elements: Range<usize>,
}

/// Collects the gradients of a step.
pub struct Gradients {
    exchange: Arc<Mutex<Exchange>>,
    /// Held for what they do.
    _hooks: Option<GradHooks>,
}

/// Parameters that are sent together.
#[derive(Debug, PartialEq, Eq)]
struct Bucket {
    /// Indices of parameters, each with its first element in the flat bucket.
    members: Vec<(usize, usize)>,
    /// Elements of a shard; the flat bucket has as many for each process, the last ones of no meaning.
    shard_len: usize,
}

impl Bucket {
    /// What of the bucket lies in the shard of a process: each part of a parameter, and where it is in the shard.
    fn pieces(&self, sizes: &[usize], rank: usize) -> Vec<(Piece, usize)> {
        let shard = rank * self.shard_len..(rank + 1) * self.shard_len;
        let within = |&(param, at): &(usize, usize)| {
            let begin = shard.start.max(at);
            let end = shard.end.min(at + sizes[param]);
            let elements = begin.checked_sub(at)?..end.checked_sub(at)?;
            let piece = Piece { param, elements };
            (begin < end).then(|| (piece, begin - shard.start))
        };
        self.members.iter().filter_map(within).collect()
    }
}

/// The gradients of a step on their way.
struct Exchange {
    group: Group,
    params: Vec<Tensor>,
    is_sharded: bool,
    buckets: Vec<Bucket>,
    /// Bucket of each parameter.
    bucket_of: Vec<usize>,
    /// Nothing is exchanged any more.
    is_isolated: bool,
    /// Whether this backward pass is the last of the step.
    is_armed: bool,
    /// Gradients that each bucket still waits for.
    n_missing: Vec<usize>,
    /// Buckets that are on their way, from the first on.
    sent: Vec<Sent>,
    error: Option<Failed>,
}

/// A bucket on its way.
#[derive(Default)]
struct Sent {
    work: Option<Work>,
    /// What is sent, if it is not the gradients themselves.
    _flat: Option<Tensor>,
    /// This process' part of the sum, if sharded.
    shard: Option<Tensor>,
}

/// What may go wrong during a backward pass.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Exchange(#[from] Error),
    #[error(transparent)]
    Tensor(#[from] TchError),
}

impl Failed {
    fn explain(self, group: &Group) -> PluginError {
        match self {
            Self::Exchange(error) => group.explain(&error),
            Self::Tensor(error) => {
                let failed: Result<(), TchError> = Err(error);
                let text = failed.or_plugin_error("gradients cannot be exchanged");
                text.err().unwrap_or_default()
            }
        }
    }
}

impl Gradients {
    /// Of these parameters; `is_sharded`: each process gets a part of the sums.
    ///
    /// # Errors
    /// If libtorch allows no hooks.
    pub fn new(group: &Group, params: &[Tensor], is_sharded: bool) -> Result<Self, PluginError> {
        let buckets = buckets(params, group.n_ranks());
        let mut bucket_of = vec![0; params.len()];
        for (index, bucket) in buckets.iter().enumerate() {
            for (param, _) in &bucket.members {
                bucket_of[*param] = index;
            }
        }
        let exchange = Arc::new(Mutex::new(Exchange {
            group: group.clone(),
            params: params.iter().map(Tensor::shallow_clone).collect(),
            is_sharded: is_sharded && !group.is_single(),
            is_isolated: false,
            n_missing: Vec::new(),
            buckets,
            bucket_of,
            is_armed: false,
            sent: Vec::new(),
            error: None,
        }));
        let hooks = if group.is_single() {
            None
        } else {
            let of_hooks = Arc::clone(&exchange);
            let tensors: Vec<&Tensor> = params.iter().collect();
            let hooks = GradHooks::new(&tensors, move |param| lock(&of_hooks).arrived(param));
            Some(hooks.map_err(|error| {
                PluginError::new("gradients cannot be watched").why(error.to_string())
            })?)
        };
        Ok(Self {
            exchange,
            _hooks: hooks,
        })
    }

    /// What this process updates: every parameter, or its shard of each bucket.
    pub fn pieces(&self) -> Vec<Piece> {
        lock(&self.exchange).pieces()
    }

    /// A backward pass begins; the step's last one sends gradients as soon as they are there.
    pub fn expect(&self, is_last: bool) {
        lock(&self.exchange).expect(is_last);
    }

    /// Nothing is exchanged any more.
    pub fn isolate(&mut self) {
        lock(&self.exchange).is_isolated = true;
    }

    /// The sums over all processes, of each of [`Gradients::pieces`]; nothing where no parameter's gradient is.
    ///
    /// # Errors
    /// If another process has ended, or memory does not suffice.
    pub fn finish(&self) -> Result<Vec<Option<Tensor>>, PluginError> {
        let _no_grad = tch::no_grad_guard();
        lock(&self.exchange).finish()
    }

    /// After an update: everyone gets the parts of the parameters that the others have updated.
    ///
    /// # Errors
    /// If another process has ended, or memory does not suffice.
    pub fn spread(&self) -> Result<(), PluginError> {
        let _no_grad = tch::no_grad_guard();
        let exchange = lock(&self.exchange);
        let params: Vec<&Tensor> = exchange.params.iter().collect();
        exchange.gather(
            &|piece| elements(&exchange.params[piece.param], piece),
            &params,
        )
    }

    /// Puts the pieces of all processes together: tensors of the parameters' shapes, which are overwritten.
    ///
    /// # Errors
    /// As [`Gradients::spread`].
    pub fn gather(&self, pieces: &[Tensor], into: &[&Tensor]) -> Result<(), PluginError> {
        let _no_grad = tch::no_grad_guard();
        let exchange = lock(&self.exchange);
        let own = exchange.pieces();
        let of = |piece: &Piece| {
            let index = own
                .iter()
                .position(|known| known == piece)
                .unwrap_or_default();
            pieces[index].shallow_clone()
        };
        exchange.gather(&of, into)
    }

    /// Whether each process has a part only.
    pub fn is_sharded(&self) -> bool {
        lock(&self.exchange).is_sharded
    }
}

impl Exchange {
    fn sizes(&self) -> Vec<usize> {
        self.params.iter().map(Tensor::numel).collect()
    }

    fn pieces(&self) -> Vec<Piece> {
        if !self.is_sharded {
            let whole = |(param, tensor): (usize, &Tensor)| Piece {
                param,
                elements: 0..tensor.numel(),
            };
            return self.params.iter().enumerate().map(whole).collect();
        }
        let sizes = self.sizes();
        let of_bucket = |bucket: &Bucket| bucket.pieces(&sizes, self.group.rank());
        let all = self.buckets.iter().flat_map(of_bucket);
        all.map(|(piece, _)| piece).collect()
    }

    fn expect(&mut self, is_last: bool) {
        self.is_armed = is_last && !self.is_isolated;
        self.n_missing = self
            .buckets
            .iter()
            .map(|bucket| bucket.members.len())
            .collect();
        self.sent.clear();
        self.error = None;
    }

    /// On the thread of the backward pass.
    fn arrived(&mut self, param: usize) {
        if !self.is_armed || self.error.is_some() {
            return;
        }
        let _no_grad = tch::no_grad_guard();
        let bucket = self.bucket_of[param];
        self.n_missing[bucket] = self.n_missing[bucket].saturating_sub(1);
        while self.n_missing.get(self.sent.len()) == Some(&0) {
            self.send_next();
        }
    }

    fn send_next(&mut self) {
        match self.send(&self.buckets[self.sent.len()]) {
            Ok(sent) => self.sent.push(sent),
            Err(error) => {
                self.error = Some(error);
                self.sent.push(Sent::default());
            }
        }
    }

    fn send(&self, bucket: &Bucket) -> Result<Sent, Failed> {
        if !self.is_sharded {
            let members = bucket.members.iter();
            let grads: Vec<Tensor> = members
                .map(|(param, _)| self.params[*param].grad())
                .filter(Tensor::defined)
                .collect();
            let work = if grads.is_empty() {
                None
            } else {
                self.group.start_sum(&grads.iter().collect::<Vec<_>>())?
            };
            return Ok(Sent {
                work,
                ..Sent::default()
            });
        }
        let flat = self.flat(bucket)?;
        for &(param, at) in &bucket.members {
            let grad = self.params[param].grad();
            if grad.defined() {
                let into = flat.f_narrow(0, int(at), int(grad.numel()))?;
                into.view([-1]).f_copy_(&grad.f_reshape([-1])?)?;
            }
        }
        let shard = Tensor::f_empty([int(bucket.shard_len)], (flat.kind(), flat.device()))?;
        let work = self.group.start_scatter(&shard, &flat)?;
        Ok(Sent {
            work,
            _flat: Some(flat),
            shard: Some(shard),
        })
    }

    /// Zeros, as many as all shards of a bucket have.
    fn flat(&self, bucket: &Bucket) -> Result<Tensor, TchError> {
        let like = &self.params[bucket.members[0].0];
        let len = bucket.shard_len * self.group.n_ranks();
        Tensor::f_zeros([int(len)], (like.kind(), like.device()))
    }

    fn finish(&mut self) -> Result<Vec<Option<Tensor>>, PluginError> {
        self.is_armed = false;
        while self.sent.len() < self.buckets.len() && !self.group.is_single() {
            self.send_next();
        }
        if let Some(error) = self.error.take() {
            return Err(error.explain(&self.group));
        }
        let sizes = self.sizes();
        let mut of_shards = Vec::new();
        for (sent, bucket) in self.sent.drain(..).zip(&self.buckets) {
            if let Some(work) = sent.work {
                work.wait().map_err(|error| self.group.explain(&error))?;
            }
            if let Some(shard) = sent.shard {
                for (piece, at) in bucket.pieces(&sizes, self.group.rank()) {
                    let has_grad = self.params[piece.param].grad().defined();
                    let part = shard.f_narrow(0, int(at), int(piece.elements.len()));
                    let part = part.or_plugin_error("a gradient cannot be cut")?;
                    of_shards.push(has_grad.then_some(part));
                }
            }
        }
        if self.is_sharded {
            return Ok(of_shards);
        }
        let grads = self.params.iter().map(Tensor::grad);
        Ok(grads
            .map(|grad| Some(grad).filter(Tensor::defined))
            .collect())
    }

    /// `of` gives this process' pieces; `into` has a tensor for each parameter.
    fn gather(&self, of: &dyn Fn(&Piece) -> Tensor, into: &[&Tensor]) -> Result<(), PluginError> {
        if !self.is_sharded {
            return Ok(());
        }
        let sizes = self.sizes();
        for bucket in &self.buckets {
            let work = || -> Result<(), Failed> {
                let flat = self.flat(bucket)?;
                let shard = Tensor::f_zeros([int(bucket.shard_len)], (flat.kind(), flat.device()))?;
                for (piece, at) in bucket.pieces(&sizes, self.group.rank()) {
                    let part = shard.f_narrow(0, int(at), int(piece.elements.len()))?;
                    part.view([-1]).f_copy_(&of(&piece))?;
                }
                if let Some(work) = self.group.start_gather(&flat, &shard)? {
                    work.wait()?;
                }
                for &(param, at) in &bucket.members {
                    let part = flat.f_narrow(0, int(at), int(sizes[param]))?;
                    let target = into[param];
                    target.shallow_clone().f_copy_(&part.f_view_as(target)?)?;
                }
                Ok(())
            };
            work().map_err(|error| error.explain(&self.group))?;
        }
        Ok(())
    }
}

/// The elements of a piece, sharing storage with the parameter, which is contiguous.
pub fn elements(param: &Tensor, piece: &Piece) -> Tensor {
    let Piece { elements, .. } = piece;
    let flat = param.detach().view([-1]);
    flat.narrow(0, int(elements.start), int(elements.len()))
}

/// Cuts the parameters into buckets, from the last one on.
fn buckets(params: &[Tensor], n_ranks: usize) -> Vec<Bucket> {
    let mut buckets: Vec<Vec<(usize, usize)>> = Vec::new();
    let (mut len, mut n_bytes, mut kind) = (0, 0, None);
    let mut lens = Vec::new();
    for (index, param) in params.iter().enumerate().rev() {
        let is_full = n_bytes >= BUCKET_BYTES || kind != Some(param.kind());
        if is_full {
            buckets.push(Vec::new());
            lens.push(0);
            (len, n_bytes, kind) = (0, 0, Some(param.kind()));
        }
        if let (Some(bucket), Some(of_bucket)) = (buckets.last_mut(), lens.last_mut()) {
            bucket.push((index, len));
            len += param.numel();
            *of_bucket = len;
        }
        n_bytes += param.numel() * param.kind().elt_size_in_bytes();
    }
    let shards = buckets.into_iter().zip(lens);
    shards
        .map(|(members, len)| Bucket {
            members,
            shard_len: len.div_ceil(n_ranks * ALIGNMENT) * ALIGNMENT,
        })
        .collect()
}

fn lock(exchange: &Mutex<Exchange>) -> MutexGuard<'_, Exchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}

fn int(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn params(sizes: &[i64]) -> Vec<Tensor> {
        let of =
            |&size: &i64| Tensor::ones([size], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        sizes.iter().map(of).collect()
    }

    /// 25 MB are 6553600 floats.
    #[test]
    fn buckets_are_filled_from_the_last_parameter_on() {
        let all = buckets(&params(&[10, 5_000_000, 5_000_000, 3]), 2);
        let members: Vec<_> = all.iter().map(|bucket| bucket.members.clone()).collect();
        assert_eq!(
            members,
            [vec![(3, 0), (2, 3), (1, 5_000_003)], vec![(0, 0)]]
        );
        assert_eq!(all[1].shard_len, 64);
        assert_eq!(all[0].shard_len, 5_000_064);
    }

    #[test]
    fn shards_hold_each_element_once() {
        let sizes = [100, 7, 300, 1];
        for n_ranks in [1, 2, 3, 4, 7] {
            let all = buckets(&params(&[100, 7, 300, 1]), n_ranks);
            let mut seen = sizes.map(|size| vec![0; size]);
            for rank in 0..n_ranks {
                for bucket in &all {
                    for (piece, at) in bucket.pieces(&sizes, rank) {
                        assert!(at + piece.elements.len() <= bucket.shard_len);
                        for element in piece.elements {
                            seen[piece.param][element] += 1;
                        }
                    }
                }
            }
            assert!(seen.iter().flatten().all(|&n| n == 1), "{n_ranks} ranks");
        }
    }

    #[test]
    fn one_process_has_its_own_gradients() {
        let params = params(&[4, 2]);
        let gradients = Gradients::new(&Group::single(), &params, false).unwrap();
        gradients.expect(true);
        (&params[0] * 3.0).sum(Kind::Float).backward();
        let grads = gradients.finish().unwrap();
        assert_eq!(grads[0], Some(Tensor::from_slice(&[3.0_f32; 4])));
        assert!(grads[1].is_none());
        assert_eq!(
            gradients.pieces()[1],
            Piece {
                param: 1,
                elements: 0..2
            }
        );
    }
}
