//! A ring on its worker: the device half, its descriptors, its state.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use super::stats::{Counter, QueueStats};
use super::{EventKind, Events, InFlight, Outcome, Reply, RingFacts};
use crate::memory::{DirtyLog, GuestMemory};
use crate::ring::{Broken, DeviceRing, RingLog};
use crate::sys::eventfd::{self, PeerEvent};

/// Chains given back before the driver sees them, while more are under way: one that looks for answers goes on early.
const STEP: u32 = 4;

/// How a worker learns of new chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kicks {
    /// It looks from time to time: there is no descriptor, or none that can be waited for.
    Polled,
    /// The descriptor is watched.
    Watched,
    /// The descriptor's other end is closed: the ring rests until it gets another one.
    Silent,
}

/// How a ring stops. Either way nothing new is taken, and what storage has is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopMode {
    /// Everything that was ever taken completes, by a predecessor too: the driver's requests are all answered.
    #[default]
    Finish,
    /// What storage has not been given yet, or has failed and is kept, stays in the in-flight region, for whoever serves the ring next.
    Leave,
}

/// Who waits for a ring to stop, and how it stops.
#[derive(Debug)]
pub(super) struct Stopping {
    pub(super) mode: StopMode,
    pub(super) reply: Reply<u16>,
}

/// What the device notes in the dirty log.
#[derive(Clone, Debug, Default)]
pub(super) struct LogState {
    pub(super) log: Option<Arc<DirtyLog>>,
    /// VHOST_F_LOG_ALL.
    pub(super) data: bool,
    /// SET_LOG_FD: signalled when something was noted.
    pub(super) notify: Option<Arc<OwnedFd>>,
}

/// A started ring.
#[derive(Debug)]
pub(super) struct Served {
    /// The device's number for it.
    pub(super) index: u16,
    pub(super) ring: DeviceRing,
    pub(super) features: u64,
    pub(super) enabled: bool,
    pub(super) broken: bool,
    /// Set while GET_VRING_BASE waits for the last chain.
    pub(super) stopping: Option<Stopping>,
    /// Whoever waits for the stop has waited long enough for chains that storage failed.
    pub(super) impatient: bool,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<PeerEvent>,
    pub(super) err: Option<OwnedFd>,
    pub(super) kicks: Kicks,
    /// VHOST_VRING_F_LOG: under which guest address the used ring is noted in the dirty log.
    pub(super) log_used: Option<u64>,
    pub(super) stats: Arc<QueueStats>,
    pub(super) in_flight: Arc<InFlight>,
}

impl Served {
    /// What its `Serve` reports to.
    pub(super) fn facts(&self) -> RingFacts {
        RingFacts { index: self.index, stats: Arc::clone(&self.stats), in_flight: Arc::clone(&self.in_flight) }
    }

    /// Whether new chains are taken from it.
    #[inline]
    pub(super) fn runs(&self) -> bool {
        self.enabled && !self.broken && self.stopping.is_none()
    }

    /// Whether a look at it finds work.
    #[inline]
    pub(super) fn has_chains(&mut self) -> bool {
        // A ring that turns out to be broken is work, too.
        self.runs() && self.ring.has_available() != Ok(false)
    }

    /// Whether it stops, and a predecessor's chains have to be answered first.
    pub(super) fn finishes(&self) -> bool {
        !self.broken && self.ring.to_replay() > 0 && self.stopping.as_ref().is_some_and(|s| s.mode == StopMode::Finish)
    }

    /// Whether it stops and its driver gets no answers any more.
    pub(super) fn leaves(&self) -> bool {
        self.stopping.as_ref().is_some_and(|s| s.mode == StopMode::Leave)
    }

    /// Whether it is to stop and nothing is left to wait for.
    pub(super) fn has_stopped(&self) -> bool {
        self.stopping.is_some() && self.ring.in_flight() == 0 && !self.finishes()
    }

    /// Whether it must be looked at without being told.
    pub(super) fn polled(&self) -> bool {
        self.runs() && self.kicks == Kicks::Polled
    }

    /// Notes that a chain was taken.
    #[inline]
    pub(super) fn taken(&self, head: u16, now_ns: u64) {
        self.in_flight.taken(head, now_ns);
        self.stats.set(Counter::InFlight, u64::from(self.ring.in_flight()));
    }

    /// Writes the used entry of a chain; `publish` makes it visible.
    #[inline]
    pub(super) fn give_back(&mut self, head: u16, outcome: &Outcome, memory: &GuestMemory, events: &Events) {
        self.stats.ended(outcome);
        self.in_flight.ended(head);
        if self.ring.logs_data() {
            if let Err(broken) = self.ring.log_writes(head, memory) {
                self.break_ring(broken, events);
            }
        }
        if let Err(broken) = self.ring.push(head, outcome.written) {
            self.break_ring(broken, events);
        }
    }

    /// Lets go of a chain that was not answered.
    pub(super) fn forget(&mut self, head: u16) {
        self.in_flight.ended(head);
        self.ring.forget(head);
        self.stats.set(Counter::InFlight, u64::from(self.ring.in_flight()));
    }

    /// Notes what is written from now on where `log` says.
    pub(super) fn set_log(&mut self, log: &LogState, events: &Events) {
        let used = self.log_used;
        let ring_log = log.log.as_ref().map(|shared| RingLog { log: Arc::clone(shared), data: log.data, used });
        if let Err(broken) = self.ring.set_log(ring_log) {
            self.break_ring(broken, events);
        }
    }

    /// Makes what was given back visible, if it is enough, while more is to come.
    #[inline]
    pub(super) fn publish_early(&mut self, events: &Events) {
        if self.ring.unpublished() < STEP {
            return;
        }
        match self.ring.publish_early() {
            Ok(true) => self.notify(),
            Ok(false) => {}
            Err(broken) => self.break_ring(broken, events),
        }
    }

    /// Makes what was given back visible and notifies the driver if it wants to be.
    #[inline]
    pub(super) fn publish(&mut self, events: &Events) {
        // All may have been shown, and the driver notified, already.
        self.stats.set(Counter::InFlight, u64::from(self.ring.in_flight()));
        if !self.ring.has_news() {
            return;
        }
        match self.ring.publish() {
            Ok(true) => self.notify(),
            Ok(false) => self.stats.add(Counter::NotificationsSuppressed, 1),
            Err(broken) => self.break_ring(broken, events),
        }
    }

    /// Signals the call descriptor.
    pub(super) fn notify(&self) {
        let Some(call) = &self.call else { return };
        // A full descriptor has been signalled already; a closed pipe has nobody behind it.
        let _ = call.signal();
        step!("notified");
        self.stats.add(Counter::NotificationsSent, 1);
    }

    /// Stops serving the ring and says so.
    pub(super) fn break_ring(&mut self, broken: Broken, events: &Events) {
        if self.broken {
            return;
        }
        self.broken = true;
        self.stats.set(Counter::Broken, 1);
        events.push(EventKind::RingBroken, Some(self.index), broken.to_string());
        if let Some(err) = &self.err {
            let _ = eventfd::signal(err.as_fd());
        }
    }

    /// Empties the kick descriptor; false when it will never be readable again in a useful way.
    pub(super) fn drain_kick(&self) -> bool {
        let Some(kick) = &self.kick else { return true };
        self.stats.add(Counter::Kicks, 1);
        match eventfd::drain(kick.as_fd()) {
            Ok(true) => true,
            // Readable without a byte: the other end of a pipe is closed. An eventfd somebody else emptied is fine.
            Ok(false) => !matches!(eventfd::classify(kick.as_fd()), Ok(kind) if kind != eventfd::FdKind::EventFd),
            Err(_) => false,
        }
    }

    pub(super) fn kick_fd(&self) -> Option<libc::c_int> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }
}
