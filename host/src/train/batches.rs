//! Batches of token windows in a fixed order, read ahead by a thread, with an exact position.
//!
//! ```text
//! n = ⌊n_windows / batch_size⌋ batches an epoch;  lane j of batch p reads window p + j·n
//! ```
//! so each lane walks through one contiguous part of the stream; `-overfit_batches` ends each epoch earlier. What is stored in a checkpoint is the position of
//! the last batch that was *consumed*, whatever the thread has read ahead.
//!
//! Source: reference `framework/loader/sampler.py`, `MultibatchSequentialSampler`.

use super::TrainError;
use moeut_plugin_api::PluginError;
use moeut_plugin_api::abi::client::TokenDatasetClient;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use tch::Tensor;

/// Batches that wait in the queue; one more is in the thread's hands.
const READ_AHEAD: usize = 2;

/// Where in the stream a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that are complete.
    pub epoch: u64,
    /// Batches consumed of this pass.
    pub batch: u64,
}

impl Position {
    /// The position itself, or the next epoch's start if this epoch has been made shorter since it was saved.
    fn within(self, batches_per_epoch: u64) -> Self {
        if self.batch < batches_per_epoch {
            return self;
        }
        Self {
            epoch: self.epoch + 1,
            batch: 0,
        }
    }

    fn next(self, batches_per_epoch: u64) -> Self {
        let next = Self {
            batch: self.batch + 1,
            ..self
        };
        next.within(batches_per_epoch)
    }
}

/// How a stream becomes batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Sequences per optimizer step.
    pub batch_size: usize,
    /// Parts in which they are computed, one after the other.
    pub n_microbatches: usize,
    /// Tokens that the model sees per sequence.
    pub seq_len: usize,
    /// The first so many batches are all there is; every batch if absent.
    pub n_batches: Option<u64>,
}

impl BatchShape {
    /// Sizes of the microbatches: as even as possible, larger ones first, never empty.
    ///
    /// The reference's chunks can be fewer than asked for and then crash (9 sequences in 4 parts); these are not.
    pub fn microbatch_sizes(&self) -> Vec<usize> {
        let parts = self.n_microbatches.clamp(1, self.batch_size);
        let (base, extra) = (self.batch_size / parts, self.batch_size % parts);
        (0..parts)
            .map(|part| base + usize::from(part < extra))
            .collect()
    }
}

/// Part of a batch on its way to the model.
pub struct Microbatch {
    /// Token ids, int64 `[seq_len + 1, size]` on the CPU.
    pub tokens: Tensor,
    /// Its share of the batch, 0 to 1.
    pub weight: f64,
    /// Whether its rows do not go on from where the same rows of the last batch ended: a pass over the data begins.
    pub is_start: bool,
}

impl Microbatch {
    /// The same tokens, not copied.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            tokens: self.tokens.shallow_clone(),
            weight: self.weight,
            is_start: self.is_start,
        }
    }
}

struct Batch {
    microbatches: Vec<Microbatch>,
    after: Position,
}

/// The training stream.
pub struct Batches {
    queue: Receiver<Result<Batch, PluginError>>,
    shape: BatchShape,
    position: Position,
}

impl Batches {
    /// Starts to read behind `position`.
    ///
    /// # Errors
    /// If the stream does not fill one batch.
    pub fn start(
        dataset: Arc<TokenDatasetClient>,
        n_windows: u64,
        shape: BatchShape,
        position: Position,
    ) -> Result<Self, TrainError> {
        let batches_per_epoch = n_windows / shape.batch_size as u64;
        if batches_per_epoch == 0 {
            return Err(
                PluginError::new("the training data does not fill one batch")
                    .why(format!(
                        "it has {n_windows} sequences of {} tokens, and `batch_size` is {}",
                        shape.seq_len, shape.batch_size
                    ))
                    .fix("lower `-batch_size` or `-lm.unroll`, or give it more text")
                    .into(),
            );
        }
        let order = Order {
            stride: batches_per_epoch,
            n_batches: shape.n_batches.unwrap_or(u64::MAX).min(batches_per_epoch),
        };
        let position = position.within(order.n_batches);
        let (sender, queue) = sync_channel(READ_AHEAD);
        std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || {
                let mut position = position;
                loop {
                    let batch = read_batch(&dataset, shape, order, position);
                    let has_failed = batch.is_err();
                    position = position.next(order.n_batches);
                    // The receiver is gone when training ends.
                    if sender.send(batch).is_err() || has_failed {
                        return;
                    }
                }
            })
            .map_err(|error| PluginError::new("no thread can be started").why(error.to_string()))?;
        Ok(Self {
            queue,
            shape,
            position,
        })
    }

    /// The next batch, in microbatches.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn next_batch(&mut self) -> Result<Vec<Microbatch>, TrainError> {
        let batch = self.queue.recv().map_err(|_| {
            PluginError::new("the thread that reads the data has ended")
                .why("it reported its reason a step before")
        })??;
        self.position = batch.after;
        Ok(batch.microbatches)
    }

    /// How the stream becomes batches.
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// Position behind the last consumed batch.
    pub fn position(&self) -> Position {
        self.position
    }
}

/// Which windows make a batch, and how many batches an epoch has.
#[derive(Debug, Clone, Copy)]
struct Order {
    /// Windows between the same batch's lanes: `n` of the equation above.
    stride: u64,
    /// Batches of an epoch, at most `stride`.
    n_batches: u64,
}

fn read_batch(
    dataset: &TokenDatasetClient,
    shape: BatchShape,
    order: Order,
    position: Position,
) -> Result<Batch, PluginError> {
    let window = |lane: usize| position.batch + lane as u64 * order.stride;
    let mut lane = 0;
    let mut microbatches = Vec::new();
    for size in shape.microbatch_sizes() {
        let windows: Vec<u64> = (lane..lane + size).map(window).collect();
        lane += size;
        microbatches.push(Microbatch {
            tokens: read_windows(dataset, &windows, shape.seq_len)?,
            weight: size as f64 / shape.batch_size as f64,
            is_start: position.batch == 0,
        });
    }
    Ok(Batch {
        microbatches,
        after: position.next(order.n_batches),
    })
}

/// Reads windows as int64 `[seq_len + 1, windows]`, time-major.
///
/// # Errors
/// If the data cannot be read.
pub fn read_windows(
    dataset: &TokenDatasetClient,
    windows: &[u64],
    seq_len: usize,
) -> Result<Tensor, PluginError> {
    let mut ids = vec![0_i32; windows.len() * (seq_len + 1)];
    dataset.read(windows, &mut ids)?;
    let by_window = Tensor::from_slice(&ids).view([-1, super::int(seq_len) + 1]);
    Ok(by_window
        .transpose(0, 1)
        .to_kind(tch::Kind::Int64)
        .contiguous())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microbatches_add_up_and_are_never_empty() {
        for (batch_size, n_microbatches, sizes) in [
            (8, 1, &[8][..]),
            (8, 3, &[3, 3, 2]),
            (9, 4, &[3, 2, 2, 2]),
            (2, 5, &[1, 1]),
        ] {
            let shape = BatchShape {
                batch_size,
                n_microbatches,
                seq_len: 1,
                n_batches: None,
            };
            assert_eq!(shape.microbatch_sizes(), sizes);
        }
    }

    #[test]
    fn positions_wrap_into_the_next_epoch() {
        let mut position = Position::default();
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push((position.epoch, position.batch));
            position = position.next(3);
        }
        assert_eq!(seen, [(0, 0), (0, 1), (0, 2), (1, 0)]);
    }

    #[test]
    fn a_position_behind_a_shortened_epoch_is_the_start_of_the_next_one() {
        let saved = Position { epoch: 2, batch: 7 };
        assert_eq!(saved.within(8), saved);
        assert_eq!(saved.within(7), Position { epoch: 3, batch: 0 });
    }
}
