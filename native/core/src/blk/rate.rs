//! How many requests and bytes a second a disk takes, over all its workers, without a lock.
//!
//! A bucket is one number: the moment at which everything taken so far is paid for (the generic cell rate algorithm).
//! What is taken moves it on; as long as it is no further ahead of the clock than [`BURST`], more is taken.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// After a rest so much more than the rate is taken at once: what the rate allows in this time.
const BURST: Duration = Duration::from_millis(100);
const SECOND_NS: u128 = 1_000_000_000;

/// One quantity's rate.
#[derive(Debug, Default)]
struct Bucket {
    /// Units a second; 0: no limit.
    rate: AtomicU64,
    /// In nanoseconds on the workers' clock.
    paid_until: AtomicU64,
}

impl Bucket {
    fn wait(&self, now_ns: u64) -> u64 {
        match self.rate.load(Relaxed) {
            0 => 0,
            _ => self.paid_until.load(Relaxed).saturating_sub(now_ns.saturating_add(BURST.as_nanos() as u64)),
        }
    }

    fn charge(&self, amount: u64, now_ns: u64) {
        let rate = self.rate.load(Relaxed);
        if rate == 0 || amount == 0 {
            return;
        }
        let cost = u64::try_from(u128::from(amount) * SECOND_NS / u128::from(rate)).unwrap_or(u64::MAX);
        // Never refused: the closure always has a value.
        let _ = self.paid_until.fetch_update(Relaxed, Relaxed, |paid| Some(paid.max(now_ns).saturating_add(cost)));
    }

    fn set(&self, rate: u64) {
        self.rate.store(rate, Relaxed);
        self.paid_until.store(0, Relaxed);
    }
}

/// The limits of one disk.
#[derive(Debug, Default)]
pub(super) struct RateLimit {
    requests: Bucket,
    bytes: Bucket,
}

impl RateLimit {
    /// Requests and bytes a second from now on; 0 for no limit. What was taken before is forgotten.
    pub(super) fn set(&self, iops: u64, bps: u64) {
        self.requests.set(iops);
        self.bytes.set(bps);
    }

    /// Requests and bytes a second.
    pub(super) fn get(&self) -> (u64, u64) {
        (self.requests.rate.load(Relaxed), self.bytes.rate.load(Relaxed))
    }

    /// Whether there is any limit.
    pub(super) fn is_on(&self) -> bool {
        self.get() != (0, 0)
    }

    /// Nanoseconds until a request may be taken; 0: now.
    #[inline]
    pub(super) fn wait(&self, now_ns: u64) -> u64 {
        self.requests.wait(now_ns).max(self.bytes.wait(now_ns))
    }

    /// Counts a request that was taken. One larger than the burst is paid for afterwards.
    #[inline]
    pub(super) fn charge(&self, bytes: u64, now_ns: u64) {
        self.requests.charge(1, now_ns);
        self.bytes.charge(bytes, now_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests of `bytes` that are taken within `seconds` by someone who always wants more, looking each microsecond.
    fn taken(limit: &RateLimit, bytes: u64, seconds: u64) -> u64 {
        let (start, mut count) = (5_000_000_000, 0);
        for now in (start..start + seconds * 1_000_000_000).step_by(1000) {
            while limit.wait(now) == 0 {
                limit.charge(bytes, now);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn no_more_than_the_rate_and_one_burst_is_taken() {
        let limit = RateLimit::default();
        assert!(!limit.is_on());
        limit.set(1000, 0);
        assert!((10_000..=10_101).contains(&taken(&limit, 4096, 10)));
        limit.set(0, 1 << 20);
        assert!((2560..=2560 + 26 + 1).contains(&taken(&limit, 4096, 10)));
        limit.set(7, 1 << 40);
        assert!((70..=71).contains(&taken(&limit, 4096, 10)), "the tighter one counts");
    }

    #[test]
    fn a_request_larger_than_the_burst_is_taken_and_paid_for() {
        let limit = RateLimit::default();
        limit.set(0, 1000);
        assert_eq!(limit.wait(1), 0);
        limit.charge(5000, 1);
        assert_eq!(limit.wait(1), 4_900_000_000);
        assert_eq!(limit.wait(4_900_000_001), 0);
    }

    #[test]
    fn a_rest_saves_up_no_more_than_one_burst() {
        let limit = RateLimit::default();
        limit.set(100, 0);
        assert!((100..=111).contains(&taken(&limit, 0, 1)));
        let later = 1_000_000_000_000;
        let mut count = 0;
        while limit.wait(later) == 0 {
            limit.charge(0, later);
            count += 1;
        }
        assert_eq!(count, 11);
    }

    #[test]
    fn several_threads_take_no_more_than_the_rate_together() {
        let limit = RateLimit::default();
        limit.set(1000, 0);
        let total: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| taken(&limit, 0, 1))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        // At the end each may have looked just before the others took.
        assert!((1000..=1101 + 3).contains(&total), "{total}");
    }

    #[test]
    fn extreme_rates_neither_overflow_nor_divide_by_zero() {
        let limit = RateLimit::default();
        limit.set(u64::MAX, u64::MAX);
        limit.charge(u64::MAX, u64::MAX);
        assert_eq!(limit.get(), (u64::MAX, u64::MAX));
        limit.set(1, 1);
        limit.charge(u64::MAX, 1);
        assert!(limit.wait(1) > 0);
        limit.set(0, 0);
        assert_eq!(limit.wait(1), 0);
    }
}
