//! The dirty log: which pages of guest memory the device has written, one bit each (vhost-user: Migration).

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{GuestSlice, Mapping, OutOfBounds};

/// Bytes of guest memory that one bit stands for.
pub const PAGE: u64 = 4096;

/// A shared bitmap: bit `n` stands for the page at guest address `4096 * n`. Set here, read and cleared by the front-end.
#[derive(Debug)]
pub struct DirtyLog {
    bits: GuestSlice,
}

/// An address whose page the log has no bit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeyondLog;

impl From<OutOfBounds> for BeyondLog {
    fn from(_: OutOfBounds) -> Self {
        Self
    }
}

impl DirtyLog {
    /// The log that lies in `size` bytes of `fd` from `offset` on. The descriptor is duplicated.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, size: u64) -> std::io::Result<Self> {
        if size == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "a log has at least one byte"));
        }
        Self::over(Mapping::of_file(fd, offset, size)?)
    }

    /// A log over all of a mapping.
    pub fn over(map: Arc<Mapping>) -> std::io::Result<Self> {
        let len = map.len();
        let bits = GuestSlice::new(map, 0, len).map_err(|OutOfBounds| std::io::ErrorKind::InvalidInput)?;
        Ok(Self { bits })
    }

    /// Whether the peer took the memory of the log away.
    pub fn poisoned(&self) -> bool {
        self.bits.poisoned()
    }

    /// Whether every page of `len` bytes at `gpa` has a bit.
    #[inline]
    pub fn covers(&self, gpa: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return true };
        gpa.checked_add(last).is_some_and(|last| last / PAGE / 8 < self.bits.len() as u64)
    }

    /// Notes that `len` bytes at `gpa` were written. For after the writing: who clears a bit and then reads the page must
    /// find the bit set again when that was too early. Marks all of it or nothing.
    #[inline]
    pub fn mark(&self, gpa: u64, len: u64) -> Result<(), BeyondLog> {
        if !self.covers(gpa, len) {
            return Err(BeyondLog);
        }
        if len == 0 {
            return Ok(());
        }
        for page in gpa / PAGE..=(gpa + (len - 1)) / PAGE {
            self.bits.set_bits((page / 8) as usize, 1 << (page % 8))?;
        }
        Ok(())
    }

    /// Takes every bit, clearing it; `into` has a byte for each of the log's.
    pub fn take(&self, into: &mut [u8]) {
        for (at, byte) in into.iter_mut().enumerate() {
            *byte = self.bits.take_byte(at).unwrap_or(0);
        }
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.bits.len()
    }

    /// Never: a log has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;
    use std::os::fd::AsFd;

    fn log(size: u64) -> DirtyLog {
        let file = memfd::sealed(c"test", size + 3, false).unwrap();
        DirtyLog::map(file.as_fd(), 3, size).unwrap()
    }

    fn taken(log: &DirtyLog) -> Vec<u8> {
        let mut bytes = vec![0; log.len()];
        log.take(&mut bytes);
        bytes
    }

    #[test]
    fn every_page_that_is_touched_has_its_bit_set_once_taken_it_is_clear() {
        let log = log(4);
        log.mark(0, 1).unwrap();
        log.mark(4096 * 9 - 1, 2).unwrap();
        log.mark(4096 * 16, 4096 * 3).unwrap();
        log.mark(4096 * 31 + 4095, 1).unwrap();
        log.mark(4096 * 25, 0).unwrap();
        assert_eq!(taken(&log), [0b1, 0b11, 0b111, 0b1000_0000]);
        assert_eq!(taken(&log), [0; 4]);
    }

    #[test]
    fn what_lies_beyond_marks_nothing() {
        let log = log(1);
        for (gpa, len) in [(4096 * 8, 1), (4096 * 8 - 1, 2), (u64::MAX, 1), (u64::MAX, 2), (0, u64::MAX)] {
            assert_eq!(log.mark(gpa, len), Err(BeyondLog), "{gpa:#x}+{len:#x}");
        }
        assert_eq!(taken(&log), [0]);
        assert!(log.covers(4096 * 8 - 1, 1) && log.covers(u64::MAX, 0));
    }

    #[test]
    fn marks_of_several_threads_in_one_byte_are_all_kept() {
        let log = log(64);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let log = &log;
                scope.spawn(move || (0..64).for_each(|byte| log.mark((byte * 8 + thread) * PAGE, 1).unwrap()));
            }
        });
        assert_eq!(taken(&log), [0xff; 64]);
    }
}
