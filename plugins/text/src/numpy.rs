//! `numpy.random.default_rng(seed).permutation(n)`, number by number: the orders of shards and windows are part of what
//! the reference's caches and results mean.
//!
//! # Source
//! M. E. O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for Random Number
//! Generation" (2014), and "Developing a `seed_seq` Alternative" (2015). The combination is NumPy's `Generator`, whose
//! shuffle rejects by a mask.

const MULTIPLIER: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;

/// `PCG64` (XSL-RR 128/64), seeded by a `SeedSequence` of one number.
#[derive(Debug)]
pub(crate) struct Rng {
    state: u128,
    increment: u128,
    /// The upper half of a number whose lower half was handed out.
    spare: Option<u32>,
}

impl Rng {
    pub(crate) fn new(seed: u32) -> Self {
        let words = seed_sequence(seed);
        let wide = |i: usize| u128::from(words[i]) << 64 | u128::from(words[i + 1]);
        let mut rng = Self {
            state: 0,
            increment: wide(2) << 1 | 1,
            spare: None,
        };
        rng.step();
        rng.state = rng.state.wrapping_add(wide(0));
        rng.step();
        rng
    }

    /// The numbers `0..n` in random order (Fisher and Yates, from the end).
    pub(crate) fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut numbers: Vec<u32> = (0..n).collect();
        for last in (1..n).rev() {
            let other = self.up_to(last);
            numbers.swap(last as usize, other as usize);
        }
        numbers
    }

    fn step(&mut self) {
        self.state = self
            .state
            .wrapping_mul(MULTIPLIER)
            .wrapping_add(self.increment);
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "halves of a number are meant"
    )]
    fn next_u32(&mut self) -> u32 {
        if let Some(upper) = self.spare.take() {
            return upper;
        }
        self.step();
        let folded = (self.state >> 64) as u64 ^ self.state as u64;
        let number = folded.rotate_right((self.state >> 122) as u32);
        self.spare = Some((number >> 32) as u32);
        number as u32
    }

    /// A number in `0..=largest`: as many bits as that has, drawn again as long as they are too large.
    fn up_to(&mut self, largest: u32) -> u32 {
        let mask = u32::MAX.checked_shr(largest.leading_zeros()).unwrap_or(0);
        loop {
            let number = self.next_u32() & mask;
            if number <= largest {
                return number;
            }
        }
    }
}

/// `SeedSequence(seed).generate_state(4)`, as 64-bit words.
fn seed_sequence(seed: u32) -> [u64; 4] {
    let mut factor = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ factor;
        factor = factor.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(factor);
        value ^ value >> 16
    };
    let mut pool = [seed, 0, 0, 0].map(&mut hash);
    for from in 0..4 {
        for to in 0..4 {
            if from != to {
                let mixed = pool[to]
                    .wrapping_mul(0xca01_f9dd)
                    .wrapping_sub(hash(pool[from]).wrapping_mul(0x4973_f715));
                pool[to] = mixed ^ mixed >> 16;
            }
        }
    }
    let mut factor = 0x8b51_f9dd_u32;
    let mut halves = [0u32; 8];
    for (i, half) in halves.iter_mut().enumerate() {
        let value = pool[i % 4] ^ factor;
        factor = factor.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(factor);
        *half = value ^ value >> 16;
    }
    std::array::from_fn(|i| u64::from(halves[2 * i + 1]) << 32 | u64::from(halves[2 * i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::known_answers;

    /// Golden: `shuffle_remap` of `known_answers.json`, made with NumPy 2.4.6.
    #[test]
    fn permutations_are_numpys() {
        let answers = known_answers();
        let table = answers["shuffle_remap"].as_object().unwrap();
        assert!(table.len() >= 8);
        for (n, expected) in table {
            let found = Rng::new(123).permutation(n.parse().unwrap());
            let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
            assert_eq!(found[..expected.len()], expected, "n = {n}");
        }
    }

    #[test]
    fn nothing_to_permute_is_no_error() {
        assert!(Rng::new(123).permutation(0).is_empty());
    }
}
