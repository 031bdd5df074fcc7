//! The driver half of a split ring: make chains, publish them, take back what the device has used.

use std::fmt;

use super::layout::{self, Descriptor, F_INDIRECT, F_NEXT, F_WRITE};
use super::{feature, index, Areas};
use crate::memory::{GuestSlice, OutOfBounds};
use crate::sys::sync::{fence, Ordering};

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
}

/// What can go wrong on the driver's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverError {
    /// Not enough free descriptors: reap first.
    Full,
    /// A chain without buffers, or an indirect table that does not hold it.
    Chain,
    /// used.idx moved further than there are chains outstanding.
    UsedJump {
        /// What the device says.
        seen: u16,
        /// What was taken back so far.
        reaped: u16,
        /// Chains it could have used.
        outstanding: u16,
    },
    /// A used id that is no head of an outstanding chain.
    UsedId(u32),
    /// More bytes than the chain has room for.
    UsedLength {
        /// The chain.
        head: u16,
        /// What the device says.
        written: u32,
        /// What it could have written.
        room: u64,
    },
    /// The ring's own memory is too small.
    Memory,
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the ring has no free descriptors for the chain"),
            Self::Chain => f.write_str("a chain needs at least one buffer and a table that holds it"),
            Self::UsedJump { seen, reaped, outstanding } => {
                write!(f, "used.idx jumped from {reaped} to {seen} with {outstanding} chains outstanding")
            }
            Self::UsedId(id) => write!(f, "used id {id} is not outstanding"),
            Self::UsedLength { head, written, room } => {
                write!(f, "chain {head} was used with {written} bytes written but has room for {room}")
            }
            Self::Memory => f.write_str("the ring does not fit into its memory"),
        }
    }
}

impl From<OutOfBounds> for DriverError {
    fn from(_: OutOfBounds) -> Self {
        Self::Memory
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Outstanding {
    /// 0: none is.
    descriptors: u16,
    /// The available index it was offered at.
    at: u16,
    room: u64,
}

/// A split ring, seen from the driver. What the device can write is never trusted: the free list,
/// the chains' lengths and which heads are outstanding are kept here.
#[derive(Debug)]
pub struct DriverRing {
    areas: Areas,
    /// What the descriptor table holds: an entry that stays as it is is not stored again, for the device's processor would have
    /// to fetch it again.
    table: Vec<Descriptor>,
    /// The free list and, for chains in use, how they go on: the table's own copy is never read back.
    next: Vec<u16>,
    outstanding: Vec<Outstanding>,
    free_head: u16,
    free: u16,
    in_use: u16,
    next_avail: u16,
    published: u16,
    next_used: u16,
    /// The device's index as last seen: it is read again only when all up to there is reaped.
    seen_used: u16,
    event_idx: bool,
}

impl DriverRing {
    /// A ring in `areas`, which are zeroed first. Both indices start at `base`, as after a GET_VRING_BASE.
    pub fn new(areas: Areas, features: u64, base: u16) -> Result<Self, DriverError> {
        areas.desc.as_iovec().zero();
        areas.avail.as_iovec().zero();
        areas.used.as_iovec().zero();
        areas.avail.store_u16(layout::IDX, base)?;
        areas.used.store_u16(layout::IDX, base)?;
        let size = areas.size;
        Ok(Self {
            table: vec![Descriptor::from_words(0, 0); usize::from(size)],
            next: (1..=size).collect(),
            outstanding: vec![Outstanding::default(); usize::from(size)],
            free_head: 0,
            free: size,
            in_use: 0,
            next_avail: base,
            published: base,
            next_used: base,
            seen_used: base,
            event_idx: features & feature::EVENT_IDX != 0,
            areas,
        })
    }

    /// The areas of the ring.
    pub fn areas(&self) -> &Areas {
        &self.areas
    }

    /// Descriptors not in use.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains not given back yet, published or not.
    pub fn outstanding(&self) -> u16 {
        self.in_use
    }

    /// The next available index.
    pub fn avail_index(&self) -> u16 {
        self.next_avail
    }

    /// The next used index to reap.
    pub fn used_index(&self) -> u16 {
        self.next_used
    }

    /// Makes a chain of direct descriptors and returns its head; the device does not see it yet.
    #[inline]
    pub fn add(&mut self, segments: &[Segment]) -> Result<u16, DriverError> {
        let count = u16::try_from(segments.len()).map_err(|_| DriverError::Full)?;
        if count == 0 {
            return Err(DriverError::Chain);
        }
        if count > self.free {
            return Err(DriverError::Full);
        }
        let head = self.free_head;
        let mut at = head;
        let mut room = 0;
        for (place, segment) in segments.iter().enumerate() {
            let last = place + 1 == segments.len();
            let next = self.next[usize::from(at)];
            room += if segment.writable { u64::from(segment.len) } else { 0 };
            self.set_descriptor(at, segment.descriptor(last, next))?;
            self.free_head = next;
            at = next;
        }
        self.offer(head, count, room)?;
        Ok(head)
    }

    /// The same by one indirect descriptor; `table` is room for the entries, at guest address `addr`.
    pub fn add_indirect(&mut self, segments: &[Segment], table: &GuestSlice, addr: u64) -> Result<u16, DriverError> {
        write_table(segments, table)?;
        self.add_written(segments, addr)
    }

    /// The same where the table at `addr` holds the chain already: see [`write_table`].
    #[inline]
    pub fn add_written(&mut self, segments: &[Segment], addr: u64) -> Result<u16, DriverError> {
        let len = u16::try_from(segments.len()).map_err(|_| DriverError::Chain)?;
        if len == 0 {
            return Err(DriverError::Chain);
        }
        if self.free == 0 {
            return Err(DriverError::Full);
        }
        let room = segments.iter().map(|segment| if segment.writable { u64::from(segment.len) } else { 0 }).sum();
        let head = self.free_head;
        let len = u32::from(len) * layout::DESC_SIZE as u32;
        self.set_descriptor(head, Descriptor { addr, len, flags: F_INDIRECT, next: 0 })?;
        self.free_head = self.next[usize::from(head)];
        self.offer(head, 1, room)?;
        Ok(head)
    }

    #[inline]
    fn set_descriptor(&mut self, at: u16, descriptor: Descriptor) -> Result<(), DriverError> {
        let kept = &mut self.table[usize::from(at)];
        if *kept != descriptor {
            self.areas.set_descriptor(at, descriptor)?;
            *kept = descriptor;
        }
        Ok(())
    }

    fn offer(&mut self, head: u16, descriptors: u16, room: u64) -> Result<(), DriverError> {
        let slot = self.areas.slot(self.next_avail);
        self.areas.avail.store_u16(layout::avail_entry(slot), head)?;
        self.outstanding[usize::from(head)] = Outstanding { descriptors, at: self.next_avail, room };
        self.free -= descriptors;
        self.in_use += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Makes what was added visible. True when the device wants a kick for it.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, DriverError> {
        if self.published == self.next_avail {
            return Ok(false);
        }
        let old = self.published;
        self.areas.avail.store_u16(layout::IDX, self.next_avail)?;
        self.published = self.next_avail;
        // The device's wish is read after our index is visible; see `DeviceRing::enable_kicks`.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.areas.used.load_u16(layout::avail_event(self.areas.size))?;
            return Ok(index::need_event(event, self.next_avail, old));
        }
        Ok(self.areas.used.load_u16(layout::FLAGS)? & layout::USED_NO_NOTIFY == 0)
    }

    /// Whether the device has used something.
    #[inline]
    pub fn has_used(&self) -> Result<bool, DriverError> {
        Ok(self.areas.used.load_u16(layout::IDX)? != self.next_used)
    }

    /// Takes back the next used chain: its head and the bytes written.
    #[inline]
    pub fn reap(&mut self) -> Result<Option<(u16, u32)>, DriverError> {
        let reaped = self.reap_next();
        if reaped.is_err() {
            // Nothing that such a device has said is worth remembering.
            self.seen_used = self.next_used;
        }
        reaped
    }

    #[inline]
    fn reap_next(&mut self) -> Result<Option<(u16, u32)>, DriverError> {
        if self.seen_used == self.next_used {
            let seen = self.areas.used.load_u16(layout::IDX)?;
            if seen == self.next_used {
                return Ok(None);
            }
            let outstanding = self.in_use - index::ahead(self.next_avail, self.published);
            if index::ahead(seen, self.next_used) > outstanding {
                return Err(DriverError::UsedJump { seen, reaped: self.next_used, outstanding });
            }
            self.seen_used = seen;
        }
        let entry = layout::used_entry(self.areas.slot(self.next_used));
        let (id, written) = (self.areas.used.load_u32(entry)?, self.areas.used.load_u32(entry + 4)?);
        let head = u16::try_from(id).map_err(|_| DriverError::UsedId(id))?;
        let chain = *self.outstanding.get(usize::from(head)).ok_or(DriverError::UsedId(id))?;
        // What is not published the device cannot have used. A ring is half as long as its indices at most.
        let waits = index::ahead(chain.at, self.published) < index::ahead(self.next_avail, self.published);
        if chain.descriptors == 0 || waits {
            return Err(DriverError::UsedId(id));
        }
        if u64::from(written) > chain.room {
            return Err(DriverError::UsedLength { head, written, room: chain.room });
        }
        self.release(head, chain.descriptors);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((head, written)))
    }

    fn release(&mut self, head: u16, descriptors: u16) {
        self.outstanding[usize::from(head)] = Outstanding::default();
        let mut last = head;
        for _ in 1..descriptors {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.free_head;
        self.free_head = head;
        self.free += descriptors;
        self.in_use -= 1;
    }

    /// Asks for a call once `after` more chains are used, and looks once more; true when there is something to reap.
    pub fn enable_calls(&mut self, after: u16) -> Result<bool, DriverError> {
        if self.event_idx {
            let event = self.next_used.wrapping_add(after.max(1)).wrapping_sub(1);
            self.areas.avail.store_u16(layout::used_event(self.areas.size), event)?;
        } else {
            self.areas.avail.store_u16(layout::FLAGS, 0)?;
        }
        // Our wish is visible before the device's index is read; see `DeviceRing::publish`.
        fence(Ordering::SeqCst);
        let seen = self.areas.used.load_u16(layout::IDX)?;
        Ok(index::ahead(seen, self.next_used) >= after.max(1))
    }

    /// Asks for no call.
    pub fn disable_calls(&mut self) -> Result<(), DriverError> {
        if self.event_idx {
            // As far behind as an index can be.
            let event = self.next_used.wrapping_sub(1);
            return Ok(self.areas.avail.store_u16(layout::used_event(self.areas.size), event)?);
        }
        Ok(self.areas.avail.store_u16(layout::FLAGS, layout::AVAIL_NO_INTERRUPT)?)
    }
}

/// Writes a chain into an indirect table. Fails when it has no room for it, or the chain is longer than one can be.
pub(crate) fn write_table(segments: &[Segment], table: &GuestSlice) -> Result<(), DriverError> {
    if table.len() < segments.len() * layout::DESC_SIZE || segments.len() > usize::from(u16::MAX) {
        return Err(DriverError::Chain);
    }
    for (at, segment) in segments.iter().enumerate() {
        let descriptor = segment.descriptor(at + 1 == segments.len(), at as u16 + 1);
        let place = at * layout::DESC_SIZE;
        if table.is_aligned(8) {
            table.store_u64(place, descriptor.addr)?;
            table.store_u64(place + 8, descriptor.rest())?;
        } else {
            let mut entry = table.as_iovec();
            entry.advance(place);
            entry.copy_from(&descriptor.to_bytes());
        }
    }
    Ok(())
}

impl Segment {
    fn descriptor(&self, last: bool, next: u16) -> Descriptor {
        let write = if self.writable { F_WRITE } else { 0 };
        let (flags, next) = if last { (write, 0) } else { (write | F_NEXT, next) };
        Descriptor { addr: self.addr, len: self.len, flags, next }
    }
}
