//! Aligned memory of our own, for direct I/O.
#![allow(unsafe_code)]

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;

use crate::memory::IoVec;

/// A buffer on the heap, zeroed at first, that starts at a multiple of its alignment.
#[derive(Debug)]
pub struct AlignedBuffer {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: memory of this value's own, without any tie to a thread.
unsafe impl Send for AlignedBuffer {}

impl AlignedBuffer {
    /// `len` bytes at a multiple of `align`, a power of two. Fails with `EINVAL` for another one or no bytes, `ENOMEM`
    /// when there is no memory.
    pub fn new(len: usize, align: usize) -> io::Result<Self> {
        let layout = Layout::from_size_align(len, align).map_err(|_| io::ErrorKind::InvalidInput)?;
        if len == 0 {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, layout })
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.layout.size()
    }

    /// Never: a buffer has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// `len` bytes from `offset`, or as many as there are, as a run. It must not outlive the buffer: whoever hands it on keeps both.
    pub fn run(&self, offset: usize, len: usize) -> IoVec {
        let offset = offset.min(self.len());
        // SAFETY: in bounds; readable and writable as long as the buffer lives.
        unsafe { IoVec::from_raw_parts(self.base.as_ptr().add(offset), len.min(self.len() - offset)) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// A run of no bytes.
pub fn no_bytes() -> IoVec {
    // SAFETY: there are no bytes to be mapped.
    unsafe { IoVec::from_raw_parts(NonNull::dangling().as_ptr(), 0) }
}

/// Copies from one run to another, as many bytes as both have; returns how many.
pub fn copy(from: &IoVec, to: &IoVec) -> usize {
    let count = from.len().min(to.len());
    // SAFETY: both runs promise their bytes; `copy` allows any overlap.
    unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), count) };
    count
}

/// Bytes that [`zeroes`] names.
const ZEROES: usize = 1 << 20;

/// A megabyte of zeroes, aligned to a page, for as long as the process lives. It can only be read: a
/// write into it fails with `EFAULT`. It takes no memory, for all its pages are the system's zero page.
pub fn zeroes() -> io::Result<IoVec> {
    static PLACE: OnceLock<IoVec> = OnceLock::new();
    if let Some(place) = PLACE.get() {
        return Ok(*place);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, at a place that the kernel chooses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), ZEROES, libc::PROT_READ, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: mapped for as long as the process lives. Two threads that come here at once leave one mapping over.
    let place = unsafe { IoVec::from_raw_parts(base.cast(), ZEROES) };
    Ok(*PLACE.get_or_init(|| place))
}
