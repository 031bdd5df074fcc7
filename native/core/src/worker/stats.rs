//! What a queue has done, readable at any time without stopping it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use super::in_flight::{InFlight, RequestInFlight};
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
    Held,
    Retrying,
    Retried,
    Broken,
}

const COUNT: usize = Counter::Broken as usize + 1;
const TYPES: usize = Counter::ReadBytes as usize;

/// The names of the counters that are worth showing, with their places.
pub const COUNTERS: [(&str, usize); 22] = [
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
    ("held", Counter::Held as usize),
    ("retrying", Counter::Retrying as usize),
    ("retried", Counter::Retried as usize),
    ("broken", Counter::Broken as usize),
    ("other_bytes", Counter::OtherBytes as usize),
];

/// The counters of one queue. One worker writes them; anybody reads.
#[derive(Debug)]
#[repr(align(128))]
pub struct QueueStats {
    counters: [AtomicU64; COUNT],
    in_flight: Mutex<Arc<InFlight>>,
}

impl Default for QueueStats {
    fn default() -> Self {
        Self { counters: [const { AtomicU64::new(0) }; COUNT], in_flight: Mutex::default() }
    }
}

impl QueueStats {
    /// A counter's value.
    pub fn get(&self, place: usize) -> u64 {
        self.counters[place].load(Relaxed)
    }

    /// Whether there are requests that storage failed and that are kept.
    pub(super) fn keeps(&self) -> bool {
        self.get(Counter::Held as usize) + self.get(Counter::Retrying as usize) > 0
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

    /// A new table for a ring of `size`; the worker keeps what is returned.
    pub(crate) fn restart(&self, size: u16) -> Arc<InFlight> {
        let fresh = Arc::new(InFlight::new(size));
        *self.in_flight.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&fresh);
        for level in [Counter::InFlight, Counter::Held, Counter::Retrying] {
            self.set(level, 0);
        }
        self.set(Counter::Broken, 0);
        fresh
    }

    /// Microseconds since the oldest request in flight was taken; 0 when there is none.
    pub fn oldest_age_us(&self) -> u64 {
        self.table().oldest_age_us(now_ns())
    }

    /// The requests in flight, oldest first.
    pub fn in_flight(&self) -> Vec<RequestInFlight> {
        self.table().list(now_ns())
    }

    fn table(&self) -> Arc<InFlight> {
        Arc::clone(&self.in_flight.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Nanoseconds on a clock that starts at 1.
pub(crate) fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + 1
}
