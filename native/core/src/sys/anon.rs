//! Anonymous memory as a disk: reserved once, made usable as it grows, shared by threads that copy at any time.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::memory::IoVec;

/// A part that reaches beyond the memory made usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeyondEnd;

/// A reservation of address space whose first bytes are usable and read as zero until written.
///
/// The usable part only ever grows, so that a thread that copies is safe whatever others do. What races
/// for the same bytes finds some mixture of them, as on any disk; no reference to them is ever made.
#[derive(Debug)]
pub struct Anon {
    base: NonNull<u8>,
    reserved: usize,
    usable: AtomicUsize,
}

// SAFETY: a mapping of this value's own, reached by raw copies only.
unsafe impl Send for Anon {}
// SAFETY: as above; `usable` is atomic and only grows.
unsafe impl Sync for Anon {}

impl Anon {
    /// Reserves `len` bytes of address space and no memory. Fails with `ENOMEM` when the system refuses that much.
    pub fn reserve(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, reserved: len, usable: AtomicUsize::new(0) })
    }

    /// Bytes of address space.
    pub fn reserved(&self) -> usize {
        self.reserved
    }

    /// Makes at least the first `len` bytes usable, in whole pages. Fails with `ENOMEM` beyond the reservation or
    /// when the system commits no more. One thread at a time; others may copy meanwhile.
    pub fn make_usable(&self, len: usize) -> io::Result<()> {
        let usable = self.usable.load(Ordering::Relaxed);
        if len <= usable {
            return Ok(());
        }
        let len = len.checked_next_multiple_of(page_size()).ok_or(io::ErrorKind::OutOfMemory)?;
        if len > self.reserved.next_multiple_of(page_size()) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        // SAFETY: pages of this mapping that nobody reaches yet.
        let result = unsafe {
            libc::mprotect(self.base.as_ptr().add(usable).cast(), len - usable, libc::PROT_READ | libc::PROT_WRITE)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // Only advice: a kernel without huge pages refuses it, and nothing is lost.
        // SAFETY: as above.
        unsafe { libc::madvise(self.base.as_ptr().add(usable).cast(), len - usable, libc::MADV_HUGEPAGE) };
        self.usable.store(len, Ordering::Release);
        Ok(())
    }

    /// Copies bytes at `offset` into `run`.
    #[inline]
    pub fn read(&self, offset: u64, run: &IoVec) -> Result<(), BeyondEnd> {
        let from = self.at(offset, run.len() as u64)?;
        // SAFETY: `at` checked the source, the run promises the target; `copy` allows any overlap.
        unsafe { std::ptr::copy(from, run.as_ptr(), run.len()) };
        Ok(())
    }

    /// Copies the bytes of `run` to `offset`.
    #[inline]
    pub fn write(&self, offset: u64, run: &IoVec) -> Result<(), BeyondEnd> {
        let to = self.at(offset, run.len() as u64)?;
        // SAFETY: `at` checked the target, the run promises the source; `copy` allows any overlap.
        unsafe { std::ptr::copy(run.as_ptr(), to, run.len()) };
        Ok(())
    }

    /// Has the processor fetch the first line at `offset`, soon to be read or written.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        if let Ok(at) = self.at(offset, 1) {
            // SAFETY: usable, and not used longer than here.
            unsafe { IoVec::from_raw_parts(at, 1) }.prefetch();
        }
    }

    /// Writes zeroes; no page is given back.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), BeyondEnd> {
        let at = self.at(offset, len)?;
        // SAFETY: `at` checked the range.
        unsafe { std::ptr::write_bytes(at, 0, len as usize) };
        Ok(())
    }

    /// Makes the range read as zero, giving whole pages back to the system.
    pub fn release(&self, offset: u64, len: u64) -> Result<(), BeyondEnd> {
        self.at(offset, len)?;
        let (page, end) = (page_size() as u64, offset + len);
        let (first, last) = (offset.next_multiple_of(page), end - end % page);
        if first >= last {
            return self.zero(offset, len);
        }
        self.zero(offset, first - offset)?;
        self.zero(last, end - last)?;
        let at = self.at(first, last - first)?;
        // SAFETY: whole pages of this mapping; they stay usable and read as zero.
        if unsafe { libc::madvise(at.cast(), (last - first) as usize, libc::MADV_DONTNEED) } != 0 {
            // Locked memory (mlockall) cannot be given back.
            return self.zero(first, last - first);
        }
        Ok(())
    }

    /// Usable bytes as a run, for tests that need a long one. It must not outlive this value.
    #[cfg(test)]
    pub(crate) fn run(&self, offset: u64, len: u64) -> Result<IoVec, BeyondEnd> {
        // SAFETY: usable, and mapped as long as this value lives.
        Ok(unsafe { IoVec::from_raw_parts(self.at(offset, len)?, len as usize) })
    }

    /// Where `len` bytes at `offset` are, if all of them are usable.
    #[inline]
    fn at(&self, offset: u64, len: u64) -> Result<*mut u8, BeyondEnd> {
        let usable = self.usable.load(Ordering::Acquire) as u64;
        if offset.checked_add(len).is_none_or(|end| end > usable) {
            return Err(BeyondEnd);
        }
        // SAFETY: within the usable part, just checked.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }
}

impl Drop for Anon {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping, and nobody else holds it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.reserved) };
    }
}

/// Bytes in a page.
pub(crate) fn page_size() -> usize {
    // SAFETY: only asks.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}
