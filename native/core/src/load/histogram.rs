//! Latencies, kept to 1.6 % in a fixed amount of memory.

/// Sub-buckets of each power of two.
const FINE: u64 = 64;
/// Powers of two told apart: beyond 2^42 ns (more than an hour) all is one bucket.
const POWERS: u64 = 42;

/// Counts of values, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: vec![0; place((1 << POWERS) - 1) + 1], count: 0, total: 0, max: 0 }
    }
}

const fn place(value: u64) -> usize {
    let value = if value >= 1 << POWERS { (1 << POWERS) - 1 } else { value };
    if value < 2 * FINE {
        return value as usize;
    }
    let shift = (63 - value.leading_zeros() as u64) - FINE.trailing_zeros() as u64;
    (shift * FINE + (value >> shift)) as usize
}

/// The greatest value that `place` puts there.
const fn upper(place: usize) -> u64 {
    let place = place as u64;
    if place < 2 * FINE {
        return place;
    }
    let shift = place / FINE - 1;
    ((place - shift * FINE + 1) << shift) - 1
}

impl Histogram {
    /// Counts `nanoseconds`.
    #[inline]
    pub fn add(&mut self, nanoseconds: u64) {
        self.buckets[place(nanoseconds)] += 1;
        self.count += 1;
        self.total = self.total.wrapping_add(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum of all values.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The greatest value.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The buckets that hold anything: the greatest value of each, and its count.
    pub fn filled(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let filled = self.buckets.iter().enumerate().filter(|(_, &count)| count > 0);
        filled.map(|(place, &count)| (upper(place).min(self.max), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_never_wider_than_a_64th_of_its_value() {
        for value in (0..20_000).chain((0..41).map(|power| (1u64 << power) + 12_345)) {
            let bound = upper(place(value));
            assert!(bound >= value, "{value} is put below itself");
            assert!(bound - value <= value / 64, "{value} is blurred to {bound}");
        }
        assert!((1..20_000).all(|value| place(value) >= place(value - 1)));
    }

    #[test]
    fn values_are_counted_where_they_are_found_again() {
        let mut histogram = Histogram::default();
        for value in [5, 5, 100_000, u64::MAX] {
            histogram.add(value);
        }
        assert_eq!(histogram.count(), 4);
        assert_eq!(histogram.filled().map(|(_, count)| count).sum::<u64>(), 4);
        assert_eq!(histogram.filled().next(), Some((5, 2)));
    }
}
