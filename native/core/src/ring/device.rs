//! The device half of a split ring: take chains, give them back, decide who must be notified.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ahead::{self, Ahead};
use super::{feature, index, layout, Areas, Broken, Chain, RingSetup, SetupError};
use crate::memory::inflight::Left;
use crate::memory::{BeyondLog, DirtyLog, GuestMemory, InflightQueue};
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

/// What a ring notes in the dirty log.
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// VHOST_F_LOG_ALL: data and status bytes.
    pub data: bool,
    /// VHOST_VRING_F_LOG: the used ring, under this guest address.
    pub used: Option<u64>,
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
    ahead: Ahead,
    /// Where the next used entry goes; runs ahead of what was published.
    next_used: u16,
    published: u16,
    /// How many entries lie between. It could be had from the two, but a load of both at once waits until the store of one has
    /// left the processor, behind all stores to the driver's memory.
    unpublished: u32,
    /// used.idx at the last notification decision; `None` when that is not known.
    signalled: Option<u16>,
    /// Something was made visible since.
    undecided: bool,
    in_flight: u16,
    taken: Vec<u64>,
    event_idx: bool,
    indirect: bool,
    notify_on_empty: bool,
    suppressing: bool,
    tracking: Option<Tracking>,
    log: Option<RingLog>,
    /// For walking a chain once more.
    scratch: Chain,
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
            ahead: Ahead::of(setup.base, setup.features & feature::INDIRECT_DESC != 0),
            next_used: used,
            published: used,
            unpublished: 0,
            signalled: None,
            undecided: false,
            in_flight: 0,
            event_idx: setup.features & feature::EVENT_IDX != 0,
            indirect: setup.features & feature::INDIRECT_DESC != 0,
            notify_on_empty: setup.features & feature::NOTIFY_ON_EMPTY != 0,
            suppressing: false,
            tracking: None,
            log: None,
            scratch: Chain::default(),
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
                self.ahead = Ahead::of(self.next_avail, self.indirect);
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

    /// Whether the in-flight region or the dirty log was taken away by the peer.
    pub fn tracking_lost(&self) -> bool {
        let log_lost = self.log.as_ref().is_some_and(|log| log.log.poisoned());
        log_lost || self.tracking.as_ref().is_some_and(|tracking| tracking.region.poisoned())
    }

    /// Notes what is written from now on in another log, or in none. What a predecessor wrote of the used ring nobody
    /// may have noted: all of that is noted now.
    pub fn set_log(&mut self, log: Option<RingLog>) -> Result<(), Broken> {
        self.log = log;
        self.log_used(0, layout::used_len(self.areas.size, self.event_idx))
    }

    /// Whether `log_writes` has to be called for what is given back.
    #[inline]
    pub fn logs_data(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.data)
    }

    /// Notes every page that the chain at `head` let the device write: it may have written any of them, whatever came
    /// of it. After the last write to them, and before `push`.
    pub fn log_writes(&mut self, head: u16, memory: &GuestMemory) -> Result<(), Broken> {
        let Some(RingLog { log, data: true, .. }) = &self.log else { return Ok(()) };
        // The driver may not touch its descriptors before they are given back; one that does harms itself.
        self.scratch.keep_writes(true);
        self.scratch.walk(head, &self.areas, memory, self.indirect)?;
        for &(gpa, len) in self.scratch.writes() {
            // Pages without a bit were not written: `take` saw to that.
            let _: Result<(), BeyondLog> = log.mark(gpa, u64::from(len));
        }
        Ok(())
    }

    /// Notes that bytes of the used ring were written.
    #[inline]
    fn log_used(&self, offset: usize, len: usize) -> Result<(), Broken> {
        match &self.log {
            Some(RingLog { log, used: Some(used), .. }) => {
                let gpa = used.checked_add(offset as u64).ok_or(Broken::Memory)?;
                log.mark(gpa, len as u64).map_err(|BeyondLog| Broken::Memory)
            }
            _ => Ok(()),
        }
    }

    /// Notes the used entries from one index to another, and the index itself.
    fn log_published(&self, from: u16, to: u16) -> Result<(), Broken> {
        let size = self.areas.size;
        let (first, count) = (self.areas.slot(from), index::ahead(to, from));
        let until_end = count.min(size - first);
        self.log_used(layout::used_entry(first), 8 * usize::from(until_end))?;
        self.log_used(layout::used_entry(0), 8 * usize::from(count - until_end))?;
        self.log_used(layout::IDX, 2)
    }

    /// Finds the areas again in another table. No chain may be in flight.
    pub fn relocate(&mut self, memory: &GuestMemory) -> Result<(), SetupError> {
        self.areas = Areas::find(&self.setup, memory)?;
        // What was fetched ahead lies in the memory from before.
        self.ahead = Ahead::of(self.next_avail, self.indirect);
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

    /// Chains that were pushed and not published.
    #[inline]
    pub fn unpublished(&self) -> u32 {
        self.unpublished
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
        self.fetch_ahead(memory);
        let head = self.head(self.next_avail)?;
        self.begin(head, memory, chain)?;
        step!("taken");
        if let Some(tracking) = &mut self.tracking {
            tracking.region.mark(head)?;
            step!("marked");
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(true)
    }

    /// The head that the driver made available at an index.
    #[inline]
    fn head(&self, at: u16) -> Result<u16, Broken> {
        let head = self.areas.avail.load_u16(layout::avail_entry(self.areas.slot(at)))?;
        if head >= self.areas.size {
            return Err(Broken::Head { head });
        }
        Ok(head)
    }

    /// Has the processor fetch what the next chains are made of.
    #[inline]
    fn fetch_ahead(&mut self, memory: &GuestMemory) {
        let mut seen = index::ahead(self.seen_avail, self.next_avail);
        if seen < ahead::TABLES {
            // Soon it is needed anyway. A jump shows when nothing is left to take.
            let now = self.areas.avail.load_u16(layout::IDX).unwrap_or(self.seen_avail);
            if index::ahead(now, self.next_avail) <= self.areas.size {
                self.seen_avail = now;
                seen = index::ahead(now, self.next_avail);
            }
        }
        self.ahead.fetch(self.next_avail, seen, &self.areas, memory);
    }

    /// The first 16 bytes of a chain that is taken soon, each chain once; None when nothing more is known. Only a hint:
    /// its driver may still change them.
    #[inline]
    pub fn upcoming(&mut self, memory: &GuestMemory) -> Option<[u64; 2]> {
        self.ahead.tell(self.next_avail, memory)
    }

    #[inline]
    fn begin(&mut self, head: u16, memory: &GuestMemory, chain: &mut Chain) -> Result<(), Broken> {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.taken[word] & bit != 0 {
            return Err(Broken::HeadTwice { head });
        }
        chain.keep_writes(self.logs_data());
        chain.walk(head, &self.areas, memory, self.indirect)?;
        if let Some(RingLog { log, data: true, .. }) = &self.log {
            chain.forbid_unlogged(log);
        }
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
        self.unpublished += 1;
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
        self.show()?;
        if !self.undecided {
            return Ok(false);
        }
        // The driver's wish is read after our index is visible: it stores its wish and then reads our index.
        fence(Ordering::SeqCst);
        step!("fenced");
        let wanted = self.wants_notification();
        self.decided();
        wanted
    }

    /// Makes what was pushed visible while more is to come; `publish` follows. True when the driver is seen to want a
    /// notification. One that has just begun to want it is not seen without the fence, which takes as long as several
    /// requests: `publish` sees it.
    #[inline]
    pub fn publish_early(&mut self) -> Result<bool, Broken> {
        self.show()?;
        if !self.undecided {
            return Ok(false);
        }
        let wanted = self.wants_notification();
        if wanted != Ok(false) {
            self.decided();
        }
        wanted
    }

    /// Whether `publish` has something to do.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.undecided || self.unpublished() > 0
    }

    /// Stores the used index, if it is another one, and what goes with it.
    #[inline]
    fn show(&mut self) -> Result<(), Broken> {
        if self.unpublished == 0 {
            return Ok(());
        }
        self.unpublished = 0;
        self.areas.used.store_u16(layout::IDX, self.next_used)?;
        let before = std::mem::replace(&mut self.published, self.next_used);
        self.undecided = true;
        step!("used_idx");
        if self.log.is_some() {
            self.log_published(before, self.published)?;
        }
        if let Some(Tracking { region, batch, .. }) = &mut self.tracking {
            region.clear(batch, self.published)?;
            batch.clear();
            step!("region_idx");
        }
        Ok(())
    }

    #[inline]
    fn wants_notification(&mut self) -> Result<bool, Broken> {
        if self.notify_on_empty && self.in_flight == 0 && !self.has_available()? {
            return Ok(true);
        }
        if self.event_idx {
            let event = self.areas.avail.load_u16(layout::used_event(self.areas.size))?;
            return Ok(self.signalled.is_none_or(|old| index::need_event(event, self.published, old)));
        }
        Ok(self.areas.avail.load_u16(layout::FLAGS)? & layout::AVAIL_NO_INTERRUPT == 0)
    }

    #[inline]
    fn decided(&mut self) {
        self.signalled = Some(self.published);
        self.undecided = false;
    }

    /// Asks the driver not to kick while the worker looks by itself.
    #[inline]
    pub fn suppress_kicks(&mut self) -> Result<(), Broken> {
        if !self.suppressing {
            self.suppressing = true;
            // With EVENT_IDX the old event index is simply left behind.
            if !self.event_idx {
                self.areas.used.store_u16(layout::FLAGS, layout::USED_NO_NOTIFY)?;
                self.log_used(layout::FLAGS, 2)?;
            }
        }
        Ok(())
    }

    /// Asks for a kick with the next chain and looks once more; true when one came meanwhile.
    #[inline]
    pub fn enable_kicks(&mut self) -> Result<bool, Broken> {
        self.suppressing = false;
        if self.event_idx {
            let event = layout::avail_event(self.areas.size);
            self.areas.used.store_u16(event, self.next_avail)?;
            self.log_used(event, 2)?;
        } else {
            self.areas.used.store_u16(layout::FLAGS, 0)?;
            self.log_used(layout::FLAGS, 2)?;
        }
        // Our wish is visible before the driver's index is read: it stores its index and then reads our wish.
        fence(Ordering::SeqCst);
        self.has_available()
    }
}
