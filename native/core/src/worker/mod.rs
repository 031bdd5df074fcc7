//! Queue workers: threads that own rings and serve them.
//!
//! `Queues` is the owner's side: it posts commands to the workers' mailboxes and waits where it has to.
//! `Worker` is the thread: it takes chains, hands them to its `Serve`, publishes what is done, and sleeps.

mod events;
mod in_flight;
mod mailbox;
#[cfg(all(test, loom))]
mod orders;
mod polling;
mod queues;
mod run;
mod served;
mod stats;

pub use events::{Event, EventKind, Events};
pub use in_flight::{InFlight, RequestInFlight, Whereabouts};
#[cfg(feature = "count")]
pub use queues::Stepper;
pub use queues::{Notifiers, QueueError, Queues, Waker};
pub use served::StopMode;
pub(crate) use stats::{now_ns, Counter};
pub use stats::{QueueStats, COUNTERS};

use std::sync::mpsc::SyncSender;
use std::sync::Arc;
use std::time::Duration;

use crate::blk::RequestType;
use crate::disk::Engine;
use crate::memory::GuestMemory;
use crate::ring::Chain;

/// Sends one answer. The owner may have stopped waiting; that is no error.
#[derive(Debug)]
struct Reply<T>(SyncSender<T>);

impl<T> Reply<T> {
    fn send(self, value: T) {
        let _ = self.0.send(value);
    }
}

/// How a chain ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The used length.
    pub written: u32,
    /// For statistics.
    pub kind: RequestType,
    /// Bytes moved or changed, for statistics.
    pub bytes: u64,
    /// The driver was told of an error, or could not be told.
    pub failed: bool,
    /// Direct I/O demanded a copy.
    pub bounced: bool,
}

/// What became of a chain at once.
#[derive(Clone, Copy, Debug)]
pub enum Begun {
    /// It is answered.
    Done(Outcome),
    /// It comes back from `finish_batch`.
    Pending,
}

/// A chain that ended later.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// The ring, as numbered by the worker.
    pub ring: u16,
    /// The chain.
    pub head: u16,
    /// How it ended.
    pub outcome: Outcome,
}

/// Where a `Serve` says how the requests of a ring fare: nobody waits for it there, and anybody may look.
#[derive(Clone, Debug)]
pub struct RingFacts {
    /// The device's number for the ring.
    pub index: u16,
    /// Its counters.
    pub stats: Arc<QueueStats>,
    /// Its requests in flight.
    pub in_flight: Arc<InFlight>,
}

/// What a device type does with the chains of its rings. Lives on the worker's thread.
///
/// Chains point into the memory that the worker holds: it changes it only when nothing is pending.
pub trait Serve {
    /// What the worker waits with.
    type Engine: Engine;

    /// The engine.
    fn engine(&mut self) -> &mut Self::Engine;

    /// A new pass over the rings begins: what may change between requests is looked at now.
    /// `now_ns`: the time on the workers' clock, as of some moment since the last one ended.
    fn start_batch(&mut self, now_ns: u64);

    /// Whether it makes use of `hint`.
    fn wants_hints(&self) -> bool {
        false
    }

    /// Told of the first bytes of a chain that begins soon, which its driver may still change.
    fn hint(&mut self, _header: [u64; 2]) {}

    /// Starts work on a chain. `ring` is the worker's number for it, `features` what its driver negotiated.
    fn begin(&mut self, ring: u16, features: u64, chain: &mut Chain, memory: &Arc<GuestMemory>) -> Begun;

    /// Appends the chains that ended since.
    fn finish_batch(&mut self, finished: &mut Vec<Finished>);

    /// Chains begun and not finished.
    fn pending(&self) -> usize;

    /// Whether another chain may be taken now. One that is not stays in its ring.
    #[inline]
    fn admits(&mut self) -> bool {
        true
    }

    /// How long the worker may sleep at most, for what happens without a descriptor: `None` for as long as it likes.
    fn patience(&mut self) -> Option<Duration> {
        None
    }

    /// A ring begins to be served, as `ring`.
    fn ring_started(&mut self, ring: u16, facts: RingFacts) {
        let _ = (ring, facts);
    }

    /// Ends, with their errors, the chains of a ring (`None`: of all) that storage failed and that are kept to be tried
    /// again: somebody has waited long enough for them. Appends them.
    fn fail_kept(&mut self, ring: Option<u16>, finished: &mut Vec<Finished>) {
        let _ = (ring, finished);
    }

    /// Forgets the same chains without an answer, and appends their heads: who served the driver is leaving it.
    fn leave_kept(&mut self, ring: u16, left: &mut Vec<u16>) {
        let _ = (ring, left);
    }

    /// True once after a system call met memory that cannot be touched.
    fn memory_fault(&mut self) -> bool;
}
