//! How long an idle worker looks at its rings before it sleeps. Pure.

use std::time::Duration;

/// What is shorter is no window.
const LEAST_NS: u64 = 1000;

/// A window that opens to its whole length when sleeping turned out to be a mistake, since work came soon, and closes by
/// halves each time that it would not have sufficed: who is idle for long does not look on in vain for long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Polling {
    whole_ns: u64,
    now_ns: u64,
}

impl Polling {
    pub(super) fn new(window: Duration) -> Self {
        let whole_ns = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
        Self { whole_ns, now_ns: whole_ns }
    }

    /// Nanoseconds to look on for; 0: not at all.
    #[inline]
    pub(super) fn window_ns(self) -> u64 {
        self.now_ns
    }

    /// Tells how long a sleep was that ended with work for somebody who had none.
    pub(super) fn slept(&mut self, took_ns: u64) {
        self.now_ns = match self.now_ns / 2 {
            _ if took_ns <= self.whole_ns => self.whole_ns,
            half if half >= LEAST_NS => half,
            _ => 0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_closes_by_halves_and_opens_at_once() {
        let mut polling = Polling::new(Duration::from_micros(40));
        assert_eq!(polling.window_ns(), 40_000);
        let closing: Vec<_> = std::iter::repeat_with(|| {
            polling.slept(40_001);
            polling.window_ns()
        })
        .take(7)
        .collect();
        assert_eq!(closing, [20_000, 10_000, 5_000, 2_500, 1_250, 0, 0]);
        polling.slept(40_000);
        assert_eq!(polling.window_ns(), 40_000);
    }

    #[test]
    fn no_window_stays_none() {
        let mut polling = Polling::new(Duration::ZERO);
        polling.slept(0);
        assert_eq!(polling.window_ns(), 0);
    }
}
