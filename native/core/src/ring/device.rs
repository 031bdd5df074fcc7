//! The device half of a split ring: take chains, give them back, decide who must be notified.

use std::collections::VecDeque;

use super::{feature, index, layout, Areas, Broken, Chain, RingSetup, SetupError};
use crate::memory::inflight::Left;
use crate::memory::{GuestMemory, InflightQueue};
use crate::sys::sync::{fence, Ordering};

/// What a ring keeps of its in-flight region.
#[derive(Debug)]
struct Tracking {
    region: InflightQueue,
    /// Heads that a predecessor took: they come before any new one.
    replay: VecDeque<u16>,
    /// Heads given back since the last `publish`.
    batch: Vec<u16>,
}

/// A started ring, seen from the device. Owned by one worker.
///
/// `push` writes used entries that `publish` then makes visible at once, so that a batch costs one
/// index store and one decision about the notification.
#[derive(Debug)]
pub struct DeviceRing {
    areas: Areas,
    setup: RingSetup,
    next_avail: u16,
    seen_avail: u16,
    /// Where the next used entry goes; runs ahead of what was published.
    next_used: u16,
    published: u16,
    /// used.idx at the last notification decision; `None` when that is not known.
    signalled: Option<u16>,
    in_flight: u16,
    taken: Vec<u64>,
    event_idx: bool,
    indirect: bool,
    notify_on_empty: bool,
    suppressing: bool,
    tracking: Option<Tracking>,
}

impl DeviceRing {
    /// Finds the ring in memory. Its used index comes from the ring itself.
    pub fn new(setup: RingSetup, memory: &GuestMemory) -> Result<Self, SetupError> {
        let areas = Areas::find(&setup, memory)?;
        let used = areas.used.load_u16(layout::IDX).map_err(|_| SetupError::Unmapped("used ring", setup.used))?;
        Ok(Self {
            taken: vec![0; usize::from(setup.size).div_ceil(64)],
            next_avail: setup.base,
            seen_avail: setup.base,
            next_used: used,
            published: used,
            signalled: None,
            in_flight: 0,
            event_idx: setup.features & feature::EVENT_IDX != 0,
            indirect: setup.features & feature::INDIRECT_DESC != 0,
            notify_on_empty: setup.features & feature::NOTIFY_ON_EMPTY != 0,
            suppressing: false,
            tracking: None,
            areas,
            setup,
        })
    }

    /// Keeps track of what is in flight in `region` from now on, and goes on where that says a predecessor stopped; a
    /// region that nobody has used changes nothing. True when there was a predecessor: its last notification may not
    /// have been sent. For a ring from which nothing was taken yet.
    pub fn track(&mut self, mut region: InflightQueue) -> Result<bool, Broken> {
        let available = index::ahead(self.areas.avail.load_u16(layout::IDX)?, self.published);
        let left = region.take_over(self.published, available)?.map_err(Broken::Stale)?;
        let batch = Vec::with_capacity(usize::from(self.areas.size));
        let (replay, recovered) = match left {
            Left::Nothing => (VecDeque::new(), false),
            Left::Heads(heads) => {
                self.next_avail = self.published.wrapping_add(heads.len() as u16);
                self.seen_avail = self.next_avail;
                (heads.into(), true)
            }
        };
        self.tracking = Some(Tracking { region, replay, batch });
        step!("recovered", if recovered);
        Ok(recovered)
    }

    /// Whether what is in flight is kept where a successor finds it.
    pub fn tracked(&self) -> bool {
        self.tracking.is_some()
    }

    /// Chains of a predecessor that are still to be taken.
    pub fn to_replay(&self) -> usize {
        self.tracking.as_ref().map_or(0, |tracking| tracking.replay.len())
    }

    /// Whether the in-flight region was taken away by the peer.
    pub fn tracking_lost(&self) -> bool {
        self.tracking.as_ref().is_some_and(|tracking| tracking.region.poisoned())
    }

    /// Finds the areas again in another table. No chain may be in flight.
    pub fn relocate(&mut self, memory: &GuestMemory) -> Result<(), SetupError> {
        self.areas = Areas::find(&self.setup, memory)?;
        Ok(())
    }

    /// What the ring was started with.
    pub fn setup(&self) -> &RingSetup {
        &self.setup
    }

    /// The next available index: what GET_VRING_BASE answers once nothing is in flight.
    pub fn base(&self) -> u16 {
        self.next_avail
    }

    /// Chains taken and not given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The used index as the driver sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// Whether there is a chain to take. Reads the driver's index only when what it last said is used up.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, Broken> {
        if self.to_replay() > 0 {
            return Ok(true);
        }
        if self.seen_avail == self.next_avail {
            let seen = self.areas.avail.load_u16(layout::IDX)?;
            if index::ahead(seen, self.next_avail) > self.areas.size {
                return Err(Broken::AvailJump { index: self.next_avail, seen });
            }
            self.seen_avail = seen;
        }
        Ok(self.seen_avail != self.next_avail)
    }

    /// Takes the next chain; false when there is none.
    #[inline]
    pub fn take(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, Broken> {
        if let Some(head) = self.tracking.as_mut().and_then(|tracking| tracking.replay.pop_front()) {
            self.begin(head, memory, chain)?;
            step!("replayed");
            return Ok(true);
        }
        if !self.has_available()? {
            return Ok(false);
        }
        let slot = self.areas.slot(self.next_avail);
        let head = self.areas.avail.load_u16(layout::avail_entry(slot))?;
        if head >= self.areas.size {
            return Err(Broken::Head { head });
        }
        self.begin(head, memory, chain)?;
        step!("taken");
        if let Some(tracking) = &mut self.tracking {
            tracking.region.mark(head)?;
            step!("marked");
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    #[inline]
    fn begin(&mut self, head: u16, memory: &GuestMemory, chain: &mut Chain) -> Result<(), Broken> {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.taken[word] & bit != 0 {
            return Err(Broken::HeadTwice { head });
        }
        chain.walk(head, &self.areas, memory, self.indirect)?;
        self.taken[word] |= bit;
        self.in_flight += 1;
        Ok(())
    }

    /// Writes the used entry of a chain that was taken; the driver does not see it yet.
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        debug_assert!(self.taken[word] & bit != 0, "head {head} is not in flight");
        if let Some(tracking) = &mut self.tracking {
            tracking.region.link(head)?;
            tracking.batch.push(head);
            step!("linked");
        }
        let entry = layout::used_entry(self.areas.slot(self.next_used));
        self.areas.used.store_u32(entry, u32::from(head))?;
        self.areas.used.store_u32(entry + 4, written)?;
        step!("pushed");
        self.taken[word] &= !bit;
        self.in_flight -= 1;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Lets go of a chain that was taken, without an answer: its driver still waits for it, and so it stays marked in
    /// the in-flight region, for whoever serves the ring next.
    pub fn forget(&mut self, head: u16) {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        debug_assert!(self.taken[word] & bit != 0, "head {head} is not in flight");
        self.taken[word] &= !bit;
        self.in_flight -= 1;
    }

    /// Makes what was pushed visible. True when the driver wants to be notified of it.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, Broken> {
        if self.next_used == self.published {
            return Ok(false);
        }
        self.areas.used.store_u16(layout::IDX, self.next_used)?;
        self.published = self.next_used;
        step!("used_idx");
        if let Some(Tracking { region, batch, .. }) = &mut self.tracking {
            region.clear(batch, self.published)?;
            batch.clear();
            step!("region_idx");
        }
        // The driver's wish is read after our index is visible: it stores its wish and then reads our index.
        fence(Ordering::SeqCst);
        step!("fenced");
        let new = self.published;
        let old = self.signalled.replace(new);
        if self.notify_on_empty && self.in_flight == 0 && !self.has_available()? {
            return Ok(true);
        }
        if self.event_idx {
            let event = self.areas.avail.load_u16(layout::used_event(self.areas.size))?;
            return Ok(old.is_none_or(|old| index::need_event(event, new, old)));
        }
        Ok(self.areas.avail.load_u16(layout::FLAGS)? & layout::AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick while the worker looks by itself.
    #[inline]
    pub fn suppress_kicks(&mut self) -> Result<(), Broken> {
        if !self.suppressing {
            self.suppressing = true;
            // With EVENT_IDX the old event index is simply left behind.
            if !self.event_idx {
                self.areas.used.store_u16(layout::FLAGS, layout::USED_NO_NOTIFY)?;
            }
        }
        Ok(())
    }

    /// Asks for a kick with the next chain and looks once more; true when one came meanwhile.
    #[inline]
    pub fn enable_kicks(&mut self) -> Result<bool, Broken> {
        self.suppressing = false;
        if self.event_idx {
            self.areas.used.store_u16(layout::avail_event(self.areas.size), self.next_avail)?;
        } else {
            self.areas.used.store_u16(layout::FLAGS, 0)?;
        }
        // Our wish is visible before the driver's index is read: it stores its index and then reads our wish.
        fence(Ordering::SeqCst);
        self.has_available()
    }
}
