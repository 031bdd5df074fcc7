//! A run of memory as the kernel wants it.

use std::fmt;

/// A contiguous run of mapped memory that a peer may read and write at any time.
///
/// It borrows nothing: whoever holds one holds the mapping too (an `Operation` in its `pin`, a ring
/// in its table). No reference to its bytes is ever made; they are copied or handed to the kernel.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(libc::iovec);

// SAFETY: a pointer and a length; the bytes behind are only touched by raw copies and system calls,
// which are as right on one thread as on another.
unsafe impl Send for IoVec {}
// SAFETY: as above; an `IoVec` is never changed through a shared reference.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// Names `len` bytes at `base`.
    ///
    /// # Safety
    /// The bytes stay mapped, readable and writable, while this value or a copy of it is in use.
    pub unsafe fn from_raw_parts(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// How many bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Where the first byte is.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Drops the first `count` bytes, at most all.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        let count = count.min(self.len());
        // SAFETY: within the run, or one past its end.
        self.0.iov_base = unsafe { self.as_ptr().add(count) }.cast();
        self.0.iov_len -= count;
    }

    /// Keeps the first `count` bytes, at most all.
    #[inline]
    pub fn truncate(&mut self, count: usize) {
        self.0.iov_len = self.0.iov_len.min(count);
    }

    /// The first `N` bytes; `None` when there are fewer.
    #[inline]
    pub fn first<const N: usize>(&self) -> Option<[u8; N]> {
        // SAFETY: `from_raw_parts` promises the source; an array of bytes may lie anywhere.
        let read = || unsafe { self.as_ptr().cast::<[u8; N]>().read() };
        // Nobody may read the peer's memory once more instead of keeping what was read.
        (self.len() >= N).then(|| std::hint::black_box(read()))
    }

    /// Stores the first byte, if there is one.
    #[inline]
    pub fn set_first(&self, byte: u8) {
        if !self.is_empty() {
            // SAFETY: `from_raw_parts` promises the target.
            unsafe { self.as_ptr().write(byte) };
        }
    }

    /// Has the processor fetch the first bytes, to be read soon and, what lies beside them, written.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which never faults.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_ET0};
            _mm_prefetch(self.as_ptr().cast(), _MM_HINT_ET0);
        }
    }

    /// Copies bytes out, as many as fit into `into`; returns how many.
    #[inline]
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let count = self.len().min(into.len());
        // SAFETY: `from_raw_parts` promises the source; it cannot overlap a `&mut` slice of ours.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr(), into.as_mut_ptr(), count) };
        count
    }

    /// Copies bytes in, as many as fit; returns how many.
    #[inline]
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let count = self.len().min(from.len());
        // SAFETY: `from_raw_parts` promises the target; `copy` allows any overlap.
        unsafe { std::ptr::copy(from.as_ptr(), self.as_ptr(), count) };
        count
    }

    /// Sets every byte to zero.
    #[inline]
    pub fn zero(&self) {
        // SAFETY: `from_raw_parts` promises the target.
        unsafe { std::ptr::write_bytes(self.as_ptr(), 0, self.len()) };
    }
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.as_ptr(), self.len())
    }
}
