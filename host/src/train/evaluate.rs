//! Validation: token-exact loss over every window of a stream, in the parameters' own precision.

use super::loss::{inputs_and_targets, token_losses};
use super::reporting::Observer;
use super::segments::Segments;
use super::stream::Stream;
use super::{TrainError, forward, int};
use crate::distributed::Group;
use crate::signals::Signals;
use moeut_plugin_api::ForwardInput;
use moeut_plugin_api::abi::client::ModelClient;
use moeut_torch::IntoHandle;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// A stream to validate on.
pub struct EvalStream {
    /// Name in the logs, such as `val`.
    pub name: String,
    /// The data.
    pub stream: Stream,
    /// UTF-8 bytes of text per token, if known.
    pub utf8_bytes_per_token: Option<f64>,
}

/// The result of a validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// Nats per token.
    pub loss: f64,
    /// Share of tokens that were the likeliest, 0 to 1.
    pub accuracy: f64,
    /// Bits per UTF-8 byte of the text, if its bytes were counted.
    pub bits_per_byte: Option<f64>,
    /// Tokens that were predicted.
    pub n_tokens: u64,
}

impl Scores {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Who looks on while a stream is scored.
pub struct Watcher<'a> {
    /// End it.
    pub signals: &'a Signals,
    /// Each process scores its share.
    pub group: &'a Group,
    /// Gets what the passes tell.
    pub observer: &'a mut Observer,
    /// Hears how many of how many batches are scored.
    pub progress: &'a dyn Fn(u64, u64),
}

/// Scores a model on a stream; no scores if a signal ends it. What the model remembers of the training stays.
///
/// # Errors
/// If the data cannot be read or the model fails.
pub fn evaluate(
    model: &mut ModelClient,
    segments: Segments,
    stream: &EvalStream,
    batch_size: usize,
    device: Device,
    watcher: Watcher<'_>,
) -> Result<Option<Scores>, TrainError> {
    // The validation has a slot of its own, but its states are of no use afterwards.
    let of_training = segments.tensors(model)?;
    let scores = score(model, segments, stream, batch_size, device, watcher)?;
    segments.restore(model, &of_training)?;
    Ok(scores)
}

fn score(
    model: &mut ModelClient,
    segments: Segments,
    stream: &EvalStream,
    batch_size: usize,
    device: Device,
    watcher: Watcher<'_>,
) -> Result<Option<Scores>, TrainError> {
    let Watcher {
        signals,
        group,
        observer,
        progress,
    } = watcher;
    let _no_grad = tch::no_grad_guard();
    let order = Order::new(
        stream.stream.n_windows(),
        batch_size as u64,
        segments.is_on(),
        (group.rank() as u64, group.n_ranks() as u64),
    );
    let (mut loss, mut n_right) = (0.0, 0.0);
    for index in 0..order.n_own {
        progress(index, order.n_own);
        if signals.asked().is_some() {
            break;
        }
        let batch = order.batch(index);
        let tokens_tb = stream
            .stream
            .read(&batch.windows)?
            .tokens_tb
            .to_device(device);
        let (inputs, targets) = inputs_and_targets(&tokens_tb);
        let output = forward(
            model,
            &inputs,
            ForwardInput {
                tokens_tb: inputs.share(),
                is_training: false,
                wishes: observer.wishes(index + 1 == order.n_own),
                past: segments.validation(index == 0),
            },
        )?;
        let n_scored = int(batch.n_scored);
        let logits = output.logits.narrow(1, 0, n_scored);
        let targets = targets.narrow(1, 0, n_scored);
        loss += token_losses(&logits, &targets)?
            .sum(Kind::Double)
            .double_value(&[]);
        let right = logits.argmax(-1, false).eq_tensor(&targets);
        n_right += right.sum(Kind::Double).double_value(&[]);
        observer.add(batch.n_scored, output);
    }
    group.confer(signals)?;
    if signals.is_ending() {
        return Ok(None);
    }
    progress(order.n_own, order.n_own);
    let sums = Tensor::from_slice(&[loss, n_right]).to_device(device);
    group.sum(&[&sums])?;
    let windows: Vec<u64> = (0..stream.stream.n_windows()).collect();
    let n_tokens = stream.stream.n_targets(&windows);
    let [loss, accuracy] = [0, 1].map(|index| sums.double_value(&[index]) / n_tokens as f64);
    Ok(Some(Scores {
        loss,
        accuracy,
        n_tokens: n_tokens as u64,
        bits_per_byte: stream
            .utf8_bytes_per_token
            .map(|bytes| loss / std::f64::consts::LN_2 / bytes),
    }))
}

/// Which windows are scored together; each once.
///
/// ```text
/// n = ⌈n_windows / batch_size⌉ batches
/// without memory: batch p has the windows p·batch_size, p·batch_size + 1, …
/// with memory:    row j of batch p is window p + j·n, so that a row goes on from where it ended
/// ```
/// Several processes take turns at the batches, or with memory share the rows of `n_ranks · batch_size` in each batch.
///
/// With memory the last row can run out before the others. It then repeats the last window, which is not scored again,
/// because the number of rows that a memory belongs to is fixed.
///
/// The reference reads all streams by rows and drops what does not fill the last batch.
#[derive(Debug, Clone, Copy)]
struct Order {
    n_windows: u64,
    batch_size: u64,
    n_batches: u64,
    is_by_row: bool,
    /// This process and how many there are.
    rank: u64,
    n_ranks: u64,
    /// Batches of this process.
    n_own: u64,
}

/// One batch of a validation.
#[derive(Debug, PartialEq, Eq)]
struct Batch {
    windows: Vec<u64>,
    /// How many of the windows count, from the first on.
    n_scored: usize,
}

impl Order {
    fn new(n_windows: u64, batch_size: u64, is_by_row: bool, (rank, n_ranks): (u64, u64)) -> Self {
        let at_once = if is_by_row {
            batch_size * n_ranks
        } else {
            batch_size
        };
        let n_batches = n_windows.div_ceil(at_once);
        let mut order = Self {
            n_windows,
            batch_size,
            n_batches,
            is_by_row,
            rank,
            n_ranks,
            n_own: n_batches,
        };
        if !is_by_row {
            order.n_own = (n_batches + n_ranks - 1 - rank) / n_ranks;
        } else if order.rows().is_empty() {
            order.n_own = 0;
        }
        order
    }

    /// Rows of this process: as even as possible.
    fn rows(&self) -> Range<u64> {
        let n_rows = self.n_windows.div_ceil(self.n_batches);
        let first = |rank| rank * n_rows / self.n_ranks;
        first(self.rank)..first(self.rank + 1)
    }

    /// Of this process' batches.
    fn batch(&self, index: u64) -> Batch {
        let (windows, n_scored) = if self.is_by_row {
            let window = |row| index + row * self.n_batches;
            let last = self.n_windows - 1;
            (
                self.rows().map(|row| window(row).min(last)).collect(),
                self.rows().filter(|&row| window(row) <= last).count(),
            )
        } else {
            let first = (index * self.n_ranks + self.rank) * self.batch_size;
            let windows: Vec<u64> = (first..self.n_windows.min(first + self.batch_size)).collect();
            let n_scored = windows.len();
            (windows, n_scored)
        };
        Batch { windows, n_scored }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(n_windows: u64, batch_size: u64, is_by_row: bool) -> Vec<Batch> {
        batches_of(n_windows, batch_size, is_by_row, (0, 1))
    }

    fn batches_of(
        n_windows: u64,
        batch_size: u64,
        is_by_row: bool,
        place: (u64, u64),
    ) -> Vec<Batch> {
        let order = Order::new(n_windows, batch_size, is_by_row, place);
        (0..order.n_own).map(|index| order.batch(index)).collect()
    }

    #[test]
    fn processes_score_every_window_once() {
        for (n_windows, batch_size) in [(1, 4), (5, 4), (7, 3), (10, 4), (40, 2)] {
            for (is_by_row, n_ranks) in [(false, 2), (true, 2), (false, 3), (true, 3), (true, 8)] {
                let of_rank = |rank| batches_of(n_windows, batch_size, is_by_row, (rank, n_ranks));
                let mut scored: Vec<u64> = (0..n_ranks)
                    .flat_map(of_rank)
                    .flat_map(|batch| batch.windows[..batch.n_scored].to_vec())
                    .collect();
                scored.sort_unstable();
                assert_eq!(
                    scored,
                    (0..n_windows).collect::<Vec<_>>(),
                    "{n_ranks} processes"
                );
            }
        }
    }

    #[test]
    fn every_window_is_scored_once() {
        for (n_windows, batch_size) in [(1, 4), (4, 4), (5, 4), (7, 3), (10, 4), (12, 5), (16, 1)] {
            for is_by_row in [false, true] {
                let mut scored: Vec<u64> = batches(n_windows, batch_size, is_by_row)
                    .iter()
                    .flat_map(|batch| batch.windows[..batch.n_scored].to_vec())
                    .collect();
                scored.sort_unstable();
                let all: Vec<u64> = (0..n_windows).collect();
                assert_eq!(scored, all, "{n_windows} in batches of {batch_size}");
            }
        }
    }

    #[test]
    fn with_memory_rows_go_on_and_their_number_is_fixed() {
        let batch = |windows: [u64; 3], n_scored| Batch {
            windows: windows.into(),
            n_scored,
        };
        assert_eq!(
            batches(7, 3, true),
            [
                batch([0, 3, 6], 3),
                batch([1, 4, 6], 2),
                batch([2, 5, 6], 2)
            ]
        );
        for (n_windows, batch_size) in [(1, 4), (5, 4), (10, 4), (12, 5), (13, 6)] {
            let all = batches(n_windows, batch_size, true);
            for pair in all.windows(2) {
                assert_eq!(pair[0].windows.len(), pair[1].windows.len());
                for row in 0..pair[1].n_scored {
                    assert_eq!(pair[1].windows[row], pair[0].windows[row] + 1);
                }
            }
        }
    }
}
