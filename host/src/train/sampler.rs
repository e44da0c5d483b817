//! Which windows make a batch: a function of the position alone, so that a run that goes on sees what it would have seen.
//!
//! ```text
//! stream      n = ⌊n_windows / batch_size⌋ batches an epoch;  lane j of batch p reads window p + j·n
//! documents   a shuffle of all documents for each epoch, cut into batches
//! buckets     the same shuffle, sorted by length, cut into batches, and the batches shuffled
//! ```
//! Each lane of a stream walks through one contiguous part of it. In buckets (`-length_bucketed_sampling`) documents of
//! about the same length come together, so that little is computed behind their ends; which of the equally long ones
//! meet is another draw in each epoch. What does not fill the last batch is left out of that epoch.
//!
//! # Source
//! Reference code `framework/loader/sampler.py`, `MultibatchSequentialSampler` and `BucketedSampler`.

use super::batches::Position;
use super::sampling::Uniform;
use std::sync::Arc;

/// How a stream becomes batches of windows.
#[derive(Debug)]
pub struct Sampler {
    batch_size: usize,
    /// `n` of the equations above.
    n_batches: u64,
    order: Order,
}

#[derive(Debug)]
enum Order {
    Lanes,
    Documents {
        lengths: Arc<[u32]>,
        seed: u64,
        is_bucketed: bool,
        /// The epoch that was asked for last, and its documents in the order of its batches.
        epoch: Option<(u64, Vec<u32>)>,
    },
}

impl Sampler {
    /// For windows cut from one stream.
    pub fn lanes(n_windows: u64, batch_size: usize) -> Self {
        Self {
            batch_size,
            n_batches: n_windows / batch_size as u64,
            order: Order::Lanes,
        }
    }

    /// For documents of these lengths.
    pub fn documents(lengths: Arc<[u32]>, batch_size: usize, seed: u64, is_bucketed: bool) -> Self {
        Self {
            batch_size,
            n_batches: (lengths.len() / batch_size) as u64,
            order: Order::Documents {
                lengths,
                seed,
                is_bucketed,
                epoch: None,
            },
        }
    }

    /// Whole batches of an epoch.
    pub fn n_batches(&self) -> u64 {
        self.n_batches
    }

    /// Whether a lane of a batch goes on where the same lane of the batch before ended.
    pub fn has_lanes(&self) -> bool {
        matches!(self.order, Order::Lanes)
    }

    /// The windows of a batch, lane by lane.
    ///
    /// # Panics
    /// If the epoch has no such batch, which is a bug in the caller.
    pub fn windows(&mut self, position: Position) -> Vec<u64> {
        assert!(
            position.batch < self.n_batches,
            "batch {} of {}",
            position.batch,
            self.n_batches
        );
        let (batch_size, n_batches) = (self.batch_size, self.n_batches);
        match &mut self.order {
            Order::Lanes => (0..batch_size as u64)
                .map(|lane| position.batch + lane * n_batches)
                .collect(),
            Order::Documents {
                lengths,
                seed,
                is_bucketed,
                epoch,
            } => {
                if epoch.as_ref().map(|(number, _)| *number) != Some(position.epoch) {
                    let documents =
                        shuffled(lengths, batch_size, *seed, position.epoch, *is_bucketed);
                    *epoch = Some((position.epoch, documents));
                }
                let documents = epoch.as_ref().map_or(&[][..], |(_, documents)| documents);
                let index = usize::try_from(position.batch).unwrap_or(usize::MAX);
                let of_batch = documents.chunks(batch_size).nth(index).unwrap_or(&[]);
                of_batch.iter().map(|&document| document.into()).collect()
            }
        }
    }
}

/// All documents of an epoch in the order of its batches.
fn shuffled(
    lengths: &[u32],
    batch_size: usize,
    seed: u64,
    epoch: u64,
    is_bucketed: bool,
) -> Vec<u32> {
    // Streams of neighbouring seeds must not be one stream, shifted.
    let mut uniform =
        Uniform::new(seed.rotate_left(32) ^ (epoch + 1).wrapping_mul(0xd6e8_feb8_6659_fd93));
    let mut documents: Vec<u32> = (0..).take(lengths.len()).collect();
    shuffle(&mut documents, &mut uniform);
    if !is_bucketed {
        return documents;
    }
    // Stable, so that documents of one length stay as shuffled.
    documents.sort_by_key(|&document| lengths[document as usize]);
    let mut batches: Vec<&[u32]> = documents.chunks_exact(batch_size).collect();
    shuffle(&mut batches, &mut uniform);
    batches.concat()
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], uniform: &mut Uniform) {
    for end in (1..items.len()).rev() {
        items.swap(end, uniform.below(end + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(sampler: &mut Sampler, epoch: u64) -> Vec<Vec<u64>> {
        (0..sampler.n_batches())
            .map(|batch| sampler.windows(Position { epoch, batch }))
            .collect()
    }

    fn lengths() -> Arc<[u32]> {
        (0..103).map(|i| 2 + (i * 37) % 50).collect()
    }

    fn documents(seed: u64, is_bucketed: bool) -> Sampler {
        Sampler::documents(lengths(), 10, seed, is_bucketed)
    }

    #[test]
    fn a_lane_walks_through_one_part_of_the_stream() {
        let mut sampler = Sampler::lanes(11, 3);
        assert_eq!(
            epoch(&mut sampler, 5),
            [[0, 3, 6], [1, 4, 7], [2, 5, 8]].map(Vec::from)
        );
    }

    /// Ten batches of ten; three of the 103 documents wait for another epoch.
    #[test]
    fn a_document_comes_at_most_once_in_an_epoch() {
        for is_bucketed in [false, true] {
            let mut seen = epoch(&mut documents(1, is_bucketed), 0).concat();
            assert_eq!(seen.len(), 100);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 100);
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_positions_can_be_asked_for_in_any_order() {
        for is_bucketed in [false, true] {
            let mut sampler = documents(1, is_bucketed);
            let first = epoch(&mut sampler, 0);
            assert_ne!(epoch(&mut sampler, 1), first);
            assert_eq!(epoch(&mut sampler, 0), first);
            assert_ne!(epoch(&mut documents(2, is_bucketed), 0), first);
            let position = Position { epoch: 0, batch: 7 };
            assert_eq!(documents(1, is_bucketed).windows(position), first[7]);
        }
    }

    #[test]
    fn a_bucket_has_documents_of_about_one_length() {
        let lengths = lengths();
        let spread = |is_bucketed| -> u32 {
            let all = epoch(&mut documents(1, is_bucketed), 0);
            let of_batch = |batch: &Vec<u64>| {
                let of = |&window: &u64| lengths[usize::try_from(window).unwrap()];
                let (least, most) = (batch.iter().map(of).min(), batch.iter().map(of).max());
                most.unwrap() - least.unwrap()
            };
            all.iter().map(of_batch).max().unwrap()
        };
        // 103 documents have 50 lengths, so ten neighbours span about five of them.
        assert!(spread(true) <= 6, "{}", spread(true));
        assert!(spread(false) >= 25, "{}", spread(false));
    }

    /// The batches of an epoch must not come shortest first.
    #[test]
    fn buckets_come_in_no_order() {
        let lengths = lengths();
        let firsts: Vec<u32> = epoch(&mut documents(1, true), 0)
            .iter()
            .map(|batch| lengths[usize::try_from(batch[0]).unwrap()])
            .collect();
        assert!(!firsts.is_sorted());
    }
}
