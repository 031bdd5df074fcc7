//! One chain: two byte streams, the readable one and then the writable one, never a count of descriptors
//! (virtio: Message Framing).

use super::layout::{Descriptor, DESC_SIZE, F_INDIRECT, F_NEXT, F_WRITE};
use super::{Areas, Broken};
use crate::memory::{words_of, DirtyLog, GuestMemory, IoVec};

/// Entries an indirect table may have even where the ring is shorter: Linux makes tables for `seg_max`, whatever the ring's size.
const MIN_INDIRECT_LIMIT: u32 = 4096;
/// Bytes one chain may describe (virtio: Message Framing).
const MAX_LEN: u64 = 1 << 32;

/// What is wrong with a chain that can still be given back to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A buffer or an indirect table lies outside of guest memory.
    Unmapped,
    /// A readable buffer follows a writable one.
    Order,
    /// More than 2^32 bytes.
    Length,
}

/// Where the last writable byte is.
#[derive(Clone, Copy, Debug)]
pub enum Status {
    /// The chain has no writable byte.
    None,
    /// It is outside of guest memory.
    Unmapped,
    /// It is this run of one byte, which is *not* part of `Chain::writable` any more.
    At(IoVec),
}

/// A chain taken from a ring. The lists are used again for the next one.
#[derive(Debug, Default)]
pub struct Chain {
    /// The first descriptor: what is given back.
    pub head: u16,
    /// The readable stream, from run `read` on.
    readable: Vec<IoVec>,
    read: usize,
    /// The writable stream.
    pub writable: Vec<IoVec>,
    /// Bytes in the readable stream.
    pub readable_len: u64,
    /// Bytes in `writable`.
    pub writable_len: u64,
    /// Set when not everything could be found; the streams then have holes.
    pub fault: Option<Fault>,
    last_unmapped: bool,
    /// Guest addresses and bytes of the writable buffers, while `keep_writes` says that somebody wants them.
    writes: Vec<(u64, u32)>,
    keep_writes: bool,
}

impl Chain {
    /// Reads the chain at `head`. `Err` means that the ring itself cannot be trusted any more.
    pub(super) fn walk(
        &mut self,
        head: u16,
        areas: &Areas,
        memory: &GuestMemory,
        indirect: bool,
    ) -> Result<(), Broken> {
        self.clear(head);
        let mut at = head;
        for _ in 0..areas.size {
            let descriptor = areas.descriptor(at)?;
            if descriptor.flags & F_INDIRECT != 0 {
                if !indirect || descriptor.flags & F_NEXT != 0 {
                    return Err(Broken::Indirect { head });
                }
                return self.walk_table(descriptor, memory, u32::from(areas.size));
            }
            self.push(descriptor, memory);
            if descriptor.flags & F_NEXT == 0 {
                return self.walked();
            }
            at = descriptor.next;
            if at >= areas.size {
                return Err(Broken::Next { head, next: at });
            }
        }
        Err(Broken::Loop { head })
    }

    fn walk_table(&mut self, table: Descriptor, memory: &GuestMemory, ring_size: u32) -> Result<(), Broken> {
        let head = self.head;
        let entries = table.len / DESC_SIZE as u32;
        if table.len % DESC_SIZE as u32 != 0 || entries == 0 || entries > ring_size.max(MIN_INDIRECT_LIMIT) {
            return Err(Broken::IndirectLength { head, len: table.len });
        }
        if let Some(run) = memory.run(table.addr, u64::from(table.len)) {
            return self.walk_entries(entries as u16, memory, |at| {
                let mut run = run;
                run.advance(usize::from(at) * DESC_SIZE);
                run.words().unwrap_or_default()
            });
        }
        self.walk_scattered(table, entries as u16, memory)
    }

    /// The table crosses regions, or lies outside of them: it is read through its runs.
    #[cold]
    fn walk_scattered(&mut self, table: Descriptor, entries: u16, memory: &GuestMemory) -> Result<(), Broken> {
        let mut runs = Vec::new();
        if memory.runs(table.addr, u64::from(table.len), &mut runs).is_err() {
            self.fault = Some(Fault::Unmapped);
            self.last_unmapped = true;
            return Ok(());
        }
        self.walk_entries(entries, memory, |at| {
            let mut bytes = [0; DESC_SIZE];
            copy_out(&runs, usize::from(at) * DESC_SIZE, &mut bytes);
            words_of(bytes)
        })
    }

    #[inline(always)]
    fn walk_entries(
        &mut self,
        entries: u16,
        memory: &GuestMemory,
        entry: impl Fn(u16) -> [u64; 2],
    ) -> Result<(), Broken> {
        let head = self.head;
        let mut at = 0;
        for _ in 0..entries {
            let [addr, rest] = entry(at);
            let descriptor = Descriptor::from_words(addr, rest);
            if descriptor.flags & F_INDIRECT != 0 {
                return Err(Broken::Indirect { head });
            }
            self.push(descriptor, memory);
            if descriptor.flags & F_NEXT == 0 {
                return self.walked();
            }
            at = descriptor.next;
            if at >= entries {
                return Err(Broken::Next { head, next: at });
            }
        }
        Err(Broken::Loop { head })
    }

    /// The sum of 65535 lengths of 32 bits fits.
    #[inline]
    fn walked(&mut self) -> Result<(), Broken> {
        if self.readable_len + self.writable_len > MAX_LEN {
            self.fault = Some(Fault::Length);
        }
        Ok(())
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.read = 0;
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
        self.fault = None;
        self.last_unmapped = false;
        self.writes.clear();
    }

    /// Keeps a list of what the device may write from the next walk on.
    pub(super) fn keep_writes(&mut self, keep: bool) {
        self.keep_writes = keep;
    }

    /// The writable buffers, as guest addresses and bytes.
    pub(super) fn writes(&self) -> &[(u64, u32)] {
        &self.writes
    }

    /// What the device may not write does not exist for it: nothing of the request is carried out, and it is only
    /// answered when its status byte may be written.
    pub(super) fn forbid_unlogged(&mut self, log: &DirtyLog) {
        if self.writes.iter().all(|&(gpa, len)| log.covers(gpa, u64::from(len))) {
            return;
        }
        self.fault = Some(Fault::Unmapped);
        self.last_unmapped |= self.writes.last().is_some_and(|&(gpa, len)| !log.covers(gpa, u64::from(len)));
    }

    #[inline(always)]
    fn push(&mut self, descriptor: Descriptor, memory: &GuestMemory) {
        let len = u64::from(descriptor.len);
        if len == 0 {
            return; // it is no part of either stream, wherever it stands
        }
        let writable = descriptor.flags & F_WRITE != 0;
        let list = if writable {
            self.writable_len += len;
            &mut self.writable
        } else {
            if self.writable_len > 0 {
                self.fault = Some(Fault::Order);
            }
            self.readable_len += len;
            &mut self.readable
        };
        let mapped = memory.runs(descriptor.addr, len, list).is_ok();
        if !mapped {
            self.fault = Some(Fault::Unmapped);
        }
        if writable {
            self.last_unmapped = !mapped;
            if self.keep_writes {
                self.writes.push((descriptor.addr, descriptor.len));
            }
        }
    }

    /// Takes the last writable byte off the writable stream.
    #[inline]
    pub fn take_status(&mut self) -> Status {
        if self.last_unmapped {
            return Status::Unmapped;
        }
        let Some(last) = self.writable.last_mut() else { return Status::None };
        let mut byte = *last;
        byte.advance(last.len() - 1);
        if last.len() == 1 {
            self.writable.pop();
        } else {
            last.truncate(last.len() - 1);
        }
        self.writable_len -= 1;
        Status::At(byte)
    }

    /// Takes 16 bytes off the front of the readable stream, as two little-endian words; `None` when it is shorter.
    #[inline]
    pub fn take_header(&mut self) -> Option<[u64; 2]> {
        // Drivers mostly put it into a buffer of its own.
        match self.readable().first() {
            Some(header) if header.len() == 16 => {
                let words = header.words();
                self.read += 1;
                self.readable_len -= 16;
                words
            }
            _ => self.take_bytes().map(words_of),
        }
    }

    /// The readable stream.
    #[inline]
    pub fn readable(&self) -> &[IoVec] {
        &self.readable[self.read..]
    }

    /// The same, to be taken away.
    pub fn readable_mut(&mut self) -> &mut Vec<IoVec> {
        self.readable.drain(..std::mem::take(&mut self.read));
        &mut self.readable
    }

    /// Takes `N` bytes off the front of the readable stream; `None` when it is shorter.
    pub fn take_bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.readable_len < N as u64 {
            return None;
        }
        let mut header = [0; N];
        let mut filled = 0;
        let mut whole = 0;
        for run in self.readable_mut() {
            let count = run.copy_to(&mut header[filled..]);
            run.advance(count);
            filled += count;
            whole += usize::from(run.is_empty());
            if filled == N {
                break;
            }
        }
        if filled < N {
            return None;
        }
        self.readable.drain(..whole);
        self.readable_len -= N as u64;
        Some(header)
    }
}

/// The runs of a stream from byte `offset` on.
fn runs_from(runs: &[IoVec], mut offset: usize) -> impl Iterator<Item = IoVec> + '_ {
    runs.iter().filter_map(move |run| {
        let mut rest = *run;
        rest.advance(offset);
        offset -= offset.min(run.len());
        (!rest.is_empty()).then_some(rest)
    })
}

/// Copies bytes from byte `offset` of a stream of runs; returns how many there were.
pub(crate) fn copy_out(runs: &[IoVec], offset: usize, into: &mut [u8]) -> usize {
    runs_from(runs, offset).fold(0, |filled, run| filled + run.copy_to(&mut into[filled..]))
}

/// Copies bytes to byte `offset` of a stream of runs; returns how many fitted.
pub(crate) fn copy_in(runs: &[IoVec], offset: usize, from: &[u8]) -> usize {
    runs_from(runs, offset).fold(0, |stored, run| stored + run.copy_from(&from[stored..]))
}
