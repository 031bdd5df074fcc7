//! The virtio disk on the driver's side: requests made in shared memory, and their answers.

use std::sync::Arc;

use crate::memory::{GuestSlice, Mapping, OutOfBounds};
use crate::ring::layout::DESC_SIZE;
use crate::ring::{feature, write_table, Areas, DriverError, DriverRing, Segment};

/// Bytes of a slot's header and status byte, apart from each other's cache lines.
const SLOT_LEN: usize = 64;
const STATUS_AT: usize = 16;
/// What the status byte holds before the device has written it: no status of the specification.
const UNANSWERED: u8 = 0xff;

/// Where a queue lies in its arena; all numbers are bytes from the arena's start.
#[derive(Clone, Copy, Debug)]
pub struct ClientLayout {
    /// Descriptors, a power of two.
    pub size: u16,
    /// Data segments one request may have.
    pub seg_max: u16,
    /// Where the first byte is.
    pub offset: usize,
}

impl ClientLayout {
    const fn desc(&self) -> usize {
        self.offset
    }

    const fn avail(&self) -> usize {
        self.desc() + DESC_SIZE * self.size as usize
    }

    const fn used(&self) -> usize {
        (self.avail() + 6 + 2 * self.size as usize).next_multiple_of(4096)
    }

    const fn slots(&self) -> usize {
        (self.used() + 6 + 8 * self.size as usize).next_multiple_of(4096)
    }

    const fn tables(&self) -> usize {
        self.slots() + SLOT_LEN * self.size as usize
    }

    const fn table_len(&self) -> usize {
        DESC_SIZE * (self.seg_max as usize + 2)
    }

    /// Bytes of the whole queue, a multiple of 4096.
    pub const fn len(&self) -> usize {
        (self.tables() + self.table_len() * self.size as usize).next_multiple_of(4096) - self.offset
    }

    /// Never: a queue has at least one descriptor.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Offsets of the descriptor table, the available ring and the used ring.
    pub const fn areas(&self) -> (usize, usize, usize) {
        (self.desc(), self.avail(), self.used())
    }
}

/// A run of the arena that a request moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// One request to make.
#[derive(Clone, Copy, Debug)]
pub struct ClientRequest<'a> {
    /// `virtio_blk_req.type`.
    pub kind: u32,
    /// `virtio_blk_req.sector`.
    pub sector: u64,
    /// The data, in order.
    pub data: &'a [Piece],
    /// The device writes the data.
    pub writable: bool,
    /// Given back with the answer.
    pub token: u64,
}

/// One request answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// From the request.
    pub token: u64,
    /// The status byte; 0xff when the device did not write one.
    pub status: u8,
    /// The used length.
    pub written: u32,
}

/// Room for one indirect table, and the chain that it holds. Most requests of a slot differ in their header only: the
/// table is then left alone, and the device's processor need not fetch it again.
#[derive(Debug)]
struct Table {
    room: GuestSlice,
    addr: u64,
    holds: Vec<Segment>,
}

impl Table {
    fn hold(&mut self, segments: &[Segment]) -> Result<(), DriverError> {
        if self.holds != segments {
            self.holds.clear();
            write_table(segments, &self.room)?;
            self.holds.extend_from_slice(segments);
        }
        Ok(())
    }
}

/// One queue of a disk, seen from the driver. One thread at a time.
#[derive(Debug)]
pub struct ClientQueue {
    ring: DriverRing,
    layout: ClientLayout,
    slots: GuestSlice,
    /// Guest address of the first slot.
    slots_addr: u64,
    /// Each slot's indirect table; none without the feature.
    tables: Vec<Table>,
    free: Vec<u16>,
    tokens: Vec<u64>,
    slot_of: Vec<u16>,
    segments: Vec<Segment>,
}

impl ClientQueue {
    /// A fresh queue in `map`, whose first byte has the guest address `base`.
    pub fn new(map: Arc<Mapping>, base: u64, layout: ClientLayout, features: u64) -> Result<Self, DriverError> {
        Self::starting_at(map, base, layout, features, 0)
    }

    /// The same with a ring whose indices start at `first`.
    pub fn starting_at(
        map: Arc<Mapping>,
        base: u64,
        layout: ClientLayout,
        features: u64,
        first: u16,
    ) -> Result<Self, DriverError> {
        let size = usize::from(layout.size);
        let slice = |at, len| GuestSlice::new(Arc::clone(&map), at, len);
        let areas = Areas {
            desc: slice(layout.desc(), DESC_SIZE * size)?,
            avail: slice(layout.avail(), 6 + 2 * size)?,
            used: slice(layout.used(), 6 + 8 * size)?,
            size: layout.size,
        };
        let tables = if features & feature::INDIRECT_DESC == 0 { 0 } else { size };
        let table = |slot| {
            let at = layout.tables() + layout.table_len() * slot;
            Ok::<_, OutOfBounds>(Table {
                room: slice(at, layout.table_len())?,
                addr: base + at as u64,
                holds: Vec::new(),
            })
        };
        Ok(Self {
            ring: DriverRing::new(areas, features, first)?,
            slots: slice(layout.slots(), SLOT_LEN * size)?,
            slots_addr: base + layout.slots() as u64,
            tables: (0..tables).map(table).collect::<Result<_, _>>()?,
            layout,
            free: (0..layout.size).rev().collect(),
            tokens: vec![0; size],
            slot_of: vec![0; size],
            segments: Vec::new(),
        })
    }

    /// Requests that were made and not answered.
    pub fn outstanding(&self) -> u16 {
        self.ring.outstanding()
    }

    /// Whether a request of `pieces` data segments can be made now.
    pub fn has_room(&self, pieces: usize) -> bool {
        let descriptors = if self.tables.is_empty() { pieces + 2 } else { 1 };
        !self.free.is_empty() && usize::from(self.ring.free()) >= descriptors
    }

    /// Makes a request; the device sees it with the next `publish`. Returns the guest address of its status byte.
    #[inline]
    pub fn submit(&mut self, request: &ClientRequest<'_>) -> Result<u64, DriverError> {
        if request.data.len() > usize::from(self.layout.seg_max) {
            return Err(DriverError::Chain);
        }
        if !self.has_room(request.data.len()) {
            return Err(DriverError::Full);
        }
        let slot = *self.free.last().ok_or(DriverError::Full)?;
        let at = SLOT_LEN * usize::from(slot);
        self.slots.store_u64(at, u64::from(request.kind))?;
        self.slots.store_u64(at + 8, request.sector)?;
        self.slots.store_u16(at + STATUS_AT, u16::from(UNANSWERED))?;
        let header = self.slots_addr + at as u64;
        let place = |addr, len, writable| Segment { addr, len, writable };
        self.segments.clear();
        self.segments.push(place(header, STATUS_AT as u32, false));
        self.segments.extend(request.data.iter().map(|piece| place(piece.addr, piece.len, request.writable)));
        self.segments.push(place(header + STATUS_AT as u64, 1, true));
        let head = match self.tables.get_mut(usize::from(slot)) {
            Some(table) => {
                table.hold(&self.segments)?;
                self.ring.add_written(&self.segments, table.addr)?
            }
            None => self.ring.add(&self.segments)?,
        };
        self.free.pop();
        self.slot_of[usize::from(head)] = slot;
        self.tokens[usize::from(slot)] = request.token;
        Ok(header + STATUS_AT as u64)
    }

    /// Makes what was submitted visible. True when the device wants a kick.
    #[inline]
    pub fn publish(&mut self) -> Result<bool, DriverError> {
        self.ring.publish()
    }

    /// Takes one answer.
    #[inline]
    pub fn reap(&mut self) -> Result<Option<Answer>, DriverError> {
        let Some((head, written)) = self.ring.reap()? else { return Ok(None) };
        let slot = self.slot_of[usize::from(head)];
        let status = self.slots.load_u16(SLOT_LEN * usize::from(slot) + STATUS_AT)? as u8;
        self.free.push(slot);
        Ok(Some(Answer { token: self.tokens[usize::from(slot)], status, written }))
    }

    /// Asks for a call once `after` more requests are answered; true when that is so already.
    pub fn enable_calls(&mut self, after: u16) -> Result<bool, DriverError> {
        self.ring.enable_calls(after)
    }

    /// Asks for no call.
    pub fn disable_calls(&mut self) -> Result<(), DriverError> {
        self.ring.disable_calls()
    }

    /// The ring's indices: next available, next used.
    pub fn indices(&self) -> (u16, u16) {
        (self.ring.avail_index(), self.ring.used_index())
    }
}
