//! What a queue has done, readable at any time without stopping it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use super::Outcome;

/// Counters of one queue, in the order of `COUNTERS`.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
#[allow(dead_code)] // `ended` reaches some by the request's type
pub(crate) enum Counter {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
    Other,
    ReadBytes,
    WriteBytes,
    FlushBytes,
    DiscardBytes,
    WriteZeroesBytes,
    GetIdBytes,
    OtherBytes,
    Errors,
    Bounced,
    Kicks,
    NotificationsSent,
    NotificationsSuppressed,
    InFlight,
    Broken,
}

const COUNT: usize = Counter::Broken as usize + 1;
const TYPES: usize = Counter::ReadBytes as usize;

/// The names of the counters that are worth showing, with their places.
pub const COUNTERS: [(&str, usize); 19] = [
    ("reads", Counter::Read as usize),
    ("writes", Counter::Write as usize),
    ("flushes", Counter::Flush as usize),
    ("discards", Counter::Discard as usize),
    ("write_zeroes", Counter::WriteZeroes as usize),
    ("get_ids", Counter::GetId as usize),
    ("others", Counter::Other as usize),
    ("read_bytes", Counter::ReadBytes as usize),
    ("written_bytes", Counter::WriteBytes as usize),
    ("discarded_bytes", Counter::DiscardBytes as usize),
    ("zeroed_bytes", Counter::WriteZeroesBytes as usize),
    ("errors", Counter::Errors as usize),
    ("bounced", Counter::Bounced as usize),
    ("kicks", Counter::Kicks as usize),
    ("notifications_sent", Counter::NotificationsSent as usize),
    ("notifications_suppressed", Counter::NotificationsSuppressed as usize),
    ("in_flight", Counter::InFlight as usize),
    ("broken", Counter::Broken as usize),
    ("other_bytes", Counter::OtherBytes as usize),
];

/// The counters of one queue. One worker writes them; anybody reads.
#[derive(Debug)]
#[repr(align(128))]
pub struct QueueStats {
    counters: [AtomicU64; COUNT],
    /// When each head in flight was taken, in nanoseconds since the first use of the clock; 0: not in flight.
    started: Mutex<Arc<[AtomicU64]>>,
}

impl Default for QueueStats {
    fn default() -> Self {
        Self { counters: [const { AtomicU64::new(0) }; COUNT], started: Mutex::new(Arc::new([])) }
    }
}

impl QueueStats {
    /// A counter's value.
    pub fn get(&self, place: usize) -> u64 {
        self.counters[place].load(Relaxed)
    }

    /// Adds; only the queue's worker may.
    #[inline]
    pub(crate) fn add(&self, counter: Counter, amount: u64) {
        let cell = &self.counters[counter as usize];
        cell.store(cell.load(Relaxed).wrapping_add(amount), Relaxed);
    }

    #[inline]
    pub(crate) fn set(&self, counter: Counter, value: u64) {
        self.counters[counter as usize].store(value, Relaxed);
    }

    /// Counts a chain that ended.
    #[inline]
    pub(crate) fn ended(&self, outcome: &Outcome) {
        let add = |place: usize, amount: u64| {
            let cell = &self.counters[place];
            cell.store(cell.load(Relaxed).wrapping_add(amount), Relaxed);
        };
        add(outcome.kind as usize, 1);
        add(outcome.kind as usize + TYPES, outcome.bytes);
        if outcome.failed {
            add(Counter::Errors as usize, 1);
        }
        if outcome.bounced {
            add(Counter::Bounced as usize, 1);
        }
    }

    /// New ages for a ring of `size`; the worker keeps what is returned.
    pub(crate) fn restart(&self, size: u16) -> Arc<[AtomicU64]> {
        let fresh: Arc<[AtomicU64]> = (0..size).map(|_| AtomicU64::new(0)).collect();
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&fresh);
        self.set(Counter::InFlight, 0);
        self.set(Counter::Broken, 0);
        fresh
    }

    /// Microseconds since the oldest request in flight was taken; 0 when there is none.
    pub fn oldest_age_us(&self) -> u64 {
        let started = Arc::clone(&self.started.lock().unwrap_or_else(PoisonError::into_inner));
        let oldest = started.iter().map(|at| at.load(Relaxed)).filter(|&at| at != 0).min();
        oldest.map_or(0, |at| now_ns().saturating_sub(at) / 1000)
    }
}

/// Nanoseconds on a clock that starts at 1.
pub(crate) fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + 1
}
