//! Where things are in a split ring (virtio: Split Virtqueues). Pure.

/// Bytes of one descriptor.
pub const DESC_SIZE: usize = 16;
/// The descriptor goes on at `next`.
pub const F_NEXT: u16 = 1;
/// The device writes the buffer.
pub const F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const F_INDIRECT: u16 = 4;
/// avail.flags: the driver wants no notification.
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// used.flags: the device wants no notification.
pub const USED_NO_NOTIFY: u16 = 1;
/// Byte of `flags` in the available and used ring.
pub const FLAGS: usize = 0;
/// Byte of `idx` in the available and used ring.
pub const IDX: usize = 2;
/// The largest queue.
pub const MAX_SIZE: u16 = 32768;

/// Byte of `avail.ring[slot]`.
#[inline]
pub const fn avail_entry(slot: u16) -> usize {
    4 + 2 * slot as usize
}

/// Byte of `used_event` in the available ring.
#[inline]
pub const fn used_event(size: u16) -> usize {
    avail_entry(size)
}

/// Byte of `used.ring[slot]`.
#[inline]
pub const fn used_entry(slot: u16) -> usize {
    4 + 8 * slot as usize
}

/// Byte of `avail_event` in the used ring.
#[inline]
pub const fn avail_event(size: u16) -> usize {
    used_entry(size)
}

/// Bytes of the descriptor table.
pub const fn desc_len(size: u16) -> usize {
    DESC_SIZE * size as usize
}

/// Bytes of the available ring; the event word only exists with EVENT_IDX.
pub const fn avail_len(size: u16, event_idx: bool) -> usize {
    avail_entry(size) + if event_idx { 2 } else { 0 }
}

/// Bytes of the used ring; the event word only exists with EVENT_IDX.
pub const fn used_len(size: u16, event_idx: bool) -> usize {
    used_entry(size) + if event_idx { 2 } else { 0 }
}

/// One descriptor, as copied out of its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// `F_NEXT`, `F_WRITE`, `F_INDIRECT`.
    pub flags: u16,
    /// The next descriptor, when `F_NEXT` is set.
    pub next: u16,
}

impl Descriptor {
    /// From the two little-endian words of a descriptor.
    #[inline]
    pub const fn from_words(addr: u64, rest: u64) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// The second word.
    #[inline]
    pub const fn rest(&self) -> u64 {
        self.len as u64 | (self.flags as u64) << 32 | (self.next as u64) << 48
    }

    /// As 16 bytes.
    pub fn to_bytes(self) -> [u8; DESC_SIZE] {
        let mut bytes = [0; DESC_SIZE];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..].copy_from_slice(&self.rest().to_le_bytes());
        bytes
    }
}
