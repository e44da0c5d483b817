//! The residual stream between layers.

use std::cell::OnceCell;
use tch::Tensor;

/// What a layer reads and the last one left, `[B, T, D]`, or as wide as [`crate::Context::aligned`] makes it.
///
/// The last layer's update need not have been added: whoever reads the stream next, [`crate::Context::reading`],
/// adds, rounds and normalizes in one pass over memory.
#[derive(Debug)]
pub struct Stream {
    sum: Tensor,
    update: Option<Tensor>,
    whole: OnceCell<Tensor>,
}

impl Stream {
    /// `sum + update`.
    pub fn updated(sum: Tensor, update: Tensor) -> Self {
        Self {
            update: Some(update),
            ..Self::from(sum)
        }
    }

    /// The sum, which is taken once, by whoever asks first.
    pub fn whole(&self) -> &Tensor {
        self.whole.get_or_init(|| match &self.update {
            Some(update) => &self.sum + update,
            None => self.sum.shallow_clone(),
        })
    }

    /// What there is, and what is still to be added.
    pub(crate) fn parts(&self) -> (&Tensor, Option<&Tensor>) {
        match self.whole.get() {
            Some(whole) => (whole, None),
            None => (&self.sum, self.update.as_ref()),
        }
    }
}

impl From<Tensor> for Stream {
    fn from(sum: Tensor) -> Self {
        Self {
            sum,
            update: None,
            whole: OnceCell::new(),
        }
    }
}
