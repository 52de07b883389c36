//! The only source of chance in a run: xoshiro256**, seeded by splitmix64.
//!
//! Each part of a run draws from a stream of its own ([`Prng::fork`]), so that one more draw in one
//! part does not change all the others.

/// One step of splitmix64, also used as a cheap mixing function.
pub(crate) fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seeded stream of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Prng {
    state: [u64; 4],
}

impl Prng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut s = seed;
        let mut next = || {
            s = s.wrapping_add(0x9e37_79b9_7f4a_7c15);
            splitmix(s)
        };
        Self { state: [next(), next(), next(), next()] }
    }

    /// An independent stream, named so that streams do not depend on the order of forking.
    pub(crate) fn fork(seed: u64, name: &str, index: u64) -> Self {
        let mut h = splitmix(seed ^ index.wrapping_mul(0x2545_f491_4f6c_dd1d));
        for b in name.bytes() {
            h = splitmix(h ^ u64::from(b));
        }
        Self::new(h)
    }

    pub(crate) fn next(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in `low..=high`.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        debug_assert!(low <= high);
        match high.wrapping_sub(low).wrapping_add(1) {
            0 => self.next(),
            span => low + ((u128::from(self.next()) * u128::from(span)) >> 64) as u64,
        }
    }

    /// Uniform in the logarithm: small and large values are equally likely, in orders of magnitude.
    pub(crate) fn log_between(&mut self, low: u64, high: u64) -> u64 {
        let (low_bits, high_bits) = (low.max(1).ilog2(), high.max(1).ilog2());
        let bits = self.between(u64::from(low_bits), u64::from(high_bits)) as u32;
        let floor = 1u64 << bits;
        self.between(floor, floor.saturating_mul(2) - 1).clamp(low, high)
    }

    /// True `per_million` times in a million.
    pub(crate) fn chance(&mut self, per_million: u32) -> bool {
        per_million != 0 && self.between(0, 999_999) < u64::from(per_million)
    }

    /// True `percent` times in a hundred.
    pub(crate) fn percent(&mut self, percent: u32) -> bool {
        self.chance(percent * 10_000)
    }

    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.between(0, of.len() as u64 - 1) as usize]
    }
}
