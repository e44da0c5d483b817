//! Batches of token windows in the order of a [`Sampler`], read ahead by a thread, with an exact position.
//!
//! What is stored in a checkpoint is the position of the last batch that was *consumed*, whatever the thread has read
//! ahead. `-overfit_batches` ends each epoch early.

use super::TrainError;
use super::sampler::Sampler;
use super::stream::Stream;
use moeut_plugin_api::PluginError;
use moeut_torch::{OrPluginError, cuda};
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{Receiver, sync_channel};
use tch::{Device, Tensor};

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
    /// Sequences per optimizer step, of all processes together.
    pub batch_size: usize,
    /// The first one of this process.
    pub first_row: usize,
    /// How many are this process'.
    pub n_rows: usize,
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
        let parts = self.n_microbatches.clamp(1, self.n_rows.max(1));
        let (base, extra) = (self.n_rows / parts, self.n_rows % parts);
        (0..parts)
            .map(|part| base + usize::from(part < extra))
            .collect()
    }
}

/// Part of a batch on its way to the model.
pub struct Microbatch {
    /// Token ids, int64 `[T + 1, size]` on the CPU, where `T` is `seq_len`, or less if all its documents are shorter;
    /// [`super::stream::BEHIND_END`] behind a document's end.
    pub tokens: Tensor,
    /// Tokens to be predicted.
    pub n_targets: usize,
    /// Its share of the whole batch's targets, 0 to 1.
    pub weight: f64,
    /// Whether its rows do not go on from where the same rows of the last batch ended: a pass over the data begins, or
    /// rows are documents.
    pub is_start: bool,
}

impl Microbatch {
    /// The same tokens, not copied.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            tokens: self.tokens.shallow_clone(),
            n_targets: self.n_targets,
            weight: self.weight,
            is_start: self.is_start,
        }
    }

    /// The tokens on a device. A copy to a GPU is queued behind the work of the step before, which nobody waits for.
    ///
    /// # Errors
    /// If memory does not suffice.
    pub(super) fn tokens_on(&self, device: Device) -> Result<Tensor, PluginError> {
        let copy = if device.is_cuda() {
            cuda::upload(&self.tokens, device)
        } else {
            self.tokens.f_to_device(device)
        };
        copy.or_plugin_error("a batch cannot be copied to the device")
    }
}

struct Batch {
    microbatches: Vec<Microbatch>,
    /// Of all processes.
    n_targets: usize,
    after: Position,
}

/// The training stream.
pub struct Batches {
    queue: Receiver<Result<Batch, PluginError>>,
    shape: BatchShape,
    position: Position,
    n_targets: usize,
}

impl Batches {
    /// Starts to read behind `position`.
    ///
    /// # Errors
    /// If the stream does not fill one batch.
    pub fn start(
        stream: Stream,
        mut sampler: Sampler,
        shape: BatchShape,
        position: Position,
    ) -> Result<Self, TrainError> {
        if sampler.n_batches() == 0 {
            return Err(
                PluginError::new("the training data does not fill one batch")
                    .why(format!(
                        "it has {} sequences of {} tokens, and `batch_size` is {}",
                        stream.n_windows(),
                        shape.seq_len,
                        shape.batch_size
                    ))
                    .fix("lower `-batch_size` or `-lm.unroll`, or give it more text")
                    .into(),
            );
        }
        let n_batches = shape
            .n_batches
            .map_or(sampler.n_batches(), |most| most.min(sampler.n_batches()));
        let position = position.within(n_batches);
        let (sender, queue) = sync_channel(READ_AHEAD);
        std::thread::Builder::new()
            .name("batches".into())
            .spawn(move || {
                let mut position = position;
                loop {
                    let after = position.next(n_batches);
                    let batch = read_batch(&stream, &mut sampler, shape, position).map(
                        |(microbatches, n_targets)| Batch {
                            microbatches,
                            n_targets,
                            after,
                        },
                    );
                    let has_failed = batch.is_err();
                    position = after;
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
            n_targets: 0,
        })
    }

    /// This process' part of the next batch, in microbatches.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn next_batch(&mut self) -> Result<Vec<Microbatch>, TrainError> {
        let batch = self.queue.recv().map_err(|_| {
            PluginError::new("the thread that reads the data has ended")
                .why("it reported its reason a step before")
        })??;
        self.position = batch.after;
        self.n_targets = batch.n_targets;
        Ok(batch.microbatches)
    }

    /// How the stream becomes batches.
    pub fn shape(&self) -> &BatchShape {
        &self.shape
    }

    /// Tokens to be predicted in the last consumed batch, by all processes together.
    pub fn n_targets(&self) -> usize {
        self.n_targets
    }

    /// Position behind the last consumed batch.
    pub fn position(&self) -> Position {
        self.position
    }
}

fn read_batch(
    stream: &Stream,
    sampler: &mut Sampler,
    shape: BatchShape,
    position: Position,
) -> Result<(Vec<Microbatch>, usize), PluginError> {
    let windows = sampler.windows(position);
    let n_targets = stream.n_targets(&windows);
    let mut rest = &windows[shape.first_row..shape.first_row + shape.n_rows];
    let mut microbatches = Vec::new();
    for size in shape.microbatch_sizes() {
        let (part, others) = rest.split_at(size);
        rest = others;
        let read = stream.read(part)?;
        microbatches.push(Microbatch {
            tokens: read.tokens_tb,
            n_targets: read.n_targets,
            weight: read.n_targets as f64 / n_targets as f64,
            is_start: position.batch == 0 || !sampler.has_lanes(),
        });
    }
    Ok((microbatches, n_targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn microbatches_add_up_and_are_never_empty() {
        for (n_rows, n_microbatches, sizes) in [
            (8, 1, &[8][..]),
            (8, 3, &[3, 3, 2]),
            (9, 4, &[3, 2, 2, 2]),
            (2, 5, &[1, 1]),
        ] {
            let shape = BatchShape {
                batch_size: 16,
                first_row: 0,
                n_rows,
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
