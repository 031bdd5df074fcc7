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

    /// The first 16 bytes as two little-endian words, each read once; `None` when there are fewer.
    #[inline]
    pub fn words(&self) -> Option<[u64; 2]> {
        if self.len() < 16 {
            return None;
        }
        let at = self.as_ptr().cast::<u64>();
        if at.is_aligned() {
            // SAFETY: `from_raw_parts` promises the bytes, and both words are aligned. Volatile: the peer's memory is not read
            // once more instead of keeping what was read.
            return Some(unsafe { [at.read_volatile(), at.add(1).read_volatile()] }.map(u64::from_le));
        }
        let mut bytes = [0; 16];
        self.copy_to(&mut bytes);
        Some(words_of(bytes))
    }

    /// Stores the first byte, if there is one.
    #[inline]
    pub fn set_first(&self, byte: u8) {
        if !self.is_empty() {
            // SAFETY: `from_raw_parts` promises the target.
            unsafe { self.as_ptr().write(byte) };
        }
    }

    /// Has the processor fetch the first line, soon to be used.
    #[inline]
    pub fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which never faults.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            _mm_prefetch(self.as_ptr().cast(), _MM_HINT_T0);
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

/// 16 bytes as two little-endian words.
#[inline]
pub(crate) fn words_of(bytes: [u8; 16]) -> [u64; 2] {
    let whole = u128::from_le_bytes(bytes);
    [whole as u64, (whole >> 64) as u64]
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.as_ptr(), self.len())
    }
}
