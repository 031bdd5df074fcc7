//! Chains for somebody else: a `Serve` that hands every chain to other threads, for device types served outside of Rust.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::blk::RequestType;
use crate::disk::AnyEngine;
use crate::memory::{GuestMemory, IoVec};
use crate::ring::{copy_in, copy_out, Chain};
use crate::worker::{Begun, Finished, Outcome, Serve, Waker};

#[derive(Debug, Default)]
struct Desk {
    /// Chains nobody has taken yet, by queue.
    waiting: Vec<VecDeque<HeldChain>>,
    /// Chains given back, by worker.
    answered: Vec<Vec<Finished>>,
    wakers: Vec<Option<Waker>>,
    closed: bool,
}

/// Where workers leave chains and other threads fetch them.
#[derive(Debug)]
pub struct Hub {
    desk: Mutex<Desk>,
    arrived: Condvar,
}

impl Hub {
    /// For `num_queues` rings on `num_workers` workers.
    pub fn new(num_queues: u16, num_workers: u16) -> Arc<Self> {
        let desk = Desk {
            waiting: (0..num_queues).map(|_| VecDeque::new()).collect(),
            answered: (0..num_workers).map(|_| Vec::new()).collect(),
            wakers: vec![None; usize::from(num_workers)],
            closed: false,
        };
        Arc::new(Self { desk: Mutex::new(desk), arrived: Condvar::new() })
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next chain of queue `index`; `None` when `timeout` passed or the hub was closed. Any thread.
    pub fn take(&self, index: u16, timeout: Option<Duration>) -> Option<HeldChain> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut desk = self.desk();
        loop {
            if let Some(chain) = desk.waiting.get_mut(usize::from(index))?.pop_front() {
                return Some(chain);
            }
            if desk.closed {
                return None;
            }
            desk = match deadline {
                None => self.arrived.wait(desk).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return None;
                    }
                    self.arrived.wait_timeout(desk, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Nobody takes chains any more: who waits is sent away, what was not taken is answered with length 0.
    pub fn close(&self) {
        let unwanted: Vec<VecDeque<HeldChain>> = {
            let mut desk = self.desk();
            desk.closed = true;
            desk.waiting.iter_mut().map(std::mem::take).collect()
        };
        self.arrived.notify_all();
        // Dropped without the lock: each gives itself back.
        drop(unwanted);
    }

    /// Whether `close` was called.
    pub fn is_closed(&self) -> bool {
        self.desk().closed
    }

    fn answer(&self, worker: usize, finished: Finished) {
        let waker = {
            let mut desk = self.desk();
            desk.answered[worker].push(finished);
            desk.wakers[worker].clone()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// One worker's end of the hub.
pub struct ChainServe {
    hub: Arc<Hub>,
    worker: usize,
    num_workers: usize,
    engine: AnyEngine,
    pending: usize,
}

impl ChainServe {
    /// `engine` is only slept on.
    pub fn new(hub: Arc<Hub>, worker: usize, num_workers: usize, waker: Waker, engine: AnyEngine) -> Self {
        hub.desk().wakers[worker] = Some(waker);
        Self { hub, worker, num_workers, engine, pending: 0 }
    }
}

impl Serve for ChainServe {
    type Engine = AnyEngine;

    fn engine(&mut self) -> &mut AnyEngine {
        &mut self.engine
    }

    fn start_batch(&mut self, _now_ns: u64) {}

    fn begin(&mut self, ring: u16, _features: u64, chain: &mut Chain, memory: &Arc<GuestMemory>) -> Begun {
        if chain.fault.is_some() {
            return Begun::Done(outcome(0, true));
        }
        let index = usize::from(ring) * self.num_workers + self.worker;
        let held = HeldChain {
            hub: Arc::clone(&self.hub),
            worker: self.worker,
            ring,
            index: index as u16,
            head: chain.head,
            readable: std::mem::take(chain.readable_mut()),
            writable: std::mem::take(&mut chain.writable),
            memory: Arc::clone(memory),
            answered: AtomicBool::new(false),
        };
        self.pending += 1;
        let refused = {
            let mut desk = self.hub.desk();
            if desk.closed {
                Some(held)
            } else {
                desk.waiting[index].push_back(held);
                None
            }
        };
        // Gives itself back, without the lock.
        drop(refused);
        self.hub.arrived.notify_all();
        Begun::Pending
    }

    fn finish_batch(&mut self, finished: &mut Vec<Finished>) {
        if self.pending == 0 {
            return;
        }
        let before = finished.len();
        finished.append(&mut self.hub.desk().answered[self.worker]);
        self.pending -= finished.len() - before;
    }

    fn pending(&self) -> usize {
        self.pending
    }

    fn memory_fault(&mut self) -> bool {
        false
    }
}

fn outcome(written: u32, failed: bool) -> Outcome {
    Outcome { written, kind: RequestType::Other, bytes: u64::from(written), failed, bounced: false }
}

/// A chain in somebody's hands. Given back once; dropped, it goes back with length 0.
#[derive(Debug)]
pub struct HeldChain {
    hub: Arc<Hub>,
    worker: usize,
    ring: u16,
    index: u16,
    head: u16,
    readable: Vec<IoVec>,
    writable: Vec<IoVec>,
    /// Keeps the bytes behind the runs mapped.
    memory: Arc<GuestMemory>,
    answered: AtomicBool,
}

impl HeldChain {
    /// The queue it came from.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes of the readable stream.
    pub fn readable(&self) -> u64 {
        self.readable.iter().map(|run| run.len() as u64).sum()
    }

    /// Bytes of the writable stream.
    pub fn writable(&self) -> u64 {
        self.writable.iter().map(|run| run.len() as u64).sum()
    }

    /// Copies from byte `offset` of the readable stream; `None` once it was given back.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Option<usize> {
        (!self.is_answered()).then(|| copy_out(&self.readable, offset, into))
    }

    /// Copies to byte `offset` of the writable stream; `None` once it was given back.
    pub fn write(&self, offset: usize, from: &[u8]) -> Option<usize> {
        (!self.is_answered()).then(|| copy_in(&self.writable, offset, from))
    }

    /// Whether it was given back.
    pub fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }

    /// The memory it points into.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Gives the chain back; false when it was already.
    pub fn complete(&self, written: u32, failed: bool) -> bool {
        if self.answered.swap(true, Ordering::AcqRel) {
            return false;
        }
        let written = u64::from(written).min(self.writable()) as u32;
        let finished = Finished { ring: self.ring, head: self.head, outcome: outcome(written, failed) };
        self.hub.answer(self.worker, finished);
        true
    }
}

impl Drop for HeldChain {
    fn drop(&mut self) {
        self.complete(0, true);
    }
}
