//! Random numbers that a seed fixes. Not for anything but choosing moments and places.

use std::ops::Range;

/// Numbers that a seed fixes: `SplitMix64`, whose quality is ample for choosing moments.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// An index into `len` things; 0 if there are none.
    pub(super) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.next() % (len.max(1) as u64)).unwrap_or_default()
    }

    /// 0 to 1.
    #[expect(clippy::cast_precision_loss, reason = "a moment need not be exact")]
    pub(super) fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_fixes_the_numbers() {
        let numbers = |seed| {
            let mut random = Random(seed);
            [
                random.below(0..1000),
                random.below(0..1000),
                random.below(5..6),
            ]
        };
        assert_eq!(numbers(1), numbers(1));
        assert_ne!(numbers(1), numbers(2));
        assert_eq!(numbers(1)[2], 5);
    }
}
