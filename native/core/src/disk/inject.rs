//! Slow and unreliable storage on purpose, for testers: any engine, with its operations held back or failed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Completion, Engine, Kind, Operation};
use crate::memory::IoVec;

/// What goes wrong, and how often. Discards and zeroes count as writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Faults {
    /// Each read is held for 0.5 to 1.5 times this long.
    pub delay_read: Duration,
    /// Likewise for writes.
    pub delay_write: Duration,
    /// Likewise for flushes.
    pub delay_flush: Duration,
    /// The share of reads, 0..1, that fail.
    pub error_read: f64,
    /// Likewise for writes; a failed one stores nothing.
    pub error_write: f64,
    /// Likewise for flushes.
    pub error_flush: f64,
    /// What they fail with.
    pub errno: i32,
    /// So many operations of the disk fail, then storage is well again; `None`: no end.
    pub error_limit: Option<u64>,
    /// Where the random numbers start: the same seed and the same requests give the same faults.
    pub seed: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            delay_read: Duration::ZERO,
            delay_write: Duration::ZERO,
            delay_flush: Duration::ZERO,
            error_read: 0.0,
            error_write: 0.0,
            error_flush: 0.0,
            errno: libc::EIO,
            error_limit: None,
            seed: 0,
        }
    }
}

impl Faults {
    fn of(&self, kind: Kind) -> (Duration, f64) {
        match kind {
            Kind::Read => (self.delay_read, self.error_read),
            Kind::Write | Kind::Discard | Kind::WriteZeroes { .. } => (self.delay_write, self.error_write),
            Kind::Flush => (self.delay_flush, self.error_flush),
        }
    }
}

/// Marsaglia's xorshift64*: reproducible, and good enough to shake a queue.
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// `stream` tells the engines of one disk apart.
    fn new(seed: u64, stream: u64) -> Self {
        let mixed = (seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self(mixed | 1)
    }

    /// The next number of 0..1.
    fn share(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        bits as f64 / (1_u64 << 53) as f64
    }
}

/// An operation that waits for its time. Ordered by it, and by arrival where that is equal.
#[derive(Debug)]
struct Held {
    due: Instant,
    number: u64,
    fails: bool,
    operation: Operation,
}

impl Held {
    fn key(&self) -> (Instant, u64) {
        (self.due, self.number)
    }
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// An engine in front of another one. An operation is held first and handed on when it is due, so
/// that operations reach storage, and end, out of order.
#[derive(Debug)]
pub struct FaultyEngine<E> {
    inner: E,
    faults: Faults,
    /// Failures left to all engines of the disk.
    left: Arc<AtomicU64>,
    random: Random,
    held: BinaryHeap<Reverse<Held>>,
    number: u64,
    /// Ended while nobody was reaping.
    ended: Vec<Completion>,
}

impl<E: Engine> FaultyEngine<E> {
    /// Puts `faults` in front of `inner`; `stream` tells the engines of one disk apart, which share `left`: how many
    /// more operations may fail.
    pub fn new(inner: E, faults: Faults, stream: u64, left: Arc<AtomicU64>) -> Self {
        let random = Random::new(faults.seed, stream);
        Self { inner, faults, left, random, held: BinaryHeap::new(), number: 0, ended: Vec::new() }
    }

    /// Whether one more operation may fail.
    fn takes_failure(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    /// Hands on what is due.
    fn release(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let now = Instant::now();
        while self.held.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(next)) = self.held.pop() else { return };
            let completion = if next.fails {
                Some(Completion::of(next.operation, Err(self.faults.errno)))
            } else {
                self.inner.submit(next.operation)
            };
            self.ended.extend(completion);
        }
    }
}

impl<E: Engine> Engine for FaultyEngine<E> {
    fn inline(&self) -> bool {
        false
    }

    fn move_now(&mut self, _kind: Kind, _offset: u64, _durable: bool, _runs: &[IoVec]) -> bool {
        false
    }

    fn submit(&mut self, operation: Operation) -> Option<Completion> {
        let (delay, error) = self.faults.of(operation.kind);
        // Both numbers are drawn whatever they are for: a fault more does not shift those that follow.
        let (factor, luck) = (0.5 + self.random.share(), self.random.share());
        let fails = luck < error && self.takes_failure();
        if delay.is_zero() {
            return match fails {
                true => Some(Completion::of(operation, Err(self.faults.errno))),
                false => self.inner.submit(operation),
            };
        }
        let due = Instant::now() + delay.mul_f64(factor);
        self.number += 1;
        self.held.push(Reverse(Held { due, number: self.number, fails, operation }));
        None
    }

    fn kick(&mut self) -> io::Result<()> {
        self.release();
        self.inner.kick()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let before = self.inner.pending();
        self.release();
        done.append(&mut self.ended);
        if self.inner.pending() > before {
            // What fell due has to move even when the worker only looks. A refusal comes again, and
            // is told, at its next `kick` or `wait`.
            let _ = self.inner.kick();
        }
        self.inner.reap(done);
    }

    fn pending(&self) -> usize {
        self.held.len() + self.ended.len() + self.inner.pending()
    }

    fn watch(&mut self, fd: libc::c_int, token: u32) -> io::Result<()> {
        self.inner.watch(fd, token)
    }

    fn unwatch(&mut self, token: u32) {
        self.inner.unwatch(token);
    }

    fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<u32>) -> io::Result<()> {
        self.release();
        let timeout = if !self.ended.is_empty() {
            Some(Duration::ZERO)
        } else if let Some(Reverse(next)) = self.held.peek() {
            let due = next.due.saturating_duration_since(Instant::now());
            Some(timeout.map_or(due, |timeout| timeout.min(due)))
        } else {
            timeout
        };
        self.inner.wait(timeout, ready)
    }
}
