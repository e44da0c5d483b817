//! Windows of a token stream as tensors, and where a document in one ends.
//!
//! ```text
//! stream      every window has seq_len + 1 tokens
//! documents   a window has a document's tokens, at most seq_len + 1; windows that are read together are as wide as the
//!             longest of them, and [`BEHIND_END`] stands behind the end of the others
//! ```
//! A causal model sees nothing of what is behind a document's end, and no loss is taken there. Routers see it: the
//! balancing of experts counts a padded place as one more token 0.

use super::border::{check_info, check_tokens};
use super::int;
use crate::watchdog::watch;
use moeut_plugin_api::abi::client::TokenDatasetClient;
use moeut_plugin_api::{PluginError, StreamInfo};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Stands where no token is; the loss leaves out such a target.
pub const BEHIND_END: i64 = -100;

/// Lengths that are asked for at once.
const PAGE: usize = 1 << 16;

/// An opened stream. Cloning shares it.
#[derive(Clone)]
pub struct Stream {
    dataset: Arc<TokenDatasetClient>,
    seq_len: usize,
    n_windows: u64,
    vocab_size: u64,
    /// Tokens of each document; none if windows are cut from one stream.
    lengths: Option<Arc<[u32]>>,
}

/// Some windows of a stream.
pub struct Windows {
    /// Token ids, int64 `[T + 1, windows]`, time-major, on the CPU; [`BEHIND_END`] where there is none.
    pub tokens_tb: Tensor,
    /// Tokens to be predicted.
    pub n_targets: usize,
}

impl Stream {
    /// The opened dataset called `name`; asks for the lengths of documents, if there are any.
    ///
    /// # Errors
    /// If the dataset fails to say, or says what cannot be.
    pub fn new(
        name: &str,
        dataset: Arc<TokenDatasetClient>,
        seq_len: usize,
        info: &StreamInfo,
    ) -> Result<Self, PluginError> {
        check_info(name, info, seq_len)?;
        let lengths = if info.has_documents {
            Some(lengths(&dataset, info.n_windows, seq_len)?.into())
        } else {
            None
        };
        Ok(Self {
            dataset,
            seq_len,
            n_windows: info.n_windows,
            vocab_size: info.vocab_size,
            lengths,
        })
    }

    /// Number of windows.
    pub fn n_windows(&self) -> u64 {
        self.n_windows
    }

    /// Tokens that the model sees of a window, at most.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Tokens of each document, the last of which is only predicted; none if windows are cut from one stream.
    pub fn lengths(&self) -> Option<&Arc<[u32]>> {
        self.lengths.as_ref()
    }

    /// Tokens to be predicted in these windows.
    pub fn n_targets(&self, windows: &[u64]) -> usize {
        windows.iter().map(|&window| self.len(window) - 1).sum()
    }

    /// Reads windows.
    ///
    /// # Errors
    /// If the data cannot be read.
    pub fn read(&self, windows: &[u64]) -> Result<Windows, PluginError> {
        let mut ids = vec![0_i32; windows.len() * (self.seq_len + 1)];
        {
            let _watched = watch("dataset", self.dataset.name(), "read");
            self.dataset.read(windows, &mut ids)?;
        }
        for (&window, row) in windows.iter().zip(ids.chunks(self.seq_len + 1)) {
            check_tokens(&row[..self.len(window).min(row.len())], self.vocab_size)?;
        }
        let by_window = Tensor::from_slice(&ids).view([-1, int(self.seq_len) + 1]);
        let by_window = match &self.lengths {
            None => by_window.to_kind(Kind::Int64),
            Some(_) => self.without_rest(&by_window, windows),
        };
        Ok(Windows {
            tokens_tb: by_window.transpose(0, 1).contiguous(),
            n_targets: self.n_targets(windows),
        })
    }

    /// Cuts what is behind the longest document, and marks what is behind the end of the others.
    fn without_rest(&self, tokens_bt: &Tensor, windows: &[u64]) -> Tensor {
        let lengths: Vec<i64> = windows
            .iter()
            .map(|&window| int(self.len(window)))
            .collect();
        let width = lengths.iter().copied().max().unwrap_or(0);
        let is_behind_bt = Tensor::arange(width, (Kind::Int64, tch::Device::Cpu))
            .unsqueeze(0)
            .ge_tensor(&Tensor::from_slice(&lengths).unsqueeze(1));
        tokens_bt
            .narrow(1, 0, width)
            .to_kind(Kind::Int64)
            .masked_fill(&is_behind_bt, BEHIND_END)
    }

    /// Tokens of a window.
    fn len(&self, window: u64) -> usize {
        let length = self.lengths.as_ref().and_then(|lengths| {
            let index = usize::try_from(window).ok()?;
            lengths.get(index).map(|&length| length as usize)
        });
        length.unwrap_or(self.seq_len + 1)
    }
}

fn lengths(
    dataset: &TokenDatasetClient,
    n_windows: u64,
    seq_len: usize,
) -> Result<Vec<u32>, PluginError> {
    let n_windows = super::build::size(n_windows)?;
    let mut lengths = vec![0; n_windows];
    for (page, part) in lengths.chunks_mut(PAGE).enumerate() {
        dataset.lengths((page * PAGE) as u64, part)?;
    }
    let is_possible = |&length: &u32| (2..=seq_len + 1).contains(&(length as usize));
    match lengths.iter().position(|length| !is_possible(length)) {
        None => Ok(lengths),
        Some(window) => Err(
            PluginError::new("the dataset gives a document an impossible length")
                .why(format!(
                    "document {window} has {} tokens, and a window has 2 to {}",
                    lengths[window],
                    seq_len + 1
                ))
                .fix("this is a defect of the dataset's plugin: report it to its authors"),
        ),
    }
}
