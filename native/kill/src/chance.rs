//! Numbers that look random and come again with the same seed. Pure.

/// Marsaglia's xorshift64*.
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    /// From `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self((seed.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}
