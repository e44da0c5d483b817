//! Names of the tokens that attention maps show: those of the batch's first sequence, and of what segment memory holds
//! before it.

use moeut_plugin_api::{Past, TokenRange};
use tch::Tensor;

/// Most tokens that are remembered; no memory that fits a device is longer.
const MOST: usize = 1 << 16;

/// Tokens as text, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// What the model read, with what it remembers.
    pub(super) inputs: Vec<String>,
    /// What comes next.
    pub(super) targets: Vec<String>,
}

impl Labels {
    /// Those of a range; blank where the run does not know the token, as right behind a resume.
    pub(super) fn of(tokens: Option<&[String]>, range: TokenRange) -> Vec<String> {
        let tokens = tokens.unwrap_or_default();
        let from_end = |place: u64| usize::try_from(range.from_end.saturating_sub(place)).ok();
        let label = |place: u64| {
            let index = tokens.len().checked_sub(from_end(place)?)?;
            tokens.get(index).cloned()
        };
        (0..range.n)
            .map(|place| label(place).unwrap_or_default())
            .collect()
    }
}

/// Follows the first sequence of each batch.
pub struct Follower {
    /// The text of a token.
    text: Box<dyn Fn(i32) -> String>,
    is_on: bool,
    /// Read before the current batch; empty for models without memory.
    earlier: Vec<i32>,
    current: Vec<i32>,
}

impl Follower {
    /// Does nothing unless it `is_on`; `text` is that of a token.
    pub fn new(text: impl Fn(i32) -> String + 'static, is_on: bool) -> Self {
        Self {
            text: Box::new(text),
            is_on,
            earlier: Vec::new(),
            current: Vec::new(),
        }
    }

    /// Takes the first microbatch of a step, `[T + 1, B]` on the CPU, and what it sees of earlier ones.
    pub(super) fn follow(&mut self, tokens_tb: &Tensor, past: Past) {
        if !self.is_on {
            return;
        }
        let column = tokens_tb.select(1, 0).to_kind(tch::Kind::Int);
        let column = Vec::<i32>::try_from(column.contiguous()).unwrap_or_default();
        let before = std::mem::replace(&mut self.current, column);
        match past {
            Past::Segments {
                is_reset: false, ..
            } => {
                let n_read = before.len().saturating_sub(1);
                self.earlier.extend(&before[..n_read]);
                let n_surplus = self.earlier.len().saturating_sub(MOST);
                self.earlier.drain(..n_surplus);
            }
            Past::None | Past::Segments { .. } | Past::Cache { .. } | Past::Fork { .. } => {
                self.earlier.clear();
            }
        }
    }

    /// The tokens of the current step.
    pub(super) fn labels(&self) -> Labels {
        let text = |&id: &i32| {
            // Behind the end of a document there is none.
            let text = if id < 0 {
                String::new()
            } else {
                (self.text)(id)
            };
            text.escape_debug().to_string()
        };
        let texts = |ids: &[i32]| -> Vec<String> { ids.iter().map(text).collect() };
        let Some((_, inputs)) = self.current.split_last() else {
            return Labels::default();
        };
        Labels {
            inputs: [texts(&self.earlier), texts(inputs)].concat(),
            targets: texts(&self.current[1..]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_earlier_segments_stand_first() {
        let mut follower = Follower::new(|id| format!("{id}"), true);
        let mut labels = |ids: [i64; 3], is_reset| {
            let others = Tensor::from_slice(&[7i64, 7, 7]);
            let tokens_tb = Tensor::stack(&[Tensor::from_slice(&ids), others], 1);
            follower.follow(&tokens_tb, Past::Segments { slot: 0, is_reset });
            let Labels { inputs, targets } = follower.labels();
            (inputs.join(" "), targets.join(" "))
        };
        let pair = |inputs: &str, targets: &str| (inputs.to_owned(), targets.to_owned());
        assert_eq!(labels([1, 2, 3], true), pair("1 2", "2 3"));
        assert_eq!(labels([3, 4, -100], false), pair("1 2 3 4", "4 "));
        assert_eq!(labels([5, 6, 7], true), pair("5 6", "6 7"));
    }

    #[test]
    fn without_memory_nothing_stands_before() {
        let mut follower = Follower::new(|id| format!("{id}\n"), true);
        for _ in 0..2 {
            follower.follow(&Tensor::from_slice(&[1i64, 2]).unsqueeze(1), Past::None);
        }
        assert_eq!(follower.labels().inputs, ["1\\n"]);
    }
}
