//! What the workers of one disk share, and how others reach them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::flush::FlushGate;
use super::kept::Episode;
use super::operator::{Decision, Desk};
use super::policy::ErrorPolicy;
use super::rate::RateLimit;
use super::request::Limits;
use crate::worker::Waker;

/// What the workers of one disk share, and what may change while they run. Usable from any thread.
#[derive(Debug)]
pub struct BlkShared {
    pub(super) limits: Limits,
    pub(super) policy: ErrorPolicy,
    pub(super) num_sectors: AtomicU64,
    pub(super) writeback: AtomicBool,
    pub(super) flush_failed: AtomicBool,
    pub(super) flush_gate: FlushGate,
    pub(super) rate: RateLimit,
    pub(super) episode: Episode,
    pub(super) device_id: Vec<u8>,
    desks: Mutex<Vec<Arc<Desk>>>,
}

impl BlkShared {
    /// `device_id` is cut to the 20 bytes that GET_ID answers. Errors are reported and nothing is limited, at first.
    pub fn new(limits: Limits, writeback: bool, device_id: &[u8]) -> Self {
        Self {
            limits,
            policy: ErrorPolicy::default(),
            num_sectors: AtomicU64::new(limits.num_sectors),
            writeback: AtomicBool::new(writeback),
            flush_failed: AtomicBool::new(false),
            flush_gate: FlushGate::default(),
            rate: RateLimit::default(),
            episode: Episode::default(),
            device_id: device_id.to_vec(),
            desks: Mutex::default(),
        }
    }

    /// The same with a policy for requests that storage fails.
    #[must_use]
    pub fn with_policy(self, policy: ErrorPolicy) -> Self {
        Self { policy, ..self }
    }

    /// The capacity for every request taken from now on, in sectors.
    pub fn set_num_sectors(&self, num_sectors: u64) {
        self.num_sectors.store(num_sectors, Ordering::Release);
    }

    /// False: a write completes only once it is on stable storage.
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Release);
    }

    /// Whether an fdatasync failed. It is not known then what was lost, so every later FLUSH fails too.
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    /// Takes at most so many requests and so many bytes a second from now on; 0: as many as there are.
    pub fn set_rate_limit(&self, iops: u64, bps: u64) {
        self.rate.set(iops, bps);
        // Those that wait for an older limit look again.
        self.desks().iter().for_each(|desk| desk.wake());
    }

    /// The limits in force: requests and bytes a second, 0 for none.
    pub fn rate_limit(&self) -> (u64, u64) {
        self.rate.get()
    }

    /// Decides about requests that storage failed and that are kept: about that of one queue and head, or about all.
    /// Returns how many it was carried out for, after waiting at most `timeout` for the workers.
    pub fn decide(&self, decision: Decision, which: Option<(u16, u16)>, timeout: Duration) -> u64 {
        let desks = self.desks().clone();
        let replies: Vec<_> = desks.iter().map(|desk| desk.order(decision, which)).collect();
        // A worker never waits for storage, so it answers soon; one that has ended has dropped its end.
        replies.iter().map(|reply| reply.recv_timeout(timeout).unwrap_or(0)).sum()
    }

    /// A new worker's desk.
    pub(super) fn enlist(&self, waker: Waker) -> Arc<Desk> {
        let desk = Arc::new(Desk::new(waker));
        self.desks().push(Arc::clone(&desk));
        desk
    }

    /// The worker has ended.
    pub(super) fn dismiss(&self, desk: &Arc<Desk>) {
        self.desks().retain(|other| !Arc::ptr_eq(other, desk));
        desk.close();
    }

    fn desks(&self) -> MutexGuard<'_, Vec<Arc<Desk>>> {
        self.desks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
