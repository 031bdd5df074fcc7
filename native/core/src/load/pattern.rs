//! Which block comes next, and what a block holds so that a lost, torn, repeated or misplaced write shows.

use crate::memory::IoVec;

/// Bytes that carry one stamp: a sector, the least that storage may tear.
const STAMPED: usize = 512;

/// Marsaglia's xorshift64*.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// The words of one sector of a block: its place, the generation, and a filling that follows from both.
fn words(block: u64, generation: u64, sector: usize) -> impl Iterator<Item = u64> {
    let mut filling = Random::new(block ^ generation.rotate_left(32) ^ sector as u64);
    [block, generation].into_iter().chain(std::iter::repeat_with(move || filling.next()))
}

/// Fills a buffer with `generation` of `block`.
pub(super) fn fill(buffer: IoVec, block: u64, generation: u64) {
    for sector in 0..buffer.len() / STAMPED {
        let mut place = buffer;
        place.advance(sector * STAMPED);
        for word in words(block, generation, sector).take(STAMPED / 8) {
            place.copy_from(&word.to_le_bytes());
            place.advance(8);
        }
    }
}

/// Whether a buffer holds exactly `generation` of `block`.
pub(super) fn holds(buffer: IoVec, block: u64, generation: u64) -> bool {
    (0..buffer.len() / STAMPED).all(|sector| {
        let mut place = buffer;
        place.advance(sector * STAMPED);
        words(block, generation, sector).take(STAMPED / 8).all(|word| {
            let mut bytes = [0; 8];
            place.copy_to(&mut bytes);
            place.advance(8);
            u64::from_le_bytes(bytes) == word
        })
    })
}
